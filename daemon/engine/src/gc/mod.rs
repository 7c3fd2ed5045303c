//! Garbage collection: what nothing keeps any more is removed, beside running requests.
//!
//! `mark.rs` decides (pure), `sweep.rs` removes in small batches, `scheduler.rs` says when. No step
//! holds a lock that a request waits for longer than one small batch. `why.rs` explains, `disk.rs`
//! measures, `prune.rs` gives up more than a collection would.

mod disk;
mod mark;
mod prune;
mod scheduler;
mod sweep;
mod why;

use async_trait::async_trait;
use lighter_proto::errdefs::{Classify, ErrorKind, render};
use lighter_store::metadata::edges::{Kind, Node};

pub use self::disk::{DiskUsage, ImageUsage, KindUsage};
pub use self::mark::Graph;
pub use self::prune::{Prune, Pruned};
pub use self::scheduler::{Collector, Config};
pub use self::sweep::Summary;
pub use self::why::Step;

/// Why a collection failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("gc failed: {reason}")]
pub struct Error {
    kind: ErrorKind,
    reason: String,
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        self.kind
    }
}

#[allow(clippy::needless_pass_by_value, reason = "used as `map_err(failed)`")]
fn failed(error: lighter_store::Error) -> Error {
    Error {
        kind: error.kind(),
        reason: render(&error),
    }
}

/// An object of an engine that is collected like the records: a mount activation, a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its namespace.
    pub namespace: String,
    /// Its name, as reference labels have it.
    pub id: String,
    /// Tells it from one that had the name before or has it later.
    pub serial: u64,
    /// The lease that owns it.
    pub lease: Option<String>,
    /// Objects that its labels name as its keepers.
    pub keepers: Vec<Node>,
}

impl Item {
    /// Whether it stays for as long as it is active: nobody else was named to decide that.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.lease.is_none() && self.keepers.is_empty()
    }
}

/// An engine whose objects are collected.
#[async_trait]
pub trait Collectable: Send + Sync + std::fmt::Debug {
    /// What its objects are.
    fn kind(&self) -> Kind;
    /// All of them; must not wait.
    fn items(&self) -> Vec<Item>;
    /// Removes one that nothing keeps; one that is gone, or was replaced, is fine.
    async fn remove(&self, item: &Item) -> Result<(), lighter_store::Error>;
}
