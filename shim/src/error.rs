//! Why a shim operation failed, and the kind a client is told.

use std::io;
use std::path::PathBuf;

use lighter_proto::errdefs::{Classify, ErrorKind, WireError};

use crate::process::Refusal;

/// A failed shim operation. Texts keep upstream's wording where clients match on them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Error {
    /// The container, or its process, is not here.
    #[error("{0}")]
    NotFound(String),
    /// The id is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// The request itself is malformed.
    #[error("{0}")]
    InvalidArgument(String),
    /// The state does not allow the call.
    #[error("{0}")]
    Precondition(String),
    /// The OCI runtime failed; the text is what it said.
    #[error("{0}")]
    Runtime(String),
    /// Something did not happen in its time.
    #[error("{what}: not done after {seconds} s")]
    Timeout {
        /// What was waited for.
        what: String,
        /// For how long.
        seconds: u64,
    },
    /// A system call on a path failed.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was attempted.
        operation: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A system call without a path failed.
    #[error("{operation}")]
    System {
        /// What was attempted.
        operation: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl Error {
    /// An [`Error::Io`] builder for `map_err`.
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

    /// An [`Error::System`] builder for `map_err`.
    pub(crate) fn system<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System {
            operation,
            source: source.into(),
        }
    }

    /// No such container in this shim.
    pub(crate) fn no_container() -> Self {
        Self::NotFound("container not created".to_owned())
    }
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound(_) => ErrorKind::NotFound,
            Self::AlreadyExists(_) => ErrorKind::AlreadyExists,
            Self::InvalidArgument(_) => ErrorKind::InvalidArgument,
            Self::Precondition(_) => ErrorKind::FailedPrecondition,
            Self::Timeout { .. } => ErrorKind::DeadlineExceeded,
            // Engines read the text of a runtime failure under code Unknown, as upstream sends it.
            Self::Runtime(_) | Self::Io { .. } | Self::System { .. } => ErrorKind::Unknown,
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoExec(id) => Self::NotFound(format!("process does not exist {id}")),
            Refusal::ExecExists(id) => Self::AlreadyExists(format!("id {id}")),
            Refusal::State(text) => Self::Precondition(text),
            Refusal::Finished => Self::NotFound("process already finished".to_owned()),
        }
    }
}

impl From<WireError> for Error {
    fn from(error: WireError) -> Self {
        Self::Runtime(error.message)
    }
}

/// Result of a shim operation.
pub(crate) type Result<T> = std::result::Result<T, Error>;
