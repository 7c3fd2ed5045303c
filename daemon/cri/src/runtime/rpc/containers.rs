//! Containers: create, start, stop, remove, status, list, log.

use std::collections::HashMap;
use std::sync::Arc;

use futures::stream::BoxStream;
use lighter_proto::runtime::v1 as api;
use tonic::Status;

use super::{batches, seconds};
use crate::error::{Error, Result};
use crate::plugin::Plugin;
use crate::runtime::lists::read_back;

pub(in crate::runtime) async fn create_container(
    this: Arc<Plugin>,
    request: api::CreateContainerRequest,
) -> Result<api::CreateContainerResponse> {
    let config = request
        .config
        .ok_or_else(|| Error::invalid("container config is required"))?;
    let pod = this.store.pods.get(&request.pod_sandbox_id)?;
    let runtime = this.runtime_label(&pod.handler);
    let creation = this.create_container(&pod, config);
    let container_id = this
        .timers
        .time("container_create", &runtime, creation)
        .await?;
    Ok(api::CreateContainerResponse { container_id })
}

pub(in crate::runtime) async fn start_container(
    this: Arc<Plugin>,
    request: api::StartContainerRequest,
) -> Result<api::StartContainerResponse> {
    let container = this.store.containers.get(&request.container_id)?;
    let runtime = this.runtime_label_of(&container);
    let start = this.start_container(&container);
    this.timers.time("container_start", &runtime, start).await?;
    Ok(api::StartContainerResponse {})
}

pub(in crate::runtime) async fn stop_container(
    this: Arc<Plugin>,
    request: api::StopContainerRequest,
) -> Result<api::StopContainerResponse> {
    if let Some(container) = this.store.containers.find(&request.container_id)? {
        let limit = seconds(request.timeout);
        let runtime = this.runtime_label_of(&container);
        let stop = this.stop_container(&container, limit);
        this.timers.time("container_stop", &runtime, stop).await?;
    }
    Ok(api::StopContainerResponse {})
}

pub(in crate::runtime) async fn remove_container(
    this: Arc<Plugin>,
    request: api::RemoveContainerRequest,
) -> Result<api::RemoveContainerResponse> {
    if let Some(container) = this.store.containers.find(&request.container_id)? {
        let runtime = this.runtime_label_of(&container);
        let removal = this.remove_container(&container);
        this.timers
            .time("container_remove", &runtime, removal)
            .await?;
    }
    Ok(api::RemoveContainerResponse {})
}

pub(in crate::runtime) async fn container_status(
    this: Arc<Plugin>,
    request: api::ContainerStatusRequest,
) -> Result<api::ContainerStatusResponse> {
    let container = this.store.containers.get(&request.container_id)?;
    let mut info = HashMap::new();
    if request.verbose {
        let detail = this.container_info(&container)?;
        info.insert("info".to_owned(), detail.to_string());
    }
    let status = Some(this.status_of(&container));
    Ok(api::ContainerStatusResponse { status, info })
}

pub(in crate::runtime) async fn list_containers(
    this: Arc<Plugin>,
    request: api::ListContainersRequest,
) -> Result<api::ListContainersResponse> {
    read_back(this.list_containers(request.filter))
}

pub(in crate::runtime) async fn stream_containers(
    this: Arc<Plugin>,
    request: api::StreamContainersRequest,
) -> Result<BoxStream<'static, Result<api::StreamContainersResponse, Status>>> {
    let listing = async { this.containers(request.filter) };
    let items = this
        .timers
        .time("stream_container_list", "", listing)
        .await?;
    Ok(batches(&items, |containers| {
        api::StreamContainersResponse { containers }
    }))
}

pub(in crate::runtime) async fn reopen_container_log(
    this: Arc<Plugin>,
    request: api::ReopenContainerLogRequest,
) -> Result<api::ReopenContainerLogResponse> {
    let container = this.store.containers.get(&request.container_id)?;
    this.reopen_log(&container).await?;
    Ok(api::ReopenContainerLogResponse {})
}
