//! Records of everything that has a name, per namespace, and the references between them.
//!
//! One [`Db`] over the one committer; one file and one handle per kind of object. Every call takes
//! the request's [`Scope`]; a change returns when it is durable, and its event (where there is one)
//! is published after that.

pub mod containers;
pub mod content;
pub mod images;
pub mod leases;
pub mod namespaces;
pub mod sandboxes;
pub mod snapshots;

use std::collections::BTreeMap;
use std::sync::Arc;

use lighter_snapshotter::Snapshotter;

pub use self::containers::{Container, Containers, Runtime};
pub use self::content::Content;
pub use self::images::{Descriptor, Image, Images};
pub use self::leases::{Lease, Leases, Resource};
pub use self::namespaces::Namespaces;
pub use self::sandboxes::{Sandbox, Sandboxes};
pub use self::snapshots::Snapshots;
use crate::content::Store;
use crate::events::Exchange;

/// How blobs of one namespace may be used by another (`content_sharing_policy`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SharingPolicy {
    /// A blob that any namespace has can be added by digest.
    #[default]
    Shared,
    /// A namespace must send the bytes itself.
    Isolated,
}

/// All records. Clones share it.
#[derive(Debug, Clone)]
pub struct Db {
    #[allow(dead_code, reason = "skeleton")]
    inner: Arc<()>,
}

impl Db {
    /// Records over `kv`, blobs in `content`, snapshots in `snapshotters` (by plugin id), events
    /// to `events`.
    ///
    /// # Errors
    /// When the schema version is unknown or the database fails.
    pub fn open(
        _kv: lighter_kv::Db,
        _content: Arc<dyn Store>,
        _snapshotters: BTreeMap<String, Arc<dyn Snapshotter>>,
        _events: Exchange,
        _policy: SharingPolicy,
    ) -> Result<Self, crate::Error> {
        todo!()
    }

    /// Namespace records.
    #[must_use]
    pub fn namespaces(&self) -> Namespaces {
        todo!()
    }
    /// Container records.
    #[must_use]
    pub fn containers(&self) -> Containers {
        todo!()
    }
    /// Image records.
    #[must_use]
    pub fn images(&self) -> Images {
        todo!()
    }
    /// Leases.
    #[must_use]
    pub fn leases(&self) -> Leases {
        todo!()
    }
    /// Sandbox records.
    #[must_use]
    pub fn sandboxes(&self) -> Sandboxes {
        todo!()
    }
    /// Blobs as each namespace sees them.
    #[must_use]
    pub fn content(&self) -> Content {
        todo!()
    }
    /// Snapshots of `snapshotter` as each namespace sees them.
    ///
    /// # Errors
    /// `InvalidArgument`: `snapshotter argument missing`, `snapshotter not loaded: x`.
    pub fn snapshots(&self, _snapshotter: &str) -> Result<Snapshots, crate::Error> {
        todo!()
    }
    /// The exchange that changes are announced on.
    #[must_use]
    pub fn events(&self) -> &Exchange {
        todo!()
    }
}
