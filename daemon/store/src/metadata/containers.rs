//! Container records: what to run, not what runs.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use lighter_proto::containerd::events::{
    ContainerCreate, ContainerDelete, ContainerUpdate, container_create,
};
use prost_types::Any;

use super::db::Inner;
use super::encoded::EncodedContainers;
use super::keys::{self, table};
use super::mask;
use super::records::{ContainerRecord, RuntimeRecord, Stamps, decode};
use crate::events::topic;
use crate::filter::{self, Fields, Filter};
use crate::{Error, Identifier, Labels, Scope, labels};

/// Runtime of a container or sandbox.
#[derive(Debug, Clone, PartialEq)]
pub struct Runtime {
    /// Name or absolute path of the shim, e.g. `io.containerd.runc.v2`.
    pub name: String,
    /// Options, kept byte for byte.
    pub options: Option<Any>,
}

/// One container record.
#[derive(Debug, Clone, PartialEq)]
pub struct Container {
    /// Id, unique in its namespace.
    pub id: Identifier,
    /// Labels.
    pub labels: Labels,
    /// Name of the image it was made from; not checked, not a reference.
    pub image: String,
    /// Runtime.
    pub runtime: Runtime,
    /// OCI spec (JSON in an Any), byte for byte.
    pub spec: Any,
    /// Snapshotter of the root filesystem; empty for none.
    pub snapshotter: String,
    /// Key of the root filesystem's snapshot; empty for none.
    pub snapshot_key: String,
    /// Set by the store.
    pub created_at: SystemTime,
    /// Set by the store.
    pub updated_at: SystemTime,
    /// Opaque values of clients.
    pub extensions: BTreeMap<String, Any>,
    /// Sandbox it belongs to; empty for none.
    pub sandbox_id: String,
}

impl Fields for Container {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        let text = |text: &'_ str| (!text.is_empty()).then(|| Cow::Owned(text.to_owned()));
        match path.split_first()? {
            (first, []) if first == "id" => text(self.id.as_str()),
            (first, []) if first == "image" => text(&self.image),
            (first, rest) if first == "labels" => filter::entry(&self.labels, rest),
            (first, [name]) if first == "runtime" && name == "name" => text(&self.runtime.name),
            _ => None,
        }
    }
}

impl Container {
    fn check(&self) -> Result<(), Error> {
        let invalid = |reason: &str| {
            Err(Error::Invalid {
                reason: reason.to_owned(),
            })
        };
        mask::check_extensions(&self.extensions)?;
        labels::check(&self.labels)?;
        if self.runtime.name.is_empty() {
            return invalid("container.Runtime.Name must be set");
        }
        if self.spec == Any::default() {
            return invalid("container.Spec must be set");
        }
        if !self.snapshot_key.is_empty() && self.snapshotter.is_empty() {
            return invalid("container.Snapshotter must be set if container.SnapshotKey is set");
        }
        Ok(())
    }

    fn record(&self, stamps: Stamps) -> ContainerRecord {
        ContainerRecord {
            stamps,
            labels: self.labels.clone(),
            image: self.image.clone(),
            runtime: self.runtime.clone().into(),
            spec: self.spec.clone(),
            snapshotter: self.snapshotter.clone(),
            snapshot_key: self.snapshot_key.clone(),
            extensions: self.extensions.clone(),
            sandbox_id: self.sandbox_id.clone(),
        }
    }

    fn of(id: Identifier, record: ContainerRecord) -> Self {
        Self {
            id,
            labels: record.labels,
            image: record.image,
            runtime: record.runtime.into(),
            spec: record.spec,
            snapshotter: record.snapshotter,
            snapshot_key: record.snapshot_key,
            created_at: record.stamps.created_at(),
            updated_at: record.stamps.updated_at(),
            extensions: record.extensions,
            sandbox_id: record.sandbox_id,
        }
    }

