//! Why a snapshot operation failed, with the texts clients know.

use std::io;
use std::path::PathBuf;

use lighter_proto::errdefs::{Classify, ErrorKind, WireError};
use prost_types::Any;

/// Why a snapshot operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such snapshot.
    #[error("snapshot {key} does not exist: not found")]
    NotFound {
        /// Key or name asked for.
        key: String,
    },
    /// The parent named does not exist.
    #[error("parent snapshot {parent} does not exist: not found")]
    ParentNotFound {
        /// Name of the parent.
        parent: String,
    },
    /// Key or name is taken.
    #[error("snapshot {key}: already exists")]
    AlreadyExists {
        /// The key or name.
        key: String,
    },
    /// The parent is not committed.
    #[error("parent \"{parent}\" is not committed snapshot: invalid argument")]
    ParentNotCommitted {
        /// Name of the parent.
        parent: String,
    },
    /// Only active snapshots can be committed.
    #[error("snapshot \"{key}\" is not active: failed precondition")]
    NotActive {
        /// The key.
        key: String,
    },
    /// Committed snapshots have no mounts.
    #[error("requested snapshot {key} not active or view: failed precondition")]
    NoMounts {
        /// The name.
        key: String,
    },
    /// It is the parent of others.
    #[error("cannot remove snapshot with child: failed precondition")]
    HasChildren {
        /// The name.
        key: String,
    },
    /// The state of a snapshot does not allow it.
    #[error("{reason}")]
    Precondition {
        /// What stands in the way.
        reason: String,
    },
    /// A mount could not be made.
    #[error("mount")]
    Mount(#[from] crate::mount::Error),
    /// Request cannot be carried out as it is.
    #[error("{reason}")]
    Invalid {
        /// What is wrong.
        reason: String,
    },
    /// The driver lacks this.
    #[error("{what}: not implemented")]
    Unimplemented {
        /// What was asked.
        what: &'static str,
    },
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
    #[error("snapshot records")]
    Database(#[from] lighter_kv::Error),
    /// A record does not decode.
    #[error("snapshot record of {key} is damaged")]
    Damaged {
        /// The key.
        key: String,
    },
    /// A snapshotter in another process answered with an error.
    #[error(transparent)]
    Remote(#[from] WireError),
}

impl Error {
    /// Puts operation and path to an I/O error.
    pub(crate) fn io(
        operation: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            operation,
            path,
            source,
        }
    }
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } | Self::ParentNotFound { .. } => ErrorKind::NotFound,
            Self::AlreadyExists { .. } => ErrorKind::AlreadyExists,
            Self::ParentNotCommitted { .. } | Self::Invalid { .. } => ErrorKind::InvalidArgument,
            Self::NotActive { .. }
            | Self::NoMounts { .. }
            | Self::HasChildren { .. }
            | Self::Precondition { .. } => ErrorKind::FailedPrecondition,
            Self::Mount(error) => error.kind(),
            Self::Unimplemented { .. } => ErrorKind::Unimplemented,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                ErrorKind::ResourceExhausted
            }
            Self::Io { .. } => ErrorKind::Internal,
            Self::Database(error) => error.kind(),
            Self::Damaged { .. } => ErrorKind::DataLoss,
            Self::Remote(error) => error.kind,
        }
    }

    fn details(&self) -> &[Any] {
        match self {
            Self::Remote(error) => error.details(),
            _ => &[],
        }
    }
}
