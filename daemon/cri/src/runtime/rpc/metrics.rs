//! Metrics of pods, by name.

use std::sync::Arc;

use futures::stream::BoxStream;
use lighter_proto::runtime::v1 as api;
use tonic::Status;

use super::batches;
use crate::error::Result;
use crate::plugin::Plugin;
use crate::runtime::metrics::descriptors;

pub(in crate::runtime) async fn list_metric_descriptors(
    _: Arc<Plugin>,
    _: api::ListMetricDescriptorsRequest,
) -> Result<api::ListMetricDescriptorsResponse> {
    let descriptors = descriptors();
    Ok(api::ListMetricDescriptorsResponse { descriptors })
}

pub(in crate::runtime) async fn list_pod_sandbox_metrics(
    this: Arc<Plugin>,
    _: api::ListPodSandboxMetricsRequest,
) -> Result<api::ListPodSandboxMetricsResponse> {
    let pod_metrics = this.list_metrics().await;
    Ok(api::ListPodSandboxMetricsResponse { pod_metrics })
}

pub(in crate::runtime) async fn stream_pod_sandbox_metrics(
    this: Arc<Plugin>,
    _: api::StreamPodSandboxMetricsRequest,
) -> Result<BoxStream<'static, Result<api::StreamPodSandboxMetricsResponse, Status>>> {
    let items = this.list_metrics().await;
    Ok(batches(&items, |pod_sandbox_metrics| {
        api::StreamPodSandboxMetricsResponse {
            pod_sandbox_metrics,
        }
    }))
}
