//! A process's streams connected to ours: copying, window size, signals, and the end of all of it.
//!
//! ```text
//! prepare ── fifos made, our ends open, terminal raw
//!    │   (create or exec, start: the caller)
//!    ├── detach ── fifos stay for a later `tasks attach`
//!    └── run ──── copy until exit ── delete the process ── drain ── terminal restored
//! ```

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::advice;
use crate::fifo::{self, Ends, Fifos, Paths};
use crate::process::{Process, exit_code};
use crate::signals::{self, Forwarded};
use crate::terminal::{self, Raw};

/// Bytes copied at a time; a pipe holds 64 KiB by default.
const CHUNK: usize = 32 << 10;
/// Chunks of input read ahead of the container; more only costs memory.
const INPUT_AHEAD: usize = 4;
/// After the process has been deleted its streams are closed. Output that still comes is waited
/// for; this long a silence ends it, in case something inherited the streams.
const DRAIN_SILENCE: Duration = Duration::from_secs(2);

/// Where a process's streams go.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct IoFlags {
    /// Send all IO to /dev/null
    #[arg(long)]
    pub(crate) null_io: bool,
    /// Let the shim log to this URI (file:///path, binary:///program?arg) instead of to us
    #[arg(long, value_name = "URI", conflicts_with = "null_io")]
    pub(crate) log_uri: Option<String>,
    /// Directory for the fifos that carry the streams
    #[arg(long, value_name = "DIR")]
    pub(crate) fifo_dir: Option<PathBuf>,
}

/// What became of a process that we ran in the foreground.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It ended, with this code; it has been deleted.
    Exited(u8),
    /// We were told to end by this signal; it may still run.
    Interrupted(u8),
}

impl Outcome {
    /// Our own exit code.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Exited(code) => code,
            Self::Interrupted(signal) => signals::EXIT_BASE.saturating_add(signal),
        }
    }
}

/// Streams made ready for a process.
#[derive(Debug)]
pub(crate) struct Session {
    fifos: Option<Fifos>,
    paths: Paths,
    ends: Option<Ends>,
    /// Held for its drop, which gives the terminal back.
    _raw: Option<Raw>,
    terminal: bool,
}

impl Session {
    /// Prepares the streams of a new process `id`.
    pub(crate) fn prepare(
        flags: &IoFlags,
        id: &str,
        terminal: bool,
        foreground: bool,
    ) -> anyhow::Result<Self> {
        let raw = (terminal && foreground).then(Raw::enter).transpose()?;
        let mut session = Self {
            fifos: None,
            paths: Paths::default(),
            ends: None,
            _raw: raw,
            terminal,
        };
        if flags.null_io {
            return Ok(session);
        }
        if let Some(uri) = &flags.log_uri {
            if !uri.contains("://") {
                return advice::fail(
                    format!("{uri:?} is no log URI"),
                    "write it like file:///var/log/x.log or binary:///usr/bin/logger?key=value",
                );
            }
            session.paths.stdout.clone_from(uri);
            if !terminal {
                session.paths.stderr.clone_from(uri);
            }
            return Ok(session);
        }
        let fifos = Fifos::create(flags.fifo_dir.as_deref(), id, terminal)?;
        session.paths = fifos.paths().clone();
        session.ends = Some(Ends::open(&session.paths)?);
        session.fifos = Some(fifos);
        Ok(session)
    }

    /// Connects to the streams that a running process has already.
    pub(crate) fn join(paths: Paths, terminal: bool) -> anyhow::Result<Self> {
        for path in [&paths.stdout, &paths.stderr] {
            let is_uri = path.contains("://");
            if is_uri || (!path.is_empty() && !Path::new(path).exists()) {
                return advice::fail(
                    format!("cannot attach: the output goes to {path}"),
                    "only a process whose streams are fifos can be attached to",
                );
            }
        }
        let raw = terminal.then(Raw::enter).transpose()?;
        let ends = Some(Ends::open(&paths)?);
        Ok(Self {
            fifos: None,
            paths,
            ends,
            _raw: raw,
            terminal,
        })
    }

    /// The paths for the request that makes the process.
    pub(crate) fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Leaves the process alone, with its fifos.
    pub(crate) fn detach(self) {
        if let Some(fifos) = self.fifos {
            fifos.keep();
        }
    }

    /// Sizes a new process's terminal before its program can look at it.
    pub(crate) async fn fit(&self, process: &Process) {
        if let (true, Some(size)) = (self.terminal, terminal::size()) {
            // The process may have ended, or have its terminal only once it runs.
            let _ = process.resize(size).await;
        }
    }

