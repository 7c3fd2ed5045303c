//! Running one plugin binary: environment in, bounded JSON out, killed at its deadline.
//!
//! Spec: CNI 1.1, section 2, "Execution protocol". A plugin runs in a process group of its own, so
//! that a hung one dies with all its children, also when the caller gives up.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout, timeout_at};

use super::error::Failure;

/// Bytes of standard output taken from a plugin.
const MAX_STDOUT: usize = 1 << 20;
/// Bytes of standard error kept from a plugin, from its end.
const MAX_STDERR: usize = 4 << 10;
/// Bytes of output quoted in an error.
const MAX_QUOTED: usize = 512;
/// How long a finished plugin's pipes may be held open by its children.
const DRAIN: Duration = Duration::from_secs(1);
/// Tries at a binary that is just being written, and the pause between them.
const BUSY_TRIES: u32 = 5;
const BUSY_PAUSE: Duration = Duration::from_millis(100);

/// What a plugin is told through its environment.
#[derive(Debug, Clone)]
pub(super) struct Invocation<'a> {
    /// `ADD`, `DEL`, `CHECK`, `GC`, `STATUS` or `VERSION`.
    pub(super) command: &'static str,
    /// Container id; empty for commands about no container.
    pub(super) container_id: &'a str,
    /// Path of the network namespace; empty when it is gone.
    pub(super) netns: &'a str,
    /// Interface to make.
    pub(super) ifname: &'a str,
    /// `CNI_ARGS`.
    pub(super) args: &'a str,
    /// Directories of plugin binaries.
    pub(super) bin_dirs: &'a [PathBuf],
    /// When the plugin is killed.
    pub(super) deadline: Instant,
}

/// Runs the plugin `kind` with `stdin` and returns what it printed.
///
/// # Errors
/// Every way a plugin can fail, see [`Failure`].
///
/// # Cancellation
/// Dropping the future kills the plugin and its children.
pub(super) async fn run(
    kind: &str,
    stdin: &[u8],
    call: &Invocation<'_>,
) -> Result<Vec<u8>, Failure> {
    let started = Instant::now();
    let path = find(kind, call.bin_dirs)?;
    let mut child = spawn(&path, call).await?;
    let mut group = Group(child.id());
    let mut input = child.stdin.take().expect("stdin is piped");
    let stdout = child.stdout.take().expect("stdout is piped");
    let stderr = child.stderr.take().expect("stderr is piped");
    let mut output = Captured::default();
    let mut errors = Captured::default();
    let feed = async {
        // A plugin may answer without reading; then the write fails and means nothing.
        let _ = input.write_all(stdin).await;
        drop(input);
    };
    let work = async {
        let reads = async {
            tokio::join!(
                output.head(stdout, MAX_STDOUT),
                errors.tail(stderr, MAX_STDERR)
            )
        };
        tokio::pin!(reads);
        let finish = async {
            let ((), status) = tokio::join!(feed, child.wait());
            status
        };
        tokio::pin!(finish);
        tokio::select! {
            _ = &mut reads => finish.await,
            status = &mut finish => {
                let _ = timeout(DRAIN, reads).await;
                status
            }
        }
    };
    let ended = timeout_at(call.deadline, work).await;
    let stderr = errors.text();
    match ended {
        Err(_) => {
            group.kill();
            let _ = timeout(DRAIN, child.wait()).await;
            Err(Failure::Hung {
                limit: call.deadline.duration_since(started),
                stderr,
            })
        }
        Ok(Err(source)) => Err(Failure::Spawn { path, source }),
        // It may have ended by the signal for writing where nobody reads.
        Ok(Ok(_)) if output.overflowed => {
            group.reaped();
            let reason = format!("more than {MAX_STDOUT} bytes");
            Err(garbage(reason, &output.bytes, stderr))
        }
        Ok(Ok(status)) if status.success() => {
            group.reaped();
            Ok(output.bytes)
        }
        Ok(Ok(status)) => {
            group.reaped();
            Err(reported(&output.bytes, stderr, &status.to_string()))
        }
    }
}

/// A success whose output cannot be used.
pub(super) fn garbage(reason: String, output: &[u8], stderr: String) -> Failure {
    Failure::Garbage {
        reason,
        output: quoted(output),
        stderr,
    }
}

