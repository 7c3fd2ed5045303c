//! Container logs in CRI's format, written by the shim itself: they go on while the daemon is down.
//!
//! Asked for by `cri-log:///path?max=BYTES&tee=/fifo` as stdout and stderr of a task (`stream=` is
//! accepted and ignored: the field that carries the URI says it). One record per line:
//!
//! ```text
//! 2026-01-02T15:04:05.000000000Z stdout F text
//! ```
//!
//! `F` ends a line, `P` is a piece of one longer than `max` bytes, or text that the stream's end
//! left without a newline. `\r` before the newline is dropped. `max=-1` means no limit; to bound the
//! memory such lines are still cut at [`MAX_LOG_LIMIT`](super::uri::MAX_LOG_LIMIT) bytes.
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

use rustix::fs::{Mode, OFlags};
use tokio::io::unix::AsyncFd;
use tracing::warn;

use super::pipe;
use super::timestamp::Rfc3339;
use crate::error::{Error, Result};

/// Attached readers per process.
pub(crate) const MAX_ATTACHED: usize = 64;
/// Blocks copied before others get a turn.
const TURNS: u32 = 8;

/// Which stream a record belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn tag(self) -> &'static [u8] {
        match self {
            Self::Stdout => b" stdout ",
            Self::Stderr => b" stderr ",
        }
    }
}

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

/// Cuts a stream into records.
#[derive(Debug)]
struct Cutter {
    tag: &'static [u8],
    limit: usize,
    /// The unfinished line, at most `limit + 1` bytes.
    line: Vec<u8>,
}

impl Cutter {
    fn new(stream: Stream, limit: usize) -> Self {
        Self {
            tag: stream.tag(),
            limit,
            line: Vec::new(),
        }
    }

    fn record(&self, out: &mut Vec<u8>, stamp: &Rfc3339, full: bool, text: &[u8]) {
        out.extend_from_slice(stamp.as_bytes());
        out.extend_from_slice(self.tag);
        out.extend_from_slice(if full { b"F " } else { b"P " });
        out.extend_from_slice(text);
        out.push(b'\n');
    }

    /// Appends the records that `bytes` complete.
    fn push(&mut self, bytes: &[u8], stamp: &Rfc3339, out: &mut Vec<u8>) {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&b| b == b'\n') {
            let (text, tail) = rest.split_at(end);
            rest = &tail[1..];
            if self.line.is_empty() {
                self.full(text, stamp, out);
            } else {
                self.line.extend_from_slice(text);
                let line = std::mem::take(&mut self.line);
                self.full(&line, stamp, out);
            }
        }
        self.line.extend_from_slice(rest);
        // A line of exactly the limit stays whole, so the byte after it decides; a `\r` does not,
        // it may belong to the newline.
        let mut start = 0;
        while self.cuttable(start) {
            self.record(out, stamp, false, &self.line[start..start + self.limit]);
            start += self.limit;
        }
        self.line.drain(..start);
    }

    fn cuttable(&self, start: usize) -> bool {
        let left = self.line.len() - start;
        left > self.limit + 1 || (left == self.limit + 1 && self.line.last() != Some(&b'\r'))
    }

    /// One whole line, without its newline.
    fn full(&self, line: &[u8], stamp: &Rfc3339, out: &mut Vec<u8>) {
        let mut text = line.strip_suffix(b"\r").unwrap_or(line);
        while text.len() > self.limit {
            let (piece, rest) = text.split_at(self.limit);
            self.record(out, stamp, false, piece);
            text = rest;
        }
        self.record(out, stamp, true, text);
    }

    /// What the end of the stream leaves.
    fn finish(&mut self, stamp: &Rfc3339, out: &mut Vec<u8>) {
        let line = std::mem::take(&mut self.line);
        for piece in line.chunks(self.limit) {
            self.record(out, stamp, false, piece);
        }
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

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use proptest::prelude::*;

    use super::*;

    const STAMP: &str = "1970-01-01T00:00:00.000000000Z stdout ";

    fn cut(limit: usize, blocks: &[&[u8]]) -> Vec<String> {
        let mut cutter = Cutter::new(Stream::Stdout, limit);
        let stamp = Rfc3339::of(UNIX_EPOCH);
        let mut out = Vec::new();
        for block in blocks {
            cutter.push(block, &stamp, &mut out);
        }
        cutter.finish(&stamp, &mut out);
        String::from_utf8(out)
            .unwrap()
            .lines()
            .map(|line| line.strip_prefix(STAMP).unwrap().to_owned())
            .collect()
    }

    #[test]
    fn lines_are_cut_where_the_limit_says() {
        assert_eq!(cut(4, &[b"abcd\n"]), ["F abcd"]);
        assert_eq!(cut(4, &[b"abcde\n"]), ["P abcd", "F e"]);
        assert_eq!(cut(4, &[b"abcdefgh\n"]), ["P abcd", "F efgh"]);
        assert_eq!(cut(4, &[b"abcd", b"\r\n", b"\n"]), ["F abcd", "F "]);
        assert_eq!(cut(4, &[b"ab\r\nc"]), ["F ab", "P c"]);
        assert_eq!(cut(4, &[b""]), Vec::<String>::new());
    }

    proptest! {
        #[test]
        fn the_split_of_the_stream_does_not_matter(
            text in "[ab\r\n]{0,80}", at in prop::collection::vec(0usize..80, 0..5), limit in 1usize..9
        ) {
            let bytes = text.as_bytes();
            let mut cuts: Vec<usize> = at.into_iter().filter(|&i| i < bytes.len()).collect();
            cuts.sort_unstable();
            let mut blocks = Vec::new();
            let mut start = 0;
            for cut in cuts {
                blocks.push(&bytes[start..cut]);
                start = cut;
            }
            blocks.push(&bytes[start..]);
            prop_assert_eq!(cut(limit, &blocks), cut(limit, &[bytes]));
        }

        #[test]
        fn the_unfinished_line_is_bounded(blocks in prop::collection::vec("[a\r]{0,50}", 0..20)) {
            let mut cutter = Cutter::new(Stream::Stdout, 8);
            let stamp = Rfc3339::of(UNIX_EPOCH);
            let mut out = Vec::new();
            for block in blocks {
                cutter.push(block.as_bytes(), &stamp, &mut out);
                prop_assert!(cutter.line.len() <= 9);
            }
        }
    }
}
