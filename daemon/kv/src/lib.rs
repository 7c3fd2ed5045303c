//! The one committer over the embedded database.
//!
//! Everything durable that is small lives in one ordered key space. [`Db::update`] runs a closure
//! against the current state under the writer lock, applies what it wrote as one atomic batch, and
//! hands back a [`Durable`] ticket; the committer thread then makes all batches that are waiting
//! durable with one write to the journal and one `fdatasync`, and releases their tickets together.
//! Nobody is told that a change stands before its ticket is released. The store behind the journal
//! gets the changes later, many at a time.
//!
//! A read may see a change whose ticket is still pending; it never sees half a batch.
//!
//! sled is named in `sled.rs` and nowhere else; [`Db::in_memory`] is the model the tests compare
//! with.

mod commit;
mod error;
mod export;
mod journal;
mod layered;
mod memory;
mod overlay;
mod recover;
mod sled;
mod ticket;

use std::path::Path;
use std::sync::Arc;

pub use error::Error;
pub use recover::{Opened, export_path};
pub use ticket::Durable;

/// A key of the key space: bytes in lexicographic order.
pub type Key = Vec<u8>;
/// A value; keep it under 32 KiB, larger things belong in files.
pub type Value = Vec<u8>;

/// A key and its new value; `None` removes it.
pub(crate) type Change<'a> = (&'a [u8], Option<&'a [u8]>);

