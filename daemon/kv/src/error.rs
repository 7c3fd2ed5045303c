//! Why the database refused.

use std::io;
use std::path::PathBuf;

use lighter_proto::errdefs::{Classify, ErrorKind};

/// A failure of the database; after any of them but `Locked` the process should stop serving.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another process has it open.
    #[error("database {} is in use by another process", path.display())]
    Locked {
        /// Directory of the database.
        path: PathBuf,
    },
    /// What is on disk cannot be read.
    #[error("database {} is damaged: {reason}", path.display())]
    Corrupt {
        /// Directory of the database, or the export's file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// No space left.
    #[error("database: no space left on device")]
    Full,
    /// The system refused.
    #[error("database: {operation}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// An earlier commit failed; nothing more is accepted.
    #[error("database stopped after a failed commit: {reason}")]
    Stopped {
        /// The failure.
        reason: String,
    },
}

impl Error {
    /// A failed system call; a full disk is told apart.
    pub(crate) fn io(operation: &'static str, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full,
            _ => Self::Io { operation, source },
        }
    }
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Full => ErrorKind::ResourceExhausted,
            Self::Locked { .. } | Self::Stopped { .. } => ErrorKind::Unavailable,
            Self::Corrupt { .. } => ErrorKind::DataLoss,
            Self::Io { .. } => ErrorKind::Internal,
        }
    }
}
