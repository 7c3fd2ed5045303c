//! Snapshots as a namespace sees them: client keys over a driver's own.
//!
//! Client key `K` of namespace `N` is `N/<sequence>/K` in the driver; the sequence number is new for
//! every key and name, so a driver's key is never used twice. Making and committing go: look and
//! pin, call the driver, record. A failure in the driver or after it removes what the driver made;
//! what a crash leaves between the steps is reconciled by `collect.rs`.
//!
//! A driver that shares our database is durable with the record's own ticket.

mod commit;
mod make;

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use lighter_kv::Durable;
use lighter_proto::containerd::events::SnapshotRemove;
use lighter_snapshotter::{
    self as driver, CommitOptions, Info, Kind, LabelUpdate, Mount, Snapshotter, Usage,
};

use super::db::{Change, Discarded, Inner};
use super::keys;
use super::leases::{self, KIND_SNAPSHOTS};
use super::records::SnapshotRecord;
use crate::content::{KeyGuard, Pin};
use crate::events::topic;
use crate::filter::{self, Fields, Filter};
use crate::{Error, Labels, Namespace, Scope, labels};

/// Snapshots of one snapshotter, in all namespaces.
#[derive(Debug, Clone)]
pub struct Snapshots {
    inner: Arc<Inner>,
    name: Arc<str>,
    driver: Arc<dyn Snapshotter>,
}

/// A snapshot's record as filters see it.
struct ByFilter<'a>(&'a Info);

impl Fields for ByFilter<'_> {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.split_first()? {
            (first, []) if first == "name" => Some(Cow::Borrowed(&self.0.name)),
            (first, []) if first == "parent" => self.0.parent.as_deref().map(Cow::Borrowed),
            (first, []) if first == "kind" => Some(Cow::Borrowed(self.0.kind.as_str())),
            (first, rest) if first == "labels" => filter::entry(&self.0.labels, rest),
            _ => None,
        }
    }
}

impl SnapshotRecord {
    pub(crate) fn kind(&self) -> Kind {
        match self.kind {
            1 => Kind::View,
            2 => Kind::Active,
            _ => Kind::Committed,
        }
    }

    fn info(&self, key: String) -> Info {
        Info {
            kind: self.kind(),
            name: key,
            parent: (!self.parent.is_empty()).then(|| self.parent.clone()),
            labels: self.labels.clone(),
            created_at: self.stamps.created_at(),
            updated_at: self.stamps.updated_at(),
        }
    }

    /// With what a driver with records of its own says of it: the kind, and labels that it added.
    fn over(&self, key: String, below: &Info) -> Info {
        let mut info = self.info(key);
        info.kind = below.kind;
        for (name, value) in &below.labels {
            let label = info.labels.entry(name.clone());
            label.or_insert_with(|| value.clone());
        }
        info
    }
}

fn kind_number(kind: Kind) -> u32 {
    match kind {
        Kind::View => 1,
        Kind::Active => 2,
        Kind::Committed => 3,
    }
}

impl Snapshots {
    pub(crate) fn over(inner: Arc<Inner>, name: &str) -> Result<Self, Error> {
        let invalid = |reason: String| Err(Error::Invalid { reason });
        if name.is_empty() {
            return invalid("snapshotter argument missing".to_owned());
        }
        let Some(driver) = inner.snapshotters.get(name).cloned() else {
            return invalid(format!("snapshotter not loaded: {name}"));
        };
        Ok(Self {
            inner,
            name: name.into(),
            driver,
        })
    }

    /// Name of the snapshotter.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The driver below; for what it can do and where it keeps things.
    #[must_use]
    pub fn driver(&self) -> &Arc<dyn Snapshotter> {
        &self.driver
    }

    fn key(&self, namespace: &Namespace, key: &str) -> lighter_kv::Key {
        keys::snapshots(namespace, &self.name).last(key)
    }

    fn record(&self, scope: &Scope, key: &str) -> Result<SnapshotRecord, Error> {
        self.inner
            .get(&self.key(&scope.namespace, key), || {
                format!("snapshot {key:?}")
            })?
            .ok_or_else(|| not_found(key))
    }

