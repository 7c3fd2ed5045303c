//! Changes of resources.

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

pub(in crate::runtime) async fn update_container_resources(
    _: Arc<Plugin>,
    _: api::UpdateContainerResourcesRequest,
) -> Result<api::UpdateContainerResourcesResponse> {
    Err(missing("UpdateContainerResources"))
}

pub(in crate::runtime) async fn update_pod_sandbox_resources(
    _: Arc<Plugin>,
    _: api::UpdatePodSandboxResourcesRequest,
) -> Result<api::UpdatePodSandboxResourcesResponse> {
    Err(missing("UpdatePodSandboxResources"))
}
