//! All tasks: ids to handles.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lighter_proto::containerd::types::Envelope;
use lighter_proto::errdefs::{ErrorKind, WireError};
use lighter_store::events::Exchange;
use lighter_store::metadata::Db;
use lighter_store::{Identifier, Namespace, Scope};
use prost_types::Any;

use super::actor;
use super::bundle::TASKS;
use super::create::{self, CreateTask};
use super::error::Error;
use super::forward;
use super::handle::Handle;
use super::launch::Launcher;
use super::shared::{Rest, Shared, Slot};
use super::steps::Steps;
use crate::mounts::Mounts;

/// How long a question about a task waits for its recovery.
const RECOVERY_PATIENCE: Duration = Duration::from_secs(5);

/// Limits of what is asked of shims.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// Reconnecting one shim at start.
    pub shim_load: Duration,
    /// Cleaning up after one shim.
    pub shim_cleanup: Duration,
    /// A shim's shutdown.
    pub shim_shutdown: Duration,
    /// State of one task in a list.
    pub task_state: Duration,
    /// Statistics of one task.
    pub shim_stats: Duration,
}

/// What a manager is made of.
#[derive(Debug)]
pub struct Config {
    /// Directory that survives a boot.
    pub root: PathBuf,
    /// Directory that does not.
    pub state: PathBuf,
    /// How shims are started.
    pub launcher: Launcher,
    /// Limits.
    pub timeouts: Timeouts,
    /// Records of containers and sandboxes.
    pub db: Db,
    /// What carries out mounts of root filesystems that the kernel alone cannot do.
    pub mounts: Mounts,
}

/// All tasks; clones share them.
#[derive(Debug, Clone)]
pub struct Manager {
    pub(super) shared: Arc<Shared>,
}

