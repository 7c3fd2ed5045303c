//! An OCI runtime that is a program with runc's command line.

use std::ffi::OsString;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use lighter_proto::containerd::runc::v1::CheckpointOptions;
use serde::Deserialize;

use super::{Create, Exec, OciRuntime, Restore, Running, Target};
use crate::bundle;
use crate::error::{Error, Result};
use crate::io::console::ConsoleSocket;
use crate::io::{ChildStdio, pipe};
use crate::reaper::Reaper;
use crate::sys;

/// Output of a runtime command that is kept.
const MAX_OUTPUT_BYTES: usize = 1 << 20;
/// End of a runtime's log that is searched for its error.
const LOG_TAIL_BYTES: u64 = 64 * 1024;

/// A runtime run as a command.
#[derive(Debug)]
pub(crate) struct ExecRuntime {
    target: Target,
    program: Program,
    reaper: Reaper,
    /// Directory of console sockets; its path is short.
    socket_dir: PathBuf,
}

/// What is executed.
#[derive(Debug)]
enum Program {
    /// A binary, by path or found on `PATH`.
    Named(String),
    /// This very program, which is our runtime when called by its name.
    Ourselves,
}

impl Program {
    fn name(&self) -> &str {
        match self {
            Self::Named(name) => name,
            Self::Ourselves => OWN_NAME,
        }
    }

    fn command(&self) -> Command {
        match self {
            Self::Named(name) => Command::new(name),
            Self::Ourselves => own_command(),
        }
    }
}

/// The name under which the shim's binary is our OCI runtime's command line.
pub(crate) const OWN_NAME: &str = "lighter-oci";

/// Our OCI runtime's command line, without another file on disk.
pub(crate) fn own_command() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0(OWN_NAME);
    command
}

/// What a command left.
struct Outcome {
    success: bool,
    status: u32,
    output: Vec<u8>,
    /// Last error in its log.
    error: Option<String>,
}

impl Outcome {
    /// What the runtime said went wrong.
    fn text(&self) -> String {
        if let Some(error) = &self.error {
            return error.clone();
        }
        let output = String::from_utf8_lossy(&self.output);
        let output = output.trim();
        if output.is_empty() {
            format!("exit status {}", self.status)
        } else {
            format!("exit status {}: {output}", self.status)
        }
    }
}

/// Streams given to a command.
enum Streams {
    /// Nothing in; output is collected.
    Collect,
    /// These bytes in; output is collected.
    Feed(Vec<u8>),
    /// The container's own.
    Given([OwnedFd; 3]),
}

impl ExecRuntime {
    /// The runtime of a container.
    pub(crate) fn new(target: Target, reaper: Reaper, socket_dir: PathBuf) -> Self {
        let program = if target.is_builtin() {
            Program::Ourselves
        } else {
            Program::Named(target.options.binary_name.clone())
        };
        Self {
            target,
            program,
            reaper,
            socket_dir,
        }
    }

    fn log(&self) -> PathBuf {
        self.target.bundle.join("log.json")
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = self.program.command();
        command
            .current_dir(&self.target.bundle)
            .arg("--root")
            .arg(&self.target.root)
            .arg("--log")
            .arg(self.log())
            .args(["--log-format", "json"]);
        if self.target.options.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.arg(verb);
        command
    }

