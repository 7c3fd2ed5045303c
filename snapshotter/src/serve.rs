//! Any [`Snapshotter`] as a Snapshots gRPC service: the mirror image of [`crate::Proxy`].
//!
//! For a snapshotter served apart from the daemon: every change is durable before it is answered.
//! The name of the snapshotter in requests is not looked at, as containerd's own wrapper does.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use lighter_proto::containerd::services::snapshots::v1 as wire;
use lighter_proto::errdefs::into_status;
use lighter_proto::time::to_timestamp;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use wire::snapshots_server::{Snapshots, SnapshotsServer};

use crate::{CommitOptions, Error, Info, Kind, LabelUpdate, Labels, Snapshotter};

/// Records per message of a list, as containerd sends them.
const LIST_BATCH: usize = 100;

/// Serves a snapshotter.
#[derive(Debug, Clone)]
pub struct Serve {
    snapshotter: Arc<dyn Snapshotter>,
}

impl Serve {
    /// A tonic service around `snapshotter`.
    #[must_use]
    pub fn new(snapshotter: Arc<dyn Snapshotter>) -> SnapshotsServer<Self> {
        SnapshotsServer::new(Self { snapshotter })
    }

    async fn durable(&self) -> Result<(), Status> {
        self.snapshotter.durable().await.map_err(into_status)
    }
}

/// The wire form of a record.
fn encode(info: Info) -> wire::Info {
    wire::Info {
        name: info.name,
        parent: info.parent.unwrap_or_default(),
        kind: match info.kind {
            Kind::View => wire::Kind::View,
            Kind::Active => wire::Kind::Active,
            Kind::Committed => wire::Kind::Committed,
        }
        .into(),
        created_at: Some(to_timestamp(info.created_at)),
        updated_at: Some(to_timestamp(info.updated_at)),
        labels: info.labels.into_iter().collect(),
    }
}

fn parent(name: &str) -> Option<&str> {
    (!name.is_empty()).then_some(name)
}

/// What an update request means; only labels ever change.
fn label_update(
    info: wire::Info,
    mask: Option<prost_types::FieldMask>,
) -> Result<LabelUpdate, Error> {
    let mut labels: Labels = info.labels.into_iter().collect();
    let paths = mask.map(|m| m.paths).unwrap_or_default();
    if paths.is_empty() || paths.iter().any(|p| p == "labels") {
        return Ok(LabelUpdate::Replace(labels));
    }
    let mut changes = BTreeMap::new();
    for path in paths {
        let Some(key) = path.strip_prefix("labels.") else {
            return Err(Error::Invalid {
                reason: format!(
                    "cannot update {path:?} field on snapshot {:?}: invalid argument",
                    info.name
                ),
            });
        };
        changes.insert(key.to_owned(), labels.remove(key).filter(|v| !v.is_empty()));
    }
    Ok(LabelUpdate::Merge(changes))
}

#[tonic::async_trait]
impl Snapshots for Serve {
    async fn prepare(
        &self,
        request: Request<wire::PrepareSnapshotRequest>,
    ) -> Result<Response<wire::PrepareSnapshotResponse>, Status> {
        let request = request.into_inner();
        let mounts = self
            .snapshotter
            .prepare(
                &request.key,
                parent(&request.parent),
                request.labels.into_iter().collect(),
            )
            .await
            .map_err(into_status)?;
        self.durable().await?;
        Ok(Response::new(wire::PrepareSnapshotResponse {
            mounts: mounts.into_iter().map(Into::into).collect(),
        }))
    }

    async fn view(
        &self,
        request: Request<wire::ViewSnapshotRequest>,
    ) -> Result<Response<wire::ViewSnapshotResponse>, Status> {
        let request = request.into_inner();
        let mounts = self
            .snapshotter
            .view(
                &request.key,
                parent(&request.parent),
                request.labels.into_iter().collect(),
            )
            .await
            .map_err(into_status)?;
        self.durable().await?;
        Ok(Response::new(wire::ViewSnapshotResponse {
            mounts: mounts.into_iter().map(Into::into).collect(),
        }))
    }

    async fn mounts(
        &self,
        request: Request<wire::MountsRequest>,
    ) -> Result<Response<wire::MountsResponse>, Status> {
        let mounts = self
            .snapshotter
            .mounts(&request.into_inner().key)
            .await
            .map_err(into_status)?;
        Ok(Response::new(wire::MountsResponse {
            mounts: mounts.into_iter().map(Into::into).collect(),
        }))
    }

    async fn commit(
        &self,
        request: Request<wire::CommitSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let request = request.into_inner();
        let options = CommitOptions {
            labels: request.labels.into_iter().collect(),
            parent: parent(&request.parent).map(str::to_owned),
            ..CommitOptions::default()
        };
        self.snapshotter
            .commit(&request.name, &request.key, options)
            .await
            .map_err(into_status)?;
        self.durable().await?;
        Ok(Response::new(()))
    }

    async fn remove(
        &self,
        request: Request<wire::RemoveSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        self.snapshotter
            .remove(&request.into_inner().key)
            .await
            .map_err(into_status)?;
        self.durable().await?;
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<wire::StatSnapshotRequest>,
    ) -> Result<Response<wire::StatSnapshotResponse>, Status> {
        let info = self
            .snapshotter
            .stat(&request.into_inner().key)
            .await
            .map_err(into_status)?;
        Ok(Response::new(wire::StatSnapshotResponse {
            info: Some(encode(info)),
        }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateSnapshotRequest>,
    ) -> Result<Response<wire::UpdateSnapshotResponse>, Status> {
        let request = request.into_inner();
        let info = request
            .info
            .ok_or_else(|| Status::invalid_argument("info is missing: invalid argument"))?;
        let name = info.name.clone();
        let labels = label_update(info, request.update_mask).map_err(into_status)?;
        let info = self
            .snapshotter
            .update(&name, labels)
            .await
            .map_err(into_status)?;
        self.durable().await?;
        Ok(Response::new(wire::UpdateSnapshotResponse {
            info: Some(encode(info)),
        }))
    }

    type ListStream =
        Pin<Box<dyn Stream<Item = Result<wire::ListSnapshotsResponse, Status>> + Send>>;

    /// Filters are the daemon's affair: it asks a remote snapshotter without any.
    async fn list(
        &self,
        request: Request<wire::ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        if request.into_inner().filters.iter().any(|f| !f.is_empty()) {
            return Err(into_status(Error::Unimplemented {
                what: "filters on a snapshotter served apart",
            }));
        }
        let infos = self.snapshotter.walk().await.map_err(into_status)?;
        let batches: Vec<_> = infos
            .chunks(LIST_BATCH)
            .map(|batch| {
                Ok(wire::ListSnapshotsResponse {
                    info: batch.iter().cloned().map(encode).collect(),
                })
            })
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(batches))))
    }

    async fn usage(
        &self,
        request: Request<wire::UsageRequest>,
    ) -> Result<Response<wire::UsageResponse>, Status> {
        let usage = self
            .snapshotter
            .usage(&request.into_inner().key)
            .await
            .map_err(into_status)?;
        Ok(Response::new(wire::UsageResponse {
            size: i64::try_from(usage.size_bytes).unwrap_or(i64::MAX),
            inodes: i64::try_from(usage.inodes).unwrap_or(i64::MAX),
        }))
    }

    async fn cleanup(
        &self,
        _request: Request<wire::CleanupRequest>,
    ) -> Result<Response<()>, Status> {
        self.snapshotter.cleanup().await.map_err(into_status)?;
        Ok(Response::new(()))
    }
}
