//! The clients, each through what people do with it.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use lighter_integration::{
    Cli, Daemon, Engine, Image, Layer, Options, Registry, Result, Subject, built, raw,
};
use tonic::Code;

use crate::Column;
use crate::calls::{Answers, Calls, counters, since};
use crate::table::methods;

const IMAGE: &str = "docker.io/test/busybox:latest";

/// One client's run against a daemon.
struct Run {
    name: &'static str,
    /// Where the daemon's counters are.
    metrics: String,
    before: Calls,
    failed: Vec<String>,
}

impl Run {
    /// What the daemon has answered until now is none of the client's.
    fn begin(name: &'static str, metrics: String) -> Result<Self> {
        Ok(Self {
            name,
            before: counters(&metrics)?,
            metrics,
            failed: Vec::new(),
        })
    }

    /// Runs `command` with `arguments`; a failure is told as that of `program`.
    fn attempt(&mut self, program: &str, command: &mut Command, arguments: &[&str]) -> Result {
        let output = command.args(arguments).output()?;
        if !output.status.success() {
            self.failed.push(format!(
                "`{program} {}`: {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr).trim()
            ));
        }
        Ok(())
    }

    /// The column of all that was answered since.
    fn end(self) -> Result<Column> {
        Ok(Column {
            name: self.name.to_owned(),
            calls: since(&self.before, counters(&self.metrics)?),
            failed: self.failed,
        })
    }
}

/// `program`, which is killed after so many seconds.
fn bounded(program: &Path, seconds: u32) -> Command {
    let mut command = Command::new("timeout");
    command
        .args(["--signal=KILL", &seconds.to_string()])
        .arg(program)
        .stdin(Stdio::null());
    command
}

/// A daemon with its counters on `address`.
async fn daemon(path: Option<PathBuf>) -> Result<(Daemon, String)> {
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let options = Options {
        config: format!("[metrics]\naddress = {address:?}\n"),
        path,
        cri: true,
        ..Options::default()
    };
    let daemon = Daemon::start_with(Subject::Lighter, &options).await?;
    Ok((daemon, address))
}

/// Runs a `ctr` through what a person does with one.
pub(crate) async fn command_line(
    name: &'static str,
    program: &Path,
    transfers: bool,
) -> Result<Column> {
    let (daemon, metrics) = daemon(None).await?;
    let registry = Registry::start().await?;
    let pulled = registry.push(&Image::busybox("x")?, "library/busybox", "1")?;
    let archive = daemon.dir().join("busybox.tar");
    std::fs::write(&archive, Image::busybox(IMAGE)?.oci_archive()?)?;
    let mut run = Run::begin(name, metrics)?;
    let ctr = Cli::new(program, daemon.address(), daemon.namespace());
    let archive = archive.display().to_string();
    let exported = daemon.dir().join("out.tar").display().to_string();
    let manifest = Image::busybox("x")?.manifest.digest;
    let chain = Image::busybox("x")?.chain_id(1);
    let list = "ls";
    let script: Vec<Vec<&str>> = vec![
        vec!["version"],
        vec!["plugins", list],
        vec!["namespaces", list],
        vec!["namespaces", "create", "other"],
        vec!["namespaces", "label", "other", "a=b"],
        vec!["namespaces", "rm", "other"],
        vec!["leases", "create", "--id", "held"],
        vec!["leases", list],
        vec!["leases", "rm", "held"],
        vec!["images", "import", &archive],
        vec!["images", "pull", "--plain-http", &pulled],
        vec!["images", list],
        vec!["images", "check"],
        vec!["images", "label", IMAGE, "a=b"],
        vec!["images", "tag", IMAGE, "docker.io/test/copy:1"],
        vec!["images", "export", &exported, IMAGE],
        vec!["images", "push", "--plain-http", &pulled],
        vec!["content", list],
        vec!["content", "active"],
        vec!["content", "get", &manifest],
        vec!["content", "label", &manifest, "a=b"],
        vec!["snapshots", list],
        vec!["snapshots", "info", &chain],
        vec!["snapshots", "prepare", "work", &chain],
        vec!["snapshots", "mounts", "/x", "work"],
        vec!["snapshots", "usage", "work"],
        vec!["snapshots", "diff", "work"],
        vec!["snapshots", "commit", "done", "work"],
        vec!["snapshots", "view", "look", "done"],
        vec!["snapshots", "label", "done", "a=b"],
        vec!["snapshots", "rm", "look"],
        vec!["snapshots", "rm", "done"],
        vec!["run", "--rm", IMAGE, "short", "echo", "x"],
        vec!["run", "-d", IMAGE, "long", "sleep", "1000"],
        vec!["containers", list],
        vec!["containers", "info", "long"],
        vec!["containers", "label", "long", "a=b"],
        vec!["tasks", list],
        vec!["tasks", "ps", "long"],
        vec!["tasks", "metrics", "long"],
        vec!["tasks", "exec", "--exec-id", "e", "long", "true"],
        vec!["tasks", "pause", "long"],
        vec!["tasks", "resume", "long"],
        vec!["tasks", "kill", "-s", "SIGKILL", "long"],
        vec!["tasks", "rm", "long"],
        vec!["containers", "rm", "long"],
        vec!["images", "rm", "--sync", IMAGE],
    ];
    for args in &script {
        attempt(&ctr, args, &mut run.failed)?;
    }
    if transfers {
        attempt(&ctr, &["info"], &mut run.failed)?;
        attempt(&ctr, &["sandboxes", list], &mut run.failed)?;
    }
    let column = run.end()?;
    // A task that has just been killed may not be gone when it is removed.
    let _ = ctr.run(&["tasks", "rm", "-f", "long"])?;
    let _ = ctr.run(&["containers", "rm", "long"])?;
    drop(daemon);
    Ok(column)
}

