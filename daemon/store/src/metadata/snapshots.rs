//! Snapshots as a namespace sees them: client keys over a driver's own.
//!
//! Client key `K` of namespace `N` is `N/<sequence>/K` in the driver; the sequence number is new for
//! every key and name, so a driver's key is never used twice. Making and committing go: look and
//! pin, call the driver, record. A failure in the driver or after it removes what the driver made;
//! what a crash leaves between the steps is reconciled by `collect.rs`.
//!
//! A driver that shares our database is durable with the record's own ticket.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use lighter_proto::containerd::events::{SnapshotCommit, SnapshotPrepare, SnapshotRemove};
use lighter_proto::errdefs::{Classify, ErrorKind, WireError};
use lighter_snapshotter::{
    self as driver, CommitOptions, Info, Kind, LabelUpdate, Mount, Snapshotter, Usage,
};

use super::db::{Change, Discarded, Inner};
use super::keys;
use super::leases::{self, KIND_SNAPSHOTS};
use super::records::{Committing, SnapshotRecord, Stamps};
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
}

fn kind_number(kind: Kind) -> u32 {
    match kind {
        Kind::View => 1,
        Kind::Active => 2,
        Kind::Committed => 3,
    }
}

/// What the first look at a request to make a snapshot finds.
enum Look {
    /// Key or target is taken; the request's lease holds it.
    Taken(String),
    /// The parent's record, or no parent was asked for.
    Free(Option<SnapshotRecord>),
}

/// A request to make a snapshot.
#[derive(Debug)]
struct Make {
    scope: Scope,
    kind: Kind,
    key: String,
    parent: Option<String>,
    labels: Labels,
}

