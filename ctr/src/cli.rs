//! The command line as a whole: global flags, nouns, and the way to their commands.

use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::advice;
use crate::client::Client;
use crate::commands::{
    completion, containers, content, deprecations, disk, events, images, info, install, leases,
    namespaces, network, oci, plugins, pods, pprof, run, sandboxes, shim, snapshots, tasks,
    version,
};
use crate::duration;
use crate::table::Format;

/// Where containerd listens, and we do in its place.
const DEFAULT_ADDRESS: &str = "/run/containerd/containerd.sock";
/// Upstream ctr's namespace.
const DEFAULT_NAMESPACE: &str = "default";

/// Client of a containerd-compatible daemon, for people and scripts
#[derive(Debug, Parser)]
#[command(name = "ctr", version, max_term_width = 100, propagate_version = false)]
#[command(
    after_help = "`ctr NOUN --help` lists a noun's verbs, `ctr NOUN VERB --help` their flags."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Flags of every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// The daemon's gRPC socket
    #[arg(
        long,
        short,
        env = "CONTAINERD_ADDRESS",
        value_name = "SOCKET",
        default_value = DEFAULT_ADDRESS
    )]
    pub(crate) address: String,
    /// Namespace to work in
    #[arg(
        long,
        short,
        env = "CONTAINERD_NAMESPACE",
        value_name = "NAME",
        default_value = DEFAULT_NAMESPACE)]
    pub(crate) namespace: String,
    /// Give up after this long (0 = never)
    #[arg(long, value_parser = duration::parse, value_name = "DURATION", default_value = "0")]
    pub(crate) timeout: Duration,
    /// Give up connecting after this long (0 = 10s)
    #[arg(long, value_parser = duration::parse, value_name = "DURATION", default_value = "0")]
    pub(crate) connect_timeout: Duration,
    /// Show the whole chain of a failure
    #[arg(long)]
    pub(crate) debug: bool,
    /// Output of lists and infos
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        hide_possible_values = false
    )]
    pub(crate) format: Format,
}

impl Global {
    /// An empty variable is as good as none.
    fn fill_empty(&mut self) {
        if self.address.is_empty() {
            DEFAULT_ADDRESS.clone_into(&mut self.address);
        }
        if self.namespace.is_empty() {
            DEFAULT_NAMESPACE.clone_into(&mut self.namespace);
        }
    }
}

/// The nouns.
#[derive(Debug, Subcommand)]
enum Command {
    /// Manage plugins
    #[command(visible_alias = "plugin", subcommand)]
    Plugins(plugins::Command),
    /// Print the client's and the daemon's versions
    Version,
    /// Manage containers
    #[command(visible_aliases = ["c", "container"], subcommand)]
    Containers(containers::Command),
    /// Manage content
    #[command(subcommand)]
    Content(content::Command),
    /// Show the daemon's events as they come
    #[command(visible_alias = "event")]
    Events(events::Events),
    /// Manage images
    #[command(visible_aliases = ["image", "i"], subcommand)]
    Images(images::Command),
    /// Manage leases
    #[command(visible_alias = "lease", subcommand)]
    Leases(leases::Command),
    /// Manage namespaces
    #[command(visible_aliases = ["namespace", "ns"], subcommand)]
    Namespaces(namespaces::Command),
    /// Manage the networks that containers join
    #[command(subcommand)]
    Network(network::Command),
    /// See and manage what a kubelet runs: pods, their containers, logs
    #[command(visible_alias = "pod", subcommand)]
    Pods(pods::Command),
    /// Run a container
    Run(Box<run::Run>),
    /// Manage snapshots
    #[command(visible_alias = "snapshot")]
    Snapshots(snapshots::Snapshots),
    /// Manage tasks
    #[command(visible_aliases = ["t", "task"], subcommand)]
    Tasks(tasks::Command),
    /// Manage sandboxes
    #[command(visible_aliases = ["sandbox", "sb", "s"], subcommand)]
    Sandboxes(sandboxes::Command),
    /// Say why an object is still there: the way to it from a root
    Why(disk::Why),
    /// Show what uses the disk, by namespace, snapshotter and image
    Df(disk::Df),
    /// Remove what nobody needs, and say what that freed
    #[command(subcommand)]
    Prune(disk::Prune),
    /// Tools for OCI specs
    #[command(subcommand)]
    Oci(oci::Command),
    /// Install programs of an image: the files of its /bin, and of its /lib where asked for
    Install(install::Install),
    /// Ask a daemon's debug socket what it is doing
    Pprof(pprof::Pprof),
    /// Talk to a shim itself, past the daemon
    Shim(Box<shim::Shim>),
    /// Show what the daemon says of itself
    Info,
    /// Show what the daemon will drop some day
    #[command(subcommand)]
    Deprecations(deprecations::Command),
    /// Print a completion script for a shell
    Completion(completion::Completion),
}

/// What a command works with.
#[derive(Debug, Clone)]
pub(crate) struct Ctx {
    pub(crate) client: Client,
    pub(crate) format: Format,
}