    /// Copies streams and passes on signals until the process ends.
    pub(crate) async fn run(mut self, process: &Process) -> anyhow::Result<Outcome> {
        let mut output = JoinSet::new();
        let mut input = JoinSet::new();
        let (progress, mut moved) = mpsc::channel(1);
        if let Some(ends) = self.ends.take() {
            if let Some(pipe) = ends.stdout {
                output.spawn(copy_out(pipe, tokio::io::stdout(), progress.clone()));
            }
            if let Some(pipe) = ends.stderr {
                output.spawn(copy_out(pipe, tokio::io::stderr(), progress.clone()));
            }
            if let Some(pipe) = ends.stdin {
                input.spawn(copy_in(pipe, process.clone()));
            }
        }
        drop(progress);
        self.fit(process).await;
        let status = match self.watch(process).await? {
            Ok(status) => status,
            Err(signal) => {
                if let Some(fifos) = self.fifos.take() {
                    fifos.keep();
                }
                return Ok(Outcome::Interrupted(exit_code(signal)));
            }
        };
        input.abort_all();
        // While the shim waits for its copies to end, ours go on.
        if let Err(error) = process.delete().await
            && !advice::is_not_found(&error)
        {
            return Err(error.into());
        }
        let mut silence = Box::pin(tokio::time::sleep(DRAIN_SILENCE));
        loop {
            tokio::select! {
                done = output.join_next() => if done.is_none() { break },
                Some(()) = moved.recv() => silence = Box::pin(tokio::time::sleep(DRAIN_SILENCE)),
                () = &mut silence => break,
            }
        }
        Ok(Outcome::Exited(exit_code(status)))
    }

    /// Waits for the exit; meanwhile follows the window and passes on signals. The inner error is
    /// the signal that ended the wait.
    async fn watch(&self, process: &Process) -> anyhow::Result<Result<u32, u32>> {
        const WINDOW_CHANGED: u32 = 28;
        // With a terminal ^C and its like are bytes of input; only the ends of ctr itself remain.
        let mut caught = if self.terminal {
            Forwarded::catch(&[1, signals::TERM, WINDOW_CHANGED])?
        } else {
            Forwarded::all()?
        };
        let mut exit = Box::pin(process.wait());
        loop {
            tokio::select! {
                status = &mut exit => return Ok(Ok(status?)),
                signal = caught.next() => match signal {
                    WINDOW_CHANGED => self.fit(process).await,
                    signal if self.terminal => return Ok(Err(signal)),
                    signal => match process.kill(signal, false).await {
                        Err(error) if !advice::is_not_found(&error) => {
                            eprintln!("ctr: signal {signal} was not passed on: {}", error.message());
                        }
                        _ => {}
                    },
                },
            }
        }
    }
}

/// Copies a stream to ours until its end, reporting each piece on `progress` (full = not needed).
async fn copy_out(
    pipe: pipe::Receiver,
    mut to: impl AsyncWrite + Unpin,
    progress: mpsc::Sender<()>,
) {
    let mut buffer = vec![0; CHUNK];
    let mut writable = true;
    loop {
        let count = match fifo::read(&pipe, &mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        let _ = progress.try_send(());
        // When our reader has gone the process still must not block.
        if writable {
            writable = to.write_all(&buffer[..count]).await.is_ok() && to.flush().await.is_ok();
        }
    }
}

/// Copies our input until its end, then tells the process that there is no more.
async fn copy_in(pipe: pipe::Sender, process: Process) {
    let mut chunks = read_stdin();
    while let Some(chunk) = chunks.recv().await {
        if fifo::write_all(&pipe, &chunk).await.is_err() {
            return;
        }
    }
    // Ours first: the process sees the end when the last writer has closed.
    drop(pipe);
    if let Err(error) = process.close_stdin().await
        && !advice::is_not_found(&error)
    {
        eprintln!(
            "ctr: the end of the input was not passed on: {}",
            error.message()
        );
    }
}

/// Reads standard input in a thread of its own: a terminal must not be made non-blocking, because
/// that would change it for the shell as well. The thread ends with the process.
fn read_stdin() -> mpsc::Receiver<Vec<u8>> {
    let (chunks, receiver) = mpsc::channel(INPUT_AHEAD);
    std::thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        loop {
            match std::io::stdin().lock().read(&mut buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return,
                Ok(count) => {
                    if chunks.blocking_send(buffer[..count].to_vec()).is_err() {
                        return;
                    }
                }
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_uri_goes_to_both_streams_but_a_terminal_has_one() {
        let flags = IoFlags {
            log_uri: Some("file:///x".to_owned()),
            ..Default::default()
        };
        let plain = Session::prepare(&flags, "c", false, true).unwrap();
        assert_eq!(
            (plain.paths().stdout.as_str(), plain.paths().stderr.as_str()),
            ("file:///x", "file:///x")
        );
        let console = Session::prepare(&flags, "c", true, false).unwrap();
        assert_eq!(console.paths().stderr, "");
    }

    #[test]
    fn a_path_is_no_log_uri() {
        let flags = IoFlags {
            log_uri: Some("/x".to_owned()),
            ..Default::default()
        };
        assert!(Session::prepare(&flags, "c", false, true).is_err());
    }

    #[test]
    fn streams_that_are_no_fifos_cannot_be_joined() {
        let paths = Paths {
            stdout: "file:///x".to_owned(),
            ..Paths::default()
        };
        assert!(Session::join(paths, false).is_err());
    }

    #[test]
    fn an_interrupted_run_exits_like_the_signal() {
        assert_eq!(Outcome::Interrupted(15).code(), 143);
        assert_eq!(Outcome::Exited(7).code(), 7);
    }
}
