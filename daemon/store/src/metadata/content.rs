//! Blobs as a namespace sees them, and the ingests that become blobs.

use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;

use super::db::{Change, Inner};
use super::keys;
use super::records::{IngestRecord, decode};
use crate::content::{BlobReader, IngestStatus};
use crate::filter::Filter;
use crate::{Digest, Error, Labels, Namespace, Scope};

/// The record of a blob in a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobInfo {
    /// Digest.
    pub digest: Digest,
    /// Bytes.
    pub size_bytes: u64,
    /// When it came into the namespace.
    pub created_at: SystemTime,
    /// When its labels changed.
    pub updated_at: SystemTime,
    /// Labels.
    pub labels: Labels,
}

/// Blobs of all namespaces.
#[derive(Debug, Clone)]
pub struct Content {
    inner: Arc<Inner>,
}

/// An open ingest: holds the lock on its ref until dropped; dropping keeps the bytes for resume.
#[derive(Debug)]
pub struct Writer {}

impl Content {
    pub(crate) fn over(inner: Arc<Inner>) -> Self {
        Self { inner }
    }
    /// The record of a blob.
    ///
    /// # Errors
    /// `NotFound`, text `content digest sha256:…: not found`.
    pub fn info(&self, _scope: &Scope, _digest: &Digest) -> Result<BlobInfo, Error> {
        todo!()
    }
    /// Changes labels by field mask (`labels`, `labels.*`; empty: replace all).
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument`.
    pub async fn update(
        &self,
        _scope: &Scope,
        _digest: &Digest,
        _labels: Labels,
        _mask: &[String],
    ) -> Result<BlobInfo, Error> {
        todo!()
    }
    /// Matching blobs in byte order of digest.
    ///
    /// # Errors
    /// When the database fails.
    pub fn list(&self, _scope: &Scope, _filter: &Filter) -> Result<Vec<BlobInfo>, Error> {
        todo!()
    }
    /// Removes the record; the bytes go with a later collection. Event `/content/delete`.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn delete(&self, _scope: &Scope, _digest: &Digest) -> Result<(), Error> {
        todo!()
    }
    /// Opens a blob for reading at any offset.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn reader(&self, _scope: &Scope, _digest: &Digest) -> Result<BlobReader, Error> {
        todo!()
    }
    /// Reads a whole small blob (manifest, config), at most `limit_bytes`, and checks its digest.
    ///
    /// # Errors
    /// `NotFound`, `ResourceExhausted` when it is larger.
    pub async fn read(
        &self,
        _scope: &Scope,
        _digest: &Digest,
        _limit_bytes: u64,
    ) -> Result<Bytes, Error> {
        todo!()
    }
    /// One ingest.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn status(&self, _scope: &Scope, _reference: &str) -> Result<IngestStatus, Error> {
        todo!()
    }
    /// Ingests of the namespace.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn statuses(
        &self,
        _scope: &Scope,
        _filter: &Filter,
    ) -> Result<Vec<IngestStatus>, Error> {
        todo!()
    }
    /// Throws an ingest away.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn abort(&self, _scope: &Scope, _reference: &str) -> Result<(), Error> {
        todo!()
    }
    /// Opens (or resumes) the ingest `reference`. `size_bytes` 0 and `expected` `None` mean unknown.
    ///
    /// # Errors
    /// `AlreadyExists` when the namespace has `expected`; `Unavailable` when the ref is locked.
    pub async fn writer(
        &self,
        _scope: &Scope,
        _reference: &str,
        _size_bytes: u64,
        _expected: Option<&Digest>,
    ) -> Result<Writer, Error> {
        todo!()
    }
}

impl Writer {
    /// Bytes so far, total, expected digest, times.
    #[must_use]
    pub fn status(&self) -> IngestStatus {
        todo!()
    }
    /// Digest of the bytes so far.
    #[must_use]
    pub fn digest(&self) -> Digest {
        todo!()
    }
    /// Appends.
    ///
    /// # Errors
    /// `Io`.
    pub async fn write(&mut self, _data: Bytes) -> Result<(), Error> {
        todo!()
    }
    /// Back to `size_bytes`; only 0 is supported.
    ///
    /// # Errors
    /// `Unimplemented` for another size.
    pub async fn truncate(&mut self, _size_bytes: u64) -> Result<(), Error> {
        todo!()
    }
    /// Makes it a blob: size (when not 0) and digest (when given) must match, bytes and record are
    /// durable afterwards. Event `/content/create`.
    ///
    /// # Errors
    /// `FailedPrecondition` on a mismatch, `AlreadyExists` when the namespace has it (the ingest is
    /// gone then too).
    pub async fn commit(
        self,
        _size_bytes: u64,
        _expected: Option<&Digest>,
        _labels: Labels,
    ) -> Result<Digest, Error> {
        todo!()
    }
}

/// Removes an ingest's record, given as its key and value, and its hold on a shared file.
pub(crate) fn forget_ingest(
    change: &mut Change<'_, '_>,
    namespace: &Namespace,
    key: &[u8],
    value: &[u8],
) -> Result<(), Error> {
    let record: IngestRecord = decode(value, || "ingest record".to_owned())?;
    if !record.expected.is_empty() {
        let (_, mut parts) = keys::Parts::of(key).ok_or_else(|| Error::Damaged {
            what: "ingest key".to_owned(),
        })?;
        parts.name();
        if let Some(reference) = parts.last() {
            change.delete(keys::holder(&record.expected, namespace, reference));
        }
    }
    change.delete(key.to_vec());
    change.dirty();
    Ok(())
}
