//! Why a store refused.

use std::io;
use std::path::PathBuf;

use lighter_proto::errdefs::{Classify, ErrorKind};
use prost_types::Any;

/// Why a store refused. Variants follow what a caller can do about it; texts are complete and end
/// with their class where clients look at the end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The named object does not exist.
    #[error("{what}: not found")]
    NotFound {
        /// Kind and name of it, e.g. `container "x" in namespace "y"`.
        what: String,
    },
    /// The named object exists.
    #[error("{what}: already exists")]
    AlreadyExists {
        /// Kind and name of it.
        what: String,
    },
    /// The request is malformed.
    #[error("{reason}: invalid argument")]
    Invalid {
        /// What is wrong with it.
        reason: String,
    },
    /// The object's state does not allow it.
    #[error("{reason}: failed precondition")]
    Precondition {
        /// Why.
        reason: String,
    },
    /// Held by somebody else; try again.
    #[error("{reason}: unavailable")]
    Unavailable {
        /// Who holds it and since when.
        reason: String,
    },
    /// An offset outside the object.
    #[error("{reason}: out of range")]
    OutOfRange {
        /// Which.
        reason: String,
    },
    /// This store lacks the variant asked for.
    #[error("{what}: not implemented")]
    Unimplemented {
        /// What was asked.
        what: String,
    },
    /// A bound was reached.
    #[error("{reason}: resource exhausted")]
    Exhausted {
        /// Which bound.
        reason: String,
    },
    /// A record or file does not hold what it must.
    #[error("{what} is damaged: data loss")]
    Damaged {
        /// Which.
        what: String,
    },
    /// A malformed identifier.
    #[error(transparent)]
    Identifier(#[from] crate::ident::Error),
    /// A malformed digest.
    #[error(transparent)]
    Digest(#[from] crate::digest::Error),
    /// The system refused.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The database refused.
    #[error(transparent)]
    Database(#[from] lighter_kv::Error),
    /// The snapshotter refused.
    #[error(transparent)]
    Snapshotter(#[from] lighter_snapshotter::Error),
    /// A store in another process answered with an error.
    #[error(transparent)]
    Remote(#[from] lighter_proto::errdefs::WireError),
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::AlreadyExists { .. } => ErrorKind::AlreadyExists,
            Self::Invalid { .. } => ErrorKind::InvalidArgument,
            Self::Precondition { .. } => ErrorKind::FailedPrecondition,
            Self::Unavailable { .. } => ErrorKind::Unavailable,
            Self::OutOfRange { .. } => ErrorKind::OutOfRange,
            Self::Unimplemented { .. } => ErrorKind::Unimplemented,
            Self::Exhausted { .. } => ErrorKind::ResourceExhausted,
            Self::Damaged { .. } => ErrorKind::DataLoss,
            Self::Identifier(error) => error.kind(),
            Self::Digest(error) => error.kind(),
            Self::Io { source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                ) =>
            {
                ErrorKind::ResourceExhausted
            }
            Self::Io { .. } => ErrorKind::Internal,
            Self::Database(error) => error.kind(),
            Self::Snapshotter(error) => error.kind(),
            Self::Remote(error) => error.kind,
        }
    }

    fn details(&self) -> &[Any] {
        match self {
            Self::Snapshotter(error) => error.details(),
            Self::Remote(error) => error.details(),
            _ => &[],
        }
    }
}
