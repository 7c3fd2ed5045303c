//! What a collection needs of the records: all references, a barrier while it runs, removal in small
//! batches, and the stores below rid of what was removed.
//!
//! A collection reads without a lock, so records change under it. From its begin to its end every
//! change tells the barrier what it wrote and what that refers to. A batch of removals first takes
//! over what the barrier has, then judges: an object that was reachable when the batch runs is
//! reachable by references that were read unchanged, or its last new reference passed the barrier.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use lighter_kv::{Durable, Tx};
use lighter_proto::errdefs::{Classify, ErrorKind};

use super::db::{Change, Discarded, Inner};
use super::edges::{self, Fact, Kind, Node};
use super::keys::{self, Builder, table};
use super::snapshots::pin_name;
use super::{Db, content, images, leases};
use crate::{Digest, Error, Namespace, Scope};

/// How often it is looked whether the database has caught up, and how long work that nobody waits
/// for lets it.
const CROWDED_PAUSE: Duration = Duration::from_millis(5);
const BATCH_PATIENCE: Duration = Duration::from_secs(2);
const REMOVAL_PATIENCE: Duration = Duration::from_millis(50);
/// Records read at a time.
const PAGE: usize = 512;

/// Decides over objects while a batch of removals is under way.
pub trait Judge {
    /// The object was written or referred to since the collection began.
    fn shade(&mut self, node: &Node);
    /// Whether nothing keeps the object.
    fn is_garbage(&self, node: &Node) -> bool;
}

/// A collection under way; its barrier stands until it is dropped.
#[derive(Debug)]
pub struct Collection {
    db: Db,
}

/// What was done to the stores below.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// Blob files removed.
    pub blobs: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Ingests removed.
    pub ingests: u64,
    /// Snapshots removed from their drivers.
    pub snapshots: u64,
    /// Records whose bytes or snapshot were missing.
    pub broken: u64,
}

/// Mutations and removals since they were last taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Changes of any kind.
    pub mutations: u64,
    /// Changes that may have left garbage.
    pub removals: u64,
}

/// Tells the barrier, if one stands, what a change writes.
pub(super) fn pass_barrier(inner: &Inner, tx: &Tx<'_>) {
    let mut barrier = inner.barrier.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(touched) = barrier.as_mut() else {
        return;
    };
    let now = SystemTime::now();
    for (key, value) in tx.writes() {
        let Some(value) = value else { continue };
        edges::facts(key, value, now, &mut |fact| match fact {
            Fact::Exists(node) | Fact::Root(node, _) | Fact::UsedAt(node, _) => touched.push(node),
            Fact::Edge { to, .. } | Fact::Conditional { to, .. } => touched.push(to),
        });
    }
}

impl Drop for Collection {
    fn drop(&mut self) {
        *self.barrier() = None;
    }
}

impl Collection {
    fn barrier(&self) -> std::sync::MutexGuard<'_, Option<Vec<Node>>> {
        let barrier = self.db.inner.barrier.lock();
        barrier.unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes those of `candidates` that are still garbage, in one change. Blocks for as long as
    /// the change takes: keep the batch small. Returns what was removed.
    ///
    /// # Errors
    /// When the database fails.
    pub fn remove(
        &self,
        candidates: &[Node],
        judge: &mut dyn Judge,
    ) -> Result<(Vec<Node>, Durable), Error> {
        let inner = &self.db.inner;
        inner.apply_unseen(|change| {
            self.absorb(judge);
            let mut removed = Vec::new();
            for node in candidates {
                if judge.is_garbage(node) && self.remove_one(change, node)? {
                    removed.push(node.clone());
                }
            }
            Ok(removed)
        })
    }

    /// Lets others' changes go first where the database cannot keep up. Blocks for at most two
    /// seconds.
    pub fn give_way(&self) {
        let began = Instant::now();
        while self.db.inner.kv.is_crowded() && began.elapsed() < BATCH_PATIENCE {
            std::thread::sleep(CROWDED_PAUSE);
        }
    }

    /// Tells `judge` what the barrier has so far, without the writer lock: what a batch has to take
    /// over under the lock is then only what came since.
    pub fn absorb(&self, judge: &mut dyn Judge) {
        let touched = self.barrier().as_mut().map(std::mem::take);
        for node in touched.unwrap_or_default() {
            judge.shade(&node);
        }
    }

