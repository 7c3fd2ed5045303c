//! One at a time for each key: how many callers share one download and one unpack.
//!
//! Whoever holds a key does the work; the others wait, look again, and find it done. When the
//! holder goes away midway, the next one goes on where it stopped. Nobody inherits another's
//! failure.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OwnedMutexGuard;

#[derive(Debug, Default)]
struct Entry {
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Bytes the holder has done, for those who wait.
    progress: Arc<AtomicU64>,
    /// Holders and waiters.
    users: usize,
}

/// Locks by key; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Locks {
    entries: Arc<Mutex<HashMap<String, Entry>>>,
}

/// A key held, or waited for.
#[derive(Debug)]
struct Use {
    locks: Locks,
    key: String,
}

/// A key held until this is dropped.
#[derive(Debug)]
pub struct Held {
    progress: Arc<AtomicU64>,
    // Dropped in this order: the turn passes on before the entry may go.
    _turn: OwnedMutexGuard<()>,
    _use: Use,
}

impl Locks {
    fn entries(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `key`, telling `watch` twice a second how far its holder is.
    ///
    /// # Cancellation
    /// Safe: the wait is given up.
    pub async fn lock(&self, key: &str, watch: impl Fn(u64)) -> Held {
        let (turn, progress) = {
            let mut entries = self.entries();
            let entry = entries.entry(key.to_owned()).or_default();
            entry.users += 1;
            (Arc::clone(&entry.turn), Arc::clone(&entry.progress))
        };
        let used = Use {
            locks: self.clone(),
            key: key.to_owned(),
        };
        let mut waiting = std::pin::pin!(turn.lock_owned());
        let turn = loop {
            let tick = std::time::Duration::from_millis(500);
            match tokio::time::timeout(tick, &mut waiting).await {
                Ok(turn) => break turn,
                Err(_) => watch(progress.load(Ordering::Relaxed)),
            }
        };
        progress.store(0, Ordering::Relaxed);
        Held {
            progress,
            _turn: turn,
            _use: used,
        }
    }
}

impl Held {
    /// Tells those who wait how far the work is.
    pub fn progress(&self, bytes: u64) {
        self.progress.store(bytes, Ordering::Relaxed);
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        let mut entries = self.locks.entries();
        if let Some(entry) = entries.get_mut(&self.key) {
            entry.users -= 1;
            if entry.users == 0 {
                entries.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_key_is_held_by_one_and_forgotten_by_the_last() {
        let locks = Locks::default();
        let first = locks.lock("k", |_| {}).await;
        {
            let waiting = locks.lock("k", |_| {});
            let waited = tokio::time::timeout(std::time::Duration::from_millis(20), waiting).await;
            assert!(waited.is_err(), "held by another");
        }
        let other = locks.lock("other", |_| {}).await;
        drop(first);
        let again = locks.lock("k", |_| {}).await;
        drop((again, other));
        assert!(locks.entries().is_empty());
    }
}
