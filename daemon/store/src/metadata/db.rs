//! How every change of the metadata is made: one closure, one atomic batch, one wait.
//!
//! A change sees the current state alone (the committer's writer lock), its events go out from the
//! committer once it is durable and in the order of the changes, and while a collection runs its
//! writes pass the collector's barrier (see `collect.rs`).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use lighter_kv::{Durable, Key, Tx};
use lighter_proto::any;
use lighter_snapshotter::Snapshotter;
use prost::{Message, Name};
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;

use super::SharingPolicy;
use super::collect;
use super::edges::Node;
use super::keys::{self, Builder, SCHEMA_VERSION, table};
use super::records::{IngestRecord, NamespaceRecord, decode};
use crate::content::{KeyedMutex, Pins, RefLocks, Store};
use crate::events::Exchange;
use crate::{Error, Namespace};

/// Sequence numbers taken from the database at a time, so that few calls wait for the disk.
const SEQUENCE_BLOCK: u64 = 4096;

/// Everything the handles share.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) kv: lighter_kv::Db,
    pub(crate) content: Arc<dyn Store>,
    pub(crate) snapshotters: BTreeMap<String, Arc<dyn Snapshotter>>,
    pub(crate) events: Exchange,
    pub(crate) policy: SharingPolicy,
    pub(crate) activity: Activity,
    /// What no record owns any more and is still to be removed below. Senders: changes, when they
    /// are durable. Receiver: `Db::reclaim`.
    pub(crate) discarded: Arc<Mutex<Vec<Discarded>>>,
    /// What changes touched since the collection under way began; `None` while none runs. Taken
    /// under the writer lock only.
    pub(crate) barrier: Mutex<Option<Vec<Node>>>,
    /// Held while a file is made or removed, so that neither happens under the other.
    pub(crate) digests: KeyedMutex,
    /// Held while a snapshot of that key is made, committed or removed.
    pub(crate) snapshots: KeyedMutex,
    /// Objects that a call in progress relies on; no collection takes them away.
    pub(crate) pins: Pins,
    /// Keys below of snapshots that are made or committed right now.
    pub(crate) in_flight: Pins,
    /// Which refs are being written (`<namespace>/<ref>`).
    pub(crate) refs: RefLocks,
    /// Work that goes on when its caller has gone away.
    pub(crate) tasks: TaskTracker,
    /// The next number and the end of the block it is from.
    sequence: Mutex<(u64, u64)>,
}

/// Something that no record owns any more: in a store below, or the list of a lease that ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Discarded {
    Lease(Namespace, String),
    Blob(String),
    Ingest(String),
    Snapshot {
        snapshotter: String,
        backend: String,
    },
}

/// What the collector's scheduler wants to know.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    pub(crate) mutations: AtomicU64,
    pub(crate) deletions: AtomicU64,
    /// Sender: changes that removed something. Receiver: the scheduler.
    pub(crate) removed: Notify,
}

impl Inner {
    pub(crate) fn open(
        kv: lighter_kv::Db,
        content: Arc<dyn Store>,
        snapshotters: BTreeMap<String, Arc<dyn Snapshotter>>,
        events: Exchange,
        policy: SharingPolicy,
    ) -> Result<Self, Error> {
        let version_key = Builder::new(table::VERSION).prefix();
        match kv.get(&version_key)? {
            Some(found) if found == SCHEMA_VERSION.to_string().as_bytes() => {}
            Some(found) => {
                return Err(Error::Precondition {
                    reason: format!(
                        "metadata has schema version {}, this program knows {SCHEMA_VERSION}; \
                         start the program that wrote it",
                        String::from_utf8_lossy(&found)
                    ),
                });
            }
            None => {
                let ((), ticket) = kv.update(|tx| {
                    tx.put(version_key, SCHEMA_VERSION.to_string());
                    Ok::<_, Error>(())
                })?;
                ticket.wait_blocking()?;
            }
        }
        Ok(Self {
            kv,
            content,
            snapshotters,
            events,
            policy,
            activity: Activity::default(),
            discarded: Arc::default(),
            barrier: Mutex::default(),
            digests: KeyedMutex::default(),
            snapshots: KeyedMutex::default(),
            pins: Pins::default(),
            in_flight: Pins::default(),
            refs: RefLocks::default(),
            tasks: TaskTracker::new(),
            sequence: Mutex::new((0, 0)),
        })
    }

