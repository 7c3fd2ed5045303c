//! The calls of CRI, with the fields that matter as arguments.

use std::path::Path;

use lighter_proto::runtime::v1 as api;
use tonic::Status;
use tonic::transport::Channel;

use api::image_service_client::ImageServiceClient;
use api::runtime_service_client::RuntimeServiceClient;

use crate::{Client, Result, eventually};

/// Largest message, as the kubelet sets it.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// A pod that runs, and what it was asked for with.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its id.
    pub id: String,
    /// Its configuration.
    pub config: api::PodSandboxConfig,
}

/// A client of both services.
#[derive(Debug, Clone)]
pub struct Cri {
    channel: Channel,
}

impl Cri {
    /// Connects to the Unix socket `address`.
    ///
    /// # Errors
    /// When nobody accepts.
    pub async fn connect(address: &Path) -> Result<Self> {
        let client = Client::connect(address, "").await?;
        Ok(Self {
            channel: client.channel(),
        })
    }

    /// The runtime service.
    #[must_use]
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// The image service.
    #[must_use]
    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// `RunPodSandbox` with the default handler.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn run_pod(&self, config: &api::PodSandboxConfig) -> Result<Pod, Status> {
        let request = api::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        let mut answer = self.runtime().run_pod_sandbox(request.clone()).await;
        // The bridge plugin's own race with a port that is just going: nothing of the daemon's.
        if matches!(&answer, Err(status) if status.message().contains("could not set bridge's mac"))
        {
            answer = self.runtime().run_pod_sandbox(request).await;
        }
        let answer = answer?.into_inner();
        Ok(Pod {
            id: answer.pod_sandbox_id,
            config: config.clone(),
        })
    }

    /// `StopPodSandbox`.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn stop_pod(&self, id: &str) -> Result<(), Status> {
        let request = api::StopPodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        self.runtime().stop_pod_sandbox(request).await.map(drop)
    }

    /// `RemovePodSandbox`.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn remove_pod(&self, id: &str) -> Result<(), Status> {
        let request = api::RemovePodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        self.runtime().remove_pod_sandbox(request).await.map(drop)
    }

    /// Stops and removes a pod, as a kubelet does.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn end_pod(&self, id: &str) -> Result<(), Status> {
        self.stop_pod(id).await?;
        self.remove_pod(id).await
    }

    /// `PodSandboxStatus`, verbose.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn pod_status(&self, id: &str) -> Result<api::PodSandboxStatusResponse, Status> {
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: id.to_owned(),
            verbose: true,
        };
        let answer = self.runtime().pod_sandbox_status(request).await?;
        Ok(answer.into_inner())
    }

    /// State of a pod.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn pod_state(&self, id: &str) -> Result<api::PodSandboxState, Status> {
        let status = self.pod_status(id).await?.status.unwrap_or_default();
        Ok(status.state())
    }

    /// `ListPodSandbox`.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn pods(
        &self,
        filter: Option<api::PodSandboxFilter>,
    ) -> Result<Vec<api::PodSandbox>, Status> {
        let request = api::ListPodSandboxRequest { filter };
        let answer = self.runtime().list_pod_sandbox(request).await?;
        Ok(answer.into_inner().items)
    }

    /// `CreateContainer`.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn create(&self, pod: &Pod, config: &api::ContainerConfig) -> Result<String, Status> {
        let request = api::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config.clone()),
            sandbox_config: Some(pod.config.clone()),
        };
        let answer = self.runtime().create_container(request).await?;
        Ok(answer.into_inner().container_id)
    }

    /// `StartContainer`.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn start(&self, id: &str) -> Result<(), Status> {
        let request = api::StartContainerRequest {
            container_id: id.to_owned(),
        };
        self.runtime().start_container(request).await.map(drop)
    }

    /// `CreateContainer` and `StartContainer`.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn run(&self, pod: &Pod, config: &api::ContainerConfig) -> Result<String, Status> {
        let id = self.create(pod, config).await?;
        self.start(&id).await?;
        Ok(id)
    }

    /// `StopContainer` with so many seconds for the process to end by itself.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn stop(&self, id: &str, timeout: i64) -> Result<(), Status> {
        let request = api::StopContainerRequest {
            container_id: id.to_owned(),
            timeout,
        };
        self.runtime().stop_container(request).await.map(drop)
    }

    /// `RemoveContainer`.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn remove(&self, id: &str) -> Result<(), Status> {
        let request = api::RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        self.runtime().remove_container(request).await.map(drop)
    }

    /// `ContainerStatus`, verbose.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn full_status(&self, id: &str) -> Result<api::ContainerStatusResponse, Status> {
        let request = api::ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: true,
        };
        let answer = self.runtime().container_status(request).await?;
        Ok(answer.into_inner())
    }

    /// Status of a container.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn status(&self, id: &str) -> Result<api::ContainerStatus, Status> {
        Ok(self.full_status(id).await?.status.unwrap_or_default())
    }

    /// Waits until a container has ended.
    ///
    /// # Errors
    /// When it does not.
    pub async fn exited(&self, id: &str) -> Result<api::ContainerStatus> {
        eventually("the container ends", async || {
            let status = self.status(id).await?;
            Ok((status.state() == api::ContainerState::ContainerExited).then_some(status))
        })
        .await
    }

    /// `ListContainers`.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn containers(
        &self,
        filter: Option<api::ContainerFilter>,
    ) -> Result<Vec<api::Container>, Status> {
        let request = api::ListContainersRequest { filter };
        let answer = self.runtime().list_containers(request).await?;
        Ok(answer.into_inner().containers)
    }

    /// `ExecSync` without a limit.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn exec(&self, id: &str, cmd: &[&str]) -> Result<api::ExecSyncResponse, Status> {
        self.exec_within(id, cmd, 0).await
    }

    /// `ExecSync` with a limit in seconds.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn exec_within(
        &self,
        id: &str,
        cmd: &[&str],
        timeout: i64,
    ) -> Result<api::ExecSyncResponse, Status> {
        let request = api::ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: cmd.iter().map(|&word| word.to_owned()).collect(),
            timeout,
        };
        Ok(self.runtime().exec_sync(request).await?.into_inner())
    }

    /// What a script prints in a container; it must succeed.
    ///
    /// # Errors
    /// When it does not.
    pub async fn shell(&self, id: &str, script: &str) -> Result<String> {
        let done = self.exec(id, &["sh", "-c", script]).await?;
        let stderr = String::from_utf8_lossy(&done.stderr);
        anyhow::ensure!(
            done.exit_code == 0,
            "{script}: exit {}: {stderr}",
            done.exit_code
        );
        Ok(String::from_utf8(done.stdout)?)
    }

    /// `ImageStatus`; verbose.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn image_status(&self, image: &str) -> Result<api::ImageStatusResponse, Status> {
        let request = api::ImageStatusRequest {
            image: Some(spec(image)),
            verbose: true,
        };
        Ok(self.images().image_status(request).await?.into_inner())
    }

    /// `PullImage`. Returns the image's id.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn pull(&self, image: &str, auth: Option<api::AuthConfig>) -> Result<String, Status> {
        let request = api::PullImageRequest {
            image: Some(spec(image)),
            auth,
            sandbox_config: None,
        };
        Ok(self
            .images()
            .pull_image(request)
            .await?
            .into_inner()
            .image_ref)
    }

    /// `RemoveImage`.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn remove_image(&self, image: &str) -> Result<(), Status> {
        let request = api::RemoveImageRequest {
            image: Some(spec(image)),
        };
        self.images().remove_image(request).await.map(drop)
    }

    /// `ListImages`.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn list_images(&self, image: Option<&str>) -> Result<Vec<api::Image>, Status> {
        let request = api::ListImagesRequest {
            filter: image.map(|image| api::ImageFilter {
                image: Some(spec(image)),
            }),
        };
        Ok(self
            .images()
            .list_images(request)
            .await?
            .into_inner()
            .images)
    }
}

fn spec(image: &str) -> api::ImageSpec {
    api::ImageSpec {
        image: image.to_owned(),
        ..Default::default()
    }
}
