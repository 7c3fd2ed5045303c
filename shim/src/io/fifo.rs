//! Named pipes made by the client.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

use super::pipe;
use crate::error::{Error, Result};

/// First and longest pause between looks for a reader.
const READER_POLL: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(200));

/// Opens a fifo for output, once somebody reads from it.
///
/// Waiting for the reader is what keeps the output of a short-lived process from being lost when
/// the client opens its end a moment later. Afterwards the fifo is held open for both directions,
/// so that a reader may vanish and another come: the writer only feels a full pipe.
///
/// # Errors
/// When the fifo cannot be opened. The wait for a reader has no end but cancellation.
pub(crate) async fn open_output(path: &Path) -> std::io::Result<AsyncFd<OwnedFd>> {
    let (mut pause, longest) = READER_POLL;
    let probe = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let writer = loop {
        match rustix::fs::open(path, probe, Mode::empty()) {
            Ok(writer) => break writer,
            Err(Errno::NXIO) => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(longest);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    let both = rustix::fs::open(
        path,
        OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    drop(writer);
    pipe::watch_raw(both)
}

/// Opens a fifo for input: the reader, and a writer of our own that keeps it from ending.
///
/// # Errors
/// `Io` when it cannot be opened.
pub(crate) fn open_input(path: &Path) -> Result<(OwnedFd, OwnedFd)> {
    let open = |access: OFlags| {
        rustix::fs::open(
            path,
            access | OFlags::NONBLOCK | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(std::io::Error::from)
    };
    let reader = open(OFlags::RDONLY).map_err(Error::io("open stream", path))?;
    let keeper = open(OFlags::WRONLY).map_err(Error::io("open stream", path))?;
    Ok((reader, keeper))
}
