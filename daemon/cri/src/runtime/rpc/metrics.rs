//! Metrics of pods, by name.

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

pub(in crate::runtime) async fn list_metric_descriptors(
    _: Arc<Plugin>,
    _: api::ListMetricDescriptorsRequest,
) -> Result<api::ListMetricDescriptorsResponse> {
    Err(missing("ListMetricDescriptors"))
}

pub(in crate::runtime) async fn list_pod_sandbox_metrics(
    _: Arc<Plugin>,
    _: api::ListPodSandboxMetricsRequest,
) -> Result<api::ListPodSandboxMetricsResponse> {
    Err(missing("ListPodSandboxMetrics"))
}

pub(in crate::runtime) async fn stream_pod_sandbox_metrics(
    _: Arc<Plugin>,
    _: api::StreamPodSandboxMetricsRequest,
) -> Result<BoxStream<'static, Result<api::StreamPodSandboxMetricsResponse, Status>>> {
    Err(missing("StreamPodSandboxMetrics"))
}
