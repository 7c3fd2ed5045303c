//! `runtime.v1.RuntimeService`: decode, call, encode.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, BoxStream, StreamExt as _};
use lighter_proto::errdefs::{into_status, render};
use lighter_proto::runtime::v1 as api;
use lighter_proto::runtime::v1::runtime_service_server::RuntimeService;
use tonic::{Request, Response, Status};

use crate::error::Error;
use crate::plugin::Plugin;

/// Items in one message of a streamed list.
const BATCH: usize = 5000;

/// The service over the plugin.
#[derive(Debug, Clone)]
pub struct RuntimeEdge(pub Arc<Plugin>);

/// Does work to its end, even when the caller hangs up.
async fn owned<T: Send + 'static>(
    plugin: &Plugin,
    work: impl Future<Output = crate::error::Result<T>> + Send + 'static,
) -> Result<Response<T>, Status> {
    let done = plugin.tracker.spawn(work).await;
    let done = done.map_err(|e| Status::internal(e.to_string()))?;
    done.map(Response::new).map_err(into_status)
}

#[tonic::async_trait]
impl RuntimeService for RuntimeEdge {
    async fn version(
        &self,
        request: Request<api::VersionRequest>,
    ) -> Result<Response<api::VersionResponse>, Status> {
        let _any = request;
        Ok(Response::new(api::VersionResponse {
            version: "0.1.0".to_owned(),
            runtime_name: "containerd".to_owned(),
            runtime_version: self.0.version.clone(),
            runtime_api_version: "v1".to_owned(),
        }))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<api::RunPodSandboxRequest>,
    ) -> Result<Response<api::RunPodSandboxResponse>, Status> {
        let this = Arc::clone(&self.0);
        let request = request.into_inner();
        owned(&self.0, async move {
            let config = request
                .config
                .ok_or_else(|| Error::invalid("sandbox config is required"))?;
            let pod_sandbox_id = this.run_pod(config, request.runtime_handler).await?;
            Ok(api::RunPodSandboxResponse { pod_sandbox_id })
        })
        .await
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<api::StopPodSandboxRequest>,
    ) -> Result<Response<api::StopPodSandboxResponse>, Status> {
        let this = Arc::clone(&self.0);
        let request = request.into_inner();
        owned(&self.0, async move {
            if let Some(pod) = this.store.find_pod(&request.pod_sandbox_id)? {
                this.stop_pod(&pod).await?;
            }
            Ok(api::StopPodSandboxResponse {})
        })
        .await
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<api::RemovePodSandboxRequest>,
    ) -> Result<Response<api::RemovePodSandboxResponse>, Status> {
        let this = Arc::clone(&self.0);
        let request = request.into_inner();
        owned(&self.0, async move {
            if let Some(pod) = this.store.find_pod(&request.pod_sandbox_id)? {
                this.remove_pod(&pod).await?;
            }
            Ok(api::RemovePodSandboxResponse {})
        })
        .await
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<api::PodSandboxStatusRequest>,
    ) -> Result<Response<api::PodSandboxStatusResponse>, Status> {
        let request = request.into_inner();
        let pod = self
            .0
            .store
            .pod(&request.pod_sandbox_id)
            .map_err(into_status)?;
        let mut info = HashMap::new();
        if request.verbose {
            let state = pod.state();
            let detail = serde_json::json!({
                "pid": state.pid,
                "netNamespaceClosed": pod.netns.as_ref().is_none_or(|n| crate::netns::is_closed(n)),
                "snapshotKey": pod.id,
                "snapshotter": self.0.snapshotter_of(&pod.handler),
                "runtimeHandler": pod.handler,
                "cniResult": state.cni_result,
                "sandboxMetadata": self.0.pod_metadata(&pod).map_err(into_status)?,
            });
            info.insert("info".to_owned(), detail.to_string());
        }
        Ok(Response::new(api::PodSandboxStatusResponse {
            status: Some(self.0.pod_status_of(&pod)),
            info,
            ..Default::default()
        }))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<api::ListPodSandboxRequest>,
    ) -> Result<Response<api::ListPodSandboxResponse>, Status> {
        let items = self.0.pods(request.into_inner().filter);
        Ok(Response::new(api::ListPodSandboxResponse { items }))
    }

    async fn create_container(
        &self,
        request: Request<api::CreateContainerRequest>,
    ) -> Result<Response<api::CreateContainerResponse>, Status> {
        let this = Arc::clone(&self.0);
        let request = request.into_inner();
        owned(&self.0, async move {
            let config = request
                .config
                .ok_or_else(|| Error::invalid("container config is required"))?;
            let container_id = this
                .create_container(&request.pod_sandbox_id, config)
                .await?;
            Ok(api::CreateContainerResponse { container_id })
        })
        .await
    }

