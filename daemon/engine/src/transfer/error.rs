//! Why a transfer failed.

use std::time::Duration;

use lighter_proto::errdefs::{Classify, ErrorKind};
use prost_types::Any;

use crate::{diff, image, registry, runtime, streaming};

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing goes from there to here.
    #[error("method Transfer not implemented for {from} to {to}: not implemented")]
    Pair {
        /// The source.
        from: String,
        /// The destination.
        to: String,
    },
    /// The registry does not know the name.
    #[error("failed to resolve image")]
    Resolve(#[source] registry::Error),
    /// A verifier said no.
    #[error("image verifier bindir blocked pull of {what} for reason: {reason}")]
    Blocked {
        /// Reference and digest.
        what: String,
        /// In the verifier's words.
        reason: String,
    },
    /// The verifiers could not be run.
    #[error("image verifier: {reason}")]
    Verifier {
        /// Why.
        reason: String,
    },
    /// The request does not say what is needed.
    #[error("{reason}: invalid argument")]
    Invalid {
        /// What is missing or wrong.
        reason: String,
    },
    /// The archive is not one of images, or malformed.
    #[error("{reason}: invalid argument")]
    Archive {
        /// What is wrong.
        reason: String,
    },
    /// Nothing is left after filtering.
    #[error("{reason}: not found")]
    Nothing {
        /// Of what.
        reason: String,
    },
    /// A container's files are out of reach.
    #[error("{reason}")]
    Container {
        /// What this is to the caller.
        kind: ErrorKind,
        /// Why.
        reason: String,
    },
    /// Files could not be copied.
    #[error("copy of {what}")]
    Copy {
        /// Path and container.
        what: String,
        /// Why.
        source: diff::Error,
    },
    /// The client of a copy stood still.
    #[error("copy of {what}: waited {limit:?} for the client to {awaited}: deadline exceeded")]
    Idle {
        /// Path and container.
        what: String,
        /// What it should have done.
        awaited: &'static str,
        /// For how long not a byte moved.
        limit: Duration,
    },
    /// A container's files could not be mounted.
    #[error(transparent)]
    Mount(#[from] lighter_snapshotter::mount::Error),
    /// Tasks.
    #[error(transparent)]
    Task(#[from] runtime::Error),
    /// The client's stream.
    #[error(transparent)]
    Stream(#[from] streaming::Error),
    /// Bytes could not be read or written.
    #[error("{operation}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Images.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// Registries.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// Stores.
    #[error(transparent)]
    Store(#[from] lighter_store::Error),
}

impl Error {
    pub(super) fn invalid(reason: impl Into<String>) -> Self {
        Self::Invalid {
            reason: reason.into(),
        }
    }

    pub(super) fn archive(reason: impl Into<String>) -> Self {
        Self::Archive {
            reason: reason.into(),
        }
    }
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Pair { .. } => ErrorKind::Unimplemented,
            Self::Resolve(error) | Self::Registry(error) => error.kind(),
            Self::Blocked { .. } => ErrorKind::Unknown,
            Self::Verifier { .. } | Self::Io { .. } => ErrorKind::Internal,
            Self::Invalid { .. } | Self::Archive { .. } => ErrorKind::InvalidArgument,
            Self::Nothing { .. } => ErrorKind::NotFound,
            Self::Container { kind, .. } => *kind,
            Self::Copy { source, .. } => source.kind(),
            Self::Idle { .. } => ErrorKind::DeadlineExceeded,
            Self::Mount(error) => error.kind(),
            Self::Task(error) => error.kind(),
            Self::Stream(error) => error.kind(),
            Self::Image(error) => error.kind(),
            Self::Store(error) => error.kind(),
        }
    }

    fn details(&self) -> &[Any] {
        match self {
            Self::Image(error) => error.details(),
            Self::Store(error) => error.details(),
            Self::Task(error) => error.details(),
            _ => &[],
        }
    }
}

impl From<registry::reference::Error> for Error {
    fn from(error: registry::reference::Error) -> Self {
        Self::Registry(error.into())
    }
}
