//! Statistics of containers and pods.

use std::sync::Arc;

use futures::stream::BoxStream;
use lighter_proto::errdefs::ErrorKind;
use lighter_proto::runtime::v1 as api;
use tonic::Status;

use crate::error::{Error, Result};
use crate::plugin::Plugin;

fn missing(name: &str) -> Error {
    Error::new(
        ErrorKind::Unimplemented,
        format!("{name} is not implemented"),
    )
}

pub(in crate::runtime) async fn container_stats(
    _: Arc<Plugin>,
    _: api::ContainerStatsRequest,
) -> Result<api::ContainerStatsResponse> {
    Err(missing("ContainerStats"))
}

pub(in crate::runtime) async fn list_container_stats(
    _: Arc<Plugin>,
    _: api::ListContainerStatsRequest,
) -> Result<api::ListContainerStatsResponse> {
    Err(missing("ListContainerStats"))
}

pub(in crate::runtime) async fn pod_sandbox_stats(
    _: Arc<Plugin>,
    _: api::PodSandboxStatsRequest,
) -> Result<api::PodSandboxStatsResponse> {
    Err(missing("PodSandboxStats"))
}

pub(in crate::runtime) async fn list_pod_sandbox_stats(
    _: Arc<Plugin>,
    _: api::ListPodSandboxStatsRequest,
) -> Result<api::ListPodSandboxStatsResponse> {
    Err(missing("ListPodSandboxStats"))
}

pub(in crate::runtime) async fn stream_container_stats(
    _: Arc<Plugin>,
    _: api::StreamContainerStatsRequest,
) -> Result<BoxStream<'static, Result<api::StreamContainerStatsResponse, Status>>> {
    Err(missing("StreamContainerStats"))
}

pub(in crate::runtime) async fn stream_pod_sandbox_stats(
    _: Arc<Plugin>,
    _: api::StreamPodSandboxStatsRequest,
) -> Result<BoxStream<'static, Result<api::StreamPodSandboxStatsResponse, Status>>> {
    Err(missing("StreamPodSandboxStats"))
}