    async fn start_container(
        &self,
        request: Request<api::StartContainerRequest>,
    ) -> Result<Response<api::StartContainerResponse>, Status> {
        let this = Arc::clone(&self.0);
        let request = request.into_inner();
        owned(&self.0, async move {
            let container = this.store.container(&request.container_id)?;
            this.start_container(&container).await?;
            Ok(api::StartContainerResponse {})
        })
        .await
    }

    async fn stop_container(
        &self,
        request: Request<api::StopContainerRequest>,
    ) -> Result<Response<api::StopContainerResponse>, Status> {
        let this = Arc::clone(&self.0);
        let request = request.into_inner();
        owned(&self.0, async move {
            let limit = Duration::from_secs(u64::try_from(request.timeout).unwrap_or(0));
            if let Some(container) = this.store.find_container(&request.container_id)? {
                this.stop_container(&container, limit).await?;
            }
            Ok(api::StopContainerResponse {})
        })
        .await
    }

    async fn remove_container(
        &self,
        request: Request<api::RemoveContainerRequest>,
    ) -> Result<Response<api::RemoveContainerResponse>, Status> {
        let this = Arc::clone(&self.0);
        let request = request.into_inner();
        owned(&self.0, async move {
            if let Some(container) = this.store.find_container(&request.container_id)? {
                this.remove_container(&container).await?;
            }
            Ok(api::RemoveContainerResponse {})
        })
        .await
    }

    async fn list_containers(
        &self,
        request: Request<api::ListContainersRequest>,
    ) -> Result<Response<api::ListContainersResponse>, Status> {
        let containers = self.0.containers(request.into_inner().filter);
        Ok(Response::new(api::ListContainersResponse { containers }))
    }

    async fn container_status(
        &self,
        request: Request<api::ContainerStatusRequest>,
    ) -> Result<Response<api::ContainerStatusResponse>, Status> {
        let request = request.into_inner();
        let container = self
            .0
            .store
            .container(&request.container_id)
            .map_err(into_status)?;
        let mut info = HashMap::new();
        if request.verbose {
            let status = container.status();
            let detail = serde_json::json!({
                "sandboxID": container.pod_id,
                "pid": status.pid,
                "removing": status.removing,
                "snapshotKey": container.id,
                "snapshotter": container.snapshotter,
                "config": self.0.json.write(&container.config).map_err(into_status)?,
            });
            info.insert("info".to_owned(), detail.to_string());
        }
        let status = Some(self.0.status_of(&container));
        Ok(Response::new(api::ContainerStatusResponse { status, info }))
    }

    async fn reopen_container_log(
        &self,
        request: Request<api::ReopenContainerLogRequest>,
    ) -> Result<Response<api::ReopenContainerLogResponse>, Status> {
        let id = request.into_inner().container_id;
        let container = self.0.store.container(&id).map_err(into_status)?;
        self.0.reopen_log(&container).await.map_err(into_status)?;
        Ok(Response::new(api::ReopenContainerLogResponse {}))
    }

    async fn exec_sync(
        &self,
        request: Request<api::ExecSyncRequest>,
    ) -> Result<Response<api::ExecSyncResponse>, Status> {
        let this = Arc::clone(&self.0);
        let request = request.into_inner();
        owned(&self.0, async move {
            let container = this.store.container(&request.container_id)?;
            let limit = Duration::from_secs(u64::try_from(request.timeout).unwrap_or(0));
            this.exec_sync(&container, &request.cmd, limit).await
        })
        .await
    }

    async fn exec(
        &self,
        request: Request<api::ExecRequest>,
    ) -> Result<Response<api::ExecResponse>, Status> {
        let request = request.into_inner();
        let container = self
            .0
            .store
            .container(&request.container_id)
            .map_err(into_status)?;
        self.0.running(&container).await.map_err(into_status)?;
        let server = self.0.streaming().map_err(into_status)?;
        let url = server
            .exec_url(&request)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        Ok(Response::new(api::ExecResponse { url }))
    }

    async fn attach(
        &self,
        request: Request<api::AttachRequest>,
    ) -> Result<Response<api::AttachResponse>, Status> {
        let request = request.into_inner();
        let container = self
            .0
            .store
            .container(&request.container_id)
            .map_err(into_status)?;
        self.0.running(&container).await.map_err(into_status)?;
        let server = self.0.streaming().map_err(into_status)?;
        let url = server
            .attach_url(&request)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        Ok(Response::new(api::AttachResponse { url }))
    }

