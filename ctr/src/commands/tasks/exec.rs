//! `ctr tasks exec`: one more process in a running container.

use anyhow::Context as _;
use clap::Args;
use lighter_proto::any;
use lighter_proto::containerd::services::containers::v1::Container;
use lighter_proto::containerd::services::snapshots::v1::MountsRequest;
use lighter_proto::containerd::services::tasks::v1::ExecProcessRequest;

use super::{container, spec_of};
use crate::advice;
use crate::attach::{IoFlags, Session};
use crate::cli::Ctx;
use crate::client::Client;
use crate::flags::ProcessFlags;
use crate::mount;
use crate::process::Process;
use crate::spec::model::{self, Spec};
use crate::spec::{self, Accounts};

/// Run another process in a container
#[derive(Debug, Args)]
#[command(override_usage = "ctr tasks exec [FLAGS] <CONTAINER> <COMMAND> [ARG]...")]
pub(crate) struct Exec {
    /// Working directory [default: the container's]
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// Allocate a terminal
    #[arg(long, short)]
    tty: bool,
    /// Keep standard input open (ctr always does)
    #[arg(long, short = 'i')]
    interactive: bool,
    /// Leave the process running and return
    #[arg(long, short)]
    detach: bool,
    /// ID of the process [default: made up]
    #[arg(long, value_name = "ID")]
    exec_id: Option<String>,
    /// User, group optional [default: the container's]
    #[arg(long, short, value_name = "NAME|UID[:GROUP|GID]")]
    user: Option<String>,
    /// Environment variable on top of the container's
    #[arg(long, short, value_name = "KEY[=VALUE]")]
    env: Vec<String>,
    #[command(flatten)]
    io: IoFlags,
    /// Container, and what to run in it
    #[arg(trailing_var_arg = true, required = true, value_name = "ARG")]
    args: Vec<String>,
}

impl Exec {
    /// The container that was named.
    pub(in crate::commands) fn container(&self) -> Option<&str> {
        self.args.first().map(String::as_str)
    }

    /// The same in the container `id`.
    pub(in crate::commands) fn of(mut self, id: String) -> Self {
        if let Some(first) = self.args.first_mut() {
            *first = id;
        }
        self
    }

    /// Runs it; its exit code, or 0 when detached.
    pub(in crate::commands) async fn run(self, ctx: &Ctx) -> anyhow::Result<u8> {
        let [id, command @ ..] = &self.args[..] else {
            return advice::fail(
                "no container given",
                "write ctr tasks exec CONTAINER COMMAND",
            );
        };
        if command.is_empty() {
            return advice::fail(
                "no command to run",
                format!("put it after the container: ctr tasks exec {id} sh"),
            );
        }
        let exec_id = self
            .exec_id
            .clone()
            .unwrap_or_else(|| format!("exec-{:016x}", rand::random::<u64>()));
        let container = container(&ctx.client, id).await?;
        let process = self.process(&ctx.client, &container, command).await?;
        let session = Session::prepare(&self.io, &exec_id, self.tty, !self.detach)?;
        let paths = session.paths().clone();
        let request = ExecProcessRequest {
            container_id: id.clone(),
            stdin: paths.stdin,
            stdout: paths.stdout,
            stderr: paths.stderr,
            terminal: self.tty,
            spec: Some(any::pack_json(any::PROCESS, &process)?),
            exec_id: exec_id.clone(),
        };
        ctx.client.tasks().exec(request).await?;
        let process = Process::exec(&ctx.client, id, &exec_id);
        if let Err(status) = process.start().await {
            // Registered but never ran; the start's failure is what matters.
            let _ = process.delete().await;
            return Err(status.into());
        }
        if self.detach {
            session.detach();
            return Ok(0);
        }
        Ok(session.run(&process).await?.code())
    }

    /// The container's own process with what the flags change.
    async fn process(
        &self,
        client: &Client,
        container: &Container,
        command: &[String],
    ) -> anyhow::Result<model::Process> {
        let spec = spec_of(container)?;
        let mut process = spec.process.clone().unwrap_or_default();
        process.terminal = self.tty;
        process.args = command.to_vec();
        if self.tty {
            spec::set_env(&mut process.env, "TERM=xterm");
        }
        spec::add_env(
            &mut process.env,
            &ProcessFlags {
                env: self.env.clone(),
                ..Default::default()
            },
        )?;
        if let Some(cwd) = &self.cwd {
            process.cwd.clone_from(cwd);
        }
        if let Some(user) = &self.user {
            let identity = accounts(client, container, &spec, user)
                .await?
                .resolve(user)?;
            process.user.uid = identity.uid;
            process.user.gid = identity.gid;
            process.user.additional_gids = identity.additional_gids;
        }
        Ok(process)
    }
}

/// The account files of a container, where they can be read.
async fn accounts(
    client: &Client,
    container: &Container,
    spec: &Spec,
    user: &str,
) -> anyhow::Result<Accounts> {
    if container.snapshot_key.is_empty() {
        let root = spec
            .root
            .as_ref()
            .map(|root| root.path.clone())
            .unwrap_or_default();
        return Accounts::read(root.as_ref());
    }
    let request = MountsRequest {
        snapshotter: container.snapshotter.clone(),
        key: container.snapshot_key.clone(),
    };
    let mounts = client
        .snapshots()
        .mounts(request)
        .await?
        .into_inner()
        .mounts;
    match mount::Temporary::view(&mounts) {
        Ok(rootfs) => Accounts::read(rootfs.path()),
        Err(_) if user.chars().all(|c| c.is_ascii_digit() || c == ':') => Ok(Accounts::default()),
        Err(error) => Err(error).with_context(|| format!("cannot look up user {user:?}")),
    }
}
