//! Why a network operation failed, in the words that operators of Kubernetes know.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use lighter_proto::errdefs::{Classify, ErrorKind};

/// A failure of the network layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No network configuration is loaded.
    #[error("cni plugin not initialized")]
    NotInitialized,
    /// The configuration directory could not be loaded.
    #[error("cni config load failed: {reason}: failed to load cni config")]
    Load {
        /// What is wrong, and in which file.
        reason: String,
    },
    /// A name that cannot be passed to plugins.
    #[error("invalid {what} {value:?}: {rule}")]
    Name {
        /// Kind of name.
        what: &'static str,
        /// The name.
        value: String,
        /// What is allowed.
        rule: &'static str,
    },
    /// A plugin failed.
    #[error("plugin type={kind:?}{} failed ({verb}): {failure}", name_part(name.as_deref()))]
    Plugin {
        /// Its type, which is the name of its binary.
        kind: String,
        /// Its name, when its own object has one.
        name: Option<String>,
        /// Command in lower case.
        verb: &'static str,
        /// What happened.
        failure: Box<Failure>,
    },
    /// The network gave the pod no address.
    #[error("failed to find network info for sandbox {id:?}")]
    NoAddress {
        /// Container id.
        id: String,
    },
    /// A configuration that cannot do what was asked.
    #[error("network {network:?}: {reason}")]
    Unsupported {
        /// Name of the network.
        network: String,
        /// What is missing.
        reason: String,
    },
    /// A file of ours or of the operator's could not be read or written.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The pod's network namespace could not be used.
    #[error(transparent)]
    NetNs(#[from] crate::netns::Error),
}

fn name_part(name: Option<&str>) -> String {
    name.map(|n| format!(" name={n:?}")).unwrap_or_default()
}

/// How one plugin failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// No such binary.
    #[error(
        "failed to find plugin {kind:?} in path [{dirs}]; install it there, or add its directory to the CNI bin_dirs"
    )]
    Missing {
        /// Plugin type.
        kind: String,
        /// Directories looked in, joined with spaces.
        dirs: String,
    },
    /// The binary could not be started.
    #[error("cannot run {}: {source}", path.display())]
    Spawn {
        /// The binary.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The plugin reported an error object.
    #[error("{message}{}{}", details_part(details), stderr_part(stderr))]
    Reported {
        /// CNI error code, 0 when it gave none.
        code: u32,
        /// The plugin's message.
        message: String,
        /// The plugin's details.
        details: String,
        /// End of what it wrote to standard error.
        stderr: String,
    },
    /// The plugin was still running at the deadline and was killed with all its children.
    #[error(
        "no answer within {limit:?}, plugin killed; look at what it waits for{}",
        stderr_part(stderr)
    )]
    Hung {
        /// Time it was given.
        limit: Duration,
        /// End of what it wrote to standard error.
        stderr: String,
    },
    /// It succeeded, but what it printed is not a result.
    #[error(
        "plugin printed no valid result ({reason}): {output:?}{}",
        stderr_part(stderr)
    )]
    Garbage {
        /// Why it cannot be used.
        reason: String,
        /// Start of its output.
        output: String,
        /// End of what it wrote to standard error.
        stderr: String,
    },
}

fn details_part(details: &str) -> String {
    if details.is_empty() {
        String::new()
    } else {
        format!("; {details}")
    }
}

fn stderr_part(stderr: &str) -> String {
    if stderr.is_empty() {
        String::new()
    } else {
        format!(" (stderr: {stderr:?})")
    }
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Name { .. } => ErrorKind::InvalidArgument,
            Self::Plugin { failure, .. } if matches!(**failure, Failure::Hung { .. }) => {
                ErrorKind::DeadlineExceeded
            }
            // The kubelet prints the message and tries again; upstream gives these no class.
            Self::NotInitialized
            | Self::Load { .. }
            | Self::Plugin { .. }
            | Self::NoAddress { .. }
            | Self::Unsupported { .. }
            | Self::Io { .. }
            | Self::NetNs(_) => ErrorKind::Unknown,
        }
    }
}
