//! Where root filesystems come from: the [`Snapshotter`] contract and its drivers.
//!
//! A snapshot is *active* or a *view* (addressed by its key) or *committed* (addressed by its
//! name); keys and names share one name space. Parents are always committed. A driver keeps its
//! records in the [`lighter_kv::Db`] it is handed; a change is durable once any later change of the
//! same database is (see [`Snapshotter::durable`]), so a caller that records the snapshot next
//! waits only once.
//!
//! Spec: containerd's snapshots service; the rules are those its clients rely on.

mod blockfile;
pub mod connect;
mod copy;
mod dirs;
mod erofs;
mod error;
mod flush;
mod local;
pub mod mount;
mod native;
mod overlayfs;
mod proxy;
mod serve;
mod storage;
mod sys;
#[cfg(any(test, feature = "testsuite"))]
pub mod testsuite;
mod usage;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::SystemTime;

use async_trait::async_trait;

pub use blockfile::{Blockfile, Config as BlockfileConfig};
pub use erofs::{Config as ErofsConfig, Erofs};
pub use error::Error;
pub use mount::Mount;
pub use native::Native;
pub use overlayfs::{Config as OverlayfsConfig, Overlayfs};
pub use proxy::Proxy;
pub use serve::Serve;
pub use sys::enable_verity;
pub use usage::disk_usage;

/// Label: uid map of a snapshot, `container:host:size[,…]`.
pub const LABEL_UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
/// Label: gid map of a snapshot, `container:host:size[,…]`.
pub const LABEL_GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";
/// Label: most bytes that an active snapshot may hold, where the driver has a bound.
pub const LABEL_MAX_SIZE: &str = "containerd.io/snapshot/max-size";
/// Label shown by overlayfs when configured: the upper directory.
pub const LABEL_UPPER_DIR: &str = "containerd.io/snapshot/overlay.upperdir";

/// Labels of a snapshot. No value is ever empty.
pub type Labels = BTreeMap<String, String>;

/// What a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Read-only, never committed.
    View,
    /// Writable, may be committed.
    Active,
    /// Immutable, may be a parent.
    Committed,
}

impl Kind {
    /// The word used in filters: `view`, `active`, `committed`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is known of one snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Active, view or committed.
    pub kind: Kind,
    /// Key of an active snapshot or view, name of a committed one.
    pub name: String,
    /// Name of the parent; `None` for a base.
    pub parent: Option<String>,
    /// Labels.
    pub labels: Labels,
    /// When it was prepared or committed.
    pub created_at: SystemTime,
    /// When its labels last changed.
    pub updated_at: SystemTime,
}

/// Disk used by one snapshot, its parents left out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes, by allocated blocks.
    pub size_bytes: u64,
    /// Inodes; hard links count once.
    pub inodes: u64,
}

/// How the labels of a snapshot change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelUpdate {
    /// All labels are replaced.
    Replace(Labels),
    /// Only these keys are set (`Some`) or removed (`None`).
    Merge(BTreeMap<String, Option<String>>),
}

/// What goes with a commit.
#[derive(Debug, Clone, Default)]
pub struct CommitOptions {
    /// Labels of the committed snapshot; those of the active one are not inherited.
    pub labels: Labels,
    /// Parent to put under an active snapshot that has none (capability `rebase`).
    pub parent: Option<String>,
    /// The caller has seen [`Snapshotter::sync`] return since the last file was written, so the
    /// commit need not sync.
    pub synced: bool,
}

/// A source of root filesystems.
///
/// # Errors
/// All methods: `NotFound` for an unknown key, `AlreadyExists` for a taken one,
/// `FailedPrecondition` and `InvalidArgument` for the wrong kind (see [`Error`]), `Internal` when
/// the system refuses.
#[async_trait]
pub trait Snapshotter: Send + Sync + fmt::Debug {
    /// The record of `key`.
    async fn stat(&self, key: &str) -> Result<Info, Error>;

    /// Changes labels; nothing else of a snapshot ever changes. Returns the new record.
    async fn update(&self, key: &str, labels: LabelUpdate) -> Result<Info, Error>;

    /// Disk use: stored for committed snapshots, measured for active ones, zero for views.
    async fn usage(&self, key: &str) -> Result<Usage, Error>;

    /// The mounts of an active snapshot or view; repeatable and free of side effects.
    async fn mounts(&self, key: &str) -> Result<Vec<Mount>, Error>;

    /// Makes a writable snapshot `key` on `parent`.
    async fn prepare(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error>;

    /// Makes a read-only snapshot `key` of `parent`.
    async fn view(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error>;

    /// Turns active `key` into committed `name`; the key is gone afterwards.
    async fn commit(&self, name: &str, key: &str, options: CommitOptions) -> Result<(), Error>;

    /// Removes a snapshot without children.
    async fn remove(&self, key: &str) -> Result<(), Error>;

    /// All records, in order of key.
    async fn walk(&self) -> Result<Vec<Info>, Error>;

    /// Removes directories that no record owns any more. `Unimplemented` where there are none.
    async fn cleanup(&self) -> Result<(), Error>;

    /// Waits until everything answered so far is durable; for callers without a database of
    /// their own behind it.
    async fn durable(&self) -> Result<(), Error>;

    /// Waits until the files written into active snapshots so far are on disk. One call before many
    /// commits (with [`CommitOptions::synced`]) is cheaper than what each commit does by itself.
    async fn sync(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Whether its records are in the database it was handed: then one it does not know is gone,
    /// and not just out of reach.
    fn shares_records(&self) -> bool {
        false
    }

    /// What clients may rely on, e.g. `rebase`, `remap-ids` (plugin capabilities).
    fn capabilities(&self) -> Vec<String> {
        Vec::new()
    }

    /// Whether an active snapshot without parent is one plain directory in which deletions are kept as
    /// overlayfs keeps them: then a layer may be unpacked there and committed on a parent it never saw
    /// ([`CommitOptions::parent`]).
    fn layers_stand_alone(&self) -> bool {
        false
    }

    /// Directory that holds the snapshots, where there is one on this machine (export `root`).
    fn root(&self) -> Option<PathBuf> {
        None
    }
}
