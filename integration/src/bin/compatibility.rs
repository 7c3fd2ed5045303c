//! Which method of the API each client calls, and how it is answered: writes
//! `docs/compatibility.md` from a run of every client that this machine has.
//!
//! A client's calls are read from the daemon's own counters (`grpc_server_handled_total`), so that
//! nothing here has to know what a client does beneath a command. The last column is a bare client
//! that calls every method of the descriptors with an empty request: a method that is not served
//! shows there even where no other client calls it.
//!
//! Further clients are named by environment variables, because Debian has none of them:
//! `UPSTREAM_CTR` (containerd 2.x's ctr), `CRICTL`, and `BUILDKIT`, the folder of buildkitd and
//! buildctl.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use lighter_integration::{
    Cli, Daemon, Engine, Image, Layer, Options, Registry, Result, Subject, built, raw,
};
use tonic::Code;

/// Where the table goes when no argument names another file.
const OUTPUT: &str = "docs/compatibility.md";
const IMAGE: &str = "docker.io/test/busybox:latest";

/// Answers of Unimplemented that clients of the reference get as well, and why.
const AS_THE_REFERENCE: [(&str, &str); 4] = [
    (
        "containerd.services.mounts.v1.Mounts/Activate",
        "of mounts that need no help: the client then mounts them by itself",
    ),
    (
        "containerd.services.mounts.v1.Mounts/Update",
        "no runtime serves it",
    ),
    (
        "runtime.v1.RuntimeService/CheckpointPod",
        "no runtime serves it",
    ),
    (
        "runtime.v1.RuntimeService/RestorePod",
        "no runtime serves it",
    ),
];

/// Answers to one method: how often each code.
type Answers = BTreeMap<String, u64>;
/// What a client's run was answered, by `service/Method`.
type Calls = BTreeMap<String, Answers>;

