//! Image records: a name for a descriptor.

use std::time::SystemTime;

use crate::filter::Filter;
use crate::{Digest, Error, Labels, Scope};

/// What a blob is, how long, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Media type.
    pub media_type: String,
    /// Digest.
    pub digest: Digest,
    /// Bytes; never negative.
    pub size_bytes: u64,
    /// Annotations.
    pub annotations: Labels,
}

/// One image record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Any non-empty string; by custom a full reference.
    pub name: String,
    /// Labels.
    pub labels: Labels,
    /// Index or manifest.
    pub target: Descriptor,
    /// Set by the store.
    pub created_at: SystemTime,
    /// Set by the store.
    pub updated_at: SystemTime,
}

/// Image records of all namespaces.
#[derive(Debug, Clone)]
pub struct Images {}

impl Images {
    /// Records an image. `stamp` replaces now (`source_date_epoch`). Event `/images/create`.
    ///
    /// # Errors
    /// `InvalidArgument`, `AlreadyExists`.
    pub async fn create(
        &self,
        _scope: &Scope,
        _image: Image,
        _stamp: Option<SystemTime>,
    ) -> Result<Image, Error> {
        todo!()
    }
    /// One record.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, _scope: &Scope, _name: &str) -> Result<Image, Error> {
        todo!()
    }
    /// Matching records in byte order of name.
    ///
    /// # Errors
    /// When the database fails.
    pub fn list(&self, _scope: &Scope, _filter: &Filter) -> Result<Vec<Image>, Error> {
        todo!()
    }
    /// Changes what `mask` names (labels and target when empty). Event `/images/update`.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument`.
    pub async fn update(
        &self,
        _scope: &Scope,
        _image: Image,
        _mask: &[String],
        _stamp: Option<SystemTime>,
    ) -> Result<Image, Error> {
        todo!()
    }
    /// Removes a record, if its target still is `target` where given. Event `/images/delete`.
    /// (A synchronous delete also runs a collection: the caller does that.)
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn delete(
        &self,
        _scope: &Scope,
        _name: &str,
        _target: Option<&Digest>,
    ) -> Result<(), Error> {
        todo!()
    }
}