/// What a backend must do: point reads, ordered scans, and atomic batches.
///
/// A batch is visible when `apply` returns and durable when a later `sync` returns.
pub(crate) trait Backend: Send + Sync + std::fmt::Debug {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, Error>;
    /// Shows pairs with `start <= key < end` in order, at most `limit` of them, until it says false.
    fn visit(
        &self,
        start: &[u8],
        end: Option<&[u8]>,
        limit: usize,
        seen: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), Error>;
    fn apply(&self, batch: &[Change<'_>]) -> Result<(), Error>;
    /// Makes changes that need not be seen all at once.
    fn copy(&self, changes: &[Change<'_>]) -> Result<(), Error> {
        self.apply(changes)
    }
    fn sync(&self) -> Result<(), Error>;
    /// Whether commits wait for the disk, or will soon wait for a checkpoint: what nobody waits for
    /// had better come later.
    fn is_crowded(&self) -> bool {
        false
    }
    /// Room left on the disk, where there is one.
    fn free_bytes(&self) -> Option<u64> {
        None
    }
    /// Gives a full disk some room, once. Whether it did.
    fn make_room(&self) -> bool {
        false
    }
    /// Number of the newest durable commit, where commits have numbers that outlive the process.
    fn sequence(&self) -> u64 {
        0
    }
    /// Whether there is something for [`Backend::settle`] to do.
    fn unsettled(&self) -> bool {
        false
    }
    /// Does what can wait for a quiet moment. Called by the committer.
    fn settle(&self) -> Result<(), Error> {
        Ok(())
    }
    /// Leaves as little as possible for the next open to do. Called by the committer, last.
    fn close(&self) -> Result<(), Error> {
        Ok(())
    }
    /// Pairs with `start <= key < end` in order, at most `limit` of them.
    fn range(
        &self,
        start: &[u8],
        end: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(Key, Value)>, Error> {
        let mut found = Vec::new();
        self.visit(start, end, limit, &mut |key, value| {
            found.push((key.to_vec(), value.to_vec()));
            true
        })?;
        Ok(found)
    }
}

/// Pairs that an import writes at a time.
const IMPORT_PART: usize = 256;

/// What runs on the committer once a change is durable, before its ticket is released.
pub(crate) type Hook = Box<dyn FnOnce() + Send>;

/// How to open a database.
#[derive(Debug, Clone)]
pub struct Options {
    /// Bytes of page cache; the daemon's memory follows this.
    pub cache_bytes: u64,
    /// Bytes kept allocated beside the database, given back when the disk is full.
    pub ballast_bytes: u64,
    /// Bytes of each of the journal's two segments, which stay allocated beside the database; 0 for
    /// no journal: each commit then waits for the store itself.
    pub journal_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cache_bytes: 4 << 20,
            ballast_bytes: 16 << 20,
            journal_bytes: 4 << 20,
        }
    }
}

/// A handle on the key space; clones share it.
#[derive(Debug, Clone)]
pub struct Db {
    shared: Arc<commit::Handle>,
}

impl Db {
    /// Opens or creates the database in directory `path`.
    ///
    /// # Errors
    /// [`Error::Locked`] when another process has it open, [`Error::Corrupt`] when what is on disk
    /// cannot be read, [`Error::Io`] and [`Error::Full`] when the system refuses.
    pub fn open(path: &Path, options: &Options) -> Result<Self, Error> {
        recover::open_whole(path, options)
    }

    pub(crate) fn over(backend: Box<dyn Backend>) -> Result<Self, Error> {
        Ok(Self {
            shared: Arc::new(commit::Handle::start(backend)?),
        })
    }

    /// A database that lives and dies with the process.
    ///
    /// # Errors
    /// When the committer thread cannot be started.
    pub fn in_memory() -> Result<Self, Error> {
        Self::over(Box::new(memory::Memory::default()))
    }

    /// The value at `key`.
    ///
    /// # Errors
    /// When the database failed.
    pub fn get(&self, key: &[u8]) -> Result<Option<Value>, Error> {
        self.shared.backend().get(key)
    }

    /// All pairs whose key starts with `prefix`, in key order.
    ///
    /// # Errors
    /// When the database failed.
    pub fn scan(&self, prefix: &[u8]) -> Result<Vec<(Key, Value)>, Error> {
        self.range(prefix, prefix_end(prefix).as_deref(), usize::MAX)
    }

    /// Shows all pairs whose key starts with `prefix`, in key order, without copying them. No batch
    /// is seen by half. Checkpoints wait meanwhile: `seen` must be short, and must not scan.
    ///
    /// # Errors
    /// When the database failed.
    pub fn visit(&self, prefix: &[u8], mut seen: impl FnMut(&[u8], &[u8])) -> Result<(), Error> {
        let end = prefix_end(prefix);
        let backend = self.shared.backend();
        backend.visit(prefix, end.as_deref(), usize::MAX, &mut |key, value| {
            seen(key, value);
            true
        })
    }

    /// Whether any key starts with `prefix`.
    ///
    /// # Errors
    /// When the database failed.
    pub fn any(&self, prefix: &[u8]) -> Result<bool, Error> {
        let found = self.range(prefix, prefix_end(prefix).as_deref(), 1)?;
        Ok(!found.is_empty())
    }

    /// Pairs with `start <= key < end` in key order, at most `limit`; for paging through much.
    ///
    /// # Errors
    /// When the database failed.
    pub fn range(
        &self,
        start: &[u8],
        end: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(Key, Value)>, Error> {
        self.shared.backend().range(start, end, limit)
    }

    /// Runs `change` alone against the current state and applies what it wrote, all or nothing.
    ///
    /// The closure runs once, under the writer lock: it must be short and do no I/O. When it fails
    /// nothing is applied. The change is visible at once and durable when the ticket says so.
    ///
    /// # Errors
    /// What the closure returns, or why the database refused.
    pub fn update<R, E, F>(&self, change: F) -> Result<(R, Durable), E>
    where
        F: FnOnce(&mut Tx<'_>) -> Result<R, E>,
        E: From<Error>,
    {
        let mut writer = self.shared.writer();
        let mut tx = Tx {
            backend: self.shared.backend(),
            writes: std::collections::BTreeMap::new(),
            hooks: Vec::new(),
        };
        let result = change(&mut tx)?;
        let ticket = writer.apply(&tx.writes, tx.hooks).map_err(E::from)?;
        Ok((result, ticket))
    }

    /// A number that grows with every change; equal numbers mean that nothing was written between.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.shared.applied()
    }

    /// Whether whoever has much to write, and time, had better wait: a commit is held up by the
    /// disk, or the journal fills while its other half is still copied to the store below, for which
    /// all commits would wait in the end.
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        self.shared.backend().is_crowded()
    }

    /// Waits until the database fails, and says why; afterwards the process should end.
    pub async fn stopped(&self) -> String {
        self.shared.stopped().await
    }

    /// A ticket that is released once everything applied so far is durable.
    pub fn durable(&self) -> Durable {
        self.shared.writer().ticket()
    }

    /// Writes all pairs to `path` in a form of its own (see `export.rs`), atomically and durably.
    ///
    /// # Errors
    /// When the file cannot be written or the database read.
    pub fn export(&self, path: &Path) -> Result<u64, Error> {
        export::write(self.shared.backend(), path)
    }

    /// Fills an empty database from an export. Returns the number of pairs.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the file is not a whole export.
    pub fn import(&self, path: &Path) -> Result<u64, Error> {
        let pairs = export::read(path)?.pairs;
        for part in pairs.chunks(IMPORT_PART) {
            let ((), ticket) = self.update(|tx| {
                for (key, value) in part {
                    tx.put(key.clone(), value.clone());
                }
                Ok::<_, Error>(())
            })?;
            ticket.wait_blocking()?;
        }
        Ok(pairs.len() as u64)
    }
}

/// What a change sees and writes: the current state under its own writes.
pub struct Tx<'a> {
    backend: &'a dyn Backend,
    writes: std::collections::BTreeMap<Key, Option<Value>>,
    hooks: Vec<Hook>,
}

impl std::fmt::Debug for Tx<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tx")
            .field("writes", &self.writes.len())
            .finish_non_exhaustive()
    }
}

