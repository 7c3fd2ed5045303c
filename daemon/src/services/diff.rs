//! `containerd.services.diff.v1.Diff`

use lighter_engine::differ::{Differ, Difference};
use lighter_proto::containerd::services::diff::v1::diff_server::Diff;
use lighter_proto::containerd::services::diff::v1::{
    ApplyRequest, ApplyResponse, DiffRequest, DiffResponse,
};
use lighter_proto::errdefs::into_status;
use tonic::{Request, Response, Status};

use super::scope::scope_of;
use super::wire::{descriptor, encode_descriptor, labels, required, stamp};

/// Layers to mounts and back.
#[derive(Debug, Clone)]
pub(crate) struct DiffService {
    differ: Differ,
}

impl DiffService {
    /// Over the differ of this process.
    pub(crate) fn new(differ: Differ) -> Self {
        Self { differ }
    }
}

#[tonic::async_trait]
impl Diff for DiffService {
    async fn apply(
        &self,
        request: Request<ApplyRequest>,
    ) -> Result<Response<ApplyResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let layer = descriptor(required(request.diff, "diff")?)?;
        let mounts = request.mounts.into_iter().map(Into::into).collect();
        let payloads = labels(request.payloads);
        let applied = self
            .differ
            .apply(&scope, &layer, mounts, payloads, request.sync_fs)
            .await
            .map_err(into_status)?;
        Ok(Response::new(ApplyResponse {
            applied: Some(encode_descriptor(applied)),
        }))
    }

    async fn diff(&self, request: Request<DiffRequest>) -> Result<Response<DiffResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let asked = Difference {
            lower: request.left.into_iter().map(Into::into).collect(),
            upper: request.right.into_iter().map(Into::into).collect(),
            media_type: request.media_type,
            reference: request.r#ref,
            labels: labels(request.labels),
            source_date_epoch: stamp(request.source_date_epoch)?,
        };
        let made = self
            .differ
            .compare(&scope, asked)
            .await
            .map_err(into_status)?;
        Ok(Response::new(DiffResponse {
            diff: Some(encode_descriptor(made)),
        }))
    }
}