    /// Tells `judge` what the barrier has, and removes nothing. Blocks like a small change.
    ///
    /// # Errors
    /// When the database fails.
    pub fn catch_up(&self, judge: &mut dyn Judge) -> Result<(), Error> {
        self.remove(&[], judge).map(drop)
    }

    /// Whether the object was there and is not in use.
    fn remove_one(&self, change: &mut Change<'_, '_>, node: &Node) -> Result<bool, Error> {
        let inner = &self.db.inner;
        let namespace = Namespace::new(&node.namespace)?;
        let id = node.id.as_ref();
        match node.kind {
            Kind::Lease => {
                let found = change.contains(&keys::object(table::LEASES, &namespace, id))?;
                if found {
                    let list = Discarded::Lease(namespace.clone(), id.to_owned());
                    leases::remove(change, &Scope::new(namespace), id);
                    change.discard(list);
                }
                Ok(found)
            }
            Kind::Image => {
                let found = change.contains(&keys::object(table::IMAGES, &namespace, id))?;
                if found {
                    images::remove(change, &namespace, id);
                }
                Ok(found)
            }
            Kind::Content => {
                let found = change.contains(&keys::object(table::BLOBS, &namespace, id))?;
                if found {
                    content::remove_blob(change, &namespace, id)?;
                }
                Ok(found)
            }
            Kind::Ingest => {
                if inner.refs.is_held(&format!("{namespace}/{id}")) {
                    return Ok(false);
                }
                let key = keys::object(table::INGESTS, &namespace, id);
                let Some(value) = change.tx.get(&key)? else {
                    return Ok(false);
                };
                content::forget_ingest(change, &namespace, &key, &value)?;
                Ok(true)
            }
            Kind::Snapshot => self.remove_snapshot(change, &namespace, id),
            Kind::Container | Kind::Sandbox | Kind::Mount | Kind::Stream => Ok(false),
        }
    }

