//! Checkpoints of containers and pods.

use std::sync::Arc;

use lighter_proto::errdefs::ErrorKind;
use lighter_proto::runtime::v1 as api;

use super::seconds;
use crate::error::{Error, Result};
use crate::plugin::Plugin;

/// Calls that containerd 2.4 does not answer either: a kubelet falls back on this kind of error.
fn unserved(name: &str) -> Error {
    Error::new(
        ErrorKind::Unimplemented,
        format!("method {name} not implemented"),
    )
}

pub(in crate::runtime) async fn checkpoint_container(
    this: Arc<Plugin>,
    request: api::CheckpointContainerRequest,
) -> Result<api::CheckpointContainerResponse> {
    let container = this.store.containers.get(&request.container_id)?;
    let limit = seconds(request.timeout);
    let runtime = this.runtime_label_of(&container);
    let checkpoint = this.checkpoint_container(&container, &request.location, limit);
    this.timers
        .time("container_checkpoint", &runtime, checkpoint)
        .await?;
    Ok(api::CheckpointContainerResponse {})
}

pub(in crate::runtime) async fn checkpoint_pod(
    _: Arc<Plugin>,
    _: api::CheckpointPodRequest,
) -> Result<api::CheckpointPodResponse> {
    Err(unserved("CheckpointPod"))
}

pub(in crate::runtime) async fn restore_pod(
    _: Arc<Plugin>,
    _: api::RestorePodRequest,
) -> Result<api::RestorePodResponse> {
    Err(unserved("RestorePod"))
}
