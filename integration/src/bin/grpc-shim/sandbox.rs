//! The sandbox service: what is created is ready, until it is told to stop.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::SystemTime;

use lighter_proto::containerd::runtime::sandbox::v1 as api;
use lighter_proto::containerd::runtime::sandbox::v1::sandbox_server::SandboxServer;
use lighter_proto::containerd::types;
use lighter_proto::time::to_timestamp;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

/// The service of a shim without a sandbox yet.
pub(crate) fn service() -> SandboxServer<Sandbox> {
    SandboxServer::new(Sandbox::default())
}

/// What was asked for, and what became of it.
#[derive(Debug, Default)]
pub(crate) struct Sandbox {
    made: Mutex<Option<Made>>,
    ended: watch::Sender<Option<SystemTime>>,
}

#[derive(Debug, Clone)]
struct Made {
    request: api::CreateSandboxRequest,
    at: SystemTime,
    started: bool,
}

impl Sandbox {
    fn made(&self, id: &str) -> Result<Made, Status> {
        let made = self.made.lock().expect("not poisoned").clone();
        made.filter(|made| made.request.sandbox_id == id)
            .ok_or_else(|| Status::not_found(format!("sandbox {id}")))
    }
}

#[tonic::async_trait]
impl api::sandbox_server::Sandbox for Sandbox {
    async fn create_sandbox(
        &self,
        request: Request<api::CreateSandboxRequest>,
    ) -> Result<Response<api::CreateSandboxResponse>, Status> {
        let request = request.into_inner();
        if let Some(why) = request.annotations.get("refuse") {
            return Err(Status::failed_precondition(why.clone()));
        }
        *self.made.lock().expect("not poisoned") = Some(Made {
            request,
            at: SystemTime::now(),
            started: false,
        });
        Ok(Response::new(api::CreateSandboxResponse {}))
    }

    async fn start_sandbox(
        &self,
        request: Request<api::StartSandboxRequest>,
    ) -> Result<Response<api::StartSandboxResponse>, Status> {
        let made = self.made(&request.get_ref().sandbox_id)?;
        if let Some(made) = self.made.lock().expect("not poisoned").as_mut() {
            made.started = true;
        }
        Ok(Response::new(api::StartSandboxResponse {
            pid: std::process::id(),
            created_at: Some(to_timestamp(made.at)),
            spec: None,
        }))
    }

    async fn platform(
        &self,
        request: Request<api::PlatformRequest>,
    ) -> Result<Response<api::PlatformResponse>, Status> {
        self.made(&request.get_ref().sandbox_id)?;
        Ok(Response::new(api::PlatformResponse {
            platform: Some(types::Platform {
                os: "linux".to_owned(),
                architecture: "riscv64".to_owned(),
                ..Default::default()
            }),
        }))
    }

    async fn stop_sandbox(
        &self,
        request: Request<api::StopSandboxRequest>,
    ) -> Result<Response<api::StopSandboxResponse>, Status> {
        self.made(&request.get_ref().sandbox_id)?;
        self.ended.send_replace(Some(SystemTime::now()));
        Ok(Response::new(api::StopSandboxResponse {}))
    }

    async fn wait_sandbox(
        &self,
        request: Request<api::WaitSandboxRequest>,
    ) -> Result<Response<api::WaitSandboxResponse>, Status> {
        self.made(&request.get_ref().sandbox_id)?;
        let mut ended = self.ended.subscribe();
        let at = ended.wait_for(Option::is_some).await;
        let at = at.map(|at| *at).ok().flatten();
        Ok(Response::new(api::WaitSandboxResponse {
            exit_status: 7,
            exited_at: at.map(to_timestamp),
        }))
    }

    async fn sandbox_status(
        &self,
        request: Request<api::SandboxStatusRequest>,
    ) -> Result<Response<api::SandboxStatusResponse>, Status> {
        let request = request.into_inner();
        let made = self.made(&request.sandbox_id)?;
        let ended = *self.ended.borrow();
        let ready = made.started && ended.is_none();
        let state = if ready {
            "SANDBOX_READY"
        } else {
            "SANDBOX_NOTREADY"
        };
        let info = if request.verbose {
            made.request.annotations
        } else {
            HashMap::new()
        };
        Ok(Response::new(api::SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: std::process::id(),
            state: state.to_owned(),
            info,
            created_at: Some(to_timestamp(made.at)),
            exited_at: ended.map(to_timestamp),
            extra: None,
        }))
    }

    async fn ping_sandbox(
        &self,
        request: Request<api::PingRequest>,
    ) -> Result<Response<api::PingResponse>, Status> {
        self.made(&request.get_ref().sandbox_id)?;
        Ok(Response::new(api::PingResponse {}))
    }

    async fn shutdown_sandbox(
        &self,
        request: Request<api::ShutdownSandboxRequest>,
    ) -> Result<Response<api::ShutdownSandboxResponse>, Status> {
        self.made(&request.get_ref().sandbox_id)?;
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            *ended = ended.or_else(|| Some(SystemTime::now()));
            first
        });
        Ok(Response::new(api::ShutdownSandboxResponse {}))
    }

    async fn sandbox_metrics(
        &self,
        request: Request<api::SandboxMetricsRequest>,
    ) -> Result<Response<api::SandboxMetricsResponse>, Status> {
        let id = request.into_inner().sandbox_id;
        self.made(&id)?;
        Ok(Response::new(api::SandboxMetricsResponse {
            metrics: Some(types::Metric {
                timestamp: Some(to_timestamp(SystemTime::now())),
                id,
                data: None,
            }),
        }))
    }
}
