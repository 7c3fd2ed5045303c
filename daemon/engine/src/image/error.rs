//! Why an image could not be read, fetched or unpacked.

use lighter_proto::errdefs::{Classify, ErrorKind, WireError};
use lighter_store::Digest;
use prost_types::Any;

use crate::registry;

/// Why an image could not be read, fetched or unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A document does not say what its kind of document says.
    #[error("{digest}: {reason}: invalid argument")]
    Malformed {
        /// Of the document.
        digest: Digest,
        /// What is wrong.
        reason: String,
    },
    /// An index in an index in an index …
    #[error("index {digest} is nested deeper than {limit} levels: invalid argument")]
    TooDeep {
        /// The innermost looked at.
        digest: Digest,
        /// The bound.
        limit: usize,
    },
    /// None of its manifests fits.
    #[error("no match for platform in manifest {digest}: not found")]
    NoPlatform {
        /// Index or manifest.
        digest: Digest,
    },
    /// Registries of long ago.
    #[error("schema 1 image manifests are no longer supported: invalid argument")]
    Schema1,
    /// Something that is no image at all.
    #[error("{digest} of type {media_type:?} is no manifest or index: invalid argument")]
    NoImage {
        /// Of the target.
        digest: Digest,
        /// Its media type.
        media_type: String,
    },
    /// A platform that does not parse.
    #[error("{0}: invalid argument")]
    Platform(String),
    /// Configuration and manifest disagree.
    #[error("number of layers and diffIDs don't match: {layers} != {diff_ids}: invalid argument")]
    LayerCount {
        /// In the manifest.
        layers: usize,
        /// In the configuration.
        diff_ids: usize,
    },
    /// A layer unpacks to something else than the configuration says.
    #[error("wrong diff id {got:?} calculated on extraction {want:?}", got = got.as_str(), want = want.as_str())]
    WrongDiffId {
        /// Of the layer.
        got: Digest,
        /// In the configuration.
        want: Digest,
    },
    /// A snapshot appears and disappears under us.
    #[error("failed to prepare extraction snapshot {key:?}: unavailable")]
    Contended {
        /// The key.
        key: String,
    },
    /// The layer could not be applied.
    #[error("failed to extract layer {what}")]
    Apply {
        /// Media type and digest, where to, as which snapshot.
        what: String,
        /// Why.
        source: WireError,
    },
    /// Work ended without result: the daemon is going down.
    #[error("the work was given up: aborted")]
    Abandoned,
    /// The registry.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// The stores.
    #[error(transparent)]
    Store(#[from] lighter_store::Error),
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Malformed { .. }
            | Self::TooDeep { .. }
            | Self::Schema1
            | Self::NoImage { .. }
            | Self::Platform(_)
            | Self::LayerCount { .. } => ErrorKind::InvalidArgument,
            Self::NoPlatform { .. } => ErrorKind::NotFound,
            Self::WrongDiffId { .. } => ErrorKind::FailedPrecondition,
            Self::Contended { .. } => ErrorKind::Unavailable,
            Self::Apply { source, .. } => source.kind,
            Self::Abandoned => ErrorKind::Aborted,
            Self::Registry(error) => error.kind(),
            Self::Store(error) => error.kind(),
        }
    }

    fn details(&self) -> &[Any] {
        match self {
            Self::Apply { source, .. } => source.details(),
            Self::Store(error) => error.details(),
            _ => &[],
        }
    }
}
