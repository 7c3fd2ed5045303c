//! The key space on sled: the only file that names it.
//!
//! sled 0.34's `flush` writes but does not wait for the disk, so `sync` follows it with
//! `fdatasync` on a descriptor of our own. On creation the file, its directory and the parent are
//! synced once. sled's own periodic flusher stays on, because its garbage collection runs there.
//!
//! On disk: `<dir>/db`, `<dir>/conf`, `<dir>/blobs/`, `<dir>/snap.*` are sled's; `<dir>/ballast` is a
//! preallocated file of ours, removed when the disk is full so that the database can still be
//! opened, and made again at the next open that has room.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Backend, Change, Error, Options, Value};

/// Milliseconds between sled's own flushes; they drive its garbage collection. What commits wait for
/// is the journal, so they need not be frequent.
const FLUSH_EVERY_MS: u64 = 2000;

#[derive(Debug)]
pub(crate) struct Sled {
    db: sled::Db,
    log: File,
    ballast: PathBuf,
    ballast_released: AtomicBool,
}

impl Sled {
    pub(crate) fn open(path: &Path, options: &Options) -> Result<Self, Error> {
        let fresh = !path.join("db").exists();
        fs::create_dir_all(path).map_err(|e| Error::io("create directory", e))?;
        let ballast = path.join("ballast");
        let db = match Self::try_open(path, options) {
            Err(Error::Full) if ballast.exists() => {
                fs::remove_file(&ballast).map_err(|e| Error::io("release ballast", e))?;
                Self::try_open(path, options)?
            }
            other => other?,
        };
        let log = File::open(path.join("db")).map_err(|e| Error::io("open log", e))?;
        let store = Self {
            db,
            log,
            ballast,
            ballast_released: AtomicBool::new(false),
        };
        if fresh {
            store.sync()?;
            sync_dir(path)?;
            if let Some(parent) = path.parent() {
                sync_dir(parent)?;
            }
        }
        store.lay_ballast(options.ballast_bytes);
        Ok(store)
    }

    /// Opens sled with its panics caught: it panics on some kinds of damage.
    fn try_open(path: &Path, options: &Options) -> Result<sled::Db, Error> {
        let config = sled::Config::default()
            .path(path)
            .cache_capacity(options.cache_bytes)
            .flush_every_ms(Some(FLUSH_EVERY_MS));
        // Nothing of a failed open is used afterwards.
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| config.open())) {
            Ok(Ok(db)) => Ok(db),
            Ok(Err(error)) => Err(open_error(path, error)),
            Err(panic) => {
                let reason = panic
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
                    .unwrap_or_else(|| "the database panicked while opening".to_owned());
                Err(Error::Corrupt {
                    path: path.to_owned(),
                    reason,
                })
            }
        }
    }

    /// A full disk must not keep the daemon from starting: failure is only logged.
    fn lay_ballast(&self, bytes: u64) {
        if bytes == 0 || fs::metadata(&self.ballast).is_ok_and(|m| m.len() == bytes) {
            return;
        }
        let laid = File::create(&self.ballast).and_then(|file| {
            use rustix::fs::{FallocateFlags, fallocate};
            fallocate(&file, FallocateFlags::empty(), 0, bytes).map_err(io::Error::from)
        });
        if let Err(error) = laid {
            let _ = fs::remove_file(&self.ballast);
            tracing::warn!(%error, "no room for the database's reserve");
        }
    }

    fn put(&self, (key, value): Change<'_>) -> Result<(), sled::Error> {
        match value {
            Some(value) => self.db.insert(key, value),
            None => self.db.remove(key),
        }
        .map(drop)
    }

    fn apply_once(&self, batch: &[Change<'_>]) -> Result<(), sled::Error> {
        let mut changes = sled::Batch::default();
        for (key, value) in batch {
            match value {
                Some(value) => changes.insert(*key, *value),
                None => changes.remove(*key),
            }
        }
        self.db.apply_batch(changes)
    }
}

impl Backend for Sled {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, Error> {
        let found = self.db.get(key).map_err(|e| operation_error("read", e))?;
        Ok(found.map(|value| value.to_vec()))
    }

    fn visit(
        &self,
        start: &[u8],
        end: Option<&[u8]>,
        limit: usize,
        seen: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), Error> {
        if end.is_some_and(|end| start >= end) {
            return Ok(());
        }
        let iter = match end {
            Some(end) => self.db.range(start..end),
            None => self.db.range(start..),
        };
        for pair in iter.take(limit) {
            let (key, value) = pair.map_err(|e| operation_error("scan", e))?;
            if !seen(&key, &value) {
                break;
            }
        }
        Ok(())
    }

    fn apply(&self, batch: &[Change<'_>]) -> Result<(), Error> {
        if batch.is_empty() {
            return Ok(());
        }
        match self
            .apply_once(batch)
            .map_err(|e| operation_error("write", e))
        {
            Err(Error::Full) if self.make_room() => self
                .apply_once(batch)
                .map_err(|e| operation_error("write", e)),
            other => other,
        }
    }

    /// A batch of sled's keeps out every reader, for as long as the disk takes; single changes none.
    fn copy(&self, changes: &[Change<'_>]) -> Result<(), Error> {
        for change in changes {
            match self.put(*change).map_err(|e| operation_error("write", e)) {
                Err(Error::Full) if self.make_room() => {
                    self.put(*change).map_err(|e| operation_error("write", e))?;
                }
                other => other?,
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), Error> {
        match self.db.flush().map_err(|e| operation_error("flush", e)) {
            Err(Error::Full) if self.make_room() => {
                self.db.flush().map_err(|e| operation_error("flush", e))?;
            }
            other => {
                other?;
            }
        }
        self.log.sync_data().map_err(|e| Error::io("fdatasync", e))
    }

    fn make_room(&self) -> bool {
        !self.ballast_released.swap(true, Ordering::Relaxed)
            && fs::remove_file(&self.ballast).is_ok()
    }

    fn free_bytes(&self) -> Option<u64> {
        let stat = rustix::fs::fstatvfs(&self.log).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

fn sync_dir(path: &Path) -> Result<(), Error> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(|e| Error::io("sync directory", e))
}

fn open_error(path: &Path, error: sled::Error) -> Error {
    match error {
        sled::Error::Io(e) if e.kind() == io::ErrorKind::WouldBlock => Error::Locked {
            path: path.to_owned(),
        },
        // sled wraps the lock's failure in a new error of kind Other.
        sled::Error::Io(e) if e.to_string().contains("could not acquire lock") => Error::Locked {
            path: path.to_owned(),
        },
        sled::Error::Io(e) => Error::io("open", e),
        other => Error::Corrupt {
            path: path.to_owned(),
            reason: other.to_string(),
        },
    }
}

fn operation_error(operation: &'static str, error: sled::Error) -> Error {
    match error {
        sled::Error::Io(e) => Error::io(operation, e),
        other => Error::Io {
            operation,
            source: io::Error::other(other),
        },
    }
}