    fn remove_snapshot(
        &self,
        change: &mut Change<'_, '_>,
        namespace: &Namespace,
        id: &str,
    ) -> Result<bool, Error> {
        let Some((snapshotter, key)) = id.split_once('/') else {
            return Ok(false);
        };
        let inner = &self.db.inner;
        let pin = pin_name(namespace, snapshotter, key);
        // One whose snapshotter is not loaded today may be tomorrow.
        let Ok(snapshots) = self.db.snapshots(snapshotter) else {
            return Ok(false);
        };
        if inner.pins.contains(&pin) {
            return Ok(false);
        }
        match snapshots.remove_in(change, namespace, key) {
            Ok(()) => Ok(true),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::FailedPrecondition
                ) =>
            {
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

impl Inner {
    /// Before each removal below: while commits are held up by the disk, what they wait for is not
    /// added to.
    async fn give_way(&self) {
        let began = Instant::now();
        while self.kv.is_crowded() && began.elapsed() < REMOVAL_PATIENCE {
            tokio::time::sleep(CROWDED_PAUSE).await;
        }
    }
}

impl Db {
    /// Begins a collection: from now on the barrier stands.
    ///
    /// # Errors
    /// `FailedPrecondition` while another one runs.
    pub fn collection(&self) -> Result<Collection, Error> {
        // Under the writer lock, so that no change is half way past the place of the barrier.
        let ((), _nothing_written) = self.inner.kv.update(|_tx| {
            let mut barrier = self
                .inner
                .barrier
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if barrier.is_some() {
                return Err(Error::Precondition {
                    reason: "a collection is running already".to_owned(),
                });
            }
            *barrier = Some(Vec::new());
            Ok(())
        })?;
        Ok(Collection { db: self.clone() })
    }

    /// States the facts of every record. Blocks; takes no lock.
    ///
    /// # Errors
    /// When the database fails.
    pub fn facts(&self, state: &mut dyn FnMut(Fact)) -> Result<(), Error> {
        let now = SystemTime::now();
        for table in [
            table::LEASES,
            table::RESOURCES,
            table::CONTAINERS,
            table::IMAGES,
            table::SANDBOXES,
            table::INGESTS,
            table::SNAPSHOTS,
            table::BLOBS,
        ] {
            self.pages(table, &mut |key, value| {
                edges::facts(key, value, now, state);
            })?;
        }
        Ok(())
    }

    pub(super) fn pages(&self, table: u8, each: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), Error> {
        let mut start = Builder::new(table).prefix();
        let end = Builder::new(table + 1).prefix();
        loop {
            let page = self.inner.kv.range(&start, Some(&end), PAGE)?;
            let Some((last, _)) = page.last() else {
                return Ok(());
            };
            start.clone_from(last);
            start.push(0);
            for (key, value) in &page {
                each(key, value);
            }
        }
    }

    /// Mutations and removals since the last call.
    #[must_use]
    pub fn take_counts(&self) -> Counts {
        Counts {
            mutations: self.inner.activity.mutations.swap(0, Ordering::Relaxed),
            removals: self.inner.activity.deletions.swap(0, Ordering::Relaxed),
        }
    }

    /// Gives back what was taken for a collection that failed: another is asked for, whatever was
    /// counted.
    pub fn give_back(&self, counts: Counts) {
        let activity = &self.inner.activity;
        activity
            .mutations
            .fetch_add(counts.mutations, Ordering::Relaxed);
        activity
            .deletions
            .fetch_add(counts.removals.max(1), Ordering::Relaxed);
        activity.removed.notify_one();
    }

    /// Mutations and removals since they were last taken.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            mutations: self.inner.activity.mutations.load(Ordering::Relaxed),
            removals: self.inner.activity.deletions.load(Ordering::Relaxed),
        }
    }

    /// Waits until something was removed.
    pub async fn removed(&self) {
        self.inner.activity.removed.notified().await;
    }

    /// Removes from the stores below what records gave up since the last call.
    pub async fn reclaim(&self) -> Reclaimed {
        let discarded = std::mem::take(
            &mut *self
                .inner
                .discarded
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let mut done = Reclaimed::default();
        let mut snapshots: HashMap<String, Vec<String>> = HashMap::new();
        for one in discarded {
            self.inner.give_way().await;
            match one {
                Discarded::Lease(namespace, id) => {
                    let forgotten = leases::forget_resources(&self.inner, &namespace, &id).await;
                    if let Err(error) = forgotten {
                        tracing::warn!(%error, %namespace, id, "the list of a lease that ended");
                    }
                }
                Discarded::Blob(digest) => self.reclaim_blob(&digest, &mut done).await,
                Discarded::Ingest(reference) => match self.inner.content.abort(&reference).await {
                    Ok(()) => done.ingests += 1,
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => tracing::warn!(%error, reference, "removal of an ingest"),
                },
                Discarded::Snapshot {
                    snapshotter,
                    backend,
                } => snapshots.entry(snapshotter).or_default().push(backend),
            }
        }
        for (snapshotter, backends) in snapshots {
            self.reclaim_snapshots(&snapshotter, backends, &mut done)
                .await;
        }
        done
    }

    pub(super) async fn reclaim_blob(&self, digest: &str, done: &mut Reclaimed) {
        let Ok(parsed) = Digest::parse(digest) else {
            return;
        };
        let _file = self.inner.digests.lock(digest).await;
        let prefix = keys::holders(digest).prefix();
        if self.inner.kv.any(&prefix).unwrap_or(true) {
            return;
        }
        let size = self.inner.content.size(&parsed).await.unwrap_or(0);
        match self.inner.content.remove(&parsed).await {
            Ok(()) => {
                done.blobs += 1;
                done.bytes += size;
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(%error, digest, "removal of a blob"),
        }
    }

    /// Removes snapshots from a driver; those with children wait for them.
    pub(super) async fn reclaim_snapshots(
        &self,
        snapshotter: &str,
        mut backends: Vec<String>,
        done: &mut Reclaimed,
    ) {
        let Some(driver) = self.inner.snapshotters.get(snapshotter) else {
            return;
        };
        loop {
            let before = backends.len();
            let mut left = Vec::new();
            for backend in backends {
                self.inner.give_way().await;
                match driver.remove(&backend).await {
                    Ok(()) => done.snapshots += 1,
                    Err(error) => match error.kind() {
                        ErrorKind::NotFound => {}
                        ErrorKind::FailedPrecondition => left.push(backend),
                        _ => {
                            tracing::warn!(%error, key = backend, snapshotter, "removal of a snapshot");
                        }
                    },
                }
            }
            backends = left;
            if backends.is_empty() || backends.len() == before {
                break;
            }
        }
        for backend in backends {
            tracing::debug!(key = backend, snapshotter, "a snapshot still has children");
        }
        match driver.cleanup().await {
            Err(error) if error.kind() != ErrorKind::Unimplemented => {
                tracing::warn!(%error, snapshotter, "cleanup of a snapshotter");
            }
            _ => {}
        }
    }
}
