//! Layers to snapshots, client side: Prepare, Apply, Commit, once per layer.

use std::collections::HashMap;

use anyhow::Context as _;
use lighter_proto::containerd::services::content::v1::{Info, UpdateRequest};
use lighter_proto::containerd::services::diff::v1::ApplyRequest;
use lighter_proto::containerd::services::namespaces::v1::GetNamespaceRequest;
use lighter_proto::containerd::services::snapshots::v1::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};

use super::{Resolved, chain_id};
use crate::advice::{is_already_exists, is_not_found};
use crate::client::Client;
use crate::labels;

/// What is used when neither flag nor namespace names a snapshotter.
const DEFAULT_SNAPSHOTTER: &str = "overlayfs";
/// Label of a namespace that names its snapshotter.
const SNAPSHOTTER_LABEL: &str = "containerd.io/defaults/snapshotter";
/// Label of a namespace that names its runtime.
pub(crate) const RUNTIME_LABEL: &str = "containerd.io/defaults/runtime";

/// A label of our namespace; a namespace without labels has none.
pub(crate) async fn namespace_default(
    client: &Client,
    label: &str,
) -> anyhow::Result<Option<String>> {
    let request = GetNamespaceRequest {
        name: client.namespace().to_owned(),
    };
    let labels = match client.namespaces().get(request).await {
        Ok(answer) => answer.into_inner().namespace.unwrap_or_default().labels,
        Err(status) if is_not_found(&status) => HashMap::new(),
        Err(status) => return Err(status.into()),
    };
    Ok(labels.get(label).filter(|value| !value.is_empty()).cloned())
}

/// The snapshotter to use when `given` was said.
pub(crate) async fn snapshotter(client: &Client, given: &str) -> anyhow::Result<String> {
    if !given.is_empty() {
        return Ok(given.to_owned());
    }
    let labelled = namespace_default(client, SNAPSHOTTER_LABEL).await?;
    Ok(labelled.unwrap_or_else(|| DEFAULT_SNAPSHOTTER.to_owned()))
}

/// Whether a snapshot exists.
pub(crate) async fn exists(
    client: &Client,
    snapshotter: &str,
    name: &str,
) -> Result<bool, tonic::Status> {
    let (snapshotter, key) = (snapshotter.to_owned(), name.to_owned());
    match client
        .snapshots()
        .stat(StatSnapshotRequest { snapshotter, key })
        .await
    {
        Ok(_) => Ok(true),
        Err(status) if is_not_found(&status) => Ok(false),
        Err(status) => Err(status),
    }
}

/// Unpacks the layers whose snapshots are missing; the name of the topmost snapshot.
pub(crate) async fn unpack(
    client: &Client,
    image: &Resolved,
    snapshotter: &str,
    sync_fs: bool,
) -> anyhow::Result<String> {
    let diff_ids = &image.config.rootfs.diff_ids;
    let layers = &image.manifest.layers;
    anyhow::ensure!(
        diff_ids.len() == layers.len(),
        "manifest {} has {} layers but its config names {}",
        image.descriptor.digest,
        layers.len(),
        diff_ids.len()
    );
    let top = chain_id(diff_ids);
    if top.is_empty() || exists(client, snapshotter, &top).await? {
        return Ok(top);
    }
    for (position, layer) in layers.iter().enumerate() {
        let (parent, chain) = (
            chain_id(&diff_ids[..position]),
            chain_id(&diff_ids[..=position]),
        );
        if exists(client, snapshotter, &chain).await? {
            continue;
        }
        let apply = Apply {
            client,
            snapshotter,
            parent,
            chain: &chain,
            diff: &diff_ids[position],
        };
        apply
            .run(layer, sync_fs)
            .await
            .with_context(|| format!("cannot unpack layer {}", layer.digest))?;
    }
    // The config keeps the snapshots from collection.
    let mark = HashMap::from([(
        format!("containerd.io/gc.ref.snapshot.{snapshotter}"),
        top.clone(),
    )]);
    label(client, &image.manifest.config.digest, mark).await?;
    Ok(top)
}

/// Sets labels of a blob.
pub(crate) async fn label(
    client: &Client,
    digest: &str,
    labels: HashMap<String, String>,
) -> anyhow::Result<()> {
    if labels.is_empty() {
        return Ok(());
    }
    let update_mask = Some(labels::mask(&labels));
    let info = Some(Info {
        digest: digest.to_owned(),
        labels,
        ..Default::default()
    });
    client
        .content()
        .update(UpdateRequest { info, update_mask })
        .await?;
    Ok(())
}

/// One layer onto its parent.
struct Apply<'a> {
    client: &'a Client,
    snapshotter: &'a str,
    parent: String,
    chain: &'a str,
    diff: &'a str,
}

impl Apply<'_> {
    async fn run(&self, layer: &super::Descriptor, sync_fs: bool) -> anyhow::Result<()> {
        let key = format!("extract-{:016x} {}", rand::random::<u64>(), self.chain);
        let prepared = self
            .client
            .snapshots()
            .prepare(PrepareSnapshotRequest {
                snapshotter: self.snapshotter.to_owned(),
                key: key.clone(),
                parent: self.parent.clone(),
                labels: HashMap::from([(
                    "containerd.io/snapshot.ref".to_owned(),
                    self.chain.to_owned(),
                )]),
            })
            .await;
        let mounts = match prepared {
            Ok(answer) => answer.into_inner().mounts,
            // A remote snapshotter has it already.
            Err(status) if is_already_exists(&status) => return Ok(()),
            Err(status) => return Err(status.into()),
        };
        let outcome = self.fill(layer, &key, mounts, sync_fs).await;
        if outcome.is_err() {
            let snapshotter = self.snapshotter.to_owned();
            // The lease would clean up as well, only later.
            let _ = self
                .client
                .snapshots()
                .remove(RemoveSnapshotRequest { snapshotter, key })
                .await;
        }
        outcome
    }

    async fn fill(
        &self,
        layer: &super::Descriptor,
        key: &str,
        mounts: Vec<lighter_proto::containerd::types::Mount>,
        sync_fs: bool,
    ) -> anyhow::Result<()> {
        let request = ApplyRequest {
            diff: Some(layer.to_wire()),
            mounts,
            sync_fs,
            ..Default::default()
        };
        let applied = self
            .client
            .diff()
            .apply(request)
            .await?
            .into_inner()
            .applied;
        let actual = applied
            .map(|descriptor| descriptor.digest)
            .unwrap_or_default();
        anyhow::ensure!(
            actual == self.diff,
            "its content hashes to {actual}, but the image's config says {}",
            self.diff
        );
        let committed = self
            .client
            .snapshots()
            .commit(CommitSnapshotRequest {
                snapshotter: self.snapshotter.to_owned(),
                name: self.chain.to_owned(),
                key: key.to_owned(),
                ..Default::default()
            })
            .await;
        match committed {
            Err(status) if is_already_exists(&status) => {
                // Somebody was faster: ours is superfluous.
                let (snapshotter, key) = (self.snapshotter.to_owned(), key.to_owned());
                self.client
                    .snapshots()
                    .remove(RemoveSnapshotRequest { snapshotter, key })
                    .await?;
            }
            other => drop(other?),
        }
        let uncompressed = HashMap::from([(
            "containerd.io/uncompressed".to_owned(),
            self.diff.to_owned(),
        )]);
        label(self.client, &layer.digest, uncompressed).await
    }
}