fn quoted(bytes: &[u8]) -> String {
    let head = &bytes[..bytes.len().min(MAX_QUOTED)];
    let mut text = String::from_utf8_lossy(head).into_owned();
    if bytes.len() > MAX_QUOTED {
        text.push('…');
    }
    text
}

/// The error object a failed plugin printed, or the best account of a failure without one.
fn reported(output: &[u8], stderr: String, status: &str) -> Failure {
    let message = |message: String, stderr: String| Failure::Reported {
        code: 0,
        message,
        details: String::new(),
        stderr,
    };
    if output.iter().all(u8::is_ascii_whitespace) {
        return if stderr.is_empty() {
            message(
                format!("netplugin failed with no error message: {status}"),
                stderr,
            )
        } else {
            message(format!("netplugin failed: {stderr:?}"), String::new())
        };
    }
    match serde_json::from_slice::<Value>(output) {
        Ok(Value::Object(object)) => {
            let text = |key: &str| {
                let text = object.get(key).and_then(Value::as_str).unwrap_or_default();
                quoted(text.as_bytes())
            };
            let code = object.get("code").and_then(Value::as_u64).unwrap_or(0);
            Failure::Reported {
                code: u32::try_from(code).unwrap_or(u32::MAX),
                message: text("msg"),
                details: text("details"),
                stderr,
            }
        }
        Ok(_) | Err(_) => message(
            format!(
                "netplugin failed ({status}) but error parsing its diagnostic message {:?}",
                quoted(output)
            ),
            stderr,
        ),
    }
}

/// Looks the binary up in the directories, first match wins.
pub(super) fn find(kind: &str, dirs: &[PathBuf]) -> Result<PathBuf, Failure> {
    let executable = |path: &Path| {
        std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    dirs.iter()
        .map(|dir| dir.join(kind))
        .find(|path| executable(path))
        .ok_or_else(|| Failure::Missing {
            kind: kind.to_owned(),
            dirs: dirs
                .iter()
                .map(|d| d.display().to_string())
                .collect::<Vec<_>>()
                .join(" "),
        })
}

async fn spawn(path: &Path, call: &Invocation<'_>) -> Result<Child, Failure> {
    let dirs = std::env::join_paths(call.bin_dirs).unwrap_or_default();
    let mut tries = 0;
    loop {
        let spawned = Command::new(path)
            .env("CNI_COMMAND", call.command)
            .env("CNI_CONTAINERID", call.container_id)
            .env("CNI_NETNS", call.netns)
            .env("CNI_IFNAME", call.ifname)
            .env("CNI_ARGS", call.args)
            .env("CNI_PATH", &dirs)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn();
        match spawned {
            Err(e) if e.kind() == std::io::ErrorKind::ExecutableFileBusy && tries < BUSY_TRIES => {
                tries += 1;
                tokio::time::sleep(BUSY_PAUSE).await;
            }
            Ok(child) => return Ok(child),
            Err(source) => {
                return Err(Failure::Spawn {
                    path: path.to_owned(),
                    source,
                });
            }
        }
    }
}

/// The plugin's process group, killed unless its leader was waited for.
struct Group(Option<u32>);

impl Group {
    fn reaped(&mut self) {
        self.0 = None;
    }

    fn kill(&mut self) {
        if let Some(pid) = self.0.take().and_then(|pid| i32::try_from(pid).ok()) {
            // Fails only when the whole group is gone.
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What was read from a pipe, within a bound; the rest is read and dropped.
#[derive(Default)]
struct Captured {
    bytes: Vec<u8>,
    overflowed: bool,
}

impl Captured {
    async fn head(&mut self, mut pipe: impl AsyncRead + Unpin, limit: usize) {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
            let room = limit - self.bytes.len();
            self.overflowed |= count > room;
            self.bytes.extend_from_slice(&buffer[..count.min(room)]);
            if self.overflowed {
                // Reading on would keep a plugin going that never ends.
                return;
            }
        }
    }

    async fn tail(&mut self, mut pipe: impl AsyncRead + Unpin, limit: usize) {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
            self.bytes.extend_from_slice(&buffer[..count]);
            let excess = self.bytes.len().saturating_sub(limit);
            self.bytes.drain(..excess);
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).trim().to_owned()
    }
}
