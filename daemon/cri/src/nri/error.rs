//! Why an NRI hook failed a request.

use lighter_proto::errdefs::{Classify, ErrorKind, WireError};

/// A failed hook.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A plugin refused the request.
    #[error("NRI plugin {plugin:?} failed {request}: {source}")]
    Plugin {
        /// Index and name.
        plugin: String,
        /// Name of the request.
        request: &'static str,
        /// What it answered.
        source: WireError,
    },
    /// Two plugins want different values for one thing.
    #[error("plugins {plugin:?} and {other:?} both tried to set {field}")]
    Conflict {
        /// The plugin asked later.
        plugin: String,
        /// The plugin that was first.
        other: String,
        /// What both set.
        field: String,
    },
    /// A plugin changes the container under creation as if it existed.
    #[error("plugin {plugin:?} asked update of {container:?} during creation")]
    UpdateDuringCreation {
        /// Index and name.
        plugin: String,
        /// Container id.
        container: String,
    },
    /// A validator does not accept the sum of the changes.
    #[error("validator {plugin:?} rejected container adjustment, reason: {reason}")]
    Rejected {
        /// Index and name.
        plugin: String,
        /// Its reason.
        reason: String,
    },
    /// The listening socket could not be opened.
    #[error("NRI socket {path}: {source}")]
    Listen {
        /// Its path.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Unknown
    }
}