    /// Runs a command to its end.
    async fn run(&self, mut command: Command, streams: Streams, what: &str) -> Result<Outcome> {
        let log = self.log();
        let logged = std::fs::metadata(&log).map_or(0, |m| m.len());
        let mut collected = None;
        match streams {
            Streams::Given([stdin, stdout, stderr]) => {
                command.stdin(stdin).stdout(stdout).stderr(stderr);
            }
            Streams::Collect | Streams::Feed(_) => {
                let (ours, theirs) = pipe::output_pair((0, 0))?;
                let copy = theirs
                    .try_clone()
                    .map_err(Error::system("duplicate a pipe"))?;
                command.stdin(feed(streams)?).stdout(theirs).stderr(copy);
                collected = Some(pipe::watch(ours)?);
            }
        }
        let (_, exit) = self.reaper.spawn(&mut command).map_err(|source| {
            Error::Runtime(format!(
                "{what}: unable to start the OCI runtime: exec: {:?}: {}",
                self.program.name(),
                start_failure(&source)
            ))
        })?;
        // Our copies of its streams must go, or their readers would never see the end.
        drop(command);
        let mut exit = std::pin::pin!(exit.exit());
        let mut output = Vec::new();
        // A container's init may hold the output open: the end of the command is what counts.
        let status = loop {
            let Some(ours) = collected.as_ref() else {
                break exit.await.status;
            };
            tokio::select! {
                biased;
                exit = exit.as_mut() => {
                    keep(&mut output, &pipe::available(ours));
                    break exit.status;
                }
                block = pipe::next_block(ours) => {
                    let block = block.unwrap_or_default();
                    if block.is_empty() {
                        collected = None;
                    }
                    keep(&mut output, &block);
                }
            }
        };
        let error = if status == 0 {
            None
        } else {
            last_error(&log, logged)
        };
        Ok(Outcome {
            success: status == 0,
            status,
            output,
            error,
        })
    }

    /// Runs a command that must succeed.
    async fn must(&self, command: Command, streams: Streams, what: &str) -> Result<Vec<u8>> {
        let outcome = self.run(command, streams, what).await?;
        if outcome.success {
            return Ok(outcome.output);
        }
        Err(Error::Runtime(format!("{what}: {}", outcome.text())))
    }

    /// Runs a command that leaves a process behind, and claims it.
    async fn launch(
        &self,
        mut command: Command,
        stdio: ChildStdio,
        pid_file: &Path,
        tail: Vec<OsString>,
        what: &str,
    ) -> Result<Running> {
        command.arg("--pid-file").arg(pid_file);
        let mut console: Option<ConsoleSocket> = None;
        let streams = match stdio {
            ChildStdio::Streams {
                stdin,
                stdout,
                stderr,
            } => Streams::Given([stdin, stdout, stderr]),
            ChildStdio::Terminal => {
                let socket = ConsoleSocket::bind(&self.socket_dir)?;
                command.arg("--console-socket").arg(socket.path());
                console = Some(socket);
                Streams::Collect
            }
        };
        command.args(tail);
        // A pid file of an earlier attempt must not be taken for this one's.
        let _ = std::fs::remove_file(pid_file);
        let window = self.reaper.window();
        self.must(command, streams, what).await?;
        let pid = bundle::read_pid(pid_file)?;
        let exit = window.claim(pid);
        let terminal = match console {
            None => None,
            Some(socket) => match socket.receive().await {
                Ok(terminal) => Some(terminal),
                Err(error) => {
                    // Without its terminal the process is of no use.
                    let _ = sys::kill(pid, 9);
                    return Err(error);
                }
            },
        };
        Ok(Running {
            pid,
            exit,
            terminal,
            known: None,
        })
    }

    fn id(&self) -> OsString {
        OsString::from(&self.target.id)
    }
}

/// Appends to what is kept of a command's output.
fn keep(output: &mut Vec<u8>, block: &[u8]) {
    let room = MAX_OUTPUT_BYTES
        .saturating_sub(output.len())
        .min(block.len());
    output.extend_from_slice(&block[..room]);
}

/// The wording of Go's exec package, which clients know.
fn start_failure(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "executable file not found in $PATH".to_owned(),
        _ => error.to_string(),
    }
}

/// Standard input of a command that is fed bytes: a file without a name, so that no copying task
/// is needed.
fn feed(streams: Streams) -> Result<Stdio> {
    let Streams::Feed(bytes) = streams else {
        return Ok(Stdio::null());
    };
    let fd = rustix::fs::memfd_create("input", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(Error::system("create a memory file"))?;
    let mut file = std::fs::File::from(fd);
    file.write_all(&bytes)
        .map_err(Error::system("write a memory file"))?;
    file.rewind()
        .map_err(Error::system("rewind a memory file"))?;
    Ok(file.into())
}

#[derive(Deserialize)]
struct LogLine {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
}

/// The last error that was logged after `from` bytes.
fn last_error(log: &Path, from: u64) -> Option<String> {
    let mut file = std::fs::File::open(log).ok()?;
    let size = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(
        from.max(size.saturating_sub(LOG_TAIL_BYTES)),
    ))
    .ok()?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    text.lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<LogLine>(line).ok())
        .find(|line| line.level == "error" && !line.msg.is_empty())
        .map(|line| line.msg.trim().to_owned())
}