fn attempt(ctr: &Cli, args: &[&str], failed: &mut Vec<String>) -> Result {
    let removal = args.starts_with(&["tasks", "rm"]);
    let mut output = ctr.run(args)?;
    // Our ctr exits with the code of the task that it removed, which was killed.
    let done = |code| code == 0 || removal && code == 137;
    if removal && !done(output.code) {
        // It may not have ended yet.
        std::thread::sleep(Duration::from_millis(300));
        output = ctr.run(args)?;
    }
    if !done(output.code) {
        failed.push(format!(
            "`{}` exits with {}: {}",
            args.join(" "),
            output.code,
            output.stderr.trim()
        ));
    }
    Ok(())
}

/// A Docker Engine through a container's life.
pub(crate) async fn docker() -> Result<Column> {
    let shims = tempfile::tempdir()?;
    std::os::unix::fs::symlink(
        built("containerd-shim-lighter-v2"),
        shims.path().join("containerd-shim-runc-v2"),
    )?;
    let (daemon, metrics) = daemon(Some(shims.path().to_owned())).await?;
    let mut run = Run::begin("dockerd (Debian, 20.10)", metrics)?;
    let engine = Engine::start(&daemon).await?;
    let layer = daemon.dir().join("layer.tar.gz");
    std::fs::write(&layer, Layer::busybox()?.blob.data)?;
    let layer = layer.display().to_string();
    let script: Vec<Vec<&str>> = vec![
        vec!["import", &layer, IMAGE],
        vec!["run", "--rm", IMAGE, "echo", "x"],
        vec!["run", "-d", "--name", "held", IMAGE, "sleep", "1000"],
        vec!["exec", "held", "true"],
        vec!["top", "held"],
        vec!["stats", "--no-stream", "held"],
        vec!["pause", "held"],
        vec!["unpause", "held"],
        vec!["update", "--memory", "64m", "--memory-swap", "64m", "held"],
        vec!["restart", "-t", "0", "held"],
        vec!["commit", "held", "test/committed"],
        vec!["rm", "-f", "held"],
    ];
    for args in &script {
        let (code, text) = engine.docker(args)?;
        if code != 0 {
            run.failed.push(format!(
                "`docker {}` exits with {code}: {text}",
                args.join(" ")
            ));
        }
    }
    let column = run.end()?;
    engine.stop().await?;
    drop(daemon);
    Ok(column)
}

