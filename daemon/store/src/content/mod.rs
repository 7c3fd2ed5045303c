//! Blobs and ingests, without namespaces: the [`Store`] contract and where bytes may be kept.
//!
//! An *ingest* is written under a ref; commit turns it into a *blob* that is named by its digest and
//! never changes. A ref is written by one writer at a time; the lock lives in memory and dies with
//! its writer. `metadata::Content` puts namespaces, labels and leases over a store.

mod ingest;
mod local;
mod locks;
mod proxy;
mod reader;
mod serve;
mod session;
#[cfg(any(test, feature = "testsuite"))]
pub mod testsuite;

use std::borrow::Cow;
use std::fmt;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;

pub use self::local::Local;
pub use self::locks::{KeyGuard, RefGuard};
pub(crate) use self::locks::{KeyedMutex, Pin, Pins, RefLocks};
pub use self::proxy::Proxy;
pub use self::reader::BlobReader;
pub use self::serve::Serve;
pub use self::session::{Session, Target, TargetWriter};
use crate::filter::Fields;
use crate::{Digest, Error};

/// State of an ingest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IngestStatus {
    /// Its ref.
    pub reference: String,
    /// Bytes so far.
    pub offset_bytes: u64,
    /// Bytes in the end; 0 when unknown.
    pub total_bytes: u64,
    /// Digest it must have, when known.
    pub expected: Option<Digest>,
    /// When it was begun.
    pub started_at: SystemTime,
    /// When it last grew.
    pub updated_at: SystemTime,
}

impl Fields for IngestStatus {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path {
            [field] if field == "ref" => Some(Cow::Borrowed(&self.reference)),
            _ => None,
        }
    }
}

/// A blob as a store knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Digest.
    pub digest: Digest,
    /// Bytes.
    pub size_bytes: u64,
    /// When it was committed.
    pub created_at: SystemTime,
}

/// How to open an ingest.
#[derive(Debug, Clone, Default)]
pub struct Open {
    /// Its ref: any non-empty text.
    pub reference: String,
    /// Bytes in the end; 0 when unknown.
    pub total_bytes: u64,
    /// Digest it will have, when known; chooses the algorithm, and a blob that exists is refused.
    pub expected: Option<Digest>,
    /// Who opens it, for the error that another opener gets.
    pub holder: String,
}

/// Where bytes are kept.
///
/// # Errors
/// All methods: `NotFound` for an unknown digest or ref, `Io` (`Internal`, or `ResourceExhausted`
/// on a full disk) when the system refuses.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// What is known of a blob.
    async fn info(&self, digest: &Digest) -> Result<Stored, Error>;

    /// Size of a blob.
    async fn size(&self, digest: &Digest) -> Result<u64, Error> {
        Ok(self.info(digest).await?.size_bytes)
    }

    /// Opens a blob for reading at any offset; it stays readable when it is removed meanwhile.
    async fn reader(&self, digest: &Digest) -> Result<BlobReader, Error>;

    /// Removes a blob.
    async fn remove(&self, digest: &Digest) -> Result<(), Error>;

    /// All blobs, in no order.
    async fn walk(&self) -> Result<Vec<Stored>, Error>;

    /// State of an ingest.
    async fn status(&self, reference: &str) -> Result<IngestStatus, Error>;

    /// All ingests, in no order.
    async fn statuses(&self) -> Result<Vec<IngestStatus>, Error>;

    /// Throws an ingest away, whoever writes it.
    async fn abort(&self, reference: &str) -> Result<(), Error>;

    /// Removes what a crash left half made in the store itself; says how many. For the first
    /// collection after a start.
    async fn heal(&self) -> Result<u64, Error> {
        Ok(0)
    }

    /// Opens or resumes an ingest. `AlreadyExists` when `expected` is a blob already, `Unavailable`
    /// while another writer has it.
    async fn writer(&self, open: Open) -> Result<Box<dyn Ingest>, Error>;
}

/// An open ingest. Dropping it unlocks its ref and keeps its bytes for resume.
#[async_trait]
pub trait Ingest: Send + Sync + fmt::Debug {
    /// Bytes so far, total, expected digest, times.
    fn status(&self) -> IngestStatus;

    /// Digest of the bytes so far.
    async fn digest(&mut self) -> Result<Digest, Error>;

    /// Appends all of `data`.
    ///
    /// # Cancellation
    /// How much was appended is unknown; the ingest must be opened again.
    async fn write(&mut self, data: Bytes) -> Result<(), Error>;

    /// Back to `size_bytes`; only 0 is supported.
    async fn truncate(&mut self, size_bytes: u64) -> Result<(), Error>;

    /// Makes it a blob that survives a power cut. Size (when not 0) and digest (when given) must
    /// match, else `FailedPrecondition` and the bytes stay. `AlreadyExists` when the blob is there
    /// already; the ingest is gone then too.
    async fn commit(
        self: Box<Self>,
        size_bytes: u64,
        expected: Option<&Digest>,
    ) -> Result<Digest, Error>;
}

pub(crate) fn blob_not_found(digest: &Digest) -> Error {
    Error::NotFound {
        what: format!("content {digest}"),
    }
}

pub(crate) fn blob_exists(digest: &Digest) -> Error {
    Error::AlreadyExists {
        what: format!("content {digest}"),
    }
}

pub(crate) fn ingest_not_found(reference: &str) -> Error {
    Error::NotFound {
        what: format!("ingest ref {reference:?}"),
    }
}

pub(crate) fn size_mismatch(actual: u64, expected: u64) -> Error {
    Error::Precondition {
        reason: format!("unexpected commit size {actual}, expected {expected}"),
    }
}

pub(crate) fn digest_mismatch(actual: &Digest, expected: &Digest) -> Error {
    Error::Precondition {
        reason: format!("unexpected commit digest {actual}, expected {expected}"),
    }
}

#[cfg(test)]
mod tests;
