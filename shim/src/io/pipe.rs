//! Pipes between a process and us, and copying without memory of its own.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Gid, OFlags, Uid};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Error, Result};

/// Bytes moved by one splice; more than any pipe holds.
const SPLICE_BYTES: usize = 1 << 20;
/// Bytes of one buffered read. Allocated only while there is something to copy.
pub(crate) const BLOCK_BYTES: usize = 32 * 1024;
/// Blocks copied before others get a turn.
const TURNS: u32 = 8;

/// A pipe whose read end the process gets.
///
/// # Errors
/// `System` when descriptors run out, or the owner cannot be set.
pub(crate) fn pair(owner: (u32, u32)) -> Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = make()?;
    give(&reader, owner)?;
    Ok((reader, writer))
}

/// A pipe whose write end the process gets: (ours, the process's).
///
/// # Errors
/// As [`pair`].
pub(crate) fn output_pair(owner: (u32, u32)) -> Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = make()?;
    give(&writer, owner)?;
    Ok((reader, writer))
}

fn make() -> Result<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(Error::system("create a pipe"))
}

fn give(end: &OwnedFd, (uid, gid): (u32, u32)) -> Result<()> {
    if (uid, gid) == (0, 0) {
        return Ok(());
    }
    rustix::fs::fchown(end, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
        .map_err(Error::system("give a pipe to its user"))
}

/// Makes our end of something non-blocking and watched by the reactor.
///
/// # Errors
/// `System` when it cannot be watched.
pub(crate) fn watch(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>> {
    watch_raw(fd).map_err(Error::system("watch a stream"))
}

/// As [`watch`], with the bare error.
pub(crate) fn watch_raw(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    let interest = match flags & OFlags::RWMODE {
        OFlags::WRONLY => Interest::WRITABLE,
        OFlags::RDWR => Interest::READABLE | Interest::WRITABLE,
        _ => Interest::READABLE,
    };
    crate::sys::register(fd, interest)
}

fn is_ready(fd: &OwnedFd, flag: PollFlags) -> bool {
    let mut polled = [PollFd::new(fd, flag)];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // Anything but "nothing to report" (hang-ups, errors) is for the next call to meet.
    rustix::event::poll(&mut polled, Some(&now)).map_or(true, |n| n > 0)
}

/// Moves everything from one pipe to another inside the kernel, until the end of input.
///
/// # Errors
/// When either side fails.
///
/// # Cancellation
/// Safe: what was taken from `from` is in `to`.
pub(crate) async fn splice(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut turn = 0;
    loop {
        // Both guards are taken before the attempt: readiness that arrives after it is not cleared.
        let mut readable = from.readable().await?;
        let mut writable = to.writable().await?;
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        match rustix::pipe::splice(
            from.get_ref(),
            None,
            to.get_ref(),
            None,
            SPLICE_BYTES,
            flags,
        ) {
            Ok(0) => return Ok(()),
            Ok(_) => {
                turn += 1;
                if turn % TURNS == 0 {
                    tokio::task::yield_now().await;
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                // The error does not say which side is to wait for.
                let input = is_ready(from.get_ref(), PollFlags::IN);
                let room = is_ready(to.get_ref(), PollFlags::OUT);
                if !input {
                    readable.clear_ready();
                }
                if !room {
                    writable.clear_ready();
                }
                if input && room {
                    tokio::task::yield_now().await;
                }
            }
            Err(Errno::INVAL) => return copy(from, to).await,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits for data and reads a block of it; an empty block is the end. A terminal without a process
/// behind it ends likewise. The block exists only while it is full: idle streams cost no memory.
///
/// # Errors
/// When the read fails.
pub(crate) async fn next_block(from: &AsyncFd<OwnedFd>) -> io::Result<Vec<u8>> {
    loop {
        let mut ready = from.readable().await?;
        let mut block = Vec::with_capacity(BLOCK_BYTES);
        let attempt = ready.try_io(|fd| {
            Ok(rustix::io::read(
                fd.get_ref().as_fd(),
                spare_capacity(&mut block),
            )?)
        });
        match attempt {
            Ok(Ok(_)) => return Ok(block),
            Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(Vec::new()),
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

/// Reads what is there now, at most one block.
pub(crate) fn available(from: &AsyncFd<OwnedFd>) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK_BYTES);
    // Nothing there and a failure are the same to the caller: no more output.
    let _ = rustix::io::read(from.get_ref(), spare_capacity(&mut block));
    block
}

/// Writes all of it.
///
/// # Errors
/// When the write fails.
pub(crate) async fn write_all(to: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = to.writable().await?;
        match ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref().as_fd(), bytes)?)) {
            Ok(Ok(count)) => bytes = &bytes[count..],
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
    Ok(())
}

/// Copies with a buffer, for ends that cannot splice.
///
/// # Errors
/// When either side fails.
pub(crate) async fn copy(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut turn = 0;
    loop {
        let block = next_block(from).await?;
        if block.is_empty() {
            return Ok(());
        }
        write_all(to, &block).await?;
        turn += 1;
        if turn % TURNS == 0 {
            tokio::task::yield_now().await;
        }
    }
}

/// Appends everything to a file. When the file fails the stream is drained all the same, so that
/// a full disk does not block the process.
///
/// # Errors
/// When the read fails; the first failure to write, at the end.
pub(crate) async fn drain_to_file(from: &AsyncFd<OwnedFd>, mut file: File) -> io::Result<()> {
    let mut failure = None;
    let mut turn = 0;
    loop {
        let block = next_block(from).await?;
        if block.is_empty() {
            return failure.map_or(Ok(()), Err);
        }
        if let Err(error) = file.write_all(&block)
            && failure.is_none()
        {
            tracing::warn!(%error, "output cannot be written to its file");
            failure = Some(error);
        }
        turn += 1;
        if turn % TURNS == 0 {
            tokio::task::yield_now().await;
        }
    }
}
