//! Blobs and ingests on disk, without namespaces: the [`Store`] contract.

use std::fmt;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;

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

/// A blob open for reading.
#[derive(Debug)]
pub struct BlobReader {}

impl BlobReader {
    /// Bytes of the blob.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        todo!()
    }
    /// Up to `length` bytes from `offset`; empty at the end.
    ///
    /// # Errors
    /// `Io`.
    pub async fn read_at(&self, _offset: u64, _length: usize) -> Result<Bytes, Error> {
        todo!()
    }
    /// A blocking reader of the whole, for code on a blocking thread.
    ///
    /// # Errors
    /// `Unimplemented` where the blob is in another process.
    pub fn into_std(self) -> Result<Box<dyn std::io::Read + Send>, Error> {
        todo!()
    }
}

/// Where bytes are kept. `Db` puts namespaces, records and events over it.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// Size of a blob.
    async fn size(&self, digest: &Digest) -> Result<u64, Error>;
}
