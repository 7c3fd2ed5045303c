//! Where the standard streams of a process go.
//!
//! The client names each stream by a URI; no scheme means a fifo:
//!
//! | URI | Meaning |
//! |---|---|
//! | empty | `/dev/null` |
//! | `/path`, `fifo:///path` | a fifo the client made; a plain file is appended to |
//! | `file:///path` | appended to, made with its directories when missing |
//! | `binary:///path?k=v`, `binary-v2:///path?k=v` | a logging program, see [`logger`] |
//! | `cri-log:///path?max=16384&tee=/fifo` | a CRI log file, see [`cri_log`]; ours alone |
//!
//! The process gets pipes (or a terminal), never the client's files: readers may vanish, be slow or
//! be replaced without the process noticing more than back-pressure. Nothing is buffered beyond the
//! pipes and one block per active copy, so a flood costs its own container time and nobody memory.

pub(crate) mod console;
pub(crate) mod cri_log;
pub(crate) mod fifo;
pub(crate) mod logger;
pub(crate) mod pipe;
pub(crate) mod uri;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

use self::cri_log::LogFile;
use self::logger::Logger;
use self::uri::Target;
use crate::error::{Error, Result};
use crate::reaper::Reaper;

/// The streams a client asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stdio {
    /// URI of standard input.
    pub(crate) stdin: String,
    /// URI of standard output.
    pub(crate) stdout: String,
    /// URI of standard error; unused with a terminal.
    pub(crate) stderr: String,
    /// Whether the process gets a terminal.
    pub(crate) terminal: bool,
}

/// What opening streams needs to know.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    /// Container id, for logging programs.
    pub(crate) id: &'a str,
    /// Namespace, for logging programs.
    pub(crate) namespace: &'a str,
    /// Owner of the process's ends of the pipes.
    pub(crate) owner: (u32, u32),
    /// For the exits of logging programs.
    pub(crate) reaper: &'a Reaper,
}

/// What the new process is given.
#[derive(Debug)]
pub(crate) enum ChildStdio {
    /// Descriptors 0, 1 and 2.
    Streams {
        /// Standard input.
        stdin: OwnedFd,
        /// Standard output.
        stdout: OwnedFd,
        /// Standard error.
        stderr: OwnedFd,
    },
    /// A terminal, whose other end the runtime hands back.
    Terminal,
}