    /// Makes a change and waits until it is durable.
    ///
    /// # Cancellation
    /// The change is applied when the future is first polled; dropping it only gives up the wait.
    pub(crate) async fn update<R>(
        &self,
        change: impl FnOnce(&mut Change<'_, '_>) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let (result, ticket) = self.apply(change)?;
        ticket.wait().await?;
        Ok(result)
    }

    /// Makes a change; it is visible at once and durable when the ticket says so.
    pub(crate) fn apply<R>(
        &self,
        change: impl FnOnce(&mut Change<'_, '_>) -> Result<R, Error>,
    ) -> Result<(R, Durable), Error> {
        let (done, removed) = self.make(change)?;
        self.activity.mutations.fetch_add(1, Ordering::Relaxed);
        self.activity
            .deletions
            .fetch_add(removed, Ordering::Relaxed);
        if removed > 0 {
            self.activity.removed.notify_one();
        }
        Ok(done)
    }

    /// Makes a change of a collection's, which is no reason for the next one.
    pub(crate) fn apply_unseen<R>(
        &self,
        change: impl FnOnce(&mut Change<'_, '_>) -> Result<R, Error>,
    ) -> Result<(R, Durable), Error> {
        self.make(change).map(|(done, _)| done)
    }

    /// A change, and how many of its removals may have kept something.
    fn make<R>(
        &self,
        change: impl FnOnce(&mut Change<'_, '_>) -> Result<R, Error>,
    ) -> Result<((R, Durable), u64), Error> {
        let (mut removed, mut discards) = (0, false);
        let done = self.kv.update(|tx| {
            let mut change_ = Change {
                tx,
                events: &self.events,
                discarded: &self.discarded,
                discards: false,
                removed: 0,
            };
            let result = change(&mut change_)?;
            (removed, discards) = (change_.removed, change_.discards);
            collect::pass_barrier(self, change_.tx);
            Ok::<_, Error>(result)
        })?;
        if discards {
            self.activity.removed.notify_one();
        }
        Ok((done, removed))
    }

    /// The record at `key`.
    pub(crate) fn get<M: Message + Default>(
        &self,
        key: &[u8],
        what: impl FnOnce() -> String,
    ) -> Result<Option<M>, Error> {
        match self.kv.get(key)? {
            Some(value) => decode(&value, what).map(Some),
            None => Ok(None),
        }
    }

    /// All objects of a table that have one name in `namespace`, with their names.
    pub(crate) fn list<M: Message + Default>(
        &self,
        table: u8,
        namespace: &Namespace,
    ) -> Result<Vec<(String, M)>, Error> {
        self.list_below(&keys::in_namespace(table, namespace).prefix())
    }

    /// All records below `prefix`, with the last name of their keys.
    pub(crate) fn list_below<M: Message + Default>(
        &self,
        prefix: &[u8],
    ) -> Result<Vec<(String, M)>, Error> {
        let found = self.kv.scan(prefix)?;
        found
            .into_iter()
            .map(|(key, value)| {
                let name = String::from_utf8_lossy(&key[prefix.len()..]).into_owned();
                let record = decode(&value, || format!("record {name:?}"))?;
                Ok((name, record))
            })
            .collect()
    }

    /// Has something below removed that no record ever owned.
    pub(crate) fn discard(&self, what: Discarded) {
        self.discarded
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(what);
        self.activity.removed.notify_one();
    }

