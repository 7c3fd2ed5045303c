//! `runtime.v1.RuntimeService`: every call and the function in [`rpc`](super::rpc) that answers it.

use std::sync::Arc;

use bytes::Bytes;
use futures::stream::BoxStream;
use lighter_proto::errdefs::into_status;
use lighter_proto::runtime::v1 as api;
use lighter_proto::runtime::v1::runtime_service_server::RuntimeService;
use tonic::{Request, Response, Status};

use super::rpc::{checkpoint, containers, events, exec, metrics, pods, stats, status, update};
use crate::deadline::{deadline, owned};
use crate::plugin::Gate;

/// The service over the plugin.
#[derive(Debug, Clone)]
pub struct RuntimeEdge(pub Arc<Gate>);

impl RuntimeEdge {
    /// The bytes of what `ListPodSandbox` answers.
    ///
    /// # Errors
    /// `Unavailable` until CRI is ready.
    #[allow(clippy::result_large_err, reason = "tonic's own error")]
    pub fn list_pods(&self, request: api::ListPodSandboxRequest) -> Result<Bytes, Status> {
        Ok(self.0.plugin()?.list_pods(request.filter))
    }

    /// The bytes of what `ListContainers` answers.
    ///
    /// # Errors
    /// `Unavailable` until CRI is ready.
    #[allow(clippy::result_large_err, reason = "tonic's own error")]
    pub fn list_containers(&self, request: api::ListContainersRequest) -> Result<Bytes, Status> {
        Ok(self.0.plugin()?.list_containers(request.filter))
    }
}

/// What a streamed call answers.
type Items<T> = BoxStream<'static, Result<T, Status>>;

/// Writes the service: what only reads memory is answered at once; work of another unary call goes on
/// to its end even when its caller hangs up; a stream begins at once.
macro_rules! serve {
    (
        reads { $($read:ident($question:ident) -> $reply:ident: $reader:ident;)* }
        unary { $($unary:ident($ask:ident) -> $answer:ident: $group:ident;)* }
        streams { $($stream:ident($of:ident) -> $item:ident as $kind:ident: $from:ident;)* }
    ) => {
        #[tonic::async_trait]
        impl RuntimeService for RuntimeEdge {
            $(
                async fn $read(
                    &self,
                    request: Request<api::$question>,
                ) -> Result<Response<api::$reply>, Status> {
                    let plugin = Arc::clone(self.0.plugin()?);
                    let answer = $reader::$read(plugin, request.into_inner()).await;
                    answer.map(Response::new).map_err(into_status)
                }
            )*
            $(
                async fn $unary(
                    &self,
                    request: Request<api::$ask>,
                ) -> Result<Response<api::$answer>, Status> {
                    let plugin = Arc::clone(self.0.plugin()?);
                    let until = deadline(request.metadata());
                    let work = $group::$unary(Arc::clone(&plugin), request.into_inner());
                    owned(&plugin.tracker, until, work).await
                }
            )*
            $(
                type $kind = Items<api::$item>;

                async fn $stream(
                    &self,
                    request: Request<api::$of>,
                ) -> Result<Response<Self::$kind>, Status> {
                    let plugin = Arc::clone(self.0.plugin()?);
                    let items = $from::$stream(plugin, request.into_inner()).await;
                    items.map(Response::new).map_err(into_status)
                }
            )*
        }
    };
}

serve! {
    reads {
        version(VersionRequest) -> VersionResponse: status;
        pod_sandbox_status(PodSandboxStatusRequest) -> PodSandboxStatusResponse: pods;
        list_pod_sandbox(ListPodSandboxRequest) -> ListPodSandboxResponse: pods;
        container_status(ContainerStatusRequest) -> ContainerStatusResponse: containers;
        list_containers(ListContainersRequest) -> ListContainersResponse: containers;
    }
    unary {
        status(StatusRequest) -> StatusResponse: status;
        update_runtime_config(UpdateRuntimeConfigRequest) -> UpdateRuntimeConfigResponse: status;
        runtime_config(RuntimeConfigRequest) -> RuntimeConfigResponse: status;

        run_pod_sandbox(RunPodSandboxRequest) -> RunPodSandboxResponse: pods;
        stop_pod_sandbox(StopPodSandboxRequest) -> StopPodSandboxResponse: pods;
        remove_pod_sandbox(RemovePodSandboxRequest) -> RemovePodSandboxResponse: pods;

        create_container(CreateContainerRequest) -> CreateContainerResponse: containers;
        start_container(StartContainerRequest) -> StartContainerResponse: containers;
        stop_container(StopContainerRequest) -> StopContainerResponse: containers;
        remove_container(RemoveContainerRequest) -> RemoveContainerResponse: containers;
        reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse: containers;

        exec_sync(ExecSyncRequest) -> ExecSyncResponse: exec;
        exec(ExecRequest) -> ExecResponse: exec;
        attach(AttachRequest) -> AttachResponse: exec;
        port_forward(PortForwardRequest) -> PortForwardResponse: exec;

        update_container_resources(UpdateContainerResourcesRequest) -> UpdateContainerResourcesResponse: update;
        update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest) -> UpdatePodSandboxResourcesResponse: update;

        container_stats(ContainerStatsRequest) -> ContainerStatsResponse: stats;
        list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse: stats;
        pod_sandbox_stats(PodSandboxStatsRequest) -> PodSandboxStatsResponse: stats;
        list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> ListPodSandboxStatsResponse: stats;
        list_metric_descriptors(ListMetricDescriptorsRequest) -> ListMetricDescriptorsResponse: metrics;
        list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) -> ListPodSandboxMetricsResponse: metrics;

        checkpoint_container(CheckpointContainerRequest) -> CheckpointContainerResponse: checkpoint;
        checkpoint_pod(CheckpointPodRequest) -> CheckpointPodResponse: checkpoint;
        restore_pod(RestorePodRequest) -> RestorePodResponse: checkpoint;
    }
    streams {
        stream_pod_sandboxes(StreamPodSandboxesRequest)
            -> StreamPodSandboxesResponse as StreamPodSandboxesStream: pods;
        stream_containers(StreamContainersRequest)
            -> StreamContainersResponse as StreamContainersStream: containers;
        get_container_events(GetEventsRequest)
            -> ContainerEventResponse as GetContainerEventsStream: events;
        stream_container_stats(StreamContainerStatsRequest)
            -> StreamContainerStatsResponse as StreamContainerStatsStream: stats;
        stream_pod_sandbox_stats(StreamPodSandboxStatsRequest)
            -> StreamPodSandboxStatsResponse as StreamPodSandboxStatsStream: stats;
        stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest)
            -> StreamPodSandboxMetricsResponse as StreamPodSandboxMetricsStream: metrics;
    }
}
