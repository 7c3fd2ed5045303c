//! Checkpoints of containers and pods.

use std::sync::Arc;

use lighter_proto::errdefs::ErrorKind;
use lighter_proto::runtime::v1 as api;

use crate::error::{Error, Result};
use crate::plugin::Plugin;

fn missing(name: &str) -> Error {
    Error::new(
        ErrorKind::Unimplemented,
        format!("{name} is not implemented"),
    )
}

pub(in crate::runtime) async fn checkpoint_container(
    _: Arc<Plugin>,
    _: api::CheckpointContainerRequest,
) -> Result<api::CheckpointContainerResponse> {
    Err(missing("CheckpointContainer"))
}

pub(in crate::runtime) async fn checkpoint_pod(
    _: Arc<Plugin>,
    _: api::CheckpointPodRequest,
) -> Result<api::CheckpointPodResponse> {
    Err(missing("CheckpointPod"))
}

pub(in crate::runtime) async fn restore_pod(
    _: Arc<Plugin>,
    _: api::RestorePodRequest,
) -> Result<api::RestorePodResponse> {
    Err(missing("RestorePod"))
}