    async fn port_forward(
        &self,
        request: Request<api::PortForwardRequest>,
    ) -> Result<Response<api::PortForwardResponse>, Status> {
        let request = request.into_inner();
        let pod = self
            .0
            .store
            .pod(&request.pod_sandbox_id)
            .map_err(into_status)?;
        if !pod.is_ready() {
            let error = Error::unknown(format!("sandbox container {:?} is not running", pod.id));
            return Err(into_status(error));
        }
        let server = self.0.streaming().map_err(into_status)?;
        let url = server
            .port_forward_url(&request)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        Ok(Response::new(api::PortForwardResponse { url }))
    }

    async fn update_runtime_config(
        &self,
        request: Request<api::UpdateRuntimeConfigRequest>,
    ) -> Result<Response<api::UpdateRuntimeConfigResponse>, Status> {
        let network = request
            .into_inner()
            .runtime_config
            .and_then(|c| c.network_config);
        if let Some(cidr) = network.map(|n| n.pod_cidr).filter(|c| !c.is_empty()) {
            let written = self.0.cni.write_from_template(&cidr).await;
            written.map_err(|e| into_status(Error::from(e)))?;
        }
        Ok(Response::new(api::UpdateRuntimeConfigResponse {}))
    }

    async fn status(
        &self,
        request: Request<api::StatusRequest>,
    ) -> Result<Response<api::StatusResponse>, Status> {
        let _verbose = request;
        let network = self.0.cni.status().await;
        let condition = |name: &str, problem: Option<(&str, String)>| {
            let (reason, message) = problem.unwrap_or_default();
            api::RuntimeCondition {
                r#type: name.to_owned(),
                status: reason.is_empty(),
                reason: reason.to_owned(),
                message,
            }
        };
        let network = network.err().map(|e| {
            let message = format!("Network plugin returns error: {}", render(&e));
            ("NetworkPluginNotReady", message)
        });
        let conditions = vec![
            condition("RuntimeReady", None),
            condition("NetworkReady", network),
            condition("ContainerdHasNoDeprecationWarnings", None),
        ];
        let names = self.0.config.runtime.containerd.runtimes.keys().cloned();
        let handler = |name: String| api::RuntimeHandler {
            name,
            features: Some(api::RuntimeHandlerFeatures {
                recursive_read_only_mounts: true,
                user_namespaces: false,
            }),
        };
        Ok(Response::new(api::StatusResponse {
            status: Some(api::RuntimeStatus { conditions }),
            runtime_handlers: std::iter::once(String::new())
                .chain(names)
                .map(handler)
                .collect(),
            features: Some(api::RuntimeFeatures {
                supplemental_groups_policy: true,
                ..Default::default()
            }),
            ..Default::default()
        }))
    }

    async fn runtime_config(
        &self,
        request: Request<api::RuntimeConfigRequest>,
    ) -> Result<Response<api::RuntimeConfigResponse>, Status> {
        let _empty = request;
        let handler = self.0.handler("").map_err(into_status)?;
        let systemd = handler
            .options
            .get("SystemdCgroup")
            .and_then(toml::Value::as_bool);
        let driver = if systemd == Some(true) {
            api::CgroupDriver::Systemd
        } else {
            api::CgroupDriver::Cgroupfs
        };
        let linux = api::LinuxRuntimeConfiguration {
            cgroup_driver: driver.into(),
        };
        Ok(Response::new(api::RuntimeConfigResponse {
            linux: Some(linux),
        }))
    }

