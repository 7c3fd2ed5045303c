//! `containerd.services.sandbox.v1`: Store and Controller.

use std::time::{Duration, SystemTime};

use lighter_engine::sandbox::{Created, Sandboxes};
use lighter_proto::containerd::services::sandbox::v1 as api;
use lighter_proto::containerd::services::sandbox::v1::controller_server::Controller;
use lighter_proto::containerd::services::sandbox::v1::store_server::Store;
use lighter_proto::containerd::types;
use lighter_proto::errdefs::into_status;
use lighter_proto::time::to_timestamp;
use lighter_store::Identifier;
use lighter_store::metadata::{self, Db, Runtime, Sandbox};
use tonic::{Request, Response, Status};

use super::scope::scope_of;
use super::wire::{filter, labels, required, unordered};

/// Records of sandboxes.
#[derive(Debug, Clone)]
pub(crate) struct SandboxStore {
    records: metadata::Sandboxes,
}

impl SandboxStore {
    /// Over the records of `db`.
    pub(crate) fn new(db: &Db) -> Self {
        Self {
            records: db.sandboxes(),
        }
    }
}

/// A sandbox of a request; times are the store's business.
fn decode(sandbox: types::Sandbox) -> Result<Sandbox, Status> {
    let runtime = sandbox.runtime.unwrap_or_default();
    Ok(Sandbox {
        id: Identifier::new(&sandbox.sandbox_id).map_err(into_status)?,
        labels: labels(sandbox.labels),
        runtime: Runtime {
            name: runtime.name,
            options: runtime.options,
        },
        spec: sandbox.spec,
        sandboxer: sandbox.sandboxer,
        created_at: SystemTime::UNIX_EPOCH,
        updated_at: SystemTime::UNIX_EPOCH,
        extensions: labels(sandbox.extensions),
    })
}

fn encode(sandbox: Sandbox) -> types::Sandbox {
    types::Sandbox {
        sandbox_id: sandbox.id.to_string(),
        runtime: Some(types::sandbox::Runtime {
            name: sandbox.runtime.name,
            options: sandbox.runtime.options,
        }),
        spec: sandbox.spec,
        labels: unordered(sandbox.labels),
        created_at: Some(to_timestamp(sandbox.created_at)),
        updated_at: Some(to_timestamp(sandbox.updated_at)),
        extensions: sandbox.extensions.into_iter().collect(),
        sandboxer: sandbox.sandboxer,
    }
}

#[tonic::async_trait]
impl Store for SandboxStore {
    async fn create(
        &self,
        request: Request<api::StoreCreateRequest>,
    ) -> Result<Response<api::StoreCreateResponse>, Status> {
        let scope = scope_of(&request)?;
        let sandbox = decode(required(request.into_inner().sandbox, "sandbox")?)?;
        let sandbox = self
            .records
            .create(&scope, sandbox)
            .await
            .map_err(into_status)?;
        Ok(Response::new(api::StoreCreateResponse {
            sandbox: Some(encode(sandbox)),
        }))
    }

    async fn update(
        &self,
        request: Request<api::StoreUpdateRequest>,
    ) -> Result<Response<api::StoreUpdateResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let sandbox = decode(required(request.sandbox, "sandbox")?)?;
        let updated = self.records.update(&scope, sandbox, &request.fields).await;
        Ok(Response::new(api::StoreUpdateResponse {
            sandbox: Some(encode(updated.map_err(into_status)?)),
        }))
    }

    async fn delete(
        &self,
        request: Request<api::StoreDeleteRequest>,
    ) -> Result<Response<api::StoreDeleteResponse>, Status> {
        let scope = scope_of(&request)?;
        let id = request.into_inner().sandbox_id;
        self.records
            .delete(&scope, &id)
            .await
            .map_err(into_status)?;
        Ok(Response::new(api::StoreDeleteResponse {}))
    }

    async fn list(
        &self,
        request: Request<api::StoreListRequest>,
    ) -> Result<Response<api::StoreListResponse>, Status> {
        let scope = scope_of(&request)?;
        let filter = filter(&request.get_ref().filters)?;
        let list = self.records.list(&scope, &filter).map_err(into_status)?;
        Ok(Response::new(api::StoreListResponse {
            list: list.into_iter().map(encode).collect(),
        }))
    }

    async fn get(
        &self,
        request: Request<api::StoreGetRequest>,
    ) -> Result<Response<api::StoreGetResponse>, Status> {
        let scope = scope_of(&request)?;
        let sandbox = self.records.get(&scope, &request.get_ref().sandbox_id);
        Ok(Response::new(api::StoreGetResponse {
            sandbox: Some(encode(sandbox.map_err(into_status)?)),
        }))
    }
}

/// Running sandboxes.
#[derive(Debug, Clone)]
pub(crate) struct SandboxController {
    records: metadata::Sandboxes,
    sandboxes: Sandboxes,
}

impl SandboxController {
    /// Over the controllers and the records of `db`.
    pub(crate) fn new(db: &Db, sandboxes: Sandboxes) -> Self {
        Self {
            records: db.sandboxes(),
            sandboxes,
        }
    }
}

