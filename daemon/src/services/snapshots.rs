//! `containerd.services.snapshots.v1.Snapshots`

use std::collections::BTreeMap;

use futures::stream::{self, BoxStream, StreamExt as _};
use lighter_proto::containerd::services::snapshots::v1 as wire;
use lighter_proto::containerd::services::snapshots::v1::snapshots_server::Snapshots;
use lighter_proto::containerd::types;
use lighter_proto::errdefs::into_status;
use lighter_proto::time::to_timestamp;
use lighter_snapshotter::{CommitOptions, Info, Kind, LabelUpdate, Mount};
use lighter_store::Labels;
use lighter_store::metadata::Db;
use tonic::{Request, Response, Status};

use super::scope::scope_of;
use super::wire::{count, filter, invalid, labels, paths, required, unordered};

/// Records in one message of a list.
const PAGE: usize = 100;

/// Snapshots over gRPC.
#[derive(Debug, Clone)]
pub(crate) struct SnapshotsService {
    db: Db,
}

impl SnapshotsService {
    /// Over the snapshots of `db`.
    pub(crate) fn new(db: Db) -> Self {
        Self { db }
    }

    fn of(&self, name: &str) -> Result<lighter_store::metadata::Snapshots, Status> {
        self.db.snapshots(name).map_err(into_status)
    }
}

fn parent(name: &str) -> Option<&str> {
    (!name.is_empty()).then_some(name)
}

fn encode_mounts(mounts: Vec<Mount>) -> Vec<types::Mount> {
    mounts.into_iter().map(types::Mount::from).collect()
}

fn encode(info: Info) -> wire::Info {
    let kind = match info.kind {
        Kind::View => wire::Kind::View,
        Kind::Active => wire::Kind::Active,
        Kind::Committed => wire::Kind::Committed,
    };
    wire::Info {
        name: info.name,
        parent: info.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(to_timestamp(info.created_at)),
        updated_at: Some(to_timestamp(info.updated_at)),
        labels: unordered(info.labels),
    }
}

/// How a mask and a request's labels change a snapshot's.
fn label_update(given: Labels, mask: &[String]) -> Result<LabelUpdate, Status> {
    if mask.is_empty() || mask.iter().any(|path| path == "labels") {
        if let Some(other) = mask
            .iter()
            .find(|p| *p != "labels" && !p.starts_with("labels."))
        {
            return Err(unknown(other));
        }
        return Ok(LabelUpdate::Replace(given));
    }
    let mut some = BTreeMap::new();
    for path in mask {
        let key = path.strip_prefix("labels.").ok_or_else(|| unknown(path))?;
        let value = given.get(key).filter(|value| !value.is_empty());
        some.insert(key.to_owned(), value.cloned());
    }
    Ok(LabelUpdate::Merge(some))
}

fn unknown(path: &str) -> Status {
    invalid(format!("cannot update {path:?} field on snapshot"))
}

#[tonic::async_trait]
impl Snapshots for SnapshotsService {
    async fn prepare(
        &self,
        request: Request<wire::PrepareSnapshotRequest>,
    ) -> Result<Response<wire::PrepareSnapshotResponse>, Status> {
        let scope = scope_of(&request)?;
        let r = request.into_inner();
        let snapshots = self.of(&r.snapshotter)?;
        let made = snapshots.prepare(&scope, &r.key, parent(&r.parent), labels(r.labels));
        Ok(Response::new(wire::PrepareSnapshotResponse {
            mounts: encode_mounts(made.await.map_err(into_status)?),
        }))
    }

    async fn view(
        &self,
        request: Request<wire::ViewSnapshotRequest>,
    ) -> Result<Response<wire::ViewSnapshotResponse>, Status> {
        let scope = scope_of(&request)?;
        let r = request.into_inner();
        let snapshots = self.of(&r.snapshotter)?;
        let made = snapshots.view(&scope, &r.key, parent(&r.parent), labels(r.labels));
        Ok(Response::new(wire::ViewSnapshotResponse {
            mounts: encode_mounts(made.await.map_err(into_status)?),
        }))
    }

    async fn mounts(
        &self,
        request: Request<wire::MountsRequest>,
    ) -> Result<Response<wire::MountsResponse>, Status> {
        let scope = scope_of(&request)?;
        let r = request.get_ref();
        let mounts = self.of(&r.snapshotter)?.mounts(&scope, &r.key).await;
        Ok(Response::new(wire::MountsResponse {
            mounts: encode_mounts(mounts.map_err(into_status)?),
        }))
    }

    async fn commit(
        &self,
        request: Request<wire::CommitSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let r = request.into_inner();
        let options = CommitOptions {
            labels: labels(r.labels),
            parent: parent(&r.parent).map(str::to_owned),
            ..CommitOptions::default()
        };
        let snapshots = self.of(&r.snapshotter)?;
        let committed = snapshots.commit(&scope, &r.name, &r.key, options).await;
        committed.map(Response::new).map_err(into_status)
    }

    async fn remove(
        &self,
        request: Request<wire::RemoveSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let r = request.get_ref();
        let removed = self.of(&r.snapshotter)?.remove(&scope, &r.key).await;
        removed.map(Response::new).map_err(into_status)
    }

    async fn stat(
        &self,
        request: Request<wire::StatSnapshotRequest>,
    ) -> Result<Response<wire::StatSnapshotResponse>, Status> {
        let scope = scope_of(&request)?;
        let r = request.get_ref();
        let info = self.of(&r.snapshotter)?.stat(&scope, &r.key).await;
        Ok(Response::new(wire::StatSnapshotResponse {
            info: Some(encode(info.map_err(into_status)?)),
        }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateSnapshotRequest>,
    ) -> Result<Response<wire::UpdateSnapshotResponse>, Status> {
        let scope = scope_of(&request)?;
        let r = request.into_inner();
        let snapshots = self.of(&r.snapshotter)?;
        let info = required(r.info, "info")?;
        let update = label_update(labels(info.labels), &paths(r.update_mask))?;
        let updated = snapshots.update(&scope, &info.name, update).await;
        Ok(Response::new(wire::UpdateSnapshotResponse {
            info: Some(encode(updated.map_err(into_status)?)),
        }))
    }

    type ListStream = BoxStream<'static, Result<wire::ListSnapshotsResponse, Status>>;

    async fn list(
        &self,
        request: Request<wire::ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let scope = scope_of(&request)?;
        let r = request.get_ref();
        let filter = filter(&r.filters)?;
        let found = self.of(&r.snapshotter)?.list(&scope, &filter).await;
        let pages = stream::iter(found.map_err(into_status)?.into_iter().map(encode));
        let messages = pages
            .chunks(PAGE)
            .map(|info| Ok(wire::ListSnapshotsResponse { info }));
        Ok(Response::new(messages.boxed()))
    }

    async fn usage(
        &self,
        request: Request<wire::UsageRequest>,
    ) -> Result<Response<wire::UsageResponse>, Status> {
        let scope = scope_of(&request)?;
        let r = request.get_ref();
        let usage = self.of(&r.snapshotter)?.usage(&scope, &r.key).await;
        let usage = usage.map_err(into_status)?;
        Ok(Response::new(wire::UsageResponse {
            size: count(usage.size_bytes),
            inodes: count(usage.inodes),
        }))
    }

    async fn cleanup(
        &self,
        request: Request<wire::CleanupRequest>,
    ) -> Result<Response<()>, Status> {
        scope_of(&request)?;
        let cleaned = self.of(&request.get_ref().snapshotter)?.cleanup().await;
        cleaned.map(Response::new).map_err(into_status)
    }
}