    type StreamPodSandboxesStream =
        BoxStream<'static, Result<api::StreamPodSandboxesResponse, Status>>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<api::StreamPodSandboxesRequest>,
    ) -> Result<Response<Self::StreamPodSandboxesStream>, Status> {
        let items = self.0.pods(request.into_inner().filter);
        let batches: Vec<_> = items
            .chunks(BATCH)
            .map(|batch| {
                Ok(api::StreamPodSandboxesResponse {
                    pod_sandboxes: batch.to_vec(),
                })
            })
            .collect();
        Ok(Response::new(stream::iter(batches).boxed()))
    }

    type StreamContainersStream = BoxStream<'static, Result<api::StreamContainersResponse, Status>>;

    async fn stream_containers(
        &self,
        request: Request<api::StreamContainersRequest>,
    ) -> Result<Response<Self::StreamContainersStream>, Status> {
        let items = self.0.containers(request.into_inner().filter);
        let batches: Vec<_> = items
            .chunks(BATCH)
            .map(|batch| {
                Ok(api::StreamContainersResponse {
                    containers: batch.to_vec(),
                })
            })
            .collect();
        Ok(Response::new(stream::iter(batches).boxed()))
    }

    type GetContainerEventsStream = BoxStream<'static, Result<api::ContainerEventResponse, Status>>;

    async fn get_container_events(
        &self,
        _: Request<api::GetEventsRequest>,
    ) -> Result<Response<Self::GetContainerEventsStream>, Status> {
        let events = tokio_stream::wrappers::BroadcastStream::new(self.0.events.subscribe());
        let events = events.map(|e| e.map_err(|lost| Status::data_loss(lost.to_string())));
        Ok(Response::new(events.boxed()))
    }

    async fn update_container_resources(
        &self,
        _: Request<api::UpdateContainerResourcesRequest>,
    ) -> Result<Response<api::UpdateContainerResourcesResponse>, Status> {
        Err(Status::unimplemented(
            "UpdateContainerResources is not implemented",
        ))
    }

    async fn container_stats(
        &self,
        _: Request<api::ContainerStatsRequest>,
    ) -> Result<Response<api::ContainerStatsResponse>, Status> {
        Err(Status::unimplemented("ContainerStats is not implemented"))
    }

    async fn list_container_stats(
        &self,
        _: Request<api::ListContainerStatsRequest>,
    ) -> Result<Response<api::ListContainerStatsResponse>, Status> {
        Err(Status::unimplemented(
            "ListContainerStats is not implemented",
        ))
    }

    async fn pod_sandbox_stats(
        &self,
        _: Request<api::PodSandboxStatsRequest>,
    ) -> Result<Response<api::PodSandboxStatsResponse>, Status> {
        Err(Status::unimplemented("PodSandboxStats is not implemented"))
    }

    async fn list_pod_sandbox_stats(
        &self,
        _: Request<api::ListPodSandboxStatsRequest>,
    ) -> Result<Response<api::ListPodSandboxStatsResponse>, Status> {
        Err(Status::unimplemented(
            "ListPodSandboxStats is not implemented",
        ))
    }

    async fn checkpoint_container(
        &self,
        _: Request<api::CheckpointContainerRequest>,
    ) -> Result<Response<api::CheckpointContainerResponse>, Status> {
        Err(Status::unimplemented(
            "CheckpointContainer is not implemented",
        ))
    }

    async fn checkpoint_pod(
        &self,
        _: Request<api::CheckpointPodRequest>,
    ) -> Result<Response<api::CheckpointPodResponse>, Status> {
        Err(Status::unimplemented("CheckpointPod is not implemented"))
    }

    async fn restore_pod(
        &self,
        _: Request<api::RestorePodRequest>,
    ) -> Result<Response<api::RestorePodResponse>, Status> {
        Err(Status::unimplemented("RestorePod is not implemented"))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<api::ListMetricDescriptorsRequest>,
    ) -> Result<Response<api::ListMetricDescriptorsResponse>, Status> {
        Err(Status::unimplemented(
            "ListMetricDescriptors is not implemented",
        ))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<api::ListPodSandboxMetricsRequest>,
    ) -> Result<Response<api::ListPodSandboxMetricsResponse>, Status> {
        Err(Status::unimplemented(
            "ListPodSandboxMetrics is not implemented",
        ))
    }

    async fn update_pod_sandbox_resources(
        &self,
        _: Request<api::UpdatePodSandboxResourcesRequest>,
    ) -> Result<Response<api::UpdatePodSandboxResourcesResponse>, Status> {
        Err(Status::unimplemented(
            "UpdatePodSandboxResources is not implemented",
        ))
    }

    type StreamContainerStatsStream =
        BoxStream<'static, Result<api::StreamContainerStatsResponse, Status>>;

    async fn stream_container_stats(
        &self,
        _: Request<api::StreamContainerStatsRequest>,
    ) -> Result<Response<Self::StreamContainerStatsStream>, Status> {
        Err(Status::unimplemented(
            "StreamContainerStats is not implemented",
        ))
    }

    type StreamPodSandboxStatsStream =
        BoxStream<'static, Result<api::StreamPodSandboxStatsResponse, Status>>;

    async fn stream_pod_sandbox_stats(
        &self,
        _: Request<api::StreamPodSandboxStatsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxStatsStream>, Status> {
        Err(Status::unimplemented(
            "StreamPodSandboxStats is not implemented",
        ))
    }

    type StreamPodSandboxMetricsStream =
        BoxStream<'static, Result<api::StreamPodSandboxMetricsResponse, Status>>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<api::StreamPodSandboxMetricsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxMetricsStream>, Status> {
        Err(Status::unimplemented(
            "StreamPodSandboxMetrics is not implemented",
        ))
    }
}