    fn record_in(
        &self,
        change: &Change<'_, '_>,
        scope: &Scope,
        key: &str,
    ) -> Result<Option<SnapshotRecord>, Error> {
        change.get(&self.key(&scope.namespace, key), || {
            format!("snapshot {key:?}")
        })
    }

    fn lease_kind(&self) -> String {
        format!("{KIND_SNAPSHOTS}{}", self.name)
    }

    /// The record of `key`. A driver with records of its own is asked as well: a snapshot that it lost
    /// is gone.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn stat(&self, scope: &Scope, key: &str) -> Result<Info, Error> {
        let record = self.record(scope, key)?;
        if self.driver.shares_records() {
            return Ok(record.info(key.to_owned()));
        }
        let below = self.driver.stat(&record.backend).await;
        let below = below.map_err(|error| renamed(error, &record.backend, key))?;
        Ok(record.over(key.to_owned(), &below))
    }

    /// Changes labels.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument`.
    pub async fn update(
        &self,
        scope: &Scope,
        key: &str,
        labels: LabelUpdate,
    ) -> Result<Info, Error> {
        let record = self.record(scope, key)?;
        // Before the driver takes over what the record would refuse.
        match &labels {
            LabelUpdate::Replace(all) => labels::check(all)?,
            LabelUpdate::Merge(some) => some.iter().try_for_each(|(key, value)| {
                labels::check_one(key, value.as_deref().unwrap_or_default())
            })?,
        }
        let below = match &labels {
            LabelUpdate::Replace(all) => LabelUpdate::Replace(inherited(all)),
            LabelUpdate::Merge(some) => LabelUpdate::Merge(
                some.iter()
                    .filter(|(key, _)| is_inherited(key))
                    .map(|(key, value)| (key.clone(), value.clone()))
                    .collect(),
            ),
        };
        let below = self
            .driver
            .update(&record.backend, below)
            .await
            .map_err(|error| renamed(error, &record.backend, key))?;
        let shared = self.driver.shares_records();
        self.inner
            .update(|change| {
                let mut record = self
                    .record_in(change, scope, key)?
                    .ok_or_else(|| not_found(key))?;
                match labels {
                    LabelUpdate::Replace(all) => record.labels = all,
                    LabelUpdate::Merge(some) => {
                        for (name, value) in some {
                            match value {
                                Some(value) => record.labels.insert(name, value),
                                None => record.labels.remove(&name),
                            };
                        }
                    }
                }
                labels::drop_empty(&mut record.labels);
                record.stamps.touch();
                change.put(self.key(&scope.namespace, key), &record);
                let key = key.to_owned();
                Ok(if shared {
                    record.info(key)
                } else {
                    record.over(key, &below)
                })
            })
            .await
    }

    /// Disk use.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn usage(&self, scope: &Scope, key: &str) -> Result<Usage, Error> {
        let record = self.record(scope, key)?;
        let usage = self.driver.usage(&record.backend).await;
        usage.map_err(|error| renamed(error, &record.backend, key))
    }

    /// Mounts of an active snapshot or view.
    ///
    /// # Errors
    /// `NotFound`, `FailedPrecondition`.
    pub async fn mounts(&self, scope: &Scope, key: &str) -> Result<Vec<Mount>, Error> {
        let record = self.record(scope, key)?;
        let mounts = self.driver.mounts(&record.backend).await;
        mounts.map_err(|error| renamed(error, &record.backend, key))
    }

    /// Makes a writable snapshot. Event `/snapshot/prepare`.
    ///
    /// # Errors
    /// `AlreadyExists` (also for the `snapshot.ref` target), `NotFound`, `InvalidArgument`.
    ///
    /// # Cancellation
    /// The call goes on.
    pub async fn prepare(
        &self,
        scope: &Scope,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        let made = self.prepare_ahead(scope, key, parent, labels).await?;
        made.1.wait().await?;
        Ok(made.0)
    }

    /// [`Snapshots::prepare`] for who writes a record of his own next: what is made here is durable when
    /// that record is, or when the ticket says so.
    ///
    /// # Errors
    /// As [`Snapshots::prepare`].
    ///
    /// # Cancellation
    /// The call goes on.
    pub async fn prepare_ahead(
        &self,
        scope: &Scope,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<(Vec<Mount>, Durable), Error> {
        self.make(scope, Kind::Active, key, parent, labels).await
    }

    /// Makes a read-only snapshot.
    ///
    /// # Errors
    /// As [`Snapshots::prepare`].
    ///
    /// # Cancellation
    /// The call goes on.
    pub async fn view(
        &self,
        scope: &Scope,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        let made = self.make(scope, Kind::View, key, parent, labels).await?;
        made.1.wait().await?;
        Ok(made.0)
    }

    /// Runs `work` to its end, even when the caller goes away.
    async fn detached<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let job = self.inner.tasks.spawn(work).await;
        job.unwrap_or_else(|error| {
            Err(Error::Io {
                operation: "work with snapshots of",
                path: self.name.as_ref().into(),
                source: std::io::Error::other(error),
            })
        })
    }

    fn pin(&self, namespace: &Namespace, key: &str) -> Pin {
        self.inner.pins.pin(pin_name(namespace, &self.name, key))
    }

    /// Keeps other calls off one or two keys; in order, so that two calls cannot wait for each other.
    async fn lock(&self, namespace: &Namespace, key: &str, other: Option<&str>) -> Vec<KeyGuard> {
        let names: BTreeSet<&str> = other.into_iter().chain([key]).collect();
        let mut locks = Vec::with_capacity(names.len());
        for name in names {
            let name = pin_name(namespace, &self.name, name);
            locks.push(self.inner.snapshots.lock(&name).await);
        }
        locks
    }

    fn in_flight(&self, backend: &str) -> Pin {
        self.inner.in_flight.pin(format!("{}/{backend}", self.name))
    }

    /// Writes a record and what points to it.
    fn put(
        &self,
        change: &mut Change<'_, '_>,
        namespace: &Namespace,
        key: &str,
        record: &SnapshotRecord,
    ) {
        if !record.parent.is_empty() {
            change.mark(keys::children(namespace, &self.name, &record.parent).last(key));
        }
        change.mark(keys::backend(&self.name, &record.backend));
        change.put(self.key(namespace, key), record);
    }

    /// Waits until the files written into active snapshots so far are on disk; see
    /// [`CommitOptions::synced`].
    ///
    /// # Errors
    /// When the disk refuses.
    pub async fn sync(&self) -> Result<(), Error> {
        Ok(self.driver.sync().await?)
    }

    /// Commits `key` as `name`. Event `/snapshot/commit`.
    ///
    /// # Errors
    /// `AlreadyExists`, `NotFound`, `FailedPrecondition`.
    ///
    /// # Cancellation
    /// The call goes on.
    pub async fn commit(
        &self,
        scope: &Scope,
        name: &str,
        key: &str,
        mut options: CommitOptions,
    ) -> Result<(), Error> {
        require_name("name", name)?;
        require_name("key", key)?;
        labels::check(&options.labels)?;
        labels::drop_empty(&mut options.labels);
        let (this, scope) = (self.clone(), scope.clone());
        let (name, key) = (name.to_owned(), key.to_owned());
        self.detached(async move { this.commit_now(&scope, &name, &key, options).await })
            .await
    }

    /// Removes a record and what points to it.
    fn forget(
        &self,
        change: &mut Change<'_, '_>,
        namespace: &Namespace,
        key: &str,
        record: &SnapshotRecord,
    ) {
        if !record.parent.is_empty() {
            change.delete(keys::children(namespace, &self.name, &record.parent).last(key));
        }
        change.delete(keys::backend(&self.name, &record.backend));
        change.delete(self.key(namespace, key));
    }

    /// Removes a snapshot without children. Event `/snapshot/remove`.
    ///
    /// # Errors
    /// `NotFound`, `FailedPrecondition`.
    pub async fn remove(&self, scope: &Scope, key: &str) -> Result<(), Error> {
        let _locks = self.lock(&scope.namespace, key, None).await;
        self.inner
            .update(|change| {
                leases::detach(change, scope, &self.lease_kind(), key);
                self.remove_in(change, &scope.namespace, key)
            })
            .await
    }

    /// Removes a record in a change of the caller's; the driver's snapshot follows.
    pub(crate) fn remove_in(
        &self,
        change: &mut Change<'_, '_>,
        namespace: &Namespace,
        key: &str,
    ) -> Result<(), Error> {
        let scope = Scope::new(namespace.clone());
        let record = self
            .record_in(change, &scope, key)?
            .ok_or_else(|| not_found(key))?;
        let children = keys::children(namespace, &self.name, key).prefix();
        if change.tx.any(&children)? {
            return Err(driver::Error::HasChildren {
                key: key.to_owned(),
            }
            .into());
        }
        self.forget(change, namespace, key, &record);
        change.dirty();
        change.discard(Discarded::Snapshot {
            snapshotter: self.name.as_ref().to_owned(),
            backend: record.backend,
        });
        let event = SnapshotRemove {
            key: key.to_owned(),
            snapshotter: self.name.as_ref().to_owned(),
        };
        change.publish(namespace, topic::SNAPSHOT_REMOVE, &event);
        Ok(())
    }

    /// Matching records in byte order of key. Those that a driver with records of its own knows nothing
    /// of are left out; it is asked once for all.
    ///
    /// # Errors
    /// When the database or the driver fails.
    pub async fn list(&self, scope: &Scope, filter: &Filter) -> Result<Vec<Info>, Error> {
        let prefix = keys::snapshots(&scope.namespace, &self.name).prefix();
        let all = self.inner.list_below::<SnapshotRecord>(&prefix)?;
        // After the records were read: what they name was there before they were.
        let below = if self.driver.shares_records() || all.is_empty() {
            None
        } else {
            let below = self.driver.walk().await?.into_iter();
            Some(below.map(|info| (info.name.clone(), info)).collect())
        };
        let below: Option<HashMap<String, Info>> = below;
        let shown = all.into_iter().filter_map(|(key, record)| match &below {
            None => Some(record.info(key)),
            Some(below) => Some(record.over(key, below.get(&record.backend)?)),
        });
        Ok(shown
            .filter(|info| filter.matches(&ByFilter(info)))
            .collect())
    }

    /// Removes what no record owns.
    ///
    /// # Errors
    /// `Unimplemented` where the driver has nothing to clean.
    pub async fn cleanup(&self) -> Result<(), Error> {
        Ok(self.driver.cleanup().await?)
    }
}