impl Tx<'_> {
    /// The value at `key`, own writes included.
    ///
    /// # Errors
    /// When the database failed.
    pub fn get(&self, key: &[u8]) -> Result<Option<Value>, Error> {
        match self.writes.get(key) {
            Some(value) => Ok(value.clone()),
            None => self.backend.get(key),
        }
    }

    /// Whether `key` exists.
    ///
    /// # Errors
    /// When the database failed.
    pub fn contains(&self, key: &[u8]) -> Result<bool, Error> {
        Ok(self.get(key)?.is_some())
    }

    /// All pairs whose key starts with `prefix`, own writes included, in key order.
    ///
    /// # Errors
    /// When the database failed.
    pub fn scan(&self, prefix: &[u8]) -> Result<Vec<(Key, Value)>, Error> {
        let end = prefix_end(prefix);
        let stored = self.backend.range(prefix, end.as_deref(), usize::MAX)?;
        let mut merged: std::collections::BTreeMap<Key, Value> = stored.into_iter().collect();
        for (key, value) in self.writes.range(prefix.to_vec()..) {
            if !key.starts_with(prefix) {
                break;
            }
            match value {
                Some(value) => merged.insert(key.clone(), value.clone()),
                None => merged.remove(key),
            };
        }
        Ok(merged.into_iter().collect())
    }

    /// Whether any key starts with `prefix`, own writes included.
    ///
    /// # Errors
    /// When the database failed.
    pub fn any(&self, prefix: &[u8]) -> Result<bool, Error> {
        let written = self
            .writes
            .range(prefix.to_vec()..)
            .take_while(|(key, _)| key.starts_with(prefix))
            .any(|(_, value)| value.is_some());
        if written {
            return Ok(true);
        }
        let deleted = self
            .writes
            .range(prefix.to_vec()..)
            .take_while(|(k, _)| k.starts_with(prefix));
        // One more than what this change deleted is enough to find a survivor.
        let limit = deleted.count() + 1;
        let stored = self
            .backend
            .range(prefix, prefix_end(prefix).as_deref(), limit)?;
        Ok(stored
            .iter()
            .any(|(key, _)| !matches!(self.writes.get(key), Some(None))))
    }

    /// Writes `value` at `key`.
    pub fn put(&mut self, key: impl Into<Key>, value: impl Into<Value>) {
        self.writes.insert(key.into(), Some(value.into()));
    }

    /// Removes `key`; nothing happens when it is absent.
    pub fn delete(&mut self, key: impl Into<Key>) {
        self.writes.insert(key.into(), None);
    }

    /// What this change writes so far, in key order; `None` is a removal.
    pub fn writes(&self) -> impl Iterator<Item = (&[u8], Option<&[u8]>)> {
        self.writes
            .iter()
            .map(|(key, value)| (key.as_slice(), value.as_deref()))
    }

    /// Runs `hook` once the change is durable, before its ticket is released. Hooks of all changes
    /// run one after the other in the order of the changes; they must be short and must not write.
    pub fn on_durable(&mut self, hook: impl FnOnce() + Send + 'static) {
        self.hooks.push(Box::new(hook));
    }
}

/// The smallest key after all keys with `prefix`; `None` when there is no such key.
fn prefix_end(prefix: &[u8]) -> Option<Key> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.last_mut() {
        if *last < u8::MAX {
            *last += 1;
            return Some(end);
        }
        end.pop();
    }
    None
}

#[cfg(test)]
mod tests;
