//! The mount value that snapshots, tasks and diffs exchange, and what is done with it.

use lighter_proto::containerd::types;

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