/// Name of a snapshot among the pins.
pub(crate) fn pin_name(namespace: &Namespace, snapshotter: &str, key: &str) -> String {
    format!("{namespace}/{snapshotter}/{key}")
}

fn is_inherited(label: &str) -> bool {
    label.starts_with(labels::SNAPSHOT_PREFIX) || label == labels::SNAPSHOT_REF
}

/// The labels that a driver gets to see.
fn inherited(labels: &Labels) -> Labels {
    labels
        .iter()
        .filter(|(key, _)| is_inherited(key))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn require_name(what: &str, name: &str) -> Result<(), Error> {
    if name.is_empty() {
        return Err(Error::Invalid {
            reason: format!("snapshot {what} must not be empty"),
        });
    }
    Ok(())
}

fn not_found(key: &str) -> Error {
    driver::Error::NotFound {
        key: key.to_owned(),
    }
    .into()
}

/// A driver's error with the client's key instead of its own, `backend`.
fn renamed(error: driver::Error, backend: &str, key: &str) -> Error {
    let key = key.to_owned();
    match error {
        driver::Error::Remote(mut remote) => {
            remote.message = remote.message.replace(backend, &key);
            driver::Error::Remote(remote)
        }
        driver::Error::NotFound { .. } => driver::Error::NotFound { key },
        driver::Error::NoMounts { .. } => driver::Error::NoMounts { key },
        driver::Error::NotActive { .. } => driver::Error::NotActive { key },
        driver::Error::HasChildren { .. } => driver::Error::HasChildren { key },
        other => other,
    }
    .into()
}
