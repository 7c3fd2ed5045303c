//! The mount value that snapshots, tasks and diffs exchange, and what is done with it.
//!
//! [`Mount::parse`] reads the words of the options once ([`options`]); [`mount_all`] carries mounts
//! out at a path, [`Detached`] without any path, so that nothing is left when the process dies;
//! [`unmount`], [`unmount_all`] and [`unmount_recursive`] undo them.

mod apply;
mod detached;
mod helper;
mod idmap;
mod loopdev;
mod mountinfo;
pub mod options;
mod overlay;
mod prepare;
mod stack;
mod temp;
mod template;
mod unmount;

use std::io;
use std::path::PathBuf;

use lighter_proto::containerd::types;
use lighter_proto::errdefs::{Classify, ErrorKind};

pub use apply::{mount_all, mount_at};
pub use detached::Detached;
pub use idmap::{IdMap, root_pair};
pub use mountinfo::{Entry, entries_below, is_mountpoint};
pub use prepare::{has_prefix, ready, size_bytes};
pub use temp::{Access, TempMount};
pub use template::Made;
pub use unmount::{unmount, unmount_all, unmount_recursive};

/// One mount, as fstab would say it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Mount {
    /// `bind`, `overlay`, `tmpfs`, …, with containerd's prefixes (`format/`, `mkdir/`, …) where used.
    pub fstype: String,
    /// Device or directory.
    pub source: String,
    /// Path below the mountpoint, for roots made of several mounts; empty for the root itself.
    pub target: String,
    /// fstab words; unknown words go to the filesystem.
    pub options: Vec<String>,
}

/// Why a mount could not be made or undone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The words of the mount make no sense.
    #[error("mount option {option:?} of type {fstype:?}: {reason}")]
    Option {
        /// Type of the mount.
        fstype: String,
        /// The word.
        option: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Too many lower directories for this kernel.
    #[error("mount options is too long")]
    TooLong,
    /// Several mounts, and one of them needs a path.
    #[error("{what}")]
    Unsupported {
        /// What was asked.
        what: &'static str,
    },
    /// A prefix of the type could not be carried out.
    #[error("{reason}")]
    Prepare {
        /// Why.
        reason: String,
    },
    /// A mount helper program failed.
    #[error("mount helper {helper} failed: {stderr}")]
    Helper {
        /// Name of the program.
        helper: String,
        /// What it said, cut to a few kilobytes.
        stderr: String,
    },
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
}

impl Error {
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
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Option { .. } | Self::TooLong | Self::Prepare { .. } => {
                ErrorKind::InvalidArgument
            }
            Self::Unsupported { .. } => ErrorKind::Unimplemented,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                ErrorKind::NotFound
            }
            Self::Io { .. } | Self::Helper { .. } => ErrorKind::Internal,
        }
    }
}

impl Mount {
    /// The value of option `name=`, if there is one.
    #[must_use]
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options
            .iter()
            .find_map(|o| o.strip_prefix(name)?.strip_prefix('='))
    }

    /// Whether the bare word `name` is among the options.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.options.iter().any(|o| o == name)
    }

    /// The lower directories of an overlay, nearest first; empty for other mounts.
    #[must_use]
    pub fn lower_dirs(&self) -> Vec<String> {
        let list = self.option("lowerdir").unwrap_or_default();
        let mut dirs = overlay::split_unescaped(list);
        dirs.retain(|dir| !dir.is_empty());
        dirs
    }

    /// The type without its prefixes (`overlay` of `format/mkdir/overlay`).
    #[must_use]
    pub fn kind(&self) -> &str {
        match self.fstype.rsplit_once('/') {
            Some((_, kind)) => kind,
            None => &self.fstype,
        }
    }

    /// The same mount without write access: `ro` for `rw`, and an overlay without its upper
    /// directory (its upper becomes the topmost lower), so that it may be mounted a second time.
    #[must_use]
    pub fn read_only(&self) -> Self {
        let mut mount = self.clone();
        if mount.kind() == "overlay" {
            if let Some(upper) = self.option("upperdir").map(str::to_owned) {
                mount.options.retain(|o| {
                    !o.starts_with("upperdir=") && !o.starts_with("workdir=") && o != "volatile"
                });
                for option in &mut mount.options {
                    if let Some(lower) = option.strip_prefix("lowerdir=") {
                        *option = format!("lowerdir={upper}:{lower}");
                    }
                }
            }
            return mount;
        }
        let image = mount.fstype.starts_with("mkfs/");
        if image && !std::path::Path::new(&mount.source).exists() {
            // Made by this very mount; there is nothing yet to keep as it is.
            return mount;
        }
        mount.options.retain(|o| o != "rw" && o != "ro");
        mount.options.push("ro".to_owned());
        if image && mount.kind() == "ext4" {
            // Whoever writes to it replays its journal.
            mount.options.push("noload".to_owned());
        }
        mount
    }
}

impl From<Mount> for types::Mount {
    fn from(mount: Mount) -> Self {
        Self {
            r#type: mount.fstype,
            source: mount.source,
            target: mount.target,
            options: mount.options,
        }
    }
}

impl From<types::Mount> for Mount {
    fn from(mount: types::Mount) -> Self {
        Self {
            fstype: mount.r#type,
            source: mount.source,
            target: mount.target,
            options: mount.options,
        }
    }
}

#[cfg(test)]
mod tests;