impl Manager {
    /// No tasks yet; [`Manager::recover`] finds those of earlier runs.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            shared: Arc::new(Shared::new(config)),
        }
    }

    /// How shims are started.
    #[must_use]
    pub fn launcher(&self) -> &Launcher {
        &self.shared.launcher
    }

    /// Limits.
    #[must_use]
    pub fn timeouts(&self) -> Timeouts {
        self.shared.timeouts
    }

    /// The exchange that events of tasks go to.
    #[must_use]
    pub fn events(&self) -> &Exchange {
        &self.shared.events
    }

    /// Operations under way.
    #[must_use]
    pub fn steps(&self) -> &Steps {
        &self.shared.steps
    }

    /// Runs work that must finish in a task of ours; whoever waits may leave.
    async fn owned<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        self.shared
            .tracker
            .spawn(work)
            .await
            .map_err(|_| Error::Stopping)?
    }

    /// Makes a task: its first process exists afterwards and waits to be started. A failure
    /// leaves nothing behind and publishes nothing.
    ///
    /// # Errors
    /// `AlreadyExists`, or why the shim did not start or did not make it.
    ///
    /// # Cancellation
    /// The work goes on.
    pub async fn create(&self, scope: &Scope, task: CreateTask) -> Result<Handle, Error> {
        let id = Identifier::new(&task.id).map_err(lighter_store::Error::from)?;
        let bundle = self.shared.bundle(TASKS, &scope.namespace, id.as_str());
        self.shared.reserve(&bundle).await?;
        let shared = Arc::clone(&self.shared);
        self.owned(async move {
            let made = create::create(&shared, &bundle, task).await;
            if made.is_err() {
                shared.forget(&bundle);
            }
            made
        })
        .await
    }

    /// A task.
    ///
    /// # Errors
    /// `NotFound`; `Unavailable` while it is still being recovered after a restart.
    pub async fn get(&self, namespace: &Namespace, id: &str) -> Result<Handle, Error> {
        let missing = || Error::NotFound { id: id.to_owned() };
        let slot = self.slot(namespace, id).ok_or_else(missing)?;
        let mut settled = match slot {
            Slot::Live(handle) => return Ok(handle),
            Slot::Creating | Slot::Removing(_) => return Err(missing()),
            Slot::Recovering(settled) => settled,
        };
        let _settled = tokio::time::timeout(RECOVERY_PATIENCE, settled.changed()).await;
        match self.slot(namespace, id) {
            Some(Slot::Live(handle)) => Ok(handle),
            Some(Slot::Recovering(_)) => Err(WireError::new(
                ErrorKind::Unavailable,
                format!("task {id} is being recovered: its shim does not answer yet"),
            )
            .into()),
            Some(Slot::Creating | Slot::Removing(_)) | None => Err(missing()),
        }
    }

    /// Keeps tasks of a container from being made for as long as the answer lives: who makes one waits.
    /// `None` where there is one whose first process has ended.
    ///
    /// # Errors
    /// `AlreadyExists` for a task that lives, or is being made.
    pub async fn rest(&self, namespace: &Namespace, id: &str) -> Result<Option<Rest>, Error> {
        if let Some(Slot::Live(handle)) = self.slot(namespace, id)
            && handle.init().exit.is_some()
        {
            return Ok(None);
        }
        let bundle = self.shared.bundle(TASKS, namespace, id);
        Rest::of(&self.shared, bundle).await.map(Some)
    }

    /// Waits until nothing is left of a task that was deleted: its shim has ended, unless it serves
    /// others, and its bundle is gone. At once where there is no such task, or one that lives.
    pub async fn cleared(&self, namespace: &Namespace, id: &str) {
        if let Some(Slot::Removing(mut removed)) = self.slot(namespace, id) {
            let _freed = removed.changed().await;
        }
    }

    fn slot(&self, namespace: &Namespace, id: &str) -> Option<Slot> {
        self.shared.slots().get(namespace)?.get(id).cloned()
    }

    /// Tasks of a namespace in no order. Those still being recovered are waited for, but not
    /// longer than the limit for one state.
    pub async fn list(&self, namespace: &Namespace) -> Vec<Handle> {
        let waiting: Vec<_> = {
            let slots = self.shared.slots();
            let tasks = slots.get(namespace).into_iter().flat_map(HashMap::values);
            tasks
                .filter_map(|slot| match slot {
                    Slot::Recovering(settled) => Some(settled.clone()),
                    Slot::Creating | Slot::Live(_) | Slot::Removing(_) => None,
                })
                .collect()
        };
        let all = futures::future::join_all(waiting.into_iter().map(|mut settled| async move {
            let _settled = settled.changed().await;
        }));
        let _late = tokio::time::timeout(self.shared.timeouts.task_state, all).await;
        let slots = self.shared.slots();
        let tasks = slots.get(namespace).into_iter().flat_map(HashMap::values);
        tasks
            .filter_map(|slot| match slot {
                Slot::Live(handle) => Some(handle.clone()),
                Slot::Creating | Slot::Recovering(_) | Slot::Removing(_) => None,
            })
            .collect()
    }

    /// Tasks by namespace, for reports.
    #[must_use]
    pub fn counts(&self) -> Vec<(Namespace, usize)> {
        let slots = self.shared.slots();
        slots
            .iter()
            .map(|(n, tasks)| {
                let there = |slot: &&Slot| !matches!(slot, Slot::Removing(_));
                (n.clone(), tasks.values().filter(there).count())
            })
            .collect()
    }

    /// Takes an event of a shim: the state of its task first, then its subscribers.
    ///
    /// # Errors
    /// `InvalidArgument` for a malformed envelope.
    pub async fn forward(&self, envelope: Envelope) -> Result<(), Error> {
        let Some((id, meaning)) = forward::read(&envelope) else {
            return self.shared.publish(envelope);
        };
        let Ok(namespace) = Namespace::new(&envelope.namespace) else {
            return self.shared.publish(envelope);
        };
        // An event of a task that is being recovered waits: its state must come first.
        let handle = match self.slot(&namespace, &id) {
            Some(Slot::Recovering(_)) => self.get(&namespace, &id).await.ok(),
            Some(Slot::Live(handle)) => Some(handle),
            Some(Slot::Creating | Slot::Removing(_)) | None => None,
        };
        let Some(handle) = handle else {
            return self.shared.publish(envelope);
        };
        let (reply, answer) = tokio::sync::oneshot::channel();
        let message = actor::Message::Event {
            meaning,
            envelope,
            reply,
        };
        if let Err(unsent) = handle.inbox.send(message).await {
            return match unsent.0 {
                actor::Message::Event { envelope, .. } => self.shared.publish(envelope),
                _ => Ok(()),
            };
        }
        answer.await.unwrap_or(Ok(()))
    }

    /// Lets go of all tasks without touching them, and waits for what must finish.
    pub async fn stop(&self) {
        self.shared.tracker.close();
        self.shared.stop.cancel();
        self.shared.tracker.wait().await;
    }

    /// What the runtime `name` says of itself.
    ///
    /// # Errors
    /// When there is none or it does not say.
    pub async fn info(
        &self,
        name: &str,
        options: Option<&Any>,
    ) -> Result<lighter_proto::containerd::types::RuntimeInfo, Error> {
        let shim = self.shared.launcher.resolve(name)?;
        self.shared.launcher.info(&shim, options).await
    }
}
