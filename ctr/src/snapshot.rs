//! Snapshots, client side: made to write to or to look at.

use lighter_proto::containerd::services::snapshots::v1::{
    PrepareSnapshotRequest, ViewSnapshotRequest,
};
use lighter_proto::containerd::types::Mount;

use crate::client::Client;

/// What a snapshot is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Changes, which it keeps.
    Write,
    /// A look at its parent.
    Read,
}

/// Makes a snapshot; how it is mounted.
pub(crate) async fn make(
    client: &Client,
    access: Access,
    wanted: PrepareSnapshotRequest,
) -> anyhow::Result<Vec<Mount>> {
    let mut snapshots = client.snapshots();
    Ok(match access {
        Access::Write => snapshots.prepare(wanted).await?.into_inner().mounts,
        Access::Read => {
            let PrepareSnapshotRequest {
                snapshotter,
                key,
                parent,
                labels,
            } = wanted;
            let request = ViewSnapshotRequest {
                snapshotter,
                key,
                parent,
                labels,
            };
            snapshots.view(request).await?.into_inner().mounts
        }
    })
}
