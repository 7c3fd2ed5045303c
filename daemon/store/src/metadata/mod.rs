//! Records of everything that has a name, per namespace, and the references between them.
//!
//! One [`Db`] over the one committer; one file and one handle per kind of object. Every call takes
//! the request's [`Scope`](crate::Scope); a change returns when it is durable, and its event (where there is one)
//! is published after that.

pub mod containers;
pub mod content;
pub mod images;
pub mod leases;
pub mod namespaces;
pub mod sandboxes;
pub mod snapshots;

pub mod collect;
mod db;
pub mod edges;
mod encoded;
mod keys;
mod mask;
mod reconcile;
mod records;

use std::collections::BTreeMap;
use std::sync::Arc;

use lighter_snapshotter::Snapshotter;

pub use self::containers::{Container, Containers, Runtime};
pub use self::content::{Content, Writer};
pub use self::encoded::EncodedContainers;
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
    inner: Arc<db::Inner>,
}

impl Db {
    /// Records over `kv`, blobs in `content`, snapshots in `snapshotters` (by plugin id), events
    /// to `events`.
    ///
    /// # Errors
    /// When the schema version is unknown or the database fails.
    pub fn open(
        kv: lighter_kv::Db,
        content: Arc<dyn Store>,
        snapshotters: BTreeMap<String, Arc<dyn Snapshotter>>,
        events: Exchange,
        policy: SharingPolicy,
    ) -> Result<Self, crate::Error> {
        let inner = db::Inner::open(kv, content, snapshotters, events, policy)?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Refs being written (`<namespace>/<ref>`), by whom and for how long, oldest first.
    #[must_use]
    pub fn open_refs(&self) -> Vec<(String, String, std::time::Duration)> {
        let mut open = self.inner.refs.list();
        open.sort_by_key(|(_, _, age)| std::cmp::Reverse(*age));
        open
    }

    /// Namespace records.
    #[must_use]
    pub fn namespaces(&self) -> Namespaces {
        Namespaces::over(self.inner.clone())
    }
    /// Container records.
    #[must_use]
    pub fn containers(&self) -> Containers {
        Containers::over(self.inner.clone())
    }
    /// Image records.
    #[must_use]
    pub fn images(&self) -> Images {
        Images::over(self.inner.clone())
    }
    /// Leases.
    #[must_use]
    pub fn leases(&self) -> Leases {
        Leases::over(self.inner.clone())
    }
    /// Sandbox records.
    #[must_use]
    pub fn sandboxes(&self) -> Sandboxes {
        Sandboxes::over(self.inner.clone())
    }
    /// Blobs as each namespace sees them.
    #[must_use]
    pub fn content(&self) -> Content {
        Content::over(self.inner.clone())
    }
    /// Snapshots of `snapshotter` as each namespace sees them.
    ///
    /// # Errors
    /// `InvalidArgument`: `snapshotter argument missing`, `snapshotter not loaded: x`.
    pub fn snapshots(&self, snapshotter: &str) -> Result<Snapshots, crate::Error> {
        Snapshots::over(self.inner.clone(), snapshotter)
    }
    /// Names of the snapshotters, in order.
    pub fn snapshotters(&self) -> impl Iterator<Item = &str> {
        self.inner.snapshotters.keys().map(String::as_str)
    }
    /// The exchange that changes are announced on.
    #[must_use]
    pub fn events(&self) -> &Exchange {
        &self.inner.events
    }
    /// Waits until work that its callers left behind has ended; call it before the process ends.
    pub async fn close(&self) {
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }
}

#[cfg(test)]
mod tests;
