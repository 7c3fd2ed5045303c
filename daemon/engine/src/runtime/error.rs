//! Why a task operation failed, with the texts clients match on.

use std::io;
use std::path::PathBuf;

use lighter_proto::errdefs::{Classify, ErrorKind, WireError};
use prost_types::Any;

/// Why a task operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such task.
    #[error("task {id} not found")]
    NotFound {
        /// Container id.
        id: String,
    },
    /// No such exec in the task.
    #[error("exec {exec_id} in task {id} not found")]
    ExecNotFound {
        /// Container id.
        id: String,
        /// Exec id.
        exec_id: String,
    },
    /// The container has a task.
    #[error("task {id}: already exists")]
    Exists {
        /// Container id.
        id: String,
    },
    /// The exec id is taken.
    #[error("id {exec_id}: already exists")]
    ExecExists {
        /// Exec id.
        exec_id: String,
    },
    /// The request is malformed.
    #[error("{reason}")]
    Invalid {
        /// What is wrong with it.
        reason: String,
    },
    /// The task's state does not allow it.
    #[error("{reason}")]
    State {
        /// Why.
        reason: String,
    },
    /// The runtime's shim cannot be found or used.
    #[error("{reason}")]
    Runtime {
        /// Which and why.
        reason: String,
    },
    /// The shim did not start.
    #[error("failed to start shim: {reason}")]
    Start {
        /// What it printed, and how it ended.
        reason: String,
    },
    /// The shim refused to create the task. Its words reach the client unchanged.
    #[error("failed to create shim task: {0}")]
    Create(WireError),
    /// The shim refused.
    #[error(transparent)]
    Shim(#[from] WireError),
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
    /// A store refused.
    #[error(transparent)]
    Store(#[from] lighter_store::Error),
    /// The root filesystem could not be mounted, or unmounted.
    #[error(transparent)]
    Mounts(#[from] crate::mounts::Error),
    /// A task of ours was cut off: the daemon is stopping.
    #[error("the daemon is stopping")]
    Stopping,
}

impl Error {
    /// Adapter for `map_err` on file operations.
    pub(super) fn io(
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
            Self::NotFound { .. } | Self::ExecNotFound { .. } => ErrorKind::NotFound,
            Self::Exists { .. } | Self::ExecExists { .. } => ErrorKind::AlreadyExists,
            Self::Invalid { .. } => ErrorKind::InvalidArgument,
            Self::State { .. } => ErrorKind::FailedPrecondition,
            // Upstream leaves these without a class.
            Self::Runtime { .. } | Self::Start { .. } => ErrorKind::Unknown,
            Self::Create(error) | Self::Shim(error) => error.kind,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists => {
                ErrorKind::AlreadyExists
            }
            Self::Io { source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                ) =>
            {
                ErrorKind::ResourceExhausted
            }
            Self::Io { .. } => ErrorKind::Internal,
            Self::Store(error) => error.kind(),
            Self::Mounts(error) => error.kind(),
            Self::Stopping => ErrorKind::Unavailable,
        }
    }

    fn details(&self) -> &[Any] {
        match self {
            Self::Create(error) | Self::Shim(error) => error.details(),
            Self::Store(error) => error.details(),
            _ => &[],
        }
    }
}
