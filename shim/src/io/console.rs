//! Terminals: the socket on which a runtime hands over the master side of one.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use tokio::io::Interest;
use tokio::net::UnixListener;

use crate::error::{Error, Result};

/// How long a runtime may take to send the terminal after it said that the process exists.
const TERMINAL_SECONDS: u64 = 30;

/// A listening socket for one terminal; removed when dropped.
#[derive(Debug)]
pub(crate) struct ConsoleSocket {
    path: PathBuf,
    listener: UnixListener,
}

impl ConsoleSocket {
    /// Binds a socket of a fresh name in `dir`.
    ///
    /// # Errors
    /// `Io` when it cannot be bound.
    pub(crate) fn bind(dir: &Path) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("pty-{}-{number}", std::process::id()));
        // A predecessor of the same pid may have left its socket.
        let _ = std::fs::remove_file(&path);
        let listener =
            UnixListener::bind(&path).map_err(Error::io("bind console socket", &path))?;
        Ok(Self { path, listener })
    }

    /// Where the runtime connects to.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the terminal.
    ///
    /// # Errors
    /// `Timeout` when none arrives; `Runtime` when something else does.
    pub(crate) async fn receive(self) -> Result<OwnedFd> {
        let limit = Duration::from_secs(TERMINAL_SECONDS);
        tokio::time::timeout(limit, self.receive_any())
            .await
            .map_err(|_| Error::Timeout {
                what: "terminal from the OCI runtime".to_owned(),
                seconds: TERMINAL_SECONDS,
            })?
    }

    async fn receive_any(&self) -> Result<OwnedFd> {
        let (stream, _) = self
            .listener
            .accept()
            .await
            .map_err(Error::io("accept on", &self.path))?;
        stream
            .async_io(Interest::READABLE, || {
                let mut name = [0; 4096];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = RecvAncillaryBuffer::new(&mut space);
                rustix::net::recvmsg(
                    stream.as_fd(),
                    &mut [IoSliceMut::new(&mut name)],
                    &mut ancillary,
                    RecvFlags::CMSG_CLOEXEC,
                )?;
                Ok(ancillary.drain().find_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                    _ => None,
                }))
            })
            .await
            .map_err(Error::io("receive on", &self.path))?
            .ok_or_else(|| Error::Runtime("the OCI runtime sent no terminal".to_owned()))
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
