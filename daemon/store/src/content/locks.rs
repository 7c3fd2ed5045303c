//! Locks by name: of refs, which refuse, and of digests, which wait.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::Notify;

use crate::Error;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which refs are being written, by whom and since when.
#[derive(Debug, Clone, Default)]
pub(crate) struct RefLocks {
    held: Arc<Mutex<HashMap<String, Held>>>,
}

#[derive(Debug)]
struct Held {
    holder: String,
    since: (Instant, SystemTime),
}

/// The right to write one ref, until it is dropped.
#[derive(Debug)]
pub struct RefGuard {
    locks: RefLocks,
    reference: String,
}

impl RefLocks {
    /// Takes the lock on `reference`.
    ///
    /// # Errors
    /// `Unavailable`, naming holder and age, while somebody has it.
    pub(crate) fn take(&self, reference: &str, holder: &str) -> Result<RefGuard, Error> {
        let mut all = lock(&self.held);
        if let Some(held) = all.get(reference) {
            let since = OffsetDateTime::from(held.since.1)
                .format(&Rfc3339)
                .unwrap_or_default();
            let by = match held.holder.as_str() {
                "" => String::new(),
                holder => format!(", held by {holder}"),
            };
            return Err(Error::Unavailable {
                reason: format!(
                    "ref {reference} locked for {:.3?} (since {since}{by})",
                    held.since.0.elapsed()
                ),
            });
        }
        let held = Held {
            holder: holder.to_owned(),
            since: (Instant::now(), SystemTime::now()),
        };
        all.insert(reference.to_owned(), held);
        Ok(RefGuard {
            locks: self.clone(),
            reference: reference.to_owned(),
        })
    }

    /// Refs being written, by whom and for how long.
    pub(crate) fn list(&self) -> Vec<(String, String, Duration)> {
        lock(&self.held)
            .iter()
            .map(|(reference, held)| {
                let age = held.since.0.elapsed();
                (reference.clone(), held.holder.clone(), age)
            })
            .collect()
    }

    /// Whether somebody writes `reference`.
    pub(crate) fn is_held(&self, reference: &str) -> bool {
        lock(&self.held).contains_key(reference)
    }
}

impl Drop for RefGuard {
    fn drop(&mut self) {
        lock(&self.locks.held).remove(&self.reference);
    }
}

/// Names in use, each any number of times.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pins {
    held: Arc<Mutex<HashMap<String, usize>>>,
}

/// One use of a name, until it is dropped.
#[derive(Debug)]
pub(crate) struct Pin {
    pins: Pins,
    name: String,
}

impl Pins {
    pub(crate) fn pin(&self, name: String) -> Pin {
        *lock(&self.held).entry(name.clone()).or_default() += 1;
        Pin {
            pins: self.clone(),
            name,
        }
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        lock(&self.held).contains_key(name)
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut held = lock(&self.pins.held);
        if let Some(uses) = held.get_mut(&self.name) {
            *uses -= 1;
            if *uses == 0 {
                held.remove(&self.name);
            }
        }
    }
}

/// One async mutex per key, there only while somebody holds it.
#[derive(Debug, Clone, Default)]
pub(crate) struct KeyedMutex {
    inner: Arc<Keyed>,
}

#[derive(Debug, Default)]
struct Keyed {
    held: Mutex<HashSet<String>>,
    freed: Notify,
}

/// The lock on one key, until it is dropped.
#[derive(Debug)]
pub struct KeyGuard {
    keyed: Arc<Keyed>,
    key: String,
}

impl KeyedMutex {
    /// Waits for the lock on `key`.
    ///
    /// # Cancellation
    /// Safe.
    pub(crate) async fn lock(&self, key: &str) -> KeyGuard {
        loop {
            let freed = self.inner.freed.notified();
            if let Some(guard) = self.try_lock(key) {
                return guard;
            }
            freed.await;
        }
    }

    /// The lock on `key`, unless somebody has it.
    pub(crate) fn try_lock(&self, key: &str) -> Option<KeyGuard> {
        lock(&self.inner.held)
            .insert(key.to_owned())
            .then(|| KeyGuard {
                keyed: self.inner.clone(),
                key: key.to_owned(),
            })
    }
}

impl Drop for KeyGuard {
    fn drop(&mut self) {
        lock(&self.keyed.held).remove(&self.key);
        self.keyed.freed.notify_waiters();
    }
}
