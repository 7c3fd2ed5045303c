//! What the streaming server needs from the runtime: three calls, each owning its streams.

use std::fmt;
use std::pin::Pin;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

/// A stream to read from.
pub type BoxRead = Pin<Box<dyn AsyncRead + Send>>;
/// A stream to write to.
pub type BoxWrite = Pin<Box<dyn AsyncWrite + Send>>;

/// A stream in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}
/// A boxed stream in both directions.
pub type BoxDuplex = Box<dyn Duplex>;

/// Size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// Streams of one exec or attach. Those that the client did not ask for are `None`.
pub struct ExecIo {
    /// Ends when the client closes its side, or goes away.
    pub stdin: Option<BoxRead>,
    /// Fails with `BrokenPipe` once the client is gone; an exec must then drop the output and
    /// go on until its process exits.
    pub stdout: Option<BoxWrite>,
    /// As `stdout`; never there with a terminal.
    pub stderr: Option<BoxWrite>,
    /// The newest terminal size; `None` until the client sent one. Closed when the client is gone.
    pub resize: watch::Receiver<Option<TerminalSize>>,
    /// Whether the process is to have a terminal.
    pub tty: bool,
}

impl fmt::Debug for ExecIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecIo")
            .field("stdin", &self.stdin.is_some())
            .field("stdout", &self.stdout.is_some())
            .field("stderr", &self.stderr.is_some())
            .field("tty", &self.tty)
            .finish_non_exhaustive()
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus {
    /// Its exit code; 128 and the signal's number when one ended it.
    pub code: u32,
}

/// Why the runtime could not do it: a message for the person at the client.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct BackendError(pub String);

/// The runtime, as the streaming server sees it.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Runs a command in a running container until it exits and its output is written.
    ///
    /// # Errors
    /// When it cannot be started, not when it fails.
    ///
    /// # Cancellation
    /// Dropped only when the server shuts down; a client's going away shows in the streams.
    async fn exec(
        &self,
        container_id: &str,
        command: &[String],
        io: ExecIo,
    ) -> Result<ExitStatus, BackendError>;

    /// Connects to a running container's own process until that exits.
    ///
    /// # Errors
    /// When the container is not running.
    ///
    /// # Cancellation
    /// Dropped when the client goes away: it must detach and leave the container alone.
    async fn attach(&self, container_id: &str, io: ExecIo) -> Result<(), BackendError>;

    /// Connects to `port` on the pod's localhost and copies in both directions until done.
    ///
    /// # Errors
    /// When nothing listens there, or the pod is not ready.
    ///
    /// # Cancellation
    /// Dropped when the client goes away.
    async fn port_forward(
        &self,
        sandbox_id: &str,
        port: u16,
        stream: BoxDuplex,
    ) -> Result<(), BackendError>;
}
