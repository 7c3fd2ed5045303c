//! Prepare and View: look, let the driver make, record; or adopt what a lazy driver has already.

use lighter_kv::Durable;
use lighter_proto::containerd::events::SnapshotPrepare;
use lighter_proto::errdefs::{Classify, ErrorKind, WireError};
use lighter_snapshotter::{self as driver, Kind, Mount};

use super::{Snapshots, inherited, kind_number, renamed, require_name};
use crate::events::topic;
use crate::metadata::db::{Change, Discarded};
use crate::metadata::leases;
use crate::metadata::records::{SnapshotRecord, Stamps};
use crate::{Error, Labels, Scope, labels};

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
    pub(super) async fn make(
        &self,
        scope: &Scope,
        kind: Kind,
        key: &str,
        parent: Option<&str>,
        mut labels: Labels,
    ) -> Result<(Vec<Mount>, Durable), Error> {
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

    async fn make_now(&self, make: &Make) -> Result<(Vec<Mount>, Durable), Error> {
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
            Err(error) => return Err(made_error(error, make, &backend, parent_key)),
        };
        let recorded = self
            .inner
            .apply(|change| self.record_made(change, make, &backend, parent.as_ref()));
        match recorded {
            Ok(((), durable)) => Ok((mounts, durable)),
            Err(error) => {
                self.undo(&backend).await;
                Err(error)
            }
        }
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
}

/// A driver's error with the client's names instead of its own keys.
fn made_error(error: driver::Error, make: &Make, backend: &str, parent_key: Option<&str>) -> Error {
    let parent = make.parent.clone().unwrap_or_default();
    match error {
        driver::Error::ParentNotFound { .. } => driver::Error::ParentNotFound { parent },
        driver::Error::ParentNotCommitted { .. } => driver::Error::ParentNotCommitted { parent },
        driver::Error::Remote(mut remote) => {
            remote.message = remote.message.replace(backend, &make.key);
            if let Some(parent_key) = parent_key {
                remote.message = remote.message.replace(parent_key, &parent);
            }
            driver::Error::Remote(remote)
        }
        other => return renamed(other, backend, &make.key),
    }
    .into()
}