/// What a failed `kill` means.
fn kill_error(text: &str) -> Error {
    let lower = text.to_lowercase();
    if [
        "process already finished",
        "container not running",
        "no such process",
        "not running",
    ]
    .iter()
    .any(|known| lower.contains(known))
    {
        Error::NotFound("process already finished".to_owned())
    } else if lower.contains("does not exist") {
        Error::NotFound("no such container".to_owned())
    } else {
        Error::Runtime(format!("unknown error after kill: {text}"))
    }
}

fn checkpoint_args(command: &mut Command, options: &CheckpointOptions) {
    for (set, flag) in [
        (options.open_tcp, "--tcp-established"),
        (options.external_unix_sockets, "--ext-unix-sk"),
        (options.terminal, "--shell-job"),
        (options.file_locks, "--file-locks"),
        (!options.exit, "--leave-running"),
    ] {
        if set {
            command.arg(flag);
        }
    }
    for namespace in &options.empty_namespaces {
        command.arg("--empty-ns").arg(namespace);
    }
    if !options.cgroups_mode.is_empty() {
        command
            .arg("--manage-cgroups-mode")
            .arg(&options.cgroups_mode);
    }
    if !options.parent_path.is_empty() {
        command.arg("--parent-path").arg(&options.parent_path);
    }
}

#[async_trait]
impl OciRuntime for ExecRuntime {
    async fn create(&self, create: Create) -> Result<Running> {
        let mut command = self.command("create");
        command.arg("--bundle").arg(&self.target.bundle);
        if self.target.options.no_pivot_root {
            command.arg("--no-pivot");
        }
        if self.target.options.no_new_keyring {
            command.arg("--no-new-keyring");
        }
        let pid_file = self.target.bundle.join("init.pid");
        let what = "OCI runtime create failed";
        self.launch(command, create.stdio, &pid_file, vec![self.id()], what)
            .await
    }

    async fn start(&self) -> Result<()> {
        let mut command = self.command("start");
        command.arg(&self.target.id);
        self.must(command, Streams::Collect, "OCI runtime start failed")
            .await
            .map(|_| ())
    }