/// buildkitd over `daemon`, configured by what is in `dir`.
fn buildkitd(folder: &Path, address: &str, dir: &Path, daemon: &Daemon) -> Result<Child> {
    let log = std::fs::File::create(dir.join("log"))?;
    Command::new(folder.join("buildkitd"))
        .args(["--addr", address, "--oci-worker=false"])
        .arg("--config")
        .arg(dir.join("buildkitd.toml"))
        .arg("--root")
        .arg(dir.join("root"))
        .arg("--containerd-worker-addr")
        .arg(daemon.address())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("start buildkitd")
}

/// BuildKit with its containerd worker: a build, the same one from its cache, what is kept of it.
pub(crate) async fn buildkit(folder: &Path) -> Result<Column> {
    let (daemon, metrics) = daemon(None).await?;
    let registry = Registry::start().await?;
    let base = registry.push(&Image::busybox("x")?, "library/busybox", "1")?;
    let host = base.split('/').next().unwrap_or_default();
    let dir = daemon.dir().join("buildkit");
    std::fs::create_dir(&dir)?;
    std::fs::write(
        dir.join("buildkitd.toml"),
        format!("[registry.{host:?}]\n  http = true\n"),
    )?;
    let context = dir.join("context");
    std::fs::create_dir(&context)?;
    std::fs::write(context.join("note"), "text")?;
    std::fs::write(
        context.join("Dockerfile"),
        format!("FROM {base}\nCOPY note /note\nRUN cat /note > /seen\n"),
    )?;
    let mut run = Run::begin("buildkitd", metrics)?;
    let address = format!("unix://{}", dir.join("sock").display());
    let mut server = buildkitd(folder, &address, &dir, &daemon)?;
    let context = context.display().to_string();
    let (sources, file) = (
        format!("context={context}"),
        format!("dockerfile={context}"),
    );
    let pushed = format!("type=image,name={host}/test/built:1,push=true");
    let saved = format!("type=oci,dest={}", dir.join("out.tar").display());
    let build = [
        "build",
        "--progress=plain",
        "--frontend=dockerfile.v0",
        "--local",
        &sources,
    ];
    let build = [&build[..], &["--local", &file, "--output"]].concat();
    let script = [
        vec!["debug", "workers"],
        [&build[..], &[&pushed]].concat(),
        [&build[..], &[&saved]].concat(),
        vec!["du"],
        vec!["prune", "--all"],
    ];
    let buildctl = folder.join("buildctl");
    for arguments in &script {
        // It has to come up first.
        let waiting = ["--timeout", "20", "--wait", "--addr", &address];
        run.attempt("buildctl", bounded(&buildctl, 60).args(waiting), arguments)?;
    }
    let column = run.end()?;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(server.id())?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    server.wait()?;
    drop(daemon);
    Ok(column)
}

/// `crictl`, as far as it goes without a network.
pub(crate) async fn crictl(program: &Path) -> Result<Column> {
    let (daemon, metrics) = daemon(None).await?;
    let mut run = Run::begin("crictl", metrics)?;
    let endpoint = format!("unix://{}", daemon.address().display());
    for args in [
        &["version"][..],
        &["info"],
        &["pods"],
        &["ps", "-a"],
        &["images"],
        &["imagefsinfo"],
        &["stats"],
        &["statsp"],
        &["metricdescs"],
        &["metricsp"],
        &["runtime-config"],
    ] {
        let mut command = bounded(program, 20);
        command.args([
            "--runtime-endpoint",
            &endpoint,
            "--image-endpoint",
            &endpoint,
        ]);
        run.attempt("crictl", &mut command, args)?;
    }
    let column = run.end()?;
    drop(daemon);
    Ok(column)
}

/// Calls every method with an empty request.
pub(crate) async fn bare() -> Result<Column> {
    let (daemon, _) = daemon(None).await?;
    let client = daemon.client().await?;
    let mut calls = Calls::new();
    let mut failed = Vec::new();
    for method in methods()? {
        let code = match raw::call(&client, &method, Bytes::new()).await? {
            Some(Ok(())) => "OK".to_owned(),
            Some(Err(status)) => {
                if status.code() == Code::Internal {
                    failed.push(format!("{method}: {status}"));
                }
                format!("{:?}", status.code())
            }
            None => "open".to_owned(),
        };
        calls.insert(method, Answers::from([(code, 1)]));
    }
    drop(daemon);
    Ok(Column {
        name: "empty request".to_owned(),
        calls,
        failed,
    })
}
