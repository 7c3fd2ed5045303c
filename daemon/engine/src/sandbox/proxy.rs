//! Sandboxes run by a controller in another process, over the sandbox Controller gRPC service.

use std::time::Duration;

use async_trait::async_trait;
use lighter_proto::containerd::services::sandbox::v1 as wire;
use lighter_proto::containerd::types::{self, Metric, Platform};
use lighter_proto::errdefs::{Classify, ErrorKind, WireError, render};
use lighter_proto::time::{from_timestamp, to_timestamp};
use lighter_snapshotter::connect::{MESSAGE_MAX_BYTES, connect};
use lighter_store::Scope;
use lighter_store::metadata::Sandbox;
use tonic::transport::Channel;
use wire::controller_client::ControllerClient;

use super::controller::{Controller, Created, SandboxStatus, Started, ended, moment};
use crate::differ::scoped;
use crate::runtime::Exit;

/// A remote controller.
#[derive(Debug, Clone)]
pub struct ProxyController {
    name: String,
    client: ControllerClient<Channel>,
}

impl ProxyController {
    /// A client of the controller `name` on the Unix socket `address`, connected to on first use and
    /// again after a loss.
    ///
    /// # Errors
    /// When the address is none. Must be called inside a tokio runtime.
    pub fn connect(address: &str, name: &str) -> Result<Self, WireError> {
        let channel = connect(address).map_err(|e| WireError::new(e.kind(), render(&e)))?;
        Ok(Self {
            name: name.to_owned(),
            client: ControllerClient::new(channel)
                .max_decoding_message_size(MESSAGE_MAX_BYTES)
                .max_encoding_message_size(MESSAGE_MAX_BYTES),
        })
    }

    fn client(&self) -> ControllerClient<Channel> {
        self.client.clone()
    }
}

fn encode(sandbox: Sandbox) -> types::Sandbox {
    types::Sandbox {
        sandbox_id: sandbox.id.to_string(),
        runtime: Some(types::sandbox::Runtime {
            name: sandbox.runtime.name,
            options: sandbox.runtime.options,
        }),
        spec: sandbox.spec,
        labels: sandbox.labels.into_iter().collect(),
        created_at: Some(to_timestamp(sandbox.created_at)),
        updated_at: Some(to_timestamp(sandbox.updated_at)),
        extensions: sandbox.extensions.into_iter().collect(),
        sandboxer: sandbox.sandboxer,
    }
}

fn missing(what: &str) -> WireError {
    WireError::new(
        ErrorKind::DataLoss,
        format!("answer of the remote sandbox controller has no {what}"),
    )
}

#[async_trait]
impl Controller for ProxyController {
    async fn create(&self, scope: &Scope, created: Created) -> Result<(), WireError> {
        let request = wire::ControllerCreateRequest {
            sandbox_id: created.sandbox.id.to_string(),
            rootfs: created.rootfs.into_iter().map(Into::into).collect(),
            options: created.options,
            netns_path: created.netns_path,
            annotations: created.annotations.into_iter().collect(),
            sandbox: Some(encode(created.sandbox)),
            sandboxer: self.name.clone(),
        };
        self.client().create(scoped(scope, request)?).await?;
        Ok(())
    }

    async fn start(&self, scope: &Scope, id: &str) -> Result<Started, WireError> {
        let request = wire::ControllerStartRequest {
            sandbox_id: id.to_owned(),
            sandboxer: self.name.clone(),
        };
        let answer = self.client().start(scoped(scope, request)?).await?;
        let answer = answer.into_inner();
        Ok(Started {
            pid: answer.pid,
            created_at: moment(answer.created_at),
            labels: answer.labels.into_iter().collect(),
            address: answer.address,
            version: answer.version,
            spec: answer.spec,
        })
    }

    async fn platform(&self, scope: &Scope, id: &str) -> Result<Platform, WireError> {
        let request = wire::ControllerPlatformRequest {
            sandbox_id: id.to_owned(),
            sandboxer: self.name.clone(),
        };
        let answer = self.client().platform(scoped(scope, request)?).await?;
        answer
            .into_inner()
            .platform
            .ok_or_else(|| missing("platform"))
    }

    async fn stop(&self, scope: &Scope, id: &str, limit: Duration) -> Result<(), WireError> {
        let request = wire::ControllerStopRequest {
            sandbox_id: id.to_owned(),
            timeout_secs: u32::try_from(limit.as_secs()).unwrap_or(u32::MAX),
            sandboxer: self.name.clone(),
        };
        self.client().stop(scoped(scope, request)?).await?;
        Ok(())
    }

    async fn wait(&self, scope: &Scope, id: &str) -> Result<Exit, WireError> {
        let request = wire::ControllerWaitRequest {
            sandbox_id: id.to_owned(),
            sandboxer: self.name.clone(),
        };
        let answer = self.client().wait(scoped(scope, request)?).await?;
        let answer = answer.into_inner();
        Ok(ended(answer.exit_status, answer.exited_at))
    }

    async fn status(
        &self,
        scope: &Scope,
        id: &str,
        verbose: bool,
    ) -> Result<SandboxStatus, WireError> {
        let request = wire::ControllerStatusRequest {
            sandbox_id: id.to_owned(),
            verbose,
            sandboxer: self.name.clone(),
        };
        let answer = self.client().status(scoped(scope, request)?).await?;
        let answer = answer.into_inner();
        Ok(SandboxStatus {
            pid: answer.pid,
            state: answer.state,
            info: answer.info.into_iter().collect(),
            created_at: answer.created_at.and_then(from_timestamp),
            exited_at: answer.exited_at.and_then(from_timestamp),
            extra: answer.extra,
            address: answer.address,
            version: answer.version,
        })
    }

    async fn shutdown(&self, scope: &Scope, id: &str) -> Result<(), WireError> {
        let request = wire::ControllerShutdownRequest {
            sandbox_id: id.to_owned(),
            sandboxer: self.name.clone(),
        };
        self.client().shutdown(scoped(scope, request)?).await?;
        Ok(())
    }

    async fn metrics(&self, scope: &Scope, id: &str) -> Result<Metric, WireError> {
        let request = wire::ControllerMetricsRequest {
            sandbox_id: id.to_owned(),
            sandboxer: self.name.clone(),
        };
        let answer = self.client().metrics(scoped(scope, request)?).await?;
        answer
            .into_inner()
            .metrics
            .ok_or_else(|| missing("metrics"))
    }

    async fn update(
        &self,
        scope: &Scope,
        sandbox: Sandbox,
        fields: &[String],
    ) -> Result<(), WireError> {
        let request = wire::ControllerUpdateRequest {
            sandbox_id: sandbox.id.to_string(),
            sandboxer: self.name.clone(),
            sandbox: Some(encode(sandbox)),
            fields: fields.to_vec(),
        };
        self.client().update(scoped(scope, request)?).await?;
        Ok(())
    }
}