/// Runs the command; its exit code.
pub(crate) async fn run(cli: Cli) -> anyhow::Result<u8> {
    let Cli {
        mut global,
        command,
    } = cli;
    global.fill_empty();
    let command = match command {
        // What needs no daemon.
        Command::Completion(completion) => return completion.run().map(|()| 0),
        Command::Oci(command) => return command.run(&global).map(|()| 0),
        Command::Network(command) => return command.run(&global).await.map(|()| 0),
        Command::Pprof(pprof) => return pprof.run().await.map(|()| 0),
        Command::Shim(shim) => return shim.run(&global).await.map(|()| 0),
        command => command,
    };
    let timeout = global.timeout;
    let work = async {
        let ctx = Ctx {
            client: Client::connect(&global).await?,
            format: global.format,
        };
        dispatch(&ctx, command).await
    };
    if timeout.is_zero() {
        return work.await;
    }
    match tokio::time::timeout(timeout, work).await {
        Ok(outcome) => outcome,
        Err(_) => advice::fail(
            format!("not done after {timeout:?}"),
            "see in the daemon's log what it waits for, or allow more with --timeout",
        ),
    }
}

async fn dispatch(ctx: &Ctx, command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Run(run) => return run.run(ctx).await,
        Command::Pods(command) => return command.run(ctx).await,
        Command::Tasks(command) => return command.run(ctx).await,
        Command::Plugins(command) => command.run(ctx).await,
        Command::Version => version::run(ctx).await,
        Command::Containers(command) => command.run(ctx).await,
        Command::Content(command) => command.run(ctx).await,
        Command::Events(events) => events.run(ctx).await,
        Command::Images(command) => return command.run(ctx).await,
        Command::Leases(command) => command.run(ctx).await,
        Command::Namespaces(command) => command.run(ctx).await,
        Command::Snapshots(snapshots) => snapshots.run(ctx).await,
        Command::Sandboxes(command) => command.run(ctx).await,
        Command::Why(why) => why.run(ctx).await,
        Command::Df(df) => df.run(ctx).await,
        Command::Prune(prune) => prune.run(ctx).await,
        Command::Install(install) => install.run(ctx).await,
        Command::Info => info::run(ctx).await,
        Command::Deprecations(command) => command.run(ctx).await,
        Command::Oci(_)
        | Command::Network(_)
        | Command::Pprof(_)
        | Command::Shim(_)
        | Command::Completion(_) => unreachable!("run without a daemon"),
    }
    .map(|()| 0)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parses(line: &str) -> bool {
        Cli::try_parse_from(std::iter::once("ctr").chain(line.split(' '))).is_ok()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn fingers_used_to_upstream_find_their_way() {
        for line in [
            "-n k8s.io c ls -q",
            "--namespace x -a /s containers rm --keep-snapshot a b",
            "c info --spec x",
            "run --rm -t -i docker.io/library/busybox:latest b sh -c ls",
            "run -d --env A=1 --mount type=bind,src=/a,dst=/b,options=rbind:ro img id",
            "run --net-host --rootfs /dir id sleep 1",
            "run --config spec.json id",
            "t ls -q",
            "t exec --exec-id e --tty --cwd / --user 0 c sh -c ls",
            "t kill -s KILL -a c",
            "tasks rm -f --exec-id e c",
            "task metrics --format json c",
            "t ps c",
            "i ls -q name==x",
            "i pull --all-platforms --user a:b --plain-http --hosts-dir /d r/x:1",
            "i push --platform linux/amd64 r/x:1 l/x:1",
            "i import --base-name a --digests --no-unpack --all-platforms x.tar",
            "i export --platform linux/amd64 --skip-manifest-json x.tar r/x:1",
            "i rm --sync a b",
            "i tag --force a b c",
            "i mount --rw a /mnt",
            "i unmount --rm /mnt",
            "i label a k=v k2=",
            "i check -q",
            "i convert --oci --uncompress --all-platforms a b",
            "i usage a",
            "i inspect --content a",
            "install --libs -r --path /opt/x r/x:1",
            "pprof -d /run/debug.sock heap",
            "pprof trace -s 3",
            "shim --id c state",
            "shim --id c --shim-address /run/s exec --exec-id e --cwd / sh -c ls",
            "content ls -q",
            "content get sha256:x",
            "content fetch r/x:1",
            "content ingest --expected-size 5 --expected-digest d ref",
            "content prune references --dry",
            "snapshots --snapshotter native ls",
            "snapshot rm a b",
            "snapshots prepare -t /mnt key parent",
            "snapshots usage -b a",
            "leases create --id x --expires 1h a=b",
            "leases rm --sync x",
            "ns create x a=b",
            "ns rm -c x",
            "namespaces label x a=",
            "events topic==/tasks/exit",
            "plugins ls -d type==io.containerd.snapshotter.v1",
            "plugins inspect-runtime",
            "deprecations list --format json",
            "sandboxes ls",
            "oci spec",
            "completion bash",
            "why content sha256:x",
            "why snapshot key --snapshotter native",
            "df -A --images",
            "--format json df",
            "prune images --dry-run",
            "prune leases --older-than 48h",
            "prune content --labelled",
            "prune snapshots -A --dry-run",
            "version",
            "info",
        ] {
            assert!(parses(line), "{line}");
        }
    }

    #[test]
    fn contradictions_and_typos_are_refused() {
        for line in [
            "run --rm -d a b",
            "run --rmm a b",
            "run",
            "t kill",
            "frobnicate",
        ] {
            assert!(!parses(line), "{line}");
        }
    }

    #[test]
    fn a_commands_own_flags_are_not_ours() {
        assert!(parses("run img id ls --frob -x -- y"));
        assert!(parses("t exec c ls --frob"));
    }
}
