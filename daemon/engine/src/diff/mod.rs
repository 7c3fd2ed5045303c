//! Layers: tar stream to directory ([`apply`]) and difference of directories to tar stream
//! ([`compare`]).
//!
//! Both block and belong on the blocking pool. They know plain readers, writers and mounts; where
//! blobs come from and go to is the caller's affair.
//!
//! The way of a layer through `apply`: media type and magic → stream processors or built-in
//! decompression ([`compression`], `processors`) → chunks that are hashed on one thread and unpacked
//! on another (`pipeline`) → tar entries (`tar`) → files beneath a root descriptor (`tree`,
//! `unpack`, `whiteout`). A layer that is a filesystem image already is copied (`erofs`). What is no
//! layer but files for a container, or from one, goes through `copy`.

mod apply;
mod compare;
pub mod compression;
mod copy;
mod erofs;
mod pipeline;
mod processors;
mod tar;
#[cfg(test)]
mod testing;
mod tree;
mod unpack;
mod whiteout;
mod writer;

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use lighter_proto::errdefs::{Classify, ErrorKind};

pub use apply::{Applied, ApplyOptions, Limits, apply};
pub use compare::{CompareOptions, Compared, compare};
pub use copy::{Found, IdMap, Owners, clean, find, pack, place};
pub use processors::Processor;
pub use unpack::LeansOn;
pub use whiteout::visible;

/// Media type of an uncompressed OCI layer: what every chain of processors ends with.
pub const LAYER_TAR: &str = "application/vnd.oci.image.layer.v1.tar";
/// Media type of a layer compressed with gzip.
pub const LAYER_TAR_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Media type of a layer compressed with zstd.
pub const LAYER_TAR_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// Media type of a layer that is an EROFS image.
pub const EROFS_LAYER: &str = "application/vnd.erofs.layer.v1";

/// The media type of what a layer of `media_type` is when nothing is packed around it.
#[must_use]
pub fn plain_type(media_type: &str) -> &'static str {
    match erofs::packing(media_type) {
        Some(_) => EROFS_LAYER,
        None => LAYER_TAR,
    }
}

/// Why a layer could not be applied or made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nothing turns this media type into a tar.
    #[error("no processor for media-type: {media_type}")]
    NoProcessor {
        /// The type.
        media_type: String,
    },
    /// Differences are not made in this form.
    #[error("unsupported diff media type: {media_type}: not implemented")]
    Unsupported {
        /// The type.
        media_type: String,
    },
    /// The archive is malformed, or asks for what no layer may do.
    #[error("layer entry {}: {reason}", path.display())]
    Entry {
        /// The entry's name as the archive has it, or empty.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The stream ended early, is not what its type says, or could not be read.
    #[error("read layer")]
    Stream(#[source] io::Error),
    /// The result could not be written to whoever asked for it.
    #[error("write layer")]
    Output(#[source] io::Error),
    /// Larger than allowed.
    #[error("layer is larger than {limit}")]
    TooLarge {
        /// The bound that was hit.
        limit: String,
    },
    /// A stream processor failed.
    #[error("stream processor {id} failed: {reason}")]
    Processor {
        /// Its id in the configuration.
        id: String,
        /// Exit status and what it said.
        reason: String,
    },
    /// The mounts could not be made.
    #[error(transparent)]
    Mount(#[from] lighter_snapshotter::mount::Error),
    /// The system refused.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which path inside the root.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// Puts operation and path to an error of the system.
    fn io<E: Into<io::Error>>(operation: &'static str, path: &[u8]) -> impl FnOnce(E) -> Self {
        let path = path_of(path);
        move |source| Self::Io {
            operation,
            path,
            source: source.into(),
        }
    }

    fn entry(path: &[u8], reason: impl Into<String>) -> Self {
        Self::Entry {
            path: path_of(path),
            reason: reason.into(),
        }
    }
}

fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NoProcessor { .. } | Self::Unsupported { .. } => ErrorKind::Unimplemented,
            Self::Entry { .. } => ErrorKind::InvalidArgument,
            Self::TooLarge { .. } => ErrorKind::ResourceExhausted,
            Self::Processor { .. } => ErrorKind::Unknown,
            Self::Mount(error) => error.kind(),
            Self::Stream(source) => match source.kind() {
                io::ErrorKind::UnexpectedEof
                | io::ErrorKind::InvalidData
                | io::ErrorKind::InvalidInput => ErrorKind::InvalidArgument,
                _ => ErrorKind::Internal,
            },
            Self::Io { source, .. } | Self::Output(source) => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    ErrorKind::ResourceExhausted
                }
                io::ErrorKind::ReadOnlyFilesystem => ErrorKind::FailedPrecondition,
                _ => ErrorKind::Internal,
            },
        }
    }
}
