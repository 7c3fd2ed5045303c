//! Differs: layers of the content store to mounts and back.
//!
//! [`LocalDiffer`] works in this process, [`ProxyDiffer`] asks another one; [`Differs`] is the list of
//! the configuration, tried in order until one can.

mod local;
mod proxy;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use lighter_proto::errdefs::{ErrorKind, WireError};
use lighter_snapshotter::Mount;
use lighter_store::metadata::Descriptor;
use lighter_store::{Labels, Scope};
use prost_types::Any;

pub use self::local::LocalDiffer;
pub use self::proxy::ProxyDiffer;
pub(crate) use self::proxy::scoped;
use crate::diff::LeansOn;
use crate::image::{self, Applier};

/// What goes with an apply.
#[derive(Debug, Clone, Default)]
pub struct ApplyOptions {
    /// Payloads for stream processors, by id.
    pub payloads: BTreeMap<String, Any>,
    /// Whether the files must be on disk afterwards.
    pub sync_fs: bool,
}

/// A layer that was applied.
#[derive(Debug, Clone)]
pub struct Applied {
    /// The plain tar it holds.
    pub layer: Descriptor,
    /// What it wanted of the layers below and could not know; nothing where the differ does not say.
    pub leans_on: LeansOn,
}

/// What a difference is made of.
#[derive(Debug, Clone, Default)]
pub struct Difference {
    /// Mounts of the lower side.
    pub lower: Vec<Mount>,
    /// Mounts of the upper side.
    pub upper: Vec<Mount>,
    /// Media type of the result; empty is gzip.
    pub media_type: String,
    /// Ref of the ingest; empty for any.
    pub reference: String,
    /// Labels of the blob.
    pub labels: Labels,
    /// Latest modification time in the result.
    pub source_date_epoch: Option<SystemTime>,
}

/// Applies and makes layers.
#[async_trait]
pub trait Differ: Send + Sync + fmt::Debug {
    /// Unpacks `layer` over `mounts`.
    ///
    /// # Errors
    /// `NotFound` without the blob, `Unimplemented` for what this differ does not do, or why it could
    /// not be unpacked; what was written so far stays.
    async fn apply(
        &self,
        scope: &Scope,
        layer: &Descriptor,
        mounts: &[Mount],
        options: ApplyOptions,
    ) -> Result<Applied, WireError>;

    /// Writes what makes the upper side of the lower as a layer.
    ///
    /// # Errors
    /// `Unimplemented` for what this differ does not do, or why it could not be made.
    async fn compare(&self, scope: &Scope, asked: Difference) -> Result<Descriptor, WireError>;

    /// Whether it says what a layer leans on, so that layers can be applied beside each other.
    fn tells_what_layers_lean_on(&self) -> bool {
        false
    }
}

/// Differs in the order they are tried; clones share them.
#[derive(Debug, Clone)]
pub struct Differs {
    list: Arc<[Arc<dyn Differ>]>,
}

impl Differs {
    /// The list; the first that does not answer `Unimplemented` decides.
    #[must_use]
    pub fn new(list: Vec<Arc<dyn Differ>>) -> Self {
        Self { list: list.into() }
    }
}

fn none() -> WireError {
    WireError::new(ErrorKind::Unimplemented, "no differ is configured")
}

#[async_trait]
impl Differ for Differs {
    async fn apply(
        &self,
        scope: &Scope,
        layer: &Descriptor,
        mounts: &[Mount],
        options: ApplyOptions,
    ) -> Result<Applied, WireError> {
        let mut refused = none();
        for differ in self.list.iter() {
            match differ.apply(scope, layer, mounts, options.clone()).await {
                Err(error) if error.kind == ErrorKind::Unimplemented => refused = error,
                other => return other,
            }
        }
        Err(refused)
    }

    async fn compare(&self, scope: &Scope, asked: Difference) -> Result<Descriptor, WireError> {
        let mut refused = none();
        for differ in self.list.iter() {
            match differ.compare(scope, asked.clone()).await {
                Err(error) if error.kind == ErrorKind::Unimplemented => refused = error,
                other => return other,
            }
        }
        Err(refused)
    }

    fn tells_what_layers_lean_on(&self) -> bool {
        self.list.iter().all(|d| d.tells_what_layers_lean_on())
    }
}

#[async_trait]
impl Applier for Differs {
    async fn apply(
        &self,
        scope: &Scope,
        layer: &image::Descriptor,
        mounts: &[Mount],
    ) -> Result<image::Applied, WireError> {
        let layer = Descriptor {
            media_type: layer.media_type.clone(),
            digest: layer.digest.clone(),
            size_bytes: layer.size_bytes,
            annotations: layer.annotations.clone(),
        };
        let applied = Differ::apply(self, scope, &layer, mounts, ApplyOptions::default()).await?;
        Ok(image::Applied {
            diff_id: applied.layer.digest,
            size_bytes: applied.layer.size_bytes,
            leans_on: applied.leans_on,
        })
    }

    fn tells_what_layers_lean_on(&self) -> bool {
        Differ::tells_what_layers_lean_on(self)
    }
}