    /// Whether the ingest `reference` has a record and its bytes are at `backend`.
    pub(crate) fn has_ingest(
        &self,
        namespace: &Namespace,
        reference: &str,
        backend: &str,
    ) -> Result<bool, Error> {
        let key = keys::object(table::INGESTS, namespace, reference);
        let record: Option<IngestRecord> = self.get(&key, || format!("ingest {reference:?}"))?;
        Ok(record.is_some_and(|record| record.backend == backend))
    }

    /// A number that was never handed out before, not even before a crash.
    pub(crate) async fn next_sequence(&self) -> Result<u64, Error> {
        loop {
            {
                let mut block = self.sequence.lock().unwrap_or_else(PoisonError::into_inner);
                if block.0 < block.1 {
                    block.0 += 1;
                    return Ok(block.0);
                }
            }
            let start = self
                .update(|change| {
                    let key = Builder::new(table::SEQUENCE).prefix();
                    let start = match change.tx.get(&key)? {
                        Some(value) => {
                            u64::from_be_bytes(value.try_into().map_err(|_| Error::Damaged {
                                what: "sequence of the metadata".to_owned(),
                            })?)
                        }
                        None => 0,
                    };
                    change
                        .tx
                        .put(key, (start + SEQUENCE_BLOCK).to_be_bytes().to_vec());
                    Ok(start)
                })
                .await?;
            *self.sequence.lock().unwrap_or_else(PoisonError::into_inner) =
                (start, start + SEQUENCE_BLOCK);
        }
    }
}

/// One change under way.
pub(crate) struct Change<'a, 't> {
    pub(crate) tx: &'a mut Tx<'t>,
    events: &'a Exchange,
    discarded: &'a Arc<Mutex<Vec<Discarded>>>,
    discards: bool,
    removed: u64,
}

impl Change<'_, '_> {
    pub(crate) fn get<M: Message + Default>(
        &self,
        key: &[u8],
        what: impl FnOnce() -> String,
    ) -> Result<Option<M>, Error> {
        match self.tx.get(key)? {
            Some(value) => decode(&value, what).map(Some),
            None => Ok(None),
        }
    }

    pub(crate) fn contains(&self, key: &[u8]) -> Result<bool, Error> {
        Ok(self.tx.contains(key)?)
    }

    pub(crate) fn put(&mut self, key: Key, record: &impl Message) {
        self.tx.put(key, record.encode_to_vec());
    }

    pub(crate) fn mark(&mut self, key: Key) {
        self.tx.put(key, Vec::new());
    }

    pub(crate) fn delete(&mut self, key: Key) {
        self.tx.delete(key);
    }

    /// Says that the change took away what may have kept something: a collection is worth its while.
    pub(crate) fn dirty(&mut self) {
        self.removed += 1;
    }

    /// Has something below removed, once the change that gave it up is durable.
    pub(crate) fn discard(&mut self, what: Discarded) {
        self.discards = true;
        let discarded = self.discarded.clone();
        self.tx.on_durable(move || {
            discarded
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(what);
        });
    }

    /// Makes the namespace exist.
    pub(crate) fn ensure_namespace(&mut self, namespace: &Namespace) -> Result<(), Error> {
        let key = keys::namespace(namespace);
        if !self.contains(&key)? {
            self.put(key, &NamespaceRecord::default());
        }
        Ok(())
    }

    /// Publishes once the change is durable, in the order of the changes.
    pub(crate) fn publish<M: Message + Name>(
        &mut self,
        namespace: &Namespace,
        topic: &'static str,
        event: &M,
    ) {
        let (events, namespace, event) = (self.events.clone(), namespace.clone(), any::pack(event));
        self.tx.on_durable(move || {
            if let Err(error) = events.publish_any(&namespace, topic, event) {
                tracing::error!(%error, topic, "an event of ours was refused");
            }
        });
    }
}
