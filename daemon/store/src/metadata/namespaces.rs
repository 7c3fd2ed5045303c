//! Namespace records; a namespace exists once anything was written in it.

use std::collections::BTreeMap;
use std::sync::Arc;

use lighter_proto::containerd::events::{NamespaceCreate, NamespaceDelete, NamespaceUpdate};

use super::db::{Change, Inner};
use super::keys::{self, Builder, Parts, table};
use super::records::NamespaceRecord;
use crate::events::topic;
use crate::{Error, Labels, Namespace, labels};

/// Namespace records.
#[derive(Debug, Clone)]
pub struct Namespaces {
    inner: Arc<Inner>,
}

impl Namespaces {
    pub(crate) fn over(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    /// Makes a namespace. Event `/namespaces/create`.
    ///
    /// # Errors
    /// `AlreadyExists`, `InvalidArgument`.
    pub async fn create(&self, name: &Namespace, labels: Labels) -> Result<(), Error> {
        labels::check(&labels)?;
        let mut record = NamespaceRecord { labels };
        labels::drop_empty(&mut record.labels);
        self.inner
            .update(|change| {
                let key = keys::namespace(name);
                if change.contains(&key)? {
                    return Err(Error::AlreadyExists {
                        what: format!("namespace \"{name}\""),
                    });
                }
                change.put(key, &record);
                let event = NamespaceCreate {
                    name: name.as_str().to_owned(),
                    labels: record.labels.into_iter().collect(),
                };
                change.publish(name, topic::NAMESPACE_CREATE, &event);
                Ok(())
            })
            .await
    }

    /// Labels of a namespace; none for an unknown one.
    ///
    /// # Errors
    /// When the database fails.
    pub fn labels(&self, name: &Namespace) -> Result<Labels, Error> {
        let record: Option<NamespaceRecord> = self
            .inner
            .get(&keys::namespace(name), || format!("namespace \"{name}\""))?;
        Ok(record.unwrap_or_default().labels)
    }

    /// All namespaces in byte order, with their labels.
    ///
    /// # Errors
    /// When the database fails.
    pub fn list(&self) -> Result<Vec<(Namespace, Labels)>, Error> {
        let prefix = Builder::new(table::NAMESPACES).prefix();
        self.inner
            .list_below::<NamespaceRecord>(&prefix)?
            .into_iter()
            .map(|(name, record)| Ok((Namespace::new(&name)?, record.labels)))
            .collect()
    }

    /// Sets (`Some`) and removes (`None`) labels; `replace` clears the others first.
    /// Event `/namespaces/update`.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub async fn update(
        &self,
        name: &Namespace,
        labels: BTreeMap<String, Option<String>>,
        replace: bool,
    ) -> Result<Labels, Error> {
        for (key, value) in &labels {
            labels::check_one(key, value.as_deref().unwrap_or_default())?;
        }
        self.inner
            .update(|change| {
                let key = keys::namespace(name);
                let found: Option<NamespaceRecord> =
                    change.get(&key, || format!("namespace \"{name}\""))?;
                // Only labels make a namespace that is not there.
                let kept = found.is_some() || !labels.is_empty();
                let mut record = found.unwrap_or_default();
                if replace {
                    record.labels.clear();
                }
                for (key, value) in labels {
                    match value.filter(|value| !value.is_empty()) {
                        Some(value) => record.labels.insert(key, value),
                        None => record.labels.remove(&key),
                    };
                }
                if kept {
                    change.put(key, &record);
                }
                let event = NamespaceUpdate {
                    name: name.as_str().to_owned(),
                    labels: record.labels.clone().into_iter().collect(),
                };
                change.publish(name, topic::NAMESPACE_UPDATE, &event);
                Ok(record.labels)
            })
            .await
    }

    /// Removes an empty namespace. Event `/namespaces/delete`.
    ///
    /// Leases, sandboxes and ingests do not keep it; they go with it.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` naming what is left in it.
    pub async fn delete(&self, name: &Namespace) -> Result<(), Error> {
        self.inner
            .update(|change| {
                let key = keys::namespace(name);
                if !change.contains(&key)? {
                    return Err(Error::NotFound {
                        what: format!("namespace \"{name}\""),
                    });
                }
                let left = left_in(change, name)?;
                if !left.is_empty() {
                    return Err(Error::Precondition {
                        reason: format!(
                            "namespace \"{name}\" must be empty, but it still has {}",
                            left.join(", ")
                        ),
                    });
                }
                change.delete(key);
                for (key, value) in change
                    .tx
                    .scan(&keys::in_namespace(table::INGESTS, name).prefix())?
                {
                    super::content::forget_ingest(change, name, &key, &value)?;
                }
                for table in [table::LEASES, table::RESOURCES, table::SANDBOXES] {
                    for (key, _) in change.tx.scan(&keys::in_namespace(table, name).prefix())? {
                        change.delete(key);
                    }
                }
                change.dirty();
                let event = NamespaceDelete {
                    name: name.as_str().to_owned(),
                };
                change.publish(name, topic::NAMESPACE_DELETE, &event);
                Ok(())
            })
            .await
    }
}

/// Whether others may have a namespace's blobs for their names.
pub(crate) fn is_shareable(change: &Change<'_, '_>, name: &Namespace) -> Result<bool, Error> {
    let record: Option<NamespaceRecord> =
        change.get(&keys::namespace(name), || format!("namespace \"{name}\""))?;
    let label = record.and_then(|mut r| r.labels.remove(labels::NAMESPACE_SHAREABLE));
    Ok(label.is_some_and(|value| value == "true"))
}

/// What keeps a namespace from being deleted, in the words of the error.
fn left_in(change: &Change<'_, '_>, name: &Namespace) -> Result<Vec<String>, Error> {
    let mut left = Vec::new();
    for (table, word) in [
        (table::IMAGES, "images"),
        (table::BLOBS, "blobs"),
        (table::CONTAINERS, "containers"),
    ] {
        if change.tx.any(&keys::in_namespace(table, name).prefix())? {
            left.push(word.to_owned());
        }
    }
    let mut snapshotters = std::collections::BTreeSet::new();
    for (key, _) in change
        .tx
        .scan(&keys::in_namespace(table::SNAPSHOTS, name).prefix())?
    {
        let snapshotter = Parts::of(&key).and_then(|(_, mut parts)| {
            parts.name()?;
            parts.name()
        });
        snapshotters.extend(snapshotter);
    }
    left.extend(
        snapshotters
            .into_iter()
            .map(|name| format!("snapshots on \"{name}\" snapshotter")),
    );
    Ok(left)
}
