//! Why a CRI call failed: a kind and one sentence for the kubelet's event log.

use lighter_proto::errdefs::{Classify, ErrorKind, render};

/// A failed call. The message names pod, container or image; the kubelet shows it as it is.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

/// What every step here answers.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl Error {
    /// An error of `kind`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// An error without a class: most failures are of this kind.
    pub fn unknown(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unknown, message)
    }

    /// A malformed request.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, message)
    }

    /// An object that does not exist.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    /// Whether it is of `kind`.
    #[must_use]
    pub fn is(&self, kind: ErrorKind) -> bool {
        self.kind == kind
    }

    /// Whether the object is gone already.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.kind == ErrorKind::NotFound
    }

    /// The same failure with what was being done in front.
    #[must_use]
    pub fn context(self, what: impl AsRef<str>) -> Self {
        Self {
            kind: self.kind,
            message: format!("{}: {}", what.as_ref(), self.message),
        }
    }
}

macro_rules! from_classified {
    ($($error:ty),* $(,)?) => {
        $(impl From<$error> for Error {
            fn from(error: $error) -> Self {
                Self { kind: error.kind(), message: render(&error) }
            }
        })*
    };
}

from_classified!(
    lighter_store::Error,
    lighter_store::ident::Error,
    lighter_store::digest::Error,
    lighter_engine::runtime::Error,
    lighter_snapshotter::Error,
    lighter_proto::errdefs::WireError,
    crate::cni::Error,
    crate::streaming::Error,
);

impl From<crate::netns::Error> for Error {
    fn from(error: crate::netns::Error) -> Self {
        Self::unknown(render(&error))
    }
}

impl From<serde_json::Error> for Error {
    fn from(error: serde_json::Error) -> Self {
        Self::unknown(error.to_string())
    }
}

/// An I/O failure with what was done to which path.
pub(crate) fn io(what: &str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Error {
    let what = format!("{what} {}", path.display());
    move |error| Error::unknown(format!("{what}: {error}"))
}

impl Error {
    /// The class and text of a store's error that is still needed.
    pub(crate) fn from_store(error: &lighter_store::Error) -> Self {
        Self::new(error.kind(), render(error))
    }
}
