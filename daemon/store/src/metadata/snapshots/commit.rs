//! Commit: note what the active snapshot becomes, let the driver commit, turn the record over.

use lighter_proto::containerd::events::SnapshotCommit;
use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_snapshotter::{self as driver, CommitOptions, Kind};

use super::{Snapshots, inherited, kind_number, not_found, renamed};
use crate::events::topic;
use crate::metadata::db::Change;
use crate::metadata::leases;
use crate::metadata::records::{Committing, SnapshotRecord, Stamps};
use crate::{Error, Namespace, Scope};

impl Snapshots {
    pub(super) async fn commit_now(
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
            return Err(match error.kind() {
                ErrorKind::AlreadyExists => driver::Error::AlreadyExists {
                    key: name.to_owned(),
                }
                .into(),
                _ => renamed(error, &active.backend, key),
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
}