    /// Takes over what `path` names from `request`.
    fn set(&mut self, request: &Self, path: &str) -> Result<(), Error> {
        let mut maps = mask::Maps {
            labels: &mut self.labels,
            extensions: &mut self.extensions,
        };
        if maps.set(path, &request.labels, &request.extensions) {
            return Ok(());
        }
        match path {
            "spec" => self.spec.clone_from(&request.spec),
            "image" => self.image.clone_from(&request.image),
            "snapshotkey" => self.snapshot_key.clone_from(&request.snapshot_key),
            _ => {
                let object = format!("container \"{}\"", self.id);
                return Err(labels::unknown_path(path, &object));
            }
        }
        Ok(())
    }
}

/// Paths that an empty mask stands for.
const MUTABLE: [&str; 5] = ["labels", "spec", "extensions", "image", "snapshotkey"];

impl From<Runtime> for RuntimeRecord {
    fn from(runtime: Runtime) -> Self {
        Self {
            name: runtime.name,
            options: runtime.options,
        }
    }
}

impl From<RuntimeRecord> for Runtime {
    fn from(record: RuntimeRecord) -> Self {
        Self {
            name: record.name,
            options: record.options,
        }
    }
}

/// Container records of all namespaces.
#[derive(Debug, Clone)]
pub struct Containers {
    inner: Arc<Inner>,
}