#[tonic::async_trait]
impl Controller for SandboxController {
    async fn create(
        &self,
        request: Request<api::ControllerCreateRequest>,
    ) -> Result<Response<api::ControllerCreateResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        self.sandboxes
            .controller(&request.sandboxer)
            .map_err(into_status)?;
        let sandbox = match request.sandbox {
            Some(sandbox) => decode(sandbox)?,
            None => self
                .records
                .get(&scope, &request.sandbox_id)
                .map_err(into_status)?,
        };
        let created = Created {
            sandbox,
            rootfs: request.rootfs.into_iter().map(Into::into).collect(),
            options: request.options,
            netns_path: request.netns_path,
            annotations: labels(request.annotations),
        };
        self.sandboxes
            .create(&request.sandboxer, &scope, created)
            .await
            .map_err(into_status)?;
        Ok(Response::new(api::ControllerCreateResponse {
            sandbox_id: request.sandbox_id,
        }))
    }

    async fn start(
        &self,
        request: Request<api::ControllerStartRequest>,
    ) -> Result<Response<api::ControllerStartResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let started = self
            .sandboxes
            .start(&request.sandboxer, &scope, &request.sandbox_id)
            .await
            .map_err(into_status)?;
        Ok(Response::new(api::ControllerStartResponse {
            sandbox_id: request.sandbox_id,
            pid: started.pid,
            created_at: Some(to_timestamp(started.created_at)),
            labels: unordered(started.labels),
            address: started.address,
            version: started.version,
            spec: started.spec,
        }))
    }

    async fn platform(
        &self,
        request: Request<api::ControllerPlatformRequest>,
    ) -> Result<Response<api::ControllerPlatformResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let controller = self
            .sandboxes
            .controller(&request.sandboxer)
            .map_err(into_status)?;
        let platform = controller.platform(&scope, &request.sandbox_id).await;
        Ok(Response::new(api::ControllerPlatformResponse {
            platform: Some(platform.map_err(into_status)?),
        }))
    }

    async fn stop(
        &self,
        request: Request<api::ControllerStopRequest>,
    ) -> Result<Response<api::ControllerStopResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let controller = self
            .sandboxes
            .controller(&request.sandboxer)
            .map_err(into_status)?;
        let limit = Duration::from_secs(u64::from(request.timeout_secs));
        let stopped = controller.stop(&scope, &request.sandbox_id, limit).await;
        stopped.map_err(into_status)?;
        Ok(Response::new(api::ControllerStopResponse {}))
    }

    async fn wait(
        &self,
        request: Request<api::ControllerWaitRequest>,
    ) -> Result<Response<api::ControllerWaitResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let exit = self
            .sandboxes
            .wait(&request.sandboxer, &scope, &request.sandbox_id)
            .await
            .map_err(into_status)?;
        Ok(Response::new(api::ControllerWaitResponse {
            exit_status: exit.status,
            exited_at: Some(to_timestamp(exit.at)),
        }))
    }

    async fn status(
        &self,
        request: Request<api::ControllerStatusRequest>,
    ) -> Result<Response<api::ControllerStatusResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let controller = self
            .sandboxes
            .controller(&request.sandboxer)
            .map_err(into_status)?;
        let status = controller
            .status(&scope, &request.sandbox_id, request.verbose)
            .await
            .map_err(into_status)?;
        Ok(Response::new(api::ControllerStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: status.pid,
            state: status.state,
            info: unordered(status.info),
            created_at: status.created_at.map(to_timestamp),
            exited_at: status.exited_at.map(to_timestamp),
            extra: status.extra,
            address: status.address,
            version: status.version,
        }))
    }

    async fn shutdown(
        &self,
        request: Request<api::ControllerShutdownRequest>,
    ) -> Result<Response<api::ControllerShutdownResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let controller = self
            .sandboxes
            .controller(&request.sandboxer)
            .map_err(into_status)?;
        let ended = controller.shutdown(&scope, &request.sandbox_id).await;
        ended.map_err(into_status)?;
        Ok(Response::new(api::ControllerShutdownResponse {}))
    }

    async fn metrics(
        &self,
        request: Request<api::ControllerMetricsRequest>,
    ) -> Result<Response<api::ControllerMetricsResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let controller = self
            .sandboxes
            .controller(&request.sandboxer)
            .map_err(into_status)?;
        let metrics = controller.metrics(&scope, &request.sandbox_id).await;
        Ok(Response::new(api::ControllerMetricsResponse {
            metrics: Some(metrics.map_err(into_status)?),
        }))
    }

    async fn update(
        &self,
        request: Request<api::ControllerUpdateRequest>,
    ) -> Result<Response<api::ControllerUpdateResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let controller = self
            .sandboxes
            .controller(&request.sandboxer)
            .map_err(into_status)?;
        let sandbox = decode(required(request.sandbox, "sandbox")?)?;
        let updated = controller.update(&scope, sandbox, &request.fields).await;
        updated.map_err(into_status)?;
        Ok(Response::new(api::ControllerUpdateResponse {}))
    }
}
