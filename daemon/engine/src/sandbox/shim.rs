//! Sandboxes run by shims that have the sandbox service.
//!
//! A sandbox's bundle lies beside those of tasks, in a directory of its own, in the same layout.
//! Which sandboxes run is what those bundles say: after a restart of the daemon each is connected
//! to again when it is first asked about.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use lighter_proto::containerd::runtime::sandbox::v1 as wire;
use lighter_proto::containerd::types::{Metric, Platform};
use lighter_proto::errdefs::{Classify, ErrorKind, WireError};
use lighter_proto::time::from_timestamp;
use lighter_store::metadata::Sandbox;
use lighter_store::{Labels, Namespace, Scope};

use super::controller::{Controller, Created, SandboxStatus, Started, ended, moment};
use crate::runtime::{Bundle, Connection, Exit, Manager};

/// Longest that a question to a sandbox may take.
const ASK_LIMIT: Duration = Duration::from_secs(10);

type Key = (Namespace, String);

/// The controller `shim`.
#[derive(Debug)]
pub struct ShimController {
    tasks: Manager,
    /// Connections in use; a missing one is made again from the bundle.
    connections: Mutex<HashMap<Key, Connection>>,
}

fn classified<E: Classify>(error: &E) -> WireError {
    WireError::of(error)
}

fn not_found(id: &str) -> WireError {
    WireError::new(ErrorKind::NotFound, format!("sandbox {id}"))
}

impl ShimController {
    /// Over the shims that the task manager starts.
    #[must_use]
    pub fn new(tasks: Manager) -> Arc<Self> {
        Arc::new(Self {
            tasks,
            connections: Mutex::default(),
        })
    }

    fn connections(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Connection>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn key(bundle: &Bundle) -> Key {
        (bundle.namespace.clone(), bundle.id.clone())
    }

    /// The connection to a sandbox's shim.
    async fn connection(&self, scope: &Scope, id: &str) -> Result<Connection, WireError> {
        let bundle = self.tasks.sandbox_bundle(&scope.namespace, id);
        let known = self.connections().get(&Self::key(&bundle)).cloned();
        if let Some(connection) = known.filter(|c| !c.is_closed()) {
            return Ok(connection);
        }
        if !bundle.path.exists() {
            return Err(not_found(id));
        }
        let connection = self
            .tasks
            .reach(&bundle)
            .await
            .map_err(|e| classified(&e))?;
        self.connections()
            .insert(Self::key(&bundle), connection.clone());
        Ok(connection)
    }

    /// Takes a sandbox down: its service, its shim, its bundle.
    async fn remove(
        &self,
        bundle: &Bundle,
        connection: Option<&Connection>,
    ) -> Result<(), WireError> {
        if let Some(connection) = connection {
            let request = wire::ShutdownSandboxRequest {
                sandbox_id: bundle.id.clone(),
            };
            let answer: Result<wire::ShutdownSandboxResponse, _> = connection
                .sandbox("ShutdownSandbox", request, Some(ASK_LIMIT))
                .await;
            if let Err(error) = answer
                && !matches!(
                    error.kind,
                    ErrorKind::NotFound | ErrorKind::Unavailable | ErrorKind::Unimplemented
                )
            {
                return Err(error);
            }
        }
        self.connections().remove(&Self::key(bundle));
        self.tasks
            .dismiss_shim(bundle, connection)
            .await
            .map_err(|e| classified(&e))
    }
}

#[async_trait]
impl Controller for ShimController {
    async fn create(&self, scope: &Scope, created: Created) -> Result<(), WireError> {
        let id = created.sandbox.id.to_string();
        let bundle = self.tasks.sandbox_bundle(&scope.namespace, &id);
        if bundle.path.exists() {
            return Err(WireError::new(
                ErrorKind::AlreadyExists,
                format!("sandbox {id} already running"),
            ));
        }
        let spec = created.sandbox.spec.as_ref().map(|spec| spec.value.clone());
        let options = created
            .options
            .or_else(|| created.sandbox.runtime.options.clone());
        let runtime = &created.sandbox.runtime.name;
        let connection = self
            .tasks
            .start_shim(&bundle, runtime, spec, options.as_ref())
            .await
            .map_err(|e| classified(&e))?;
        let request = wire::CreateSandboxRequest {
            sandbox_id: id,
            bundle_path: bundle.path.display().to_string(),
            rootfs: created.rootfs.into_iter().map(Into::into).collect(),
            options,
            netns_path: created.netns_path,
            annotations: created.annotations.into_iter().collect(),
        };
        let answer: Result<wire::CreateSandboxResponse, _> =
            connection.sandbox("CreateSandbox", request, None).await;
        if let Err(error) = answer {
            // The first failure is what counts; the undoing is logged where it happens.
            let _undone = self.remove(&bundle, Some(&connection)).await;
            return Err(WireError::new(
                error.kind,
                format!("failed to create sandbox {}: {}", bundle.id, error.message),
            ));
        }
        self.connections().insert(Self::key(&bundle), connection);
        Ok(())
    }

