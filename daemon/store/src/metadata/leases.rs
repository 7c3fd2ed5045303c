//! Leases: what keeps objects that nothing refers to yet.

use std::time::SystemTime;

use crate::filter::Filter;
use crate::{Error, Labels, Scope};

/// One lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Any non-empty string.
    pub id: String,
    /// Set by the store.
    pub created_at: SystemTime,
    /// Labels; `containerd.io/gc.expire` and `containerd.io/gc.flat` have meaning.
    pub labels: Labels,
}

/// What a lease holds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Resource {
    /// Digest, ingest ref, image name or snapshot key.
    pub id: String,
    /// `content`, `ingests`, `images`, `snapshots/<snapshotter>`, …
    pub kind: String,
}

/// Leases of all namespaces.
#[derive(Debug, Clone)]
pub struct Leases {}

impl Leases {
    /// Makes a lease; an empty id gets a random one.
    ///
    /// # Errors
    /// `AlreadyExists`, `InvalidArgument`.
    pub async fn create(&self, _scope: &Scope, _id: &str, _labels: Labels) -> Result<Lease, Error> {
        todo!()
    }
    /// Ends a lease. (A synchronous delete also runs a collection: the caller does that.)
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn delete(&self, _scope: &Scope, _id: &str) -> Result<(), Error> {
        todo!()
    }
    /// Matching leases in byte order of id, expired ones included.
    ///
    /// # Errors
    /// When the database fails.
    pub fn list(&self, _scope: &Scope, _filter: &Filter) -> Result<Vec<Lease>, Error> {
        todo!()
    }
    /// Adds a resource; its existence is not checked.
    ///
    /// # Errors
    /// `NotFound` for the lease, `InvalidArgument`, `Unimplemented` for an unknown kind.
    pub async fn add(&self, _scope: &Scope, _id: &str, _resource: Resource) -> Result<(), Error> {
        todo!()
    }
    /// Takes a resource off; absent is fine.
    ///
    /// # Errors
    /// `NotFound` for the lease, `InvalidArgument`, `Unimplemented` for an unknown kind.
    pub async fn remove(
        &self,
        _scope: &Scope,
        _id: &str,
        _resource: &Resource,
    ) -> Result<(), Error> {
        todo!()
    }
    /// What a lease holds: content, images, ingests, snapshots.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn resources(&self, _scope: &Scope, _id: &str) -> Result<Vec<Resource>, Error> {
        todo!()
    }
}