/// Our side of a process's streams.
#[derive(Debug)]
pub(crate) struct ProcessIo {
    stdio: Stdio,
    copies: TaskTracker,
    stop: CancellationToken,
    /// Cancelled when nobody reads input any more; clients may keep their end of it open for ever.
    input_over: CancellationToken,
    /// Output is copied from when this is cancelled on: a runtime that fails writes its complaint to
    /// the process's stderr too, and the client has that as the call's error already.
    started: CancellationToken,
    /// Our own writer of the stdin fifo: while it is open a detaching client gives no end of file.
    stdin_keeper: Mutex<Option<OwnedFd>>,
    terminal: Mutex<Option<Arc<AsyncFd<OwnedFd>>>>,
    loggers: Mutex<Vec<Logger>>,
    log: Mutex<Option<Arc<LogFile>>>,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ProcessIo {
    /// Opens the streams and starts to copy input; output follows at [`ProcessIo::started`]. The
    /// process's ends come back for the runtime.
    ///
    /// # Errors
    /// `InvalidArgument` for a URI that means nothing; `Io` for one that cannot be opened.
    pub(crate) async fn open(stdio: &Stdio, context: &Context<'_>) -> Result<(Self, ChildStdio)> {
        let stop = CancellationToken::new();
        let io = Self {
            stdio: stdio.clone(),
            copies: TaskTracker::new(),
            input_over: stop.child_token(),
            stop,
            started: CancellationToken::new(),
            stdin_keeper: Mutex::new(None),
            terminal: Mutex::new(None),
            loggers: Mutex::new(Vec::new()),
            log: Mutex::new(None),
        };
        let child = if stdio.terminal {
            ChildStdio::Terminal
        } else {
            match io.open_streams(context).await {
                Ok(child) => child,
                Err(error) => {
                    io.close().await;
                    return Err(error);
                }
            }
        };
        Ok((io, child))
    }

    async fn open_streams(&self, context: &Context<'_>) -> Result<ChildStdio> {
        let stdin = self.open_stdin(context)?;
        let out = uri::parse(&self.stdio.stdout)?;
        let err = uri::parse(&self.stdio.stderr)?;
        if let Target::Binary { .. } = &out {
            let (stdout, stderr) = self.open_logger(&out, context).await?;
            return Ok(ChildStdio::Streams {
                stdin,
                stdout,
                stderr,
            });
        }
        // `file://` sends both streams to the one file, as upstream does.
        let err = if let Target::File(_) = &out
            && !self.stdio.stderr.is_empty()
        {
            out.clone()
        } else {
            err
        };
        let stdout = self.open_output(&out, cri_log::Stream::Stdout, context)?;
        let stderr = self.open_output(&err, cri_log::Stream::Stderr, context)?;
        Ok(ChildStdio::Streams {
            stdin,
            stdout,
            stderr,
        })
    }

    fn open_stdin(&self, context: &Context<'_>) -> Result<OwnedFd> {
        if self.stdio.stdin.is_empty() {
            return null();
        }
        let Target::Fifo(path) = uri::parse(&self.stdio.stdin)? else {
            return Err(Error::InvalidArgument(format!(
                "stdin {}: only a fifo can be read from",
                self.stdio.stdin
            )));
        };
        let (reader, keeper) = fifo::open_input(&path)?;
        *locked(&self.stdin_keeper) = Some(keeper);
        let (process, ours) = pipe::pair(context.owner)?;
        let ours = pipe::watch(ours)?;
        let reader = pipe::watch(reader)?;
        let over = self.input_over.clone();
        self.copy(async move {
            // The end of input reaches the process when our end of its pipe is dropped here.
            let copied = over.run_until_cancelled(pipe::splice(&reader, &ours));
            copied.await.unwrap_or(Ok(()))
        });
        Ok(process)
    }

    fn open_output(
        &self,
        target: &Target,
        stream: cri_log::Stream,
        context: &Context<'_>,
    ) -> Result<OwnedFd> {
        match target {
            Target::Null => null(),
            Target::Fifo(path) if is_fifo(path)? => {
                let (ours, process) = pipe::output_pair(context.owner)?;
                let ours = pipe::watch(ours)?;
                let path = path.clone();
                let started = self.started.clone();
                self.copy(async move {
                    let sink = fifo::open_output(&path).await?;
                    started.cancelled().await;
                    pipe::splice(&ours, &sink).await
                });
                Ok(process)
            }
            Target::Fifo(path) | Target::File(path) => {
                let file = append(path)?;
                let (ours, process) = pipe::output_pair(context.owner)?;
                let ours = pipe::watch(ours)?;
                let started = self.started.clone();
                self.copy(async move {
                    started.cancelled().await;
                    pipe::drain_to_file(&ours, file).await
                });
                Ok(process)
            }
            Target::CriLog { path, limit, tee } => {
                let log = self.log_file(path)?;
                let (ours, process) = pipe::output_pair(context.owner)?;
                let ours = pipe::watch(ours)?;
                if let Some(tee) = tee {
                    log.attach(stream, tee.clone());
                }
                let limit = *limit;
                let started = self.started.clone();
                self.copy(async move {
                    started.cancelled().await;
                    cri_log::copy(&ours, &log, stream, limit).await
                });
                Ok(process)
            }
            Target::Binary { .. } => Err(Error::InvalidArgument(
                "stderr: a logging binary takes both streams through stdout's URI".to_owned(),
            )),
        }
    }

    /// The log of this process; both streams share it when they name one path.
    fn log_file(&self, path: &Path) -> Result<Arc<LogFile>> {
        let mut slot = locked(&self.log);
        if let Some(log) = slot.as_ref()
            && log.path() == path
        {
            return Ok(log.clone());
        }
        let log = Arc::new(LogFile::open(path)?);
        *slot = Some(log.clone());
        Ok(log)
    }

    async fn open_logger(
        &self,
        target: &Target,
        context: &Context<'_>,
    ) -> Result<(OwnedFd, OwnedFd)> {
        let (out_reader, stdout) = pipe::output_pair(context.owner)?;
        let (err_reader, stderr) = pipe::output_pair(context.owner)?;
        let logger = Logger::start(target, context, out_reader, err_reader).await?;
        locked(&self.loggers).push(logger);
        Ok((stdout, stderr))
    }

    /// The process exists: what comes out of it goes to the client.
    pub(crate) fn started(&self) {
        self.started.cancel();
    }

    /// Copies between a terminal and the client's streams.
    ///
    /// # Errors
    /// When a stream cannot be opened.
    pub(crate) async fn start_terminal(
        &self,
        terminal: OwnedFd,
        context: &Context<'_>,
    ) -> Result<()> {
        let terminal = Arc::new(pipe::watch(terminal)?);
        *locked(&self.terminal) = Some(terminal.clone());
        if !self.stdio.stdin.is_empty() {
            let Target::Fifo(path) = uri::parse(&self.stdio.stdin)? else {
                return Err(Error::InvalidArgument(format!(
                    "stdin {}: only a fifo can be read from",
                    self.stdio.stdin
                )));
            };
            let (reader, keeper) = fifo::open_input(&path)?;
            *locked(&self.stdin_keeper) = Some(keeper);
            let reader = pipe::watch(reader)?;
            let sink = terminal.clone();
            let end = self.stop.clone();
            // Input does not hold back the end of output: this copy is not waited for.
            self.copies.spawn(async move {
                tokio::select! {
                    () = end.cancelled() => {}
                    done = pipe::copy(&reader, &sink) => {
                        if let Err(error) = done {
                            tracing::debug!(%error, "terminal input ended");
                        }
                    }
                }
            });
        }
        match uri::parse(&self.stdio.stdout)? {
            Target::Null => {
                let sink = File::options()
                    .write(true)
                    .open("/dev/null")
                    .map_err(Error::io("open", "/dev/null"))?;
                self.output(async move { pipe::drain_to_file(&terminal, sink).await });
            }
            Target::Fifo(path) if is_fifo(&path)? => {
                self.output(async move {
                    let sink = fifo::open_output(&path).await?;
                    pipe::copy(&terminal, &sink).await
                });
            }
            Target::Fifo(path) | Target::File(path) => {
                let file = append(&path)?;
                self.output(async move { pipe::drain_to_file(&terminal, file).await });
            }
            Target::CriLog { path, limit, tee } => {
                let log = self.log_file(&path)?;
                if let Some(tee) = tee {
                    log.attach(cri_log::Stream::Stdout, tee);
                }
                self.output(async move {
                    cri_log::copy(&terminal, &log, cri_log::Stream::Stdout, limit).await
                });
            }
            target @ Target::Binary { .. } => {
                let (stdout, stderr) = self.open_logger(&target, context).await?;
                drop(stderr);
                let sink = pipe::watch(stdout)?;
                self.output(async move { pipe::copy(&terminal, &sink).await });
            }
        }
        Ok(())
    }

    /// A terminal's output: when it ends, input has nowhere to go.
    fn output(&self, work: impl Future<Output = std::io::Result<()>> + Send + 'static) {
        let end = self.stop.clone();
        self.copy(async move {
            let done = work.await;
            end.cancel();
            done
        });
    }

    fn copy(&self, work: impl Future<Output = std::io::Result<()>> + Send + 'static) {
        let stop = self.stop.clone();
        self.copies.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                done = work => if let Err(error) = done {
                    tracing::debug!(%error, "a stream ended early");
                }
            }
        });
    }

    /// The streams as the client named them.
    pub(crate) fn stdio(&self) -> &Stdio {
        &self.stdio
    }

    /// The log that can be reopened, if the streams go to one.
    pub(crate) fn log(&self) -> Option<Arc<LogFile>> {
        locked(&self.log).clone()
    }

    /// Sets the terminal's size; nothing happens without a terminal.
    ///
    /// # Errors
    /// When the terminal refuses.
    pub(crate) fn resize(&self, width: u32, height: u32) -> Result<()> {
        let terminal = locked(&self.terminal).clone();
        let Some(terminal) = terminal else {
            return Ok(());
        };
        let size = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        crate::sys::resize(
            std::os::fd::AsFd::as_fd(terminal.get_ref()),
            size(width),
            size(height),
        )
        .map_err(Error::system("resize the terminal"))
    }

    /// Ends the process's input once every client has closed it.
    pub(crate) fn close_stdin(&self) {
        locked(&self.stdin_keeper).take();
    }

    /// The process is gone: input ends, what is left of output is copied.
    pub(crate) fn finish(&self) {
        self.close_stdin();
        self.copies.close();
    }

    /// Waits until all output was copied, at most `limit`; input ends at once.
    pub(crate) async fn drained(&self, limit: Duration) {
        self.input_over.cancel();
        self.finish();
        if tokio::time::timeout(limit, self.copies.wait())
            .await
            .is_err()
        {
            warn!("output was not read in time; the rest is dropped");
        }
    }

    /// Stops all copies and logging programs and closes our ends.
    pub(crate) async fn close(&self) {
        self.stop.cancel();
        self.finish();
        self.copies.wait().await;
        locked(&self.terminal).take();
        let loggers = std::mem::take(&mut *locked(&self.loggers));
        for logger in loggers {
            logger.stop().await;
        }
        locked(&self.log).take();
    }
}

fn null() -> Result<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(Error::io("open", "/dev/null"))?;
    Ok(file.into())
}

/// Whether a path is a fifo; a missing one is an error, since nobody would ever read from it.
fn is_fifo(path: &Path) -> Result<bool> {
    let metadata = std::fs::metadata(path).map_err(Error::io("open stream", path))?;
    Ok(metadata.file_type().is_fifo())
}

/// Opens a file for appending, with its directories.
fn append(path: &PathBuf) -> Result<File> {
    if let Some(parent) = path.parent() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)
            .map_err(Error::io("create directory", parent))?;
    }
    File::options()
        .append(true)
        .create(true)
        .mode(0o644)
        .open(path)
        .map_err(Error::io("open", path))
}
