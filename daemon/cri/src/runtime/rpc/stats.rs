//! Statistics of containers and pods.

use std::sync::Arc;

use futures::stream::BoxStream;
use lighter_proto::runtime::v1 as api;
use tonic::Status;

use super::batches;
use crate::error::Result;
use crate::plugin::Plugin;

pub(in crate::runtime) async fn container_stats(
    this: Arc<Plugin>,
    request: api::ContainerStatsRequest,
) -> Result<api::ContainerStatsResponse> {
    let stats = Some(this.container_stats(&request.container_id).await?);
    Ok(api::ContainerStatsResponse { stats })
}

pub(in crate::runtime) async fn list_container_stats(
    this: Arc<Plugin>,
    request: api::ListContainerStatsRequest,
) -> Result<api::ListContainerStatsResponse> {
    let stats = this.list_container_stats(request.filter).await;
    Ok(api::ListContainerStatsResponse { stats })
}

pub(in crate::runtime) async fn pod_sandbox_stats(
    this: Arc<Plugin>,
    request: api::PodSandboxStatsRequest,
) -> Result<api::PodSandboxStatsResponse> {
    let stats = Some(this.pod_stats(&request.pod_sandbox_id).await?);
    Ok(api::PodSandboxStatsResponse { stats })
}

pub(in crate::runtime) async fn list_pod_sandbox_stats(
    this: Arc<Plugin>,
    request: api::ListPodSandboxStatsRequest,
) -> Result<api::ListPodSandboxStatsResponse> {
    let stats = this.list_pod_stats(request.filter).await;
    Ok(api::ListPodSandboxStatsResponse { stats })
}

pub(in crate::runtime) async fn stream_container_stats(
    this: Arc<Plugin>,
    request: api::StreamContainerStatsRequest,
) -> Result<BoxStream<'static, Result<api::StreamContainerStatsResponse, Status>>> {
    let items = this.list_container_stats(request.filter).await;
    Ok(batches(&items, |container_stats| {
        api::StreamContainerStatsResponse { container_stats }
    }))
}

pub(in crate::runtime) async fn stream_pod_sandbox_stats(
    this: Arc<Plugin>,
    request: api::StreamPodSandboxStatsRequest,
) -> Result<BoxStream<'static, Result<api::StreamPodSandboxStatsResponse, Status>>> {
    let items = this.list_pod_stats(request.filter).await;
    Ok(batches(&items, |pod_sandbox_stats| {
        api::StreamPodSandboxStatsResponse { pod_sandbox_stats }
    }))
}
