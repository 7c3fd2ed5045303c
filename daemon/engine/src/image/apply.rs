//! What unpacking asks of whoever applies layers.

use std::fmt;
use std::io::{self, Read};

use async_trait::async_trait;
use lighter_proto::errdefs::{Classify, ErrorKind, WireError};
use lighter_snapshotter::Mount;
use lighter_store::content::BlobReader;
use lighter_store::{Digest, Scope};

use super::Descriptor;
use crate::diff::LeansOn;

/// Bytes read at a time of a blob in another process.
const REMOTE_READ_BYTES: usize = 1 << 20;

/// What came out of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Digest of the uncompressed layer: its diff ID.
    pub diff_id: Digest,
    /// Bytes of the uncompressed layer.
    pub size_bytes: u64,
    /// What it wanted of the layers below and was not told.
    pub leans_on: LeansOn,
}

/// Applies layers to mounts; see [`crate::differ::Differs`].
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

    /// Whether [`Applied::leans_on`] is said; only then may a layer be applied without those below it.
    fn tells_what_layers_lean_on(&self) -> bool {
        false
    }
}

fn wire<E: Classify>(error: &E) -> WireError {
    WireError::of(error)
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
