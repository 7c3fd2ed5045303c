//! Container logs in CRI's format, written by the shim itself: they go on while the daemon is down.
//!
//! Asked for by `cri-log:///path?max=BYTES&tee=/fifo` as stdout and stderr of a task (`stream=` is
//! accepted and ignored: the field that carries the URI says it). What a record looks like is told
//! at [`lighter_floor::cri_log`]. `max=-1` means no limit; to bound the memory such lines are still
//! cut at [`MAX_LINE_BYTES`](lighter_floor::cri_log::MAX_LINE_BYTES).
//!
//! The log is reopened by `lighter.shim.v1.Log/Reopen`. Readers attached by `Attach` (or `tee`)
//! get the raw bytes through a fifo of theirs; one that goes away is forgotten, a slow one holds
//! back its container and nobody else.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use lighter_floor::cri_log::Cutter;
pub(crate) use lighter_floor::cri_log::Stream;
use lighter_floor::timestamp::Rfc3339;
use rustix::fs::{Mode, OFlags};
use tokio::io::unix::AsyncFd;
use tracing::warn;

use super::pipe;
use crate::error::{Error, Result};

/// Attached readers per process.
pub(crate) const MAX_ATTACHED: usize = 64;
/// Blocks copied before others get a turn.
const TURNS: u32 = 8;

#[derive(Debug)]
struct Open {
    file: File,
    /// Whether the last write failed, so that a full disk is reported once.
    failing: bool,
    /// Fifos of readers not opened yet, then opened.
    waiting: Vec<(Stream, PathBuf)>,
    attached: Vec<(Stream, std::sync::Arc<AsyncFd<OwnedFd>>)>,
}

/// One log file, shared by both streams of a process.
#[derive(Debug)]
pub(crate) struct LogFile {
    path: PathBuf,
    open: Mutex<Open>,
}

fn open_file(path: &Path) -> Result<File> {
    if let Some(parent) = path.parent() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)
            .map_err(Error::io("create log directory", parent))?;
    }
    File::options()
        .append(true)
        .create(true)
        .mode(0o640)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(Error::io("open log", path))
}

impl LogFile {
    /// Opens the log for appending, with its directories.
    ///
    /// # Errors
    /// `Io` when that fails.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = open_file(path)?;
        let open = Open {
            file,
            failing: false,
            waiting: Vec::new(),
            attached: Vec::new(),
        };
        Ok(Self {
            path: path.to_owned(),
            open: Mutex::new(open),
        })
    }

    fn locked(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the log is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Goes on in a new file of the same name. No record is lost or split.
    ///
    /// # Errors
    /// `Io`; the old file stays in use then.
    pub(crate) fn reopen(&self) -> Result<()> {
        let file = open_file(&self.path)?;
        let mut open = self.locked();
        open.file = file;
        open.failing = false;
        Ok(())
    }

    /// Sends the raw bytes of a stream to a fifo as well, as soon as somebody reads from it.
    ///
    /// Returns whether there was room for one more.
    pub(crate) fn attach(&self, stream: Stream, fifo: PathBuf) -> bool {
        let mut open = self.locked();
        if open.waiting.len() + open.attached.len() >= MAX_ATTACHED {
            return false;
        }
        open.waiting.push((stream, fifo));
        open.connect();
        true
    }

    fn write(&self, records: &[u8]) {
        if records.is_empty() {
            return;
        }
        let mut open = self.locked();
        match open.file.write_all(records) {
            Ok(()) => open.failing = false,
            Err(error) => {
                if !open.failing {
                    warn!(%error, path = %self.path.display(), "log records are lost");
                }
                open.failing = true;
            }
        }
    }

    async fn tee(&self, stream: Stream, bytes: &[u8]) {
        let readers: Vec<_> = {
            let mut open = self.locked();
            if open.waiting.is_empty() && open.attached.is_empty() {
                return;
            }
            open.connect();
            let of_stream = open.attached.iter().filter(|(of, _)| *of == stream);
            of_stream.map(|(_, reader)| reader.clone()).collect()
        };
        for reader in readers {
            if pipe::write_all(&reader, bytes).await.is_err() {
                let mut open = self.locked();
                open.attached
                    .retain(|(_, other)| !std::sync::Arc::ptr_eq(other, &reader));
            }
        }
    }

    /// The stream ended: its readers see the end.
    fn end(&self, stream: Stream) {
        let mut open = self.locked();
        open.connect();
        open.attached.retain(|(of, _)| *of != stream);
        open.waiting.retain(|(of, _)| *of != stream);
    }
}

impl Open {
    /// Opens the fifos that have a reader by now.
    fn connect(&mut self) {
        let attached = &mut self.attached;
        self.waiting.retain(|(stream, path)| {
            let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            match rustix::fs::open(path, flags, Mode::empty()) {
                Ok(fd) => {
                    if let Ok(fd) = pipe::watch_raw(fd) {
                        attached.push((*stream, std::sync::Arc::new(fd)));
                    }
                    false
                }
                Err(rustix::io::Errno::NXIO) => true,
                Err(_) => false,
            }
        });
    }
}

/// Copies a stream into the log until its end. Failures to write never stop the draining.
///
/// # Errors
/// When the stream cannot be read.
pub(crate) async fn copy(
    from: &AsyncFd<OwnedFd>,
    log: &LogFile,
    stream: Stream,
    limit: usize,
) -> io::Result<()> {
    let mut cutter = Cutter::new(stream, limit);
    let mut turn = 0;
    loop {
        let block = pipe::next_block(from).await;
        let stamp = Rfc3339::of(SystemTime::now());
        let mut records = Vec::new();
        match block {
            Ok(block) if !block.is_empty() => {
                cutter.push(&block, &stamp, &mut records);
                log.write(&records);
                log.tee(stream, &block).await;
            }
            end => {
                cutter.finish(&stamp, &mut records);
                log.write(&records);
                log.end(stream);
                return end.map(|_| ());
            }
        }
        turn += 1;
        if turn % TURNS == 0 {
            tokio::task::yield_now().await;
        }
    }
}
