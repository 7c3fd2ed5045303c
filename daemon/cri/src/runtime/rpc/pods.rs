//! Pods: run, stop, remove, status, list.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use futures::stream::BoxStream;
use lighter_proto::runtime::v1 as api;
use lighter_proto::time;
use tonic::Status;

use super::batches;
use crate::error::{Error, Result};
use crate::plugin::Plugin;
use crate::runtime::lists::read_back;

pub(in crate::runtime) async fn run_pod_sandbox(
    this: Arc<Plugin>,
    request: api::RunPodSandboxRequest,
) -> Result<api::RunPodSandboxResponse> {
    let config = request
        .config
        .ok_or_else(|| Error::invalid("sandbox config is required"))?;
    let pod_sandbox_id = this.run_pod(config, request.runtime_handler).await?;
    Ok(api::RunPodSandboxResponse { pod_sandbox_id })
}

pub(in crate::runtime) async fn stop_pod_sandbox(
    this: Arc<Plugin>,
    request: api::StopPodSandboxRequest,
) -> Result<api::StopPodSandboxResponse> {
    if let Some(pod) = this.store.pods.find(&request.pod_sandbox_id)? {
        this.stop_pod(&pod).await?;
    }
    Ok(api::StopPodSandboxResponse {})
}

pub(in crate::runtime) async fn remove_pod_sandbox(
    this: Arc<Plugin>,
    request: api::RemovePodSandboxRequest,
) -> Result<api::RemovePodSandboxResponse> {
    if let Some(pod) = this.store.pods.find(&request.pod_sandbox_id)? {
        let runtime = this.runtime_label(&pod.handler);
        let removal = this.remove_pod(&pod);
        this.timers
            .time("sandbox_remove", &runtime, removal)
            .await?;
    }
    Ok(api::RemovePodSandboxResponse {})
}

pub(in crate::runtime) async fn pod_sandbox_status(
    this: Arc<Plugin>,
    request: api::PodSandboxStatusRequest,
) -> Result<api::PodSandboxStatusResponse> {
    let pod = this.store.pods.get(&request.pod_sandbox_id)?;
    let mut info = HashMap::new();
    if request.verbose {
        info.insert("info".to_owned(), this.pod_info(&pod)?.to_string());
    }
    // Taken first: what happens while the statuses are read counts as newer.
    let timestamp = time::to_nanos(SystemTime::now());
    let containers = this.store.containers_of(&pod.id);
    Ok(api::PodSandboxStatusResponse {
        status: Some(this.pod_status_of(&pod)),
        info,
        containers_statuses: containers.iter().map(|c| this.status_of(c)).collect(),
        timestamp,
    })
}

pub(in crate::runtime) async fn list_pod_sandbox(
    this: Arc<Plugin>,
    request: api::ListPodSandboxRequest,
) -> Result<api::ListPodSandboxResponse> {
    read_back(this.list_pods(request.filter))
}

pub(in crate::runtime) async fn stream_pod_sandboxes(
    this: Arc<Plugin>,
    request: api::StreamPodSandboxesRequest,
) -> Result<BoxStream<'static, Result<api::StreamPodSandboxesResponse, Status>>> {
    let listing = async { this.pods(request.filter) };
    let items = this.timers.time("stream_sandbox_list", "", listing).await?;
    Ok(batches(&items, |pod_sandboxes| {
        api::StreamPodSandboxesResponse { pod_sandboxes }
    }))
}
