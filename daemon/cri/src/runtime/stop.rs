//! Stopping and removing pods and containers. Every step tolerates that it was done before.

use std::sync::Arc;
use std::time::Duration;

use lighter_engine::runtime::Handle;
use lighter_proto::errdefs::ErrorKind;
use lighter_proto::runtime::v1::{ContainerEventType, ContainerState, PodSandboxState};

use super::files::remove_dir;
use crate::error::{Error, Result};
use crate::netns;
use crate::plugin::Plugin;
use crate::store::{Container, Pod};

/// The signal that nothing withstands.
const SIGKILL: u32 = 9;
/// How long a killed process may take to go.
const KILL_LIMIT: Duration = Duration::from_secs(30);

impl Plugin {
    /// The task of a container; `None` when there is none.
    pub(super) async fn task(&self, id: &str) -> Result<Option<Handle>> {
        match self
            .tasks
            .get(&self.scope.namespace, id)
            .await
            .map_err(Error::from)
        {
            Ok(handle) => Ok(Some(handle)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn signal(handle: &Handle, signal: u32, all: bool) -> Result<()> {
        match handle.kill("", signal, all).await.map_err(Error::from) {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// Kills and deletes a task; one that is gone is fine.
    pub(super) async fn kill_task(&self, id: &str) -> Result<()> {
        let Some(handle) = self.task(id).await? else {
            return Ok(());
        };
        Self::signal(&handle, SIGKILL, true).await?;
        let ended = tokio::time::timeout(KILL_LIMIT, handle.wait("")).await;
        if ended.is_err() {
            let message = format!("an error occurs during waiting for {id:?} to be killed");
            return Err(Error::new(ErrorKind::DeadlineExceeded, message));
        }
        match handle.delete().await.map_err(Error::from) {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// Stops a container: its signal once, then SIGKILL after `limit`.
    pub(super) async fn stop_container(
        &self,
        container: &Arc<Container>,
        limit: Duration,
    ) -> Result<()> {
        let status = container.status();
        if status.state != ContainerState::ContainerRunning {
            return Ok(());
        }
        let Some(handle) = self.task(&container.id).await? else {
            return Ok(());
        };
        if !limit.is_zero() {
            let mut first = false;
            container.update(|s| first = !std::mem::replace(&mut s.stop_sent, true));
            if first {
                Self::signal(&handle, container.stop_signal, false).await?;
            }
            if tokio::time::timeout(limit, container.ended()).await.is_ok() {
                return Ok(());
            }
        }
        Self::signal(&handle, SIGKILL, false).await?;
        tokio::time::timeout(KILL_LIMIT, container.ended())
            .await
            .map_err(|_| {
                let message = format!(
                    "an error occurs during waiting for container {:?} to be killed",
                    container.id
                );
                Error::new(ErrorKind::DeadlineExceeded, message)
            })
    }

    /// Removes a container; a running one is killed first.
    pub(super) async fn remove_container(&self, container: &Arc<Container>) -> Result<()> {
        self.stop_container(container, Duration::ZERO).await?;
        let mut starting = false;
        container.update(|s| {
            starting = s.starting;
            s.removing = !starting;
        });
        if starting {
            return Err(Error::unknown(format!(
                "failed to set removing state for container {:?}: container is in starting state, can't be removed",
                container.id
            )));
        }
        let removed = self.erase_container(container).await;
        if removed.is_err() {
            container.update(|s| s.removing = false);
        }
        removed
    }

    async fn erase_container(&self, container: &Arc<Container>) -> Result<()> {
        let _busy = container.busy.lock().await;
        // One that never ran may have a task that waits for its start.
        self.kill_task(&container.id).await?;
        self.delete_record(&container.id).await?;
        self.delete_snapshot(&container.snapshotter, &container.id)
            .await?;
        remove_dir(&self.container_root(&container.id)).await?;
        self.store.remove_container(&container.id);
        self.store.release(&container.name);
        let kind = ContainerEventType::ContainerDeletedEvent;
        self.announce(&container.id, &container.pod_id, kind);
        Ok(())
    }

    /// Stops a pod and everything in it.
    pub(super) async fn stop_pod(&self, pod: &Arc<Pod>) -> Result<()> {
        let _busy = pod.busy.lock().await;
        self.stop_pod_locked(pod).await
    }

    async fn stop_pod_locked(&self, pod: &Arc<Pod>) -> Result<()> {
        for container in self.store.containers_of(&pod.id) {
            self.stop_container(&container, Duration::ZERO).await?;
        }
        self.kill_task(&pod.id).await?;
        pod.update(|s| {
            s.state = PodSandboxState::SandboxNotready;
            s.pid = 0;
        });
        self.unmount_pod_files(&pod.id).await?;
        if let Some(netns) = &pod.netns {
            self.detach_network(pod, netns).await?;
        }
        Ok(())
    }

    /// Removes a pod and its containers.
    pub(super) async fn remove_pod(&self, pod: &Arc<Pod>) -> Result<()> {
        let _busy = pod.busy.lock().await;
        self.stop_pod_locked(pod).await?;
        if let Some(netns) = &pod.netns
            && !netns::is_closed(netns)
        {
            let message = format!("sandbox network namespace {:?} is not fully closed", netns);
            return Err(Error::unknown(message));
        }
        for container in self.store.containers_of(&pod.id) {
            self.remove_container(&container).await?;
        }
        self.undo_pod(pod).await?;
        self.announce(&pod.id, &pod.id, ContainerEventType::ContainerDeletedEvent);
        self.store.remove_pod(&pod.id);
        self.store.release(&pod.name);
        Ok(())
    }
}