/// One column.
struct Column {
    name: String,
    calls: Calls,
    /// Commands that failed, with what they said.
    failed: Vec<String>,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result {
    let output = std::env::args().nth(1);
    let output = PathBuf::from(output.unwrap_or_else(|| OUTPUT.to_owned()));
    let mut columns = Vec::new();
    columns.push(command_line("ctr (lighter)", &built("ctr"), true).await?);
    columns.push(command_line("ctr (Debian, 1.6)", Path::new("/usr/bin/ctr"), false).await?);
    if let Some(program) = std::env::var_os("UPSTREAM_CTR") {
        columns.push(command_line("ctr (upstream, 2.x)", Path::new(&program), true).await?);
    }
    if Engine::is_installed() {
        columns.push(docker().await?);
    }
    if let Some(folder) = std::env::var_os("BUILDKIT") {
        columns.push(buildkit(Path::new(&folder)).await?);
    }
    if let Some(program) = std::env::var_os("CRICTL") {
        columns.push(crictl(Path::new(&program)).await?);
    }
    columns.push(bare().await?);
    let text = render(&columns)?;
    if let Some(dir) = output.parent() {
        std::fs::create_dir_all(dir)?;
    }
    std::fs::write(&output, text)?;
    say(&format!("wrote {}", output.display()))?;
    let mut broken = false;
    for column in &columns {
        for line in &column.failed {
            say(&format!("{}: {line}", column.name))?;
            broken = true;
        }
        for (method, answers) in &column.calls {
            let known = AS_THE_REFERENCE.iter().any(|(name, _)| name == method);
            if answers.contains_key("Unimplemented") && !known {
                say(&format!("{}: {method} is not served", column.name))?;
                broken = true;
            }
        }
    }
    anyhow::ensure!(!broken, "there are holes, see above");
    Ok(())
}

fn say(line: &str) -> Result {
    Ok(writeln!(std::io::stdout(), "{line}")?)
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

/// Every counter of answered calls.
fn counters(address: &str) -> Result<Calls> {
    let mut stream = TcpStream::connect(address).context("connect to the metrics")?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET /v1/metrics HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let mut calls = Calls::new();
    for line in text.lines() {
        let Some(rest) = line.strip_prefix("grpc_server_handled_total{") else {
            continue;
        };
        let Some((labels, count)) = rest.rsplit_once("} ") else {
            continue;
        };
        let label = |name: &str| {
            let start = labels.find(&format!("{name}=\""))? + name.len() + 2;
            labels[start..].split('"').next()
        };
        let (Some(service), Some(method), Some(code)) = (
            label("grpc_service"),
            label("grpc_method"),
            label("grpc_code"),
        ) else {
            continue;
        };
        let answers = calls.entry(format!("{service}/{method}")).or_default();
        // Counters are written as floating-point numbers by some.
        let count = count.trim().split('.').next().unwrap_or_default();
        *answers.entry(code.to_owned()).or_default() += count.parse::<u64>()?;
    }
    Ok(calls)
}

/// `now` without what was counted `before` the client came.
fn since(before: &Calls, now: Calls) -> Calls {
    now.into_iter()
        .filter_map(|(method, mut answers)| {
            if let Some(old) = before.get(&method) {
                for (code, count) in old {
                    if let Some(new) = answers.get_mut(code) {
                        *new = new.saturating_sub(*count);
                    }
                }
            }
            answers.retain(|_, count| *count > 0);
            (!answers.is_empty()).then_some((method, answers))
        })
        .collect()
}

/// Runs a `ctr` through what a person does with one.
async fn command_line(name: &str, program: &Path, transfers: bool) -> Result<Column> {
    let (daemon, metrics) = daemon(None).await?;
    let registry = Registry::start().await?;
    let pulled = registry.push(&Image::busybox("x")?, "library/busybox", "1")?;
    let archive = daemon.dir().join("busybox.tar");
    std::fs::write(&archive, Image::busybox(IMAGE)?.oci_archive()?)?;
    let before = counters(&metrics)?;
    let ctr = Cli::new(program, daemon.address(), daemon.namespace());
    let mut failed = Vec::new();
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
        attempt(&ctr, args, &mut failed)?;
    }
    if transfers {
        attempt(&ctr, &["info"], &mut failed)?;
        attempt(&ctr, &["sandboxes", list], &mut failed)?;
    }
    let calls = since(&before, counters(&metrics)?);
    // A task that has just been killed may not be gone when it is removed.
    let _ = ctr.run(&["tasks", "rm", "-f", "long"])?;
    let _ = ctr.run(&["containers", "rm", "long"])?;
    drop(daemon);
    Ok(Column {
        name: name.to_owned(),
        calls,
        failed,
    })
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
async fn docker() -> Result<Column> {
    let shims = tempfile::tempdir()?;
    std::os::unix::fs::symlink(
        built("containerd-shim-lighter-v2"),
        shims.path().join("containerd-shim-runc-v2"),
    )?;
    let (daemon, metrics) = daemon(Some(shims.path().to_owned())).await?;
    let before = counters(&metrics)?;
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
    let mut failed = Vec::new();
    for args in &script {
        let (code, text) = engine.docker(args)?;
        if code != 0 {
            failed.push(format!(
                "`docker {}` exits with {code}: {text}",
                args.join(" ")
            ));
        }
    }
    let calls = since(&before, counters(&metrics)?);
    engine.stop().await?;
    drop(daemon);
    Ok(Column {
        name: "dockerd (Debian, 20.10)".to_owned(),
        calls,
        failed,
    })
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
async fn buildkit(folder: &Path) -> Result<Column> {
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
    let before = counters(&metrics)?;
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
    let mut failed = Vec::new();
    for arguments in &script {
        let output = Command::new("timeout")
            .args(["--signal=KILL", "60"])
            .arg(folder.join("buildctl"))
            // It has to come up first.
            .args(["--timeout", "20", "--wait", "--addr", &address])
            .args(arguments)
            .stdin(Stdio::null())
            .output()?;
        if !output.status.success() {
            failed.push(format!(
                "`buildctl {}`: {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr).trim()
            ));
        }
    }
    let calls = since(&before, counters(&metrics)?);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(server.id())?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    server.wait()?;
    drop(daemon);
    Ok(Column {
        name: "buildkitd".to_owned(),
        calls,
        failed,
    })
}

/// `crictl`, as far as it goes without a network.
async fn crictl(program: &Path) -> Result<Column> {
    let (daemon, metrics) = daemon(None).await?;
    let before = counters(&metrics)?;
    let endpoint = format!("unix://{}", daemon.address().display());
    let mut failed = Vec::new();
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
        let output = Command::new("timeout")
            .args(["--signal=KILL", "20"])
            .arg(program)
            .args([
                "--runtime-endpoint",
                &endpoint,
                "--image-endpoint",
                &endpoint,
            ])
            .args(args)
            .stdin(Stdio::null())
            .output()?;
        if !output.status.success() {
            failed.push(format!(
                "`crictl {}`: {}",
                args.join(" "),
                String::from_utf8_lossy(&output.stderr).trim()
            ));
        }
    }
    let calls = since(&before, counters(&metrics)?);
    Ok(Column {
        name: "crictl".to_owned(),
        calls,
        failed,
    })
}

/// The names of all methods.
fn methods() -> Result<BTreeSet<String>> {
    Ok(raw::methods()?
        .into_iter()
        .map(|method| method.name)
        .collect())
}

/// Calls every method with an empty request.
async fn bare() -> Result<Column> {
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

fn render(columns: &[Column]) -> Result<String> {
    let methods = methods()?;
    let mut text = String::from(
        "# Compatibility\n\n\
         Every method of the API, and how each client's calls of it were answered: the codes, and how \
         often each. A dot means that the client's run did not call it. The run is \
         `integration/src/bin/compatibility.rs`; `make compatibility` does it again and rewrites this \
         file. The last column is a bare client that sends an empty request to every method: any \
         answer but Unimplemented means that the method is served.\n\n",
    );
    for column in columns.iter().take(columns.len().saturating_sub(1)) {
        let called = methods.iter().filter(|m| column.calls.contains_key(*m));
        let failed = column.failed.len();
        writeln!(
            text,
            "- {}: {} of {} methods called, {failed} commands failed",
            column.name,
            called.count(),
            methods.len()
        )?;
        for line in &column.failed {
            let line = line.lines().next().unwrap_or_default();
            writeln!(text, "  - {line}")?;
        }
    }
    text.push_str("\nUnimplemented is also the reference's answer to:\n\n");
    for (method, why) in AS_THE_REFERENCE {
        writeln!(text, "- {method}: {why}")?;
    }
    let mut service = "";
    for method in &methods {
        let (this, name) = method.split_once('/').unwrap_or((method, ""));
        if this != service {
            service = this;
            let names: Vec<_> = columns.iter().map(|c| c.name.as_str()).collect();
            writeln!(text, "\n## {service}\n\n| method | {} |", names.join(" | "))?;
            writeln!(text, "|---|{}", "---|".repeat(columns.len()))?;
        }
        let cells: Vec<_> = columns
            .iter()
            .map(|column| match column.calls.get(method) {
                None => "·".to_owned(),
                Some(answers) => answers
                    .iter()
                    .map(|(code, count)| match count {
                        1 => code.clone(),
                        _ => format!("{code} ×{count}"),
                    })
                    .collect::<Vec<_>>()
                    .join(", "),
            })
            .collect();
        writeln!(text, "| {name} | {} |", cells.join(" | "))?;
    }
    Ok(text)
}
