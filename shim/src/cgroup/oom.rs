//! Watching a cgroup for OOM kills.
//!
//! Version 2: `memory.events` is watched by inotify and its `oom_kill` counted. Version 1: an eventfd
//! is registered for `memory.oom_control`; it fires before the kill, and once more when the cgroup
//! goes, which does not count. The kernel's counter catches what the eventfd was too early for.

use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::EventfdFlags;
use rustix::fs::inotify;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

use super::{lookup, read};
use crate::error::{Error, Result};

/// OOM events announced at once, at most: a storm is one fact, not thousands.
const MAX_AT_ONCE: u64 = 16;

#[derive(Debug)]
struct Inner {
    source: AsyncFd<OwnedFd>,
    dir: PathBuf,
    /// The file whose `oom_kill` line counts kills.
    file: &'static str,
    /// Version 1: notifications seen.
    notified: AtomicU64,
    reported: AtomicU64,
    stop: CancellationToken,
}

/// A watch on one cgroup; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct OomWatch(Arc<Inner>);

impl OomWatch {
    /// Watches a version 1 memory cgroup.
    ///
    /// # Errors
    /// `Io` or `System`.
    pub(super) fn v1(dir: &Path) -> Result<Self> {
        let source = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(Error::system("create an eventfd"))?;
        let path = dir.join("memory.oom_control");
        let control = std::fs::File::open(&path).map_err(Error::io("open", &path))?;
        let path = dir.join("cgroup.event_control");
        let mut registry = std::fs::File::options()
            .write(true)
            .open(&path)
            .map_err(Error::io("open", &path))?;
        registry
            .write_all(format!("{} {}", source.as_raw_fd(), control.as_raw_fd()).as_bytes())
            .map_err(Error::io("write", &path))?;
        Self::new(source, dir, "memory.oom_control")
    }

    /// Watches a version 2 cgroup.
    ///
    /// # Errors
    /// `Io` or `System`.
    pub(super) fn v2(dir: &Path) -> Result<Self> {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let source = inotify::init(flags).map_err(Error::system("create an inotify instance"))?;
        let path = dir.join("memory.events");
        inotify::add_watch(&source, &path, inotify::WatchFlags::MODIFY)
            .map_err(|e| Error::io("watch", &path)(e.into()))?;
        Self::new(source, dir, "memory.events")
    }

    fn new(source: OwnedFd, dir: &Path, file: &'static str) -> Result<Self> {
        let source = crate::sys::register(source, Interest::READABLE)
            .map_err(Error::system("watch for OOM events"))?;
        Ok(Self(Arc::new(Inner {
            source,
            dir: dir.to_owned(),
            file,
            notified: AtomicU64::new(0),
            reported: AtomicU64::new(0),
            stop: CancellationToken::new(),
        })))
    }

    /// Waits for something to happen; false when the watch was stopped or its cgroup is gone.
    pub(crate) async fn changed(&self) -> bool {
        loop {
            let mut ready = tokio::select! {
                biased;
                () = self.0.stop.cancelled() => return false,
                ready = self.0.source.readable() => match ready {
                    Ok(ready) => ready,
                    Err(_) => return false,
                },
            };
            let seen = self.absorb();
            ready.clear_ready();
            if !self.0.dir.join(self.0.file).exists() {
                return false;
            }
            if seen {
                return true;
            }
        }
    }

    /// Takes the notifications that wait in the descriptor.
    fn absorb(&self) -> bool {
        let mut buffer = [0; 1024];
        let mut seen = false;
        while let Ok(count) = rustix::io::read(self.0.source.get_ref(), &mut buffer) {
            if count == 0 {
                break;
            }
            seen = true;
            // An eventfd reads as its counter; inotify's records are longer and count nothing.
            if count == 8
                && self.0.file == "memory.oom_control"
                && let Some(counter) = buffer.first_chunk::<8>()
            {
                self.0
                    .notified
                    .fetch_add(u64::from_ne_bytes(*counter), Ordering::Relaxed);
            }
        }
        seen
    }

    /// Number of OOM kills since the last call.
    pub(crate) fn take(&self) -> u64 {
        let table = read(&self.0.dir, self.0.file);
        if table.is_empty() {
            // Gone: the last notification was its removal.
            return 0;
        }
        self.absorb();
        let kills = lookup(&table, "oom_kill").unwrap_or(0);
        let total = kills.max(self.0.notified.load(Ordering::Relaxed));
        let before = self.0.reported.fetch_max(total, Ordering::Relaxed);
        total.saturating_sub(before).min(MAX_AT_ONCE)
    }

    /// Ends the watch.
    pub(crate) fn stop(&self) {
        self.0.stop.cancel();
    }
}
