//! Sandbox records.

use std::collections::BTreeMap;
use std::time::SystemTime;

use prost_types::Any;

use super::Runtime;
use crate::filter::Filter;
use crate::{Error, Identifier, Labels, Scope};

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

/// Sandbox records of all namespaces.
#[derive(Debug, Clone)]
pub struct Sandboxes {}

impl Sandboxes {
    /// Records a sandbox.
    ///
    /// # Errors
    /// `AlreadyExists`, `InvalidArgument`.
    pub async fn create(&self, _scope: &Scope, _sandbox: Sandbox) -> Result<Sandbox, Error> {
        todo!()
    }
    /// One record.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, _scope: &Scope, _id: &str) -> Result<Sandbox, Error> {
        todo!()
    }
    /// Matching records in byte order of id.
    ///
    /// # Errors
    /// When the database fails.
    pub fn list(&self, _scope: &Scope, _filter: &Filter) -> Result<Vec<Sandbox>, Error> {
        todo!()
    }
    /// Changes what `fields` names.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument`.
    pub async fn update(
        &self,
        _scope: &Scope,
        _sandbox: Sandbox,
        _fields: &[String],
    ) -> Result<Sandbox, Error> {
        todo!()
    }
    /// Removes a record.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn delete(&self, _scope: &Scope, _id: &str) -> Result<(), Error> {
        todo!()
    }
}
