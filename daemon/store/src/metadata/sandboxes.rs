//! Sandbox records.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use prost_types::Any;

use super::Runtime;
use super::db::Inner;
use super::keys::{self, table};
use super::mask;
use super::records::{SandboxRecord, Stamps};
use crate::filter::{self, Fields, Filter};
use crate::{Error, Identifier, Labels, Scope, labels};

/// One sandbox record.
#[derive(Debug, Clone, PartialEq)]
pub struct Sandbox {
    /// Id, unique in its namespace.
    pub id: Identifier,
    /// Labels.
    pub labels: Labels,
    /// Runtime.
    pub runtime: Runtime,
    /// Spec, opaque.
    pub spec: Option<Any>,
    /// Controller that runs it (`shim`, `podsandbox`, …).
    pub sandboxer: String,
    /// Set by the store.
    pub created_at: SystemTime,
    /// Set by the store.
    pub updated_at: SystemTime,
    /// Opaque values of clients.
    pub extensions: BTreeMap<String, Any>,
}

impl Fields for Sandbox {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.split_first()? {
            (first, []) if first == "id" => Some(Cow::Borrowed(self.id.as_str())),
            (first, rest) if first == "labels" => filter::entry(&self.labels, rest),
            _ => None,
        }
    }
}

impl Sandbox {
    fn check(&self) -> Result<(), Error> {
        mask::check_extensions(&self.extensions)?;
        labels::check(&self.labels)
    }

    fn record(&self, stamps: Stamps) -> SandboxRecord {
        SandboxRecord {
            stamps,
            labels: self.labels.clone(),
            runtime: self.runtime.clone().into(),
            spec: self.spec.clone(),
            sandboxer: self.sandboxer.clone(),
            extensions: self.extensions.clone(),
        }
    }

    fn of(id: Identifier, record: SandboxRecord) -> Self {
        Self {
            id,
            labels: record.labels,
            runtime: record.runtime.into(),
            spec: record.spec,
            sandboxer: record.sandboxer,
            created_at: record.stamps.created_at(),
            updated_at: record.stamps.updated_at(),
            extensions: record.extensions,
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
            "runtime" => self.runtime.clone_from(&request.runtime),
            "spec" => self.spec.clone_from(&request.spec),
            _ => {
                let object = format!("sandbox \"{}\"", self.id);
                return Err(labels::unknown_path(path, &object));
            }
        }
        Ok(())
    }
}

/// Paths that an empty mask stands for.
const MUTABLE: [&str; 4] = ["labels", "extensions", "runtime", "spec"];

/// Sandbox records of all namespaces.
#[derive(Debug, Clone)]
pub struct Sandboxes {
    inner: Arc<Inner>,
}

impl Sandboxes {
    pub(crate) fn over(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    /// Records a sandbox.
    ///
    /// # Errors
    /// `AlreadyExists`, `InvalidArgument`.
    pub async fn create(&self, scope: &Scope, mut sandbox: Sandbox) -> Result<Sandbox, Error> {
        sandbox.check()?;
        labels::drop_empty(&mut sandbox.labels);
        let stamps = Stamps::now();
        sandbox.created_at = stamps.created_at();
        sandbox.updated_at = stamps.updated_at();
        let record = sandbox.record(stamps);
        self.inner
            .update(|change| {
                let key = keys::object(table::SANDBOXES, &scope.namespace, sandbox.id.as_str());
                if change.contains(&key)? {
                    return Err(Error::AlreadyExists {
                        what: format!("sandbox \"{}\"", sandbox.id),
                    });
                }
                change.ensure_namespace(&scope.namespace)?;
                change.put(key, &record);
                Ok(())
            })
            .await?;
        Ok(sandbox)
    }

    /// One record.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, scope: &Scope, id: &str) -> Result<Sandbox, Error> {
        let key = keys::object(table::SANDBOXES, &scope.namespace, id);
        let record = self
            .inner
            .get(&key, || format!("sandbox \"{id}\""))?
            .ok_or_else(|| not_found(id))?;
        Ok(Sandbox::of(Identifier::new(id)?, record))
    }

    /// Matching records in byte order of id.
    ///
    /// # Errors
    /// When the database fails.
    pub fn list(&self, scope: &Scope, filter: &Filter) -> Result<Vec<Sandbox>, Error> {
        let mut found = Vec::new();
        for (id, record) in self.inner.list(table::SANDBOXES, &scope.namespace)? {
            let sandbox = Sandbox::of(Identifier::new(&id)?, record);
            if filter.matches(&sandbox) {
                found.push(sandbox);
            }
        }
        Ok(found)
    }

    /// Changes what `fields` names.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument`.
    pub async fn update(
        &self,
        scope: &Scope,
        sandbox: Sandbox,
        fields: &[String],
    ) -> Result<Sandbox, Error> {
        let id = sandbox.id.as_str();
        self.inner
            .update(|change| {
                let key = keys::object(table::SANDBOXES, &scope.namespace, id);
                let record: SandboxRecord = change
                    .get(&key, || format!("sandbox \"{id}\""))?
                    .ok_or_else(|| not_found(id))?;
                let mut stamps = record.stamps;
                let mut updated = Sandbox::of(sandbox.id.clone(), record);
                if fields.is_empty() && sandbox.runtime.name != updated.runtime.name {
                    return Err(Error::Invalid {
                        reason: "sandbox.Runtime.Name field is immutable".to_owned(),
                    });
                }
                for path in mask::paths(fields, &MUTABLE) {
                    updated.set(&sandbox, path)?;
                }
                updated.check()?;
                labels::drop_empty(&mut updated.labels);
                stamps.touch();
                updated.updated_at = stamps.updated_at();
                change.put(key, &updated.record(stamps));
                Ok(updated)
            })
            .await
    }

    /// Removes a record.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn delete(&self, scope: &Scope, id: &str) -> Result<(), Error> {
        self.inner
            .update(|change| {
                let key = keys::object(table::SANDBOXES, &scope.namespace, id);
                if !change.contains(&key)? {
                    return Err(not_found(id));
                }
                change.delete(key);
                change.dirty();
                Ok(())
            })
            .await
    }
}

fn not_found(id: &str) -> Error {
    Error::NotFound {
        what: format!("sandbox {id:?}"),
    }
}
