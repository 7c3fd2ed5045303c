//! The contract of a controller, and the list of them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use lighter_proto::containerd::events::{SandboxCreate, SandboxExit, SandboxStart};
use lighter_proto::containerd::types::{Metric, Platform};
use lighter_proto::errdefs::{Classify, ErrorKind, WireError};
use lighter_proto::time::{from_timestamp, to_timestamp};
use lighter_snapshotter::Mount;
use lighter_store::events::Exchange;
use lighter_store::metadata::Sandbox;
use lighter_store::{Labels, Scope};
use prost_types::{Any, Timestamp};

use crate::runtime::Exit;

/// What a sandbox is made of, beyond its record.
#[derive(Debug, Clone)]
pub struct Created {
    /// Its record.
    pub sandbox: Sandbox,
    /// Mounts of its root filesystem.
    pub rootfs: Vec<Mount>,
    /// Options for the shim.
    pub options: Option<Any>,
    /// Path of its network namespace; empty for none.
    pub netns_path: String,
    /// Annotations for the shim.
    pub annotations: Labels,
}

/// A sandbox that runs.
#[derive(Debug, Clone)]
pub struct Started {
    /// Pid of what holds it.
    pub pid: u32,
    /// When it was made.
    pub created_at: SystemTime,
    /// Labels that the controller adds.
    pub labels: Labels,
    /// Where its task service is; empty when there is none for others.
    pub address: String,
    /// Version of that service.
    pub version: u32,
    /// Its spec, as changed by the shim.
    pub spec: Option<Any>,
}

/// How a sandbox is.
#[derive(Debug, Clone)]
pub struct SandboxStatus {
    /// Pid of what holds it; 0 when nothing does.
    pub pid: u32,
    /// `SANDBOX_READY` or `SANDBOX_NOTREADY`.
    pub state: String,
    /// More, for people.
    pub info: Labels,
    /// When it was made.
    pub created_at: Option<SystemTime>,
    /// When it ended.
    pub exited_at: Option<SystemTime>,
    /// More, for programs.
    pub extra: Option<Any>,
    /// Where its task service is.
    pub address: String,
    /// Version of that service.
    pub version: u32,
}

/// When something was, as told by a peer; one that does not say so says it as it happens.
pub(super) fn moment(at: Option<Timestamp>) -> SystemTime {
    at.and_then(from_timestamp).unwrap_or_else(SystemTime::now)
}

/// How a sandbox ended, as told by a peer.
pub(super) fn ended(status: u32, at: Option<Timestamp>) -> Exit {
    Exit {
        status,
        at: moment(at),
        lost: false,
    }
}

/// A way to run sandboxes.
///
/// # Errors
/// All methods: `NotFound` for an unknown sandbox where nothing else is said.
#[async_trait]
pub trait Controller: Send + Sync + fmt::Debug {
    /// Makes a sandbox; `AlreadyExists` for one that is made.
    async fn create(&self, scope: &Scope, created: Created) -> Result<(), WireError>;
    /// Starts it; a failure shuts it down.
    async fn start(&self, scope: &Scope, id: &str) -> Result<Started, WireError>;
    /// Platform its containers run on.
    async fn platform(&self, scope: &Scope, id: &str) -> Result<Platform, WireError>;
    /// Stops it; an unknown one is stopped already.
    async fn stop(&self, scope: &Scope, id: &str, limit: Duration) -> Result<(), WireError>;
    /// Waits until it ends.
    async fn wait(&self, scope: &Scope, id: &str) -> Result<Exit, WireError>;
    /// How it is; an unknown one has ended.
    async fn status(
        &self,
        scope: &Scope,
        id: &str,
        verbose: bool,
    ) -> Result<SandboxStatus, WireError>;
    /// Removes everything it has; an unknown one has nothing.
    async fn shutdown(&self, scope: &Scope, id: &str) -> Result<(), WireError>;
    /// Statistics.
    async fn metrics(&self, scope: &Scope, id: &str) -> Result<Metric, WireError>;
    /// Takes a changed record in.
    async fn update(
        &self,
        scope: &Scope,
        sandbox: Sandbox,
        fields: &[String],
    ) -> Result<(), WireError>;
}

/// All controllers by name; clones share the list.
#[derive(Debug, Clone)]
pub struct Sandboxes {
    controllers: Arc<RwLock<BTreeMap<String, Arc<dyn Controller>>>>,
    events: Exchange,
}

fn wire<E: Classify>(error: &E) -> WireError {
    WireError::of(error)
}

impl Sandboxes {
    /// No controllers; events go to `events`.
    #[must_use]
    pub fn new(events: Exchange) -> Self {
        Self {
            controllers: Arc::default(),
            events,
        }
    }

    /// Adds a controller under `name`, in place of an earlier one.
    pub fn register(&self, name: &str, controller: Arc<dyn Controller>) {
        self.controllers
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name.to_owned(), controller);
    }

    /// The controller called `name`.
    ///
    /// # Errors
    /// `InvalidArgument` without a name, `NotFound` for an unknown one.
    pub fn controller(&self, name: &str) -> Result<Arc<dyn Controller>, WireError> {
        if name.is_empty() {
            return Err(WireError::new(
                ErrorKind::InvalidArgument,
                "sandboxer must be set",
            ));
        }
        let controllers = self
            .controllers
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        controllers.get(name).cloned().ok_or_else(|| {
            WireError::new(
                ErrorKind::NotFound,
                format!("failed to get sandbox controller by {name}"),
            )
        })
    }

    /// Makes a sandbox. Event `/sandboxes/create`.
    ///
    /// # Errors
    /// The controller's own.
    pub async fn create(
        &self,
        name: &str,
        scope: &Scope,
        created: Created,
    ) -> Result<(), WireError> {
        let event = SandboxCreate {
            sandbox_id: created.sandbox.id.to_string(),
        };
        self.controller(name)?.create(scope, created).await?;
        self.tell(scope, "/sandboxes/create", &event)
    }

    /// Starts a sandbox. Event `/sandboxes/start`.
    ///
    /// # Errors
    /// The controller's own.
    pub async fn start(&self, name: &str, scope: &Scope, id: &str) -> Result<Started, WireError> {
        let started = self.controller(name)?.start(scope, id).await?;
        let event = SandboxStart {
            sandbox_id: id.to_owned(),
        };
        self.tell(scope, "/sandboxes/start", &event)?;
        Ok(started)
    }

    /// Waits until a sandbox ends. Event `/sandboxes/exit`.
    ///
    /// # Errors
    /// The controller's own.
    pub async fn wait(&self, name: &str, scope: &Scope, id: &str) -> Result<Exit, WireError> {
        let exit = self.controller(name)?.wait(scope, id).await?;
        let event = SandboxExit {
            sandbox_id: id.to_owned(),
            exit_status: exit.status,
            exited_at: Some(to_timestamp(exit.at)),
        };
        self.tell(scope, "/sandboxes/exit", &event)?;
        Ok(exit)
    }

    fn tell<M: prost::Message + prost::Name>(
        &self,
        scope: &Scope,
        topic: &str,
        event: &M,
    ) -> Result<(), WireError> {
        self.events
            .publish(&scope.namespace, topic, event)
            .map_err(|e| wire(&e))
    }
}
