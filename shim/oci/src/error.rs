//! Why an operation of the runtime failed, in words that containerd's shims and dockerd match on.
//!
//! System errors are rendered as Go renders them (`no such file or directory`, lower case, no number), because that
//! is what callers of an OCI runtime search for.

use std::fmt::Display;
use std::io;

/// Result of the runtime's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No container with this id in the runtime's root.
    #[error("container does not exist")]
    NotFound {
        /// The id asked for.
        id: String,
    },
    /// A container with this id is there already.
    #[error("container with given ID already exists")]
    Exists {
        /// The id asked for.
        id: String,
    },
    /// The container's init process has ended (or was never started).
    #[error("container not running")]
    NotRunning,
    /// The container is not in a state that allows the operation.
    #[error("{0}")]
    State(String),
    /// The configuration asks for something impossible; says what and how to put it right.
    #[error("{0}")]
    Spec(String),
    /// The operation needs something that this machine lacks.
    #[error("{0}")]
    Unsupported(String),
    /// The container's first process failed before it ran the user's program.
    #[error("unable to start container process: {0}")]
    Process(String),
    /// A system call failed.
    #[error("{what}: {}", errno_text(.source))]
    Io {
        /// What was being done, to what.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl Error {
    /// The system error behind this one, if there is one.
    #[must_use]
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Io { source, .. } => Some(source.kind()),
            _ => None,
        }
    }

    pub(crate) fn os_error(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

/// A system error in Go's spelling.
#[must_use]
pub fn errno_text(error: &io::Error) -> String {
    let Some(number) = error.raw_os_error() else {
        return error.to_string();
    };
    let text = error.to_string();
    let text = text
        .strip_suffix(&format!(" (os error {number})"))
        .unwrap_or(&text);
    let mut letters = text.chars();
    letters
        .next()
        .map(|first| first.to_lowercase().chain(letters).collect())
        .unwrap_or_default()
}

/// Adds what was being done to a failed system call.
pub(crate) trait Context<T> {
    /// `what` is evaluated only on failure.
    fn context<S: Display>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context<S: Display>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|source| Error::Io {
            what: what().to_string(),
            source: source.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_errors_read_as_in_go() {
        assert_eq!(
            errno_text(&io::Error::from_raw_os_error(libc::ENOENT)),
            "no such file or directory"
        );
        assert_eq!(
            errno_text(&io::Error::from_raw_os_error(libc::EACCES)),
            "permission denied"
        );
        assert_eq!(
            errno_text(&io::Error::from_raw_os_error(libc::ENOEXEC)),
            "exec format error"
        );
    }

    #[test]
    fn missing_container_carries_the_words_shims_look_for() {
        assert_eq!(
            Error::NotFound { id: "a".into() }.to_string(),
            "container does not exist"
        );
    }
}