    async fn start(&self, scope: &Scope, id: &str) -> Result<Started, WireError> {
        let connection = self.connection(scope, id).await?;
        let request = wire::StartSandboxRequest {
            sandbox_id: id.to_owned(),
        };
        let answer: Result<wire::StartSandboxResponse, _> =
            connection.sandbox("StartSandbox", request, None).await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                let bundle = self.tasks.sandbox_bundle(&scope.namespace, id);
                let _undone = self.remove(&bundle, Some(&connection)).await;
                return Err(WireError::new(
                    error.kind,
                    format!("failed to start sandbox {id}: {}", error.message),
                ));
            }
        };
        let bootstrap = connection.bootstrap();
        Ok(Started {
            pid: answer.pid,
            created_at: moment(answer.created_at),
            labels: Labels::new(),
            address: bootstrap.endpoint(),
            version: bootstrap.version,
            spec: answer.spec,
        })
    }

    async fn platform(&self, scope: &Scope, id: &str) -> Result<Platform, WireError> {
        let connection = self.connection(scope, id).await?;
        let request = wire::PlatformRequest {
            sandbox_id: id.to_owned(),
        };
        let answer: wire::PlatformResponse = connection
            .sandbox("Platform", request, Some(ASK_LIMIT))
            .await?;
        Ok(answer.platform.unwrap_or_default())
    }

    async fn stop(&self, scope: &Scope, id: &str, limit: Duration) -> Result<(), WireError> {
        let connection = match self.connection(scope, id).await {
            Ok(connection) => connection,
            Err(error) if gone(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        let request = wire::StopSandboxRequest {
            sandbox_id: id.to_owned(),
            timeout_secs: u32::try_from(limit.as_secs()).unwrap_or(u32::MAX),
        };
        let answer: Result<wire::StopSandboxResponse, _> =
            connection.sandbox("StopSandbox", request, None).await;
        match answer {
            Err(error) if !gone(&error) => Err(error),
            _ => Ok(()),
        }
    }

    async fn wait(&self, scope: &Scope, id: &str) -> Result<Exit, WireError> {
        let connection = self.connection(scope, id).await?;
        let request = wire::WaitSandboxRequest {
            sandbox_id: id.to_owned(),
        };
        let answer: wire::WaitSandboxResponse =
            connection.sandbox("WaitSandbox", request, None).await?;
        Ok(ended(answer.exit_status, answer.exited_at))
    }

    async fn status(
        &self,
        scope: &Scope,
        id: &str,
        verbose: bool,
    ) -> Result<SandboxStatus, WireError> {
        let connection = match self.connection(scope, id).await {
            Ok(connection) => connection,
            Err(error) if gone(&error) => {
                return Ok(SandboxStatus {
                    pid: 0,
                    state: "SANDBOX_NOTREADY".to_owned(),
                    info: Labels::new(),
                    created_at: None,
                    exited_at: Some(SystemTime::now()),
                    extra: None,
                    address: String::new(),
                    version: 0,
                });
            }
            Err(error) => return Err(error),
        };
        let request = wire::SandboxStatusRequest {
            sandbox_id: id.to_owned(),
            verbose,
        };
        let answer: wire::SandboxStatusResponse = connection
            .sandbox("SandboxStatus", request, Some(ASK_LIMIT))
            .await?;
        let bootstrap = connection.bootstrap();
        Ok(SandboxStatus {
            pid: answer.pid,
            state: answer.state,
            info: answer.info.into_iter().collect(),
            created_at: answer.created_at.and_then(from_timestamp),
            exited_at: answer.exited_at.and_then(from_timestamp),
            extra: answer.extra,
            address: bootstrap.endpoint(),
            version: bootstrap.version,
        })
    }

    async fn shutdown(&self, scope: &Scope, id: &str) -> Result<(), WireError> {
        let bundle = self.tasks.sandbox_bundle(&scope.namespace, id);
        match self.connection(scope, id).await {
            Ok(connection) => self.remove(&bundle, Some(&connection)).await,
            Err(error) if error.kind == ErrorKind::NotFound => Ok(()),
            Err(error) if error.kind == ErrorKind::Unavailable => self.remove(&bundle, None).await,
            Err(error) => Err(error),
        }
    }

    async fn metrics(&self, scope: &Scope, id: &str) -> Result<Metric, WireError> {
        let connection = self.connection(scope, id).await?;
        let request = wire::SandboxMetricsRequest {
            sandbox_id: id.to_owned(),
        };
        let answer: wire::SandboxMetricsResponse = connection
            .sandbox("SandboxMetrics", request, Some(ASK_LIMIT))
            .await?;
        answer.metrics.ok_or_else(|| not_found(id))
    }

    async fn update(
        &self,
        _scope: &Scope,
        _sandbox: Sandbox,
        _fields: &[String],
    ) -> Result<(), WireError> {
        // Shims have no call for it; the record alone changes.
        Ok(())
    }
}

fn gone(error: &WireError) -> bool {
    matches!(error.kind, ErrorKind::NotFound | ErrorKind::Unavailable)
}
