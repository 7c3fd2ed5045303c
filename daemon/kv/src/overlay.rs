//! Changes that the journal has and the store below has not: what readers look at first.
//!
//! New changes go to the active table. A checkpoint freezes it, copies it down, and drops it.

use std::collections::BTreeMap;
use std::collections::btree_map::Range;
use std::iter::Peekable;
use std::ops::Bound;
use std::sync::Arc;

use crate::{Change, Error, journal};

/// A value, or that the key is removed.
pub(crate) type Entry = Option<Arc<[u8]>>;
/// Changes by key.
pub(crate) type Table = BTreeMap<Arc<[u8]>, Entry>;

#[derive(Debug, Default)]
pub(crate) struct Overlay {
    active: Table,
    frozen: Option<Arc<Table>>,
    /// Room for a frame's head, then the changes that no frame has yet; empty without any.
    pending: Vec<u8>,
}

impl Overlay {
    /// Takes a batch in, whole.
    pub(crate) fn apply(&mut self, batch: &[Change<'_>]) -> Result<(), Error> {
        let before = self.pending.len();
        if before == 0 {
            self.pending.resize(journal::FRAME_HEAD, 0);
        }
        for (key, value) in batch {
            if journal::push(&mut self.pending, key, *value).is_err() {
                self.pending.truncate(before);
                return Err(Error::Io {
                    operation: "write",
                    source: std::io::Error::other("a key or value is longer than 4 GiB"),
                });
            }
        }
        for (key, value) in batch {
            self.active.insert(Arc::from(*key), value.map(Arc::from));
        }
        Ok(())
    }

    /// Bytes of changes that no frame has yet.
    pub(crate) fn pending_bytes(&self) -> usize {
        self.pending.len().saturating_sub(journal::FRAME_HEAD)
    }

    /// Hands out what no frame has yet, with room for the head of one; takes an empty buffer.
    pub(crate) fn take_pending(&mut self, spare: Vec<u8>) -> Vec<u8> {
        std::mem::replace(&mut self.pending, spare)
    }

    /// Whether the store below lacks anything.
    pub(crate) fn is_empty(&self) -> bool {
        self.active.is_empty() && self.frozen.is_none()
    }

    /// Makes everything so far ready to be copied down. Nothing may be frozen already.
    pub(crate) fn freeze(&mut self) -> Arc<Table> {
        debug_assert!(self.frozen.is_none(), "one checkpoint at a time");
        let table = Arc::new(std::mem::take(&mut self.active));
        self.frozen = Some(table.clone());
        table
    }

    /// Forgets what was copied down.
    pub(crate) fn thaw(&mut self) -> Option<Arc<Table>> {
        self.frozen.take()
    }

    /// What is known about `key`; `None`: ask below.
    pub(crate) fn get(&self, key: &[u8]) -> Option<&Entry> {
        let older = || self.frozen.as_ref().and_then(|table| table.get(key));
        self.active.get(key).or_else(older)
    }

    /// What is known about keys in `start <= key < end`, in order, up to the `limit`th value.
    pub(crate) fn range(
        &self,
        start: &[u8],
        end: Option<&[u8]>,
        limit: usize,
    ) -> Vec<(Arc<[u8]>, Entry)> {
        let bounds = (
            Bound::Included(start),
            end.map_or(Bound::Unbounded, Bound::Excluded),
        );
        let mut merged = Merged {
            newer: self.active.range::<[u8], _>(bounds).peekable(),
            older: self
                .frozen
                .as_ref()
                .map(|table| table.range::<[u8], _>(bounds).peekable()),
        };
        let (mut found, mut values) = (Vec::new(), 0);
        while values < limit
            && let Some((key, entry)) = merged.next()
        {
            values += usize::from(entry.is_some());
            found.push((key.clone(), entry.clone()));
        }
        found
    }
}

type Pairs<'a> = Peekable<Range<'a, Arc<[u8]>, Entry>>;

/// Two tables in key order; the newer one counts.
struct Merged<'a> {
    newer: Pairs<'a>,
    older: Option<Pairs<'a>>,
}

impl<'a> Iterator for Merged<'a> {
    type Item = (&'a Arc<[u8]>, &'a Entry);

    fn next(&mut self) -> Option<Self::Item> {
        let Some(older) = &mut self.older else {
            return self.newer.next();
        };
        match (self.newer.peek(), older.peek()) {
            (Some((new, _)), Some((old, _))) if old < new => older.next(),
            (Some((new, _)), Some((old, _))) => {
                if new == old {
                    older.next();
                }
                self.newer.next()
            }
            (Some(_), None) => self.newer.next(),
            (None, _) => older.next(),
        }
    }
}