impl Make {
    fn target(&self) -> Option<&str> {
        self.labels.get(labels::SNAPSHOT_REF).map(String::as_str)
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

    /// The record of `key`.
    ///
    /// # Errors
    /// `NotFound`.
    #[allow(clippy::unused_async, reason = "the contract of all snapshot calls")]
    pub async fn stat(&self, scope: &Scope, key: &str) -> Result<Info, Error> {
        Ok(self.record(scope, key)?.info(key.to_owned()))
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
        let below = match &labels {
            LabelUpdate::Replace(all) => LabelUpdate::Replace(inherited(all)),
            LabelUpdate::Merge(some) => LabelUpdate::Merge(
                some.iter()
                    .filter(|(key, _)| is_inherited(key))
                    .map(|(key, value)| (key.clone(), value.clone()))
                    .collect(),
            ),
        };
        self.driver
            .update(&record.backend, below)
            .await
            .map_err(|error| renamed(error, key))?;
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
                labels::check(&record.labels)?;
                labels::drop_empty(&mut record.labels);
                record.stamps.touch();
                change.put(self.key(&scope.namespace, key), &record);
                Ok(record.info(key.to_owned()))
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
        usage.map_err(|error| renamed(error, key))
    }

    /// Mounts of an active snapshot or view.
    ///
    /// # Errors
    /// `NotFound`, `FailedPrecondition`.
    pub async fn mounts(&self, scope: &Scope, key: &str) -> Result<Vec<Mount>, Error> {
        let record = self.record(scope, key)?;
        let mounts = self.driver.mounts(&record.backend).await;
        mounts.map_err(|error| renamed(error, key))
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
        self.make(scope, Kind::View, key, parent, labels).await
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

    async fn make(
        &self,
        scope: &Scope,
        kind: Kind,
        key: &str,
        parent: Option<&str>,
        mut labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        require_name("key", key)?;
        labels::check(&labels)?;
        labels::drop_empty(&mut labels);
        let make = Make {
            scope: scope.clone(),
            kind,
            key: key.to_owned(),
            parent: parent.filter(|p| !p.is_empty()).map(str::to_owned),
            labels,
        };
        let this = self.clone();
        self.detached(async move { this.make_now(&make).await })
            .await
    }

    async fn make_now(&self, make: &Make) -> Result<Vec<Mount>, Error> {
        let namespace = &make.scope.namespace;
        let _locks = self.lock(namespace, &make.key, make.target()).await;
        let _parent = make.parent.as_deref().map(|p| self.pin(namespace, p));
        let (look, ticket) = self.inner.apply(|change| self.look(change, make))?;
        let parent = match look {
            Look::Free(parent) => parent,
            Look::Taken(what) => {
                ticket.wait().await?;
                return Err(Error::AlreadyExists { what });
            }
        };
        let sequence = self.inner.next_sequence().await?;
        let backend = format!("{namespace}/{sequence}/{}", make.key);
        let _in_flight = self.in_flight(&backend);
        let parent_key = parent.as_ref().map(|parent| parent.backend.as_str());
        let labels = inherited(&make.labels);
        let made = match make.kind {
            Kind::View => self.driver.view(&backend, parent_key, labels).await,
            _ => self.driver.prepare(&backend, parent_key, labels).await,
        };
        let mounts = match made {
            Ok(mounts) => mounts,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                return Err(self.adopt(make, parent.as_ref()).await?);
            }
            Err(error) => return Err(made_error(error, make)),
        };
        let recorded = self
            .inner
            .update(|change| self.record_made(change, make, &backend, parent.as_ref()))
            .await;
        if recorded.is_err() {
            self.undo(&backend).await;
        }
        recorded.map(|()| mounts)
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

    /// Removes what the driver made for a call that failed afterwards.
    async fn undo(&self, backend: &str) {
        if let Err(error) = self.driver.remove(backend).await
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!(%error, key = backend, "snapshot of a failed call stays for now");
            self.inner.discard(Discarded::Snapshot {
                snapshotter: self.name.as_ref().to_owned(),
                backend: backend.to_owned(),
            });
        }
    }

    fn look(&self, change: &mut Change<'_, '_>, make: &Make) -> Result<Look, Error> {
        leases::check(change, &make.scope)?;
        let target = make
            .target()
            .map(|t| (t, format!("target snapshot \"{t}\"")));
        let own = (make.key.as_str(), format!("snapshot \"{}\"", make.key));
        for (key, what) in target.into_iter().chain([own]) {
            if self.record_in(change, &make.scope, key)?.is_some() {
                leases::attach(change, &make.scope, &self.lease_kind(), key)?;
                return Ok(Look::Taken(what));
            }
        }
        match &make.parent {
            Some(parent) => Ok(Look::Free(Some(self.parent_in(
                change,
                &make.scope,
                parent,
            )?))),
            None => Ok(Look::Free(None)),
        }
    }

    fn parent_in(
        &self,
        change: &Change<'_, '_>,
        scope: &Scope,
        parent: &str,
    ) -> Result<SnapshotRecord, Error> {
        let record = self.record_in(change, scope, parent)?.ok_or_else(|| {
            driver::Error::ParentNotFound {
                parent: parent.to_owned(),
            }
        })?;
        if record.kind() != Kind::Committed {
            return Err(driver::Error::ParentNotCommitted {
                parent: parent.to_owned(),
            }
            .into());
        }
        Ok(record)
    }

    /// Writes the record of a snapshot that the driver made, unless the world changed meanwhile.
    fn record_made(
        &self,
        change: &mut Change<'_, '_>,
        make: &Make,
        backend: &str,
        parent: Option<&SnapshotRecord>,
    ) -> Result<(), Error> {
        let namespace = &make.scope.namespace;
        if self.record_in(change, &make.scope, &make.key)?.is_some() {
            return Err(Error::AlreadyExists {
                what: format!("snapshot \"{}\"", make.key),
            });
        }
        if let (Some(name), Some(parent)) = (&make.parent, parent)
            && self.parent_in(change, &make.scope, name)?.backend != parent.backend
        {
            return Err(driver::Error::ParentNotFound {
                parent: name.clone(),
            }
            .into());
        }
        change.ensure_namespace(namespace)?;
        let record = SnapshotRecord {
            stamps: Stamps::now(),
            labels: make.labels.clone(),
            backend: backend.to_owned(),
            parent: make.parent.clone().unwrap_or_default(),
            kind: kind_number(make.kind),
            committing: None,
        };
        self.put(change, namespace, &make.key, &record);
        leases::attach(change, &make.scope, &self.lease_kind(), &make.key)?;
        if make.kind == Kind::Active {
            let event = SnapshotPrepare {
                key: make.key.clone(),
                parent: record.parent,
                snapshotter: self.name.as_ref().to_owned(),
            };
            change.publish(namespace, topic::SNAPSHOT_PREPARE, &event);
        }
        Ok(())
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

    /// The driver said that the snapshot is there already: a remote snapshotter that has the target.
    /// Records it under the target's name. Returns the error that the caller gets.
    async fn adopt(&self, make: &Make, parent: Option<&SnapshotRecord>) -> Result<Error, Error> {
        let unknown = |message: String| Error::Remote(WireError::new(ErrorKind::Unknown, message));
        let Some(target) = make.target() else {
            return Ok(unknown(format!(
                "snapshotter \"{}\" has the key of snapshot \"{}\" already",
                self.name, make.key
            )));
        };
        let parent_key = parent.map(|parent| parent.backend.as_str());
        let found = self.driver.walk().await?.into_iter().find(|info| {
            info.kind == Kind::Committed
                && info.labels.get(labels::SNAPSHOT_REF).map(String::as_str) == Some(target)
                && info.parent.as_deref() == parent_key
        });
        let Some(found) = found else {
            return Ok(unknown(format!(
                "snapshotter \"{}\" says that target snapshot \"{target}\" exists but has none",
                self.name
            )));
        };
        self.inner
            .update(|change| {
                let namespace = &make.scope.namespace;
                if self.record_in(change, &make.scope, target)?.is_none() {
                    change.ensure_namespace(namespace)?;
                    let record = SnapshotRecord {
                        stamps: Stamps::now(),
                        labels: make.labels.clone(),
                        backend: found.name.clone(),
                        parent: make.parent.clone().unwrap_or_default(),
                        kind: kind_number(Kind::Committed),
                        committing: None,
                    };
                    self.put(change, namespace, target, &record);
                }
                leases::attach(change, &make.scope, &self.lease_kind(), target)
            })
            .await?;
        Ok(Error::AlreadyExists {
            what: format!("target snapshot \"{target}\""),
        })
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

    async fn commit_now(
        &self,
        scope: &Scope,
        name: &str,
        key: &str,
        options: CommitOptions,
    ) -> Result<(), Error> {
        let namespace = &scope.namespace;
        let _locks = self.lock(namespace, key, Some(name)).await;
        let rebase = options.parent.as_deref().filter(|p| !p.is_empty());
        let _parent = rebase.map(|p| self.pin(namespace, p));
        let _key = self.pin(namespace, key);
        let sequence = self.inner.next_sequence().await?;
        let backend = format!("{namespace}/{sequence}/{name}");
        let _in_flight = self.in_flight(&backend);
        let ((active, parent), _durable_with_the_record) = self
            .inner
            .apply(|change| self.begin_commit(change, scope, key, name, &backend, &options))?;
        let below = CommitOptions {
            labels: inherited(&options.labels),
            parent: parent.map(|parent| parent.backend),
            synced: options.synced,
        };
        if let Err(error) = self.driver.commit(&backend, &active.backend, below).await {
            let ((), _nothing_to_wait_for) = self.inner.apply(|change| {
                if let Some(mut record) = self.record_in(change, scope, key)? {
                    record.committing = None;
                    change.put(self.key(namespace, key), &record);
                }
                Ok(())
            })?;
            return Err(match error {
                driver::Error::AlreadyExists { .. } => driver::Error::AlreadyExists {
                    key: name.to_owned(),
                }
                .into(),
                other => renamed(other, key),
            });
        }
        self.inner
            .update(|change| {
                self.finish_commit(change, namespace, key)?;
                leases::detach(change, scope, &self.lease_kind(), key);
                // The lease may have ended meanwhile; the commit stands all the same.
                if leases::check(change, scope).is_ok() {
                    leases::attach(change, scope, &self.lease_kind(), name)?;
                }
                Ok(())
            })
            .await
    }

    /// Checks a commit and notes on the active record what it is about to become.
    fn begin_commit(
        &self,
        change: &mut Change<'_, '_>,
        scope: &Scope,
        key: &str,
        name: &str,
        backend: &str,
        options: &CommitOptions,
    ) -> Result<(SnapshotRecord, Option<SnapshotRecord>), Error> {
        leases::check(change, scope)?;
        let active = self
            .record_in(change, scope, key)?
            .ok_or_else(|| not_found(key))?;
        if active.kind() != Kind::Active {
            return Err(driver::Error::NotActive {
                key: key.to_owned(),
            }
            .into());
        }
        if name != key && self.record_in(change, scope, name)?.is_some() {
            return Err(Error::AlreadyExists {
                what: format!("snapshot \"{name}\""),
            });
        }
        let mut parent = active.parent.clone();
        let mut rebased = None;
        if let Some(wanted) = options.parent.as_deref().filter(|p| !p.is_empty())
            && wanted != parent
        {
            if !parent.is_empty() {
                return Err(Error::Invalid {
                    reason: "cannot change parent of active snapshot".to_owned(),
                });
            }
            let record = self.record_in(change, scope, wanted)?.ok_or_else(|| {
                driver::Error::ParentNotFound {
                    parent: wanted.to_owned(),
                }
            })?;
            if record.kind() != Kind::Committed {
                return Err(Error::Precondition {
                    reason: format!("parent \"{wanted}\" is not committed snapshot"),
                });
            }
            wanted.clone_into(&mut parent);
            rebased = Some(record);
        }
        let noted = SnapshotRecord {
            committing: Some(Committing {
                name: name.to_owned(),
                backend: backend.to_owned(),
                labels: options.labels.clone(),
                parent,
            }),
            ..active.clone()
        };
        change.put(self.key(&scope.namespace, key), &noted);
        Ok((active, rebased))
    }

    /// Turns an active record whose commit is done below into the committed one.
    pub(crate) fn finish_commit(
        &self,
        change: &mut Change<'_, '_>,
        namespace: &Namespace,
        key: &str,
    ) -> Result<(), Error> {
        let scope = Scope::new(namespace.clone());
        let mut active = self
            .record_in(change, &scope, key)?
            .ok_or_else(|| not_found(key))?;
        let Some(committing) = active.committing.take() else {
            return Err(driver::Error::NotActive {
                key: key.to_owned(),
            }
            .into());
        };
        if committing.name != key && self.record_in(change, &scope, &committing.name)?.is_some() {
            return Err(Error::AlreadyExists {
                what: format!("snapshot \"{}\"", committing.name),
            });
        }
        self.forget(change, namespace, key, &active);
        let record = SnapshotRecord {
            stamps: Stamps::now(),
            labels: committing.labels,
            backend: committing.backend,
            parent: committing.parent,
            kind: kind_number(Kind::Committed),
            committing: None,
        };
        self.put(change, namespace, &committing.name, &record);
        let event = SnapshotCommit {
            key: key.to_owned(),
            name: committing.name,
            snapshotter: self.name.as_ref().to_owned(),
        };
        change.publish(namespace, topic::SNAPSHOT_COMMIT, &event);
        Ok(())
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

    /// Matching records in byte order of key.
    ///
    /// # Errors
    /// When the database or the driver fails.
    #[allow(clippy::unused_async, reason = "the contract of all snapshot calls")]
    pub async fn list(&self, scope: &Scope, filter: &Filter) -> Result<Vec<Info>, Error> {
        let prefix = keys::snapshots(&scope.namespace, &self.name).prefix();
        let all = self.inner.list_below::<SnapshotRecord>(&prefix)?;
        Ok(all
            .into_iter()
            .map(|(key, record)| record.info(key))
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

/// A driver's error with the client's key instead of its own.
fn renamed(error: driver::Error, key: &str) -> Error {
    let key = key.to_owned();
    match error {
        driver::Error::NotFound { .. } => driver::Error::NotFound { key },
        driver::Error::NoMounts { .. } => driver::Error::NoMounts { key },
        driver::Error::NotActive { .. } => driver::Error::NotActive { key },
        driver::Error::HasChildren { .. } => driver::Error::HasChildren { key },
        other => other,
    }
    .into()
}

fn made_error(error: driver::Error, make: &Make) -> Error {
    let parent = make.parent.clone().unwrap_or_default();
    match error {
        driver::Error::ParentNotFound { .. } => driver::Error::ParentNotFound { parent },
        driver::Error::ParentNotCommitted { .. } => driver::Error::ParentNotCommitted { parent },
        other => return renamed(other, &make.key),
    }
    .into()
}
