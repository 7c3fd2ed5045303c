//! Container records: what to run, not what runs.

use std::collections::BTreeMap;
use std::time::SystemTime;

use prost_types::Any;

use crate::filter::Filter;
use crate::{Error, Identifier, Labels, Scope};

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

/// Container records of all namespaces.
#[derive(Debug, Clone)]
pub struct Containers {}

impl Containers {
    /// Records a container; times are set here. Event `/containers/create`.
    ///
    /// # Errors
    /// `InvalidArgument`, `AlreadyExists`.
    pub async fn create(&self, _scope: &Scope, _container: Container) -> Result<Container, Error> {
        todo!()
    }
    /// One record.
    ///
    /// # Errors
    /// `NotFound`, text `container "x" in namespace "y": not found`.
    pub fn get(&self, _scope: &Scope, _id: &str) -> Result<Container, Error> {
        todo!()
    }
    /// Matching records in byte order of id.
    ///
    /// # Errors
    /// When the database fails.
    pub fn list(&self, _scope: &Scope, _filter: &Filter) -> Result<Vec<Container>, Error> {
        todo!()
    }
    /// Changes what `mask` names (all that may change when empty). Event `/containers/update`.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument` for a path that may not change.
    pub async fn update(
        &self,
        _scope: &Scope,
        _container: Container,
        _mask: &[String],
    ) -> Result<Container, Error> {
        todo!()
    }
    /// Removes a record. Event `/containers/delete`.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn delete(&self, _scope: &Scope, _id: &str) -> Result<(), Error> {
        todo!()
    }
}