    async fn exec(&self, exec: Exec) -> Result<Running> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let spec = self.target.bundle.join(format!("exec-{number}.json"));
        std::fs::write(&spec, &exec.spec).map_err(Error::io("write", &spec))?;
        let mut command = self.command("exec");
        command.arg("--process").arg(&spec).arg("--detach");
        let pid_file = bundle::exec_pid_file(&self.target.bundle, &exec.exec_id);
        let what = "OCI runtime exec failed";
        let started = self
            .launch(command, exec.stdio, &pid_file, vec![self.id()], what)
            .await;
        let _ = std::fs::remove_file(&spec);
        started
    }

    async fn kill(&self, signal: u32, all: bool) -> Result<()> {
        let mut command = self.command("kill");
        if all {
            command.arg("--all");
        }
        command.arg(&self.target.id).arg(signal.to_string());
        let outcome = self
            .run(command, Streams::Collect, "OCI runtime kill failed")
            .await?;
        if outcome.success {
            Ok(())
        } else {
            Err(kill_error(&outcome.text()))
        }
    }

    async fn delete(&self, force: bool) -> Result<()> {
        let mut command = self.command("delete");
        if force {
            command.arg("--force");
        }
        command.arg(&self.target.id);
        let outcome = self
            .run(command, Streams::Collect, "OCI runtime delete failed")
            .await?;
        let text = outcome.text();
        if outcome.success || text.contains("does not exist") {
            return Ok(());
        }
        Err(Error::Runtime(format!("OCI runtime delete failed: {text}")))
    }

    async fn pause(&self) -> Result<()> {
        let mut command = self.command("pause");
        command.arg(&self.target.id);
        self.must(command, Streams::Collect, "OCI runtime pause failed")
            .await
            .map(|_| ())
    }

    async fn resume(&self) -> Result<()> {
        let mut command = self.command("resume");
        command.arg(&self.target.id);
        self.must(command, Streams::Collect, "OCI runtime resume failed")
            .await
            .map(|_| ())
    }

    async fn pids(&self) -> Result<Vec<u32>> {
        let mut command = self.command("ps");
        command.args(["--format", "json", &self.target.id]);
        let output = self
            .must(command, Streams::Collect, "OCI runtime ps failed")
            .await?;
        // runc prints `null` for a container without processes.
        let pids: Option<Vec<u32>> = serde_json::from_slice(&output)
            .map_err(|e| Error::Runtime(format!("OCI runtime ps failed: {e}")))?;
        Ok(pids.unwrap_or_default())
    }

    async fn update(&self, resources: Vec<u8>) -> Result<()> {
        let mut command = self.command("update");
        command.args(["--resources", "-", &self.target.id]);
        let what = "OCI runtime update failed";
        self.must(command, Streams::Feed(resources), what)
            .await
            .map(|_| ())
    }

    async fn checkpoint(&self, path: PathBuf, options: CheckpointOptions) -> Result<()> {
        let work = if options.work_path.is_empty() {
            self.target.bundle.join("work")
        } else {
            PathBuf::from(&options.work_path)
        };
        let mut command = self.command("checkpoint");
        command
            .arg("--image-path")
            .arg(&path)
            .arg("--work-path")
            .arg(&work);
        checkpoint_args(&mut command, &options);
        command.arg(&self.target.id);
        let done = self
            .must(command, Streams::Collect, "OCI runtime checkpoint failed")
            .await;
        if done.is_err() {
            // criu's own account is worth more than the runtime's; the work directory goes away.
            let kept = self.target.bundle.join("criu-dump.log");
            let _ = std::fs::copy(work.join("dump.log"), kept);
        }
        done.map(|_| ())
    }

    async fn restore(&self, restore: Restore) -> Result<Running> {
        let mut command = self.command("restore");
        let work = match self.target.options.criu_work_path.as_str() {
            "" => self.target.bundle.join("work"),
            path => PathBuf::from(path),
        };
        command
            .arg("--image-path")
            .arg(&restore.image)
            .arg("--work-path")
            .arg(&work);
        command
            .arg("--bundle")
            .arg(&self.target.bundle)
            .arg("--detach");
        if let Some(parent) = &restore.parent {
            command.arg("--parent-path").arg(parent);
        }
        if self.target.options.no_pivot_root {
            command.arg("--no-pivot");
        }
        let pid_file = self.target.bundle.join("init.pid");
        let what = "OCI runtime restore failed";
        self.launch(command, restore.stdio, &pid_file, vec![self.id()], what)
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_the_log_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log.json");
        let old = "{\"level\":\"error\",\"msg\":\"old\"}\n";
        let new =
            "{\"level\":\"error\",\"msg\":\"new \"}\n{\"level\":\"info\",\"msg\":\"x\"}\nnoise\n";
        std::fs::write(&log, format!("{old}{new}")).unwrap();
        assert_eq!(last_error(&log, old.len() as u64).as_deref(), Some("new"));
        assert_eq!(last_error(&log, (old.len() + new.len()) as u64), None);
        assert_eq!(last_error(&dir.path().join("none"), 0), None);
    }

    #[test]
    fn kill_errors_are_told_apart() {
        assert!(
            matches!(kill_error("container not running"), Error::NotFound(t) if t == "process already finished")
        );
        assert!(
            matches!(kill_error("container \"x\" does not exist"), Error::NotFound(t) if t == "no such container")
        );
        assert!(matches!(kill_error("boom"), Error::Runtime(_)));
    }
}