impl Containers {
    pub(crate) fn over(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    /// Records a container; times are set here. Event `/containers/create`.
    ///
    /// # Errors
    /// `InvalidArgument`, `AlreadyExists`.
    pub async fn create(
        &self,
        scope: &Scope,
        mut container: Container,
    ) -> Result<Container, Error> {
        container.check()?;
        labels::drop_empty(&mut container.labels);
        let stamps = Stamps::now();
        container.created_at = stamps.created_at();
        container.updated_at = stamps.updated_at();
        let record = container.record(stamps);
        let event = ContainerCreate {
            id: container.id.as_str().to_owned(),
            image: container.image.clone(),
            runtime: Some(container_create::Runtime {
                name: container.runtime.name.clone(),
                options: container.runtime.options.clone(),
            }),
        };
        self.inner
            .update(|change| {
                let key = keys::object(table::CONTAINERS, &scope.namespace, container.id.as_str());
                if change.contains(&key)? {
                    return Err(Error::AlreadyExists {
                        what: format!("container \"{}\"", container.id),
                    });
                }
                change.ensure_namespace(&scope.namespace)?;
                change.put(key, &record);
                change.publish(&scope.namespace, topic::CONTAINER_CREATE, &event);
                Ok(())
            })
            .await?;
        Ok(container)
    }

    /// One record.
    ///
    /// # Errors
    /// `NotFound`, text `container "x" in namespace "y": not found`.
    pub fn get(&self, scope: &Scope, id: &str) -> Result<Container, Error> {
        let key = keys::object(table::CONTAINERS, &scope.namespace, id);
        let record = self
            .inner
            .get(&key, || format!("container \"{id}\""))?
            .ok_or_else(|| not_found(scope, id))?;
        Ok(Container::of(Identifier::new(id)?, record))
    }

    /// Matching records in byte order of id.
    ///
    /// # Errors
    /// When the database fails.
    pub fn list(&self, scope: &Scope, filter: &Filter) -> Result<Vec<Container>, Error> {
        let mut found = Vec::new();
        for (id, record) in self.inner.list(table::CONTAINERS, &scope.namespace)? {
            let container = Container::of(Identifier::new(&id)?, record);
            if filter.matches(&container) {
                found.push(container);
            }
        }
        Ok(found)
    }

    /// The record [`Containers::get`] finds, as a message of the API that has it in field 1.
    ///
    /// # Errors
    /// Those of `get`.
    pub fn get_encoded(&self, scope: &Scope, id: &str) -> Result<Bytes, Error> {
        let key = keys::object(table::CONTAINERS, &scope.namespace, id);
        let record = self
            .inner
            .kv
            .get(&key)?
            .ok_or_else(|| not_found(scope, id))?;
        let mut encoded = EncodedContainers::default();
        match encoded.push(id.as_bytes(), &record) {
            Some(()) => Ok(encoded.joined()),
            None => Err(damaged(id)),
        }
    }

    /// The records [`Containers::list`] finds, as messages of the API.
    ///
    /// # Errors
    /// When the database fails.
    pub fn list_encoded(&self, scope: &Scope, filter: &Filter) -> Result<EncodedContainers, Error> {
        let prefix = keys::in_namespace(table::CONTAINERS, &scope.namespace).prefix();
        let (mut encoded, mut failed) = (EncodedContainers::default(), None);
        self.inner.kv.visit(&prefix, |key, value| {
            let id = &key[prefix.len()..];
            if failed.is_none()
                && let Err(error) = push_matching(&mut encoded, id, value, filter)
            {
                failed = Some(error);
            }
        })?;
        match failed {
            Some(error) => Err(error),
            None => Ok(encoded),
        }
    }

    /// Changes what `mask` names (all that may change when empty). Event `/containers/update`.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument` for a path that may not change.
    pub async fn update(
        &self,
        scope: &Scope,
        container: Container,
        mask: &[String],
    ) -> Result<Container, Error> {
        let id = container.id.as_str();
        self.inner
            .update(|change| {
                let key = keys::object(table::CONTAINERS, &scope.namespace, id);
                let record: ContainerRecord = change
                    .get(&key, || format!("container \"{id}\""))?
                    .ok_or_else(|| not_found(scope, id))?;
                let mut stamps = record.stamps;
                let mut updated = Container::of(container.id.clone(), record);
                if mask.is_empty() {
                    check_immutable(&updated, &container)?;
                }
                for path in mask::paths(mask, &MUTABLE) {
                    updated.set(&container, path)?;
                }
                updated.check()?;
                labels::drop_empty(&mut updated.labels);
                stamps.touch();
                updated.updated_at = stamps.updated_at();
                change.put(key, &updated.record(stamps));
                let event = ContainerUpdate {
                    id: id.to_owned(),
                    image: updated.image.clone(),
                    labels: updated.labels.clone().into_iter().collect(),
                    snapshot_key: updated.snapshot_key.clone(),
                };
                change.publish(&scope.namespace, topic::CONTAINER_UPDATE, &event);
                Ok(updated)
            })
            .await
    }

    /// Removes a record. Event `/containers/delete`.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn delete(&self, scope: &Scope, id: &str) -> Result<(), Error> {
        self.inner
            .update(|change| {
                let key = keys::object(table::CONTAINERS, &scope.namespace, id);
                if !change.contains(&key)? {
                    return Err(not_found(scope, id));
                }
                change.delete(key);
                change.dirty();
                let event = ContainerDelete { id: id.to_owned() };
                change.publish(&scope.namespace, topic::CONTAINER_DELETE, &event);
                Ok(())
            })
            .await
    }
}

/// Appends the record of `id` when it matches.
fn push_matching(
    encoded: &mut EncodedContainers,
    id: &[u8],
    record: &[u8],
    filter: &Filter,
) -> Result<(), Error> {
    let name = String::from_utf8_lossy(id);
    if !filter.is_all() {
        let record = decode(record, || format!("container {name:?}"))?;
        if !filter.matches(&Container::of(Identifier::new(&name)?, record)) {
            return Ok(());
        }
    }
    encoded.push(id, record).ok_or_else(|| damaged(&name))
}

fn damaged(id: &str) -> Error {
    Error::Damaged {
        what: format!("container {id:?}"),
    }
}

fn check_immutable(stored: &Container, request: &Container) -> Result<(), Error> {
    let field = if request.snapshotter != stored.snapshotter {
        "Snapshotter"
    } else if request.runtime.name != stored.runtime.name {
        "Runtime.Name"
    } else {
        return Ok(());
    };
    Err(Error::Invalid {
        reason: format!("container.{field} field is immutable"),
    })
}

fn not_found(scope: &Scope, id: &str) -> Error {
    Error::NotFound {
        what: format!("container {id:?} in namespace \"{}\"", scope.namespace),
    }
}
