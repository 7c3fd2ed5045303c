//! `containerd.services.diff.v1.Diff`

use lighter_engine::differ::{ApplyOptions, Differ as _, Difference, Differs};
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
    differs: Differs,
}

impl DiffService {
    /// Over the differs of the configuration.
    pub(crate) fn new(differs: Differs) -> Self {
        Self { differs }
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
        let mounts: Vec<_> = request.mounts.into_iter().map(Into::into).collect();
        let options = ApplyOptions {
            payloads: labels(request.payloads),
            sync_fs: request.sync_fs,
        };
        let applied = self
            .differs
            .apply(&scope, &layer, &mounts, options)
            .await
            .map_err(into_status)?;
        Ok(Response::new(ApplyResponse {
            applied: Some(encode_descriptor(applied.layer)),
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
            .differs
            .compare(&scope, asked)
            .await
            .map_err(into_status)?;
        Ok(Response::new(DiffResponse {
            diff: Some(encode_descriptor(made)),
        }))
    }
}
