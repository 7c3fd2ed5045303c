//! What unpacking asks of whoever applies layers, and the answer of this process.

use std::fmt;
use std::io::{self, Read};
use std::sync::Arc;

use async_trait::async_trait;
use lighter_proto::errdefs::{Classify, ErrorKind, WireError, render};
use lighter_snapshotter::Mount;
use lighter_store::content::BlobReader;
use lighter_store::metadata::Content;
use lighter_store::{Digest, Scope};

use super::Descriptor;
use crate::diff;

/// Bytes read at a time of a blob in another process.
const REMOTE_READ_BYTES: usize = 1 << 20;

/// What came out of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Digest of the uncompressed layer: its diff ID.
    pub diff_id: Digest,
    /// Bytes of the uncompressed layer.
    pub size_bytes: u64,
}

/// Applies layers to mounts: the differ of this process, or one behind a proxy.
#[async_trait]
pub trait Applier: Send + Sync + fmt::Debug {
    /// Unpacks the blob `layer`, which the namespace has, over `mounts`.
    ///
    /// # Errors
    /// When the layer is malformed or the system refuses; what was written so far stays.
    async fn apply(
        &self,
        scope: &Scope,
        layer: &Descriptor,
        mounts: &[Mount],
    ) -> Result<Applied, WireError>;
}

/// The differ of this process.
#[derive(Debug, Clone)]
pub struct LocalApplier {
    /// Where layers are read from.
    pub content: Content,
    /// Stream processors of the configuration.
    pub processors: Arc<[diff::Processor]>,
    /// Bounds on what a layer may become.
    pub limits: diff::Limits,
    /// Whether files are on disk before a layer counts as applied.
    pub sync_fs: bool,
}

fn wire<E: Classify>(error: &E) -> WireError {
    WireError::new(error.kind(), render(error))
}

#[async_trait]
impl Applier for LocalApplier {
    async fn apply(
        &self,
        scope: &Scope,
        layer: &Descriptor,
        mounts: &[Mount],
    ) -> Result<Applied, WireError> {
        let open = self.content.reader(scope, &layer.digest);
        let reader = blocking(open.await.map_err(|error| wire(&error))?);
        let (this, mounts) = (self.clone(), mounts.to_vec());
        let media_type = layer.media_type.clone();
        let work = move || {
            let options = diff::ApplyOptions {
                sync_fs: this.sync_fs,
                processors: &this.processors,
                limits: this.limits,
                ..diff::ApplyOptions::default()
            };
            diff::apply(reader?, &media_type, &mounts, &options).map_err(|error| wire(&error))
        };
        let applied = tokio::task::spawn_blocking(work)
            .await
            .map_err(|error| WireError::new(ErrorKind::Internal, error.to_string()))??;
        Ok(Applied {
            diff_id: Digest::parse(&applied.diff_id).map_err(|error| wire(&error))?,
            size_bytes: applied.size_bytes,
        })
    }
}

/// A blob as a blocking reader, wherever it is.
pub(crate) fn blocking(reader: BlobReader) -> Result<Box<dyn Read + Send>, WireError> {
    match reader.clone().into_std() {
        Ok(local) => return Ok(local),
        Err(error) if error.kind() == ErrorKind::Unimplemented => {}
        Err(error) => return Err(wire(&error)),
    }
    Ok(Box::new(Remote {
        reader,
        handle: tokio::runtime::Handle::current(),
        piece: bytes::Bytes::new(),
        offset: 0,
    }))
}

/// Reads a blob of another process from a blocking thread.
struct Remote {
    reader: BlobReader,
    handle: tokio::runtime::Handle,
    piece: bytes::Bytes,
    offset: u64,
}

impl Read for Remote {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.piece.is_empty() {
            let read = self.reader.read_at(self.offset, REMOTE_READ_BYTES);
            self.piece = self.handle.block_on(read).map_err(io::Error::other)?;
            self.offset += self.piece.len() as u64;
        }
        let length = buffer.len().min(self.piece.len());
        buffer[..length].copy_from_slice(&self.piece.split_to(length));
        Ok(length)
    }
}
