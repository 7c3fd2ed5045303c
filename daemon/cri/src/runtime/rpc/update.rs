//! Changes of resources.

use std::sync::Arc;

use lighter_proto::runtime::v1 as api;

use crate::error::{Error, Result};
use crate::plugin::Plugin;

pub(in crate::runtime) async fn update_container_resources(
    this: Arc<Plugin>,
    request: api::UpdateContainerResourcesRequest,
) -> Result<api::UpdateContainerResourcesResponse> {
    let container = this.store.containers.get(&request.container_id)?;
    let asked = request
        .linux
        .ok_or_else(|| Error::invalid("linux resources are required"))?;
    this.update_container(&container, asked, request.annotations)
        .await?;
    Ok(api::UpdateContainerResourcesResponse {})
}

pub(in crate::runtime) async fn update_pod_sandbox_resources(
    this: Arc<Plugin>,
    request: api::UpdatePodSandboxResourcesRequest,
) -> Result<api::UpdatePodSandboxResourcesResponse> {
    let pod = this.store.pods.get(&request.pod_sandbox_id)?;
    this.update_pod(&pod, request.overhead, request.resources)
        .await?;
    Ok(api::UpdatePodSandboxResourcesResponse {})
}
