//! What unpacking asks of whoever applies layers.

use std::fmt;

use async_trait::async_trait;
use lighter_proto::errdefs::WireError;
use lighter_snapshotter::Mount;
use lighter_store::{Digest, Scope};

use super::Descriptor;

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
