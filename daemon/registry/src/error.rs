//! Why a registry operation failed, with the texts clients know.

use std::path::PathBuf;

use http::StatusCode;
use lighter_floor::Digest;
use lighter_proto::errdefs::{Classify, ErrorKind};

use super::reference;

/// Why a registry operation failed. No text ever holds a secret or a query value.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The name does not parse.
    #[error(transparent)]
    Reference(#[from] reference::Error),
    /// No host has it.
    #[error("{what}: not found")]
    NotFound {
        /// The reference, or the descriptor that was fetched.
        what: String,
    },
    /// The registry wants (other) credentials.
    #[error(
        "pull access denied, repository does not exist or may require authorization: authorization failed"
    )]
    Denied,
    /// The registry said why it refuses a token.
    #[error("server message: {message}: authorization failed")]
    Refused {
        /// `error` of the challenge.
        message: String,
    },
    /// It wants basic authentication and there are no credentials.
    #[error("no basic auth credentials")]
    NoBasicCredentials,
    /// The token server did not give a token.
    #[error("failed to authorize: {reason}")]
    Token {
        /// What went wrong.
        reason: String,
        /// What the exchange failed with.
        #[source]
        source: Option<Box<Error>>,
    },
    /// An answer with a status that does not help.
    #[error("unexpected status from {method} request to {url}: {status}{message}")]
    Status {
        /// HTTP method.
        method: String,
        /// URL, redacted.
        url: String,
        /// Status.
        status: StatusCode,
        /// ` - Server message: …` where the registry sent one.
        message: String,
    },
    /// No answer.
    #[error("failed to do request: {method} {url:?}")]
    Transport {
        /// HTTP method.
        method: String,
        /// URL, redacted.
        url: String,
        /// Why.
        #[source]
        source: TransportCause,
    },
    /// More redirects than are followed.
    #[error("{url}: stopped after 10 redirects")]
    Redirects {
        /// URL, redacted.
        url: String,
    },
    /// The manifest is larger than any is.
    #[error("{reference}: rejecting {size_bytes} byte manifest: not found")]
    ManifestTooLarge {
        /// The reference.
        reference: String,
        /// Its size.
        size_bytes: u64,
    },
    /// The bytes are not what their digest says.
    #[error("unexpected commit digest {got}, expected {want}: failed precondition")]
    Digest {
        /// Of the bytes received.
        got: Digest,
        /// Of the descriptor.
        want: Digest,
    },
    /// The registry sent fewer or more bytes than the descriptor says.
    #[error("unexpected commit size {got_bytes}, expected {want_bytes}: failed precondition")]
    Size {
        /// Received.
        got_bytes: u64,
        /// Of the descriptor.
        want_bytes: u64,
    },
    /// No host is configured for this.
    #[error("no {capability} hosts: not found")]
    NoHosts {
        /// `pull`, `resolve`, `push`, `referrers`.
        capability: &'static str,
    },
    /// A host's configuration cannot be used.
    #[error("{}: {reason}", path.display())]
    Hosts {
        /// File or directory.
        path: PathBuf,
        /// What is wrong in it.
        reason: String,
    },
    /// The request cannot be carried out as it is.
    #[error("{reason}: invalid argument")]
    Invalid {
        /// What is wrong.
        reason: String,
    },
    /// The answer is not what the protocol says.
    #[error("{reason}")]
    Protocol {
        /// What is wrong with it.
        reason: String,
    },
    /// The bytes could not be stored or read.
    #[error("{0}")]
    Sink(SinkError),
}

/// Why a [`crate::Sink`] could not take bytes: any error that knows its class.
#[derive(Debug)]
pub struct SinkError(Box<dyn Classify + Send + Sync>);

impl<E: Classify + Send + Sync + 'static> From<E> for SinkError {
    fn from(error: E) -> Self {
        Self(Box::new(error))
    }
}

impl std::fmt::Display for SinkError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&lighter_proto::errdefs::render(&*self.0))
    }
}

/// Why there was no answer.
#[derive(Debug, thiserror::Error)]
pub enum TransportCause {
    /// Connecting, sending or receiving failed. The text has no URL.
    #[error("{}", lighter_proto::errdefs::render(.0))]
    Http(reqwest::Error),
    /// No answer within the time given.
    #[error("timeout awaiting response headers")]
    Headers,
    /// The body came slower than the minimum rate.
    #[error("peer sends less than {0} bytes a second")]
    Slow(u64),
    /// The body ended early.
    #[error("unexpected EOF")]
    Truncated,
    /// The body's encoding is broken.
    #[error("content encoding")]
    Encoding(#[source] std::io::Error),
}

impl From<reqwest::Error> for TransportCause {
    fn from(error: reqwest::Error) -> Self {
        Self::Http(error.without_url())
    }
}

impl Error {
    /// How far a host got, to choose which of several hosts' errors to show.
    pub(super) fn progress(&self) -> u8 {
        match self {
            Self::Transport { .. } => 0,
            Self::NotFound { .. } => 1,
            Self::ManifestTooLarge { .. } => 3,
            _ => 2,
        }
    }
}

impl From<SinkError> for Error {
    fn from(error: SinkError) -> Self {
        Self::Sink(error)
    }
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Reference(error) => error.kind(),
            Self::NotFound { .. } | Self::ManifestTooLarge { .. } | Self::NoHosts { .. } => {
                ErrorKind::NotFound
            }
            Self::Digest { .. } | Self::Size { .. } => ErrorKind::FailedPrecondition,
            Self::Hosts { .. } | Self::Invalid { .. } => ErrorKind::InvalidArgument,
            Self::Sink(error) => error.0.kind(),
            // Clients know these by text; upstream gives them no class either.
            Self::Denied
            | Self::Refused { .. }
            | Self::NoBasicCredentials
            | Self::Token { .. }
            | Self::Status { .. }
            | Self::Transport { .. }
            | Self::Redirects { .. }
            | Self::Protocol { .. } => ErrorKind::Unknown,
        }
    }
}
