//! Stopping and removing pods and containers. Every step tolerates that it was done before, and a
//! call that is made again goes on where the one before it stopped.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use lighter_engine::runtime::{Error as TaskError, Handle, Status};
use lighter_proto::errdefs::{Classify as _, ErrorKind};
use lighter_proto::runtime::v1::{ContainerEventType, ContainerState, PodSandboxState};

use super::files::remove_dirs;
use crate::deadline::time_left;
use crate::error::{Error, Result};
use crate::netns;
use crate::plugin::Plugin;
use crate::store::{Container, Pod};
use crate::turn::Taken;

/// The signal that nothing withstands.
const SIGKILL: u32 = 9;
/// How long a killed process may take to go.
const KILL_LIMIT: Duration = Duration::from_secs(30);
/// How long whoever watches a process may take to note its end once its task is gone.
const NOTE_LIMIT: Duration = Duration::from_secs(2);
/// What is kept of a caller's time to answer it.
const ANSWER_SHARE: Duration = Duration::from_millis(200);
/// Tries at a signal whose shim's connection was just lost.
const SIGNAL_TRIES: u32 = 3;

/// How long a kill is waited for: no longer than the caller waits.
fn kill_limit() -> Duration {
    let left = time_left().unwrap_or(KILL_LIMIT);
    KILL_LIMIT.min(left.saturating_sub(ANSWER_SHARE))
}

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
        let mut tries = 0;
        loop {
            tries += 1;
            let sent = handle.kill("", signal, all).await;
            match sent.map_err(Error::from) {
                Ok(()) => return Ok(()),
                Err(error) if error.is_not_found() => return Ok(()),
                Err(error) if error.kind() != ErrorKind::Unavailable || tries == SIGNAL_TRIES => {
                    let process = handle.init();
                    if process.exit.is_some() {
                        return Ok(());
                    }
                    return Err(error.context(format!("send signal {signal} to {}", handle.id())));
                }
                // The actor finds out whether the shim lives.
                Err(_) => tokio::time::sleep(ANSWER_SHARE).await,
            }
        }
    }

    /// Kills a task's processes and waits for their end; the task, when there is one.
    async fn end_task(&self, id: &str) -> Result<Option<Handle>> {
        let Some(handle) = self.task(id).await? else {
            return Ok(None);
        };
        if handle.init().exit.is_none() {
            Self::signal(&handle, SIGKILL, true).await?;
        }
        let ended = tokio::time::timeout(kill_limit(), handle.wait("")).await;
        if ended.is_err() {
            let message = format!("an error occurs during waiting for {id:?} to be killed");
            return Err(Error::new(ErrorKind::DeadlineExceeded, message));
        }
        Ok(Some(handle))
    }

    /// Kills and deletes a task; one that is gone is fine.
    pub(super) async fn kill_task(&self, id: &str) -> Result<()> {
        let Some(handle) = self.end_task(id).await? else {
            return Ok(());
        };
        let deleted = tokio::time::timeout(kill_limit(), handle.delete()).await;
        match deleted.map(|done: Result<_, TaskError>| done.map_err(Error::from)) {
            Ok(Err(error)) if !error.is_not_found() => {
                Err(error.context(format!("delete task {id:?}")))
            }
            Ok(_) => Ok(()),
            Err(_) => {
                let message = format!("deleting the task of {id:?} takes too long");
                Err(Error::new(ErrorKind::DeadlineExceeded, message))
            }
        }
    }

    /// Stops a container: its signal once, then SIGKILL after `limit`.
    pub(super) async fn stop_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
        limit: Duration,
    ) -> Result<()> {
        self.end_container(container, limit).await?;
        if container.status().state == ContainerState::ContainerExited {
            self.plugins_stopped(container).await;
        }
        Ok(())
    }

    async fn end_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
        limit: Duration,
    ) -> Result<()> {
        if container.status().starting {
            // Whichever way the start ends.
            drop(
                container
                    .busy
                    .take("StopContainer", &container.name)
                    .await?,
            );
        }
        let runs = |state| {
            matches!(
                state,
                ContainerState::ContainerRunning | ContainerState::ContainerUnknown
            )
        };
        if !runs(container.status().state) {
            return Ok(());
        }
        let Some(handle) = self.task(&container.id).await? else {
            return self.note_lost(container).await;
        };
        if container.status().state == ContainerState::ContainerUnknown {
            self.find_out(container, &handle).await?;
            if !runs(container.status().state) {
                return Ok(());
            }
        }
        if !limit.is_zero() {
            let mut first = false;
            container.update(|s| first = !std::mem::replace(&mut s.stop_sent, true));
            if first {
                Self::signal(&handle, container.stop_signal, false).await?;
            }
            let patience = time_left().map_or(limit, |left| limit.min(left));
            if tokio::time::timeout(patience, container.ended())
                .await
                .is_ok()
            {
                return Ok(());
            }
            if patience < limit {
                // It has not had the time that it was given: whoever asks again decides.
                let message = format!(
                    "an error occurs during waiting for container {:?} to be stopped: context deadline exceeded",
                    container.id
                );
                return Err(Error::new(ErrorKind::DeadlineExceeded, message));
            }
        }
        Self::signal(&handle, SIGKILL, false).await?;
        if tokio::time::timeout(kill_limit(), container.ended())
            .await
            .is_ok()
        {
            return Ok(());
        }
        let message = format!(
            "an error occurs during waiting for container {:?} to be killed: its process {} is still there",
            container.id,
            handle.init().pid
        );
        Err(Error::new(ErrorKind::DeadlineExceeded, message))
    }

    /// A container that runs by its status has no task: its end is noted, or was missed.
    async fn note_lost(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        let noted = tokio::time::timeout(NOTE_LIMIT, container.ended()).await;
        if noted.is_err() {
            self.container_ended(container, None, SystemTime::now())
                .await;
        }
        Ok(())
    }

    /// The shim of an UNKNOWN container answers: from here on somebody waits for its end.
    async fn find_out(self: &Arc<Self>, container: &Arc<Container>, handle: &Handle) -> Result<()> {
        if handle.init().status != Status::Created {
            self.take_unknown(container, handle.clone()).await;
            return Ok(());
        }
        // It never ran: there is no end to wait for.
        self.kill_task(&container.id).await?;
        self.container_ended(container, None, SystemTime::now())
            .await;
        Ok(())
    }

    /// Removes a container; a running one is killed first.
    pub(super) async fn remove_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
    ) -> Result<()> {
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

    async fn erase_container(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        let turn = container
            .busy
            .take("RemoveContainer", &container.name)
            .await?;
        if self.store.containers.find(&container.id)?.is_none() {
            // Another call removed it meanwhile.
            return Ok(());
        }
        turn.at("stop");
        self.stop_container(container, Duration::ZERO).await?;
        // One that never ran may have a task that waits for its start.
        turn.at("delete task");
        self.kill_task(&container.id).await?;
        turn.at("NRI RemoveContainer");
        self.plugins_remove(container).await;
        turn.at("delete record and snapshot");
        let (record, snapshot) = tokio::join!(
            self.delete_record(&container.id),
            self.delete_snapshot(&container.snapshotter, &container.id)
        );
        record?;
        snapshot?;
        turn.at("remove files");
        let (root, state) = (
            self.container_root(&container.id),
            self.container_state(&container.id),
        );
        remove_dirs([root, state]).await?;
        self.end_output(&container.id);
        self.store.containers.remove(&container.id);
        self.store.release(&container.name);
        let kind = ContainerEventType::ContainerDeletedEvent;
        self.announce(&container.id, &container.pod_id, kind);
        Ok(())
    }

    /// Stops a pod and everything in it.
    pub(super) async fn stop_pod(self: &Arc<Self>, pod: &Arc<Pod>) -> Result<()> {
        let turn = pod.busy.take("StopPodSandbox", &pod.name).await?;
        self.stop_pod_locked(pod, &turn).await
    }

    async fn stop_pod_locked(self: &Arc<Self>, pod: &Arc<Pod>, turn: &Taken<'_>) -> Result<()> {
        turn.at("stop containers");
        let containers = self.store.containers_of(&pod.id);
        let stops = containers
            .iter()
            .map(|c| self.stop_container(c, Duration::ZERO));
        for stopped in futures::future::join_all(stops).await {
            stopped?;
        }
        turn.at("kill the sandbox");
        // Whoever watches it deletes the task, while the network goes.
        let (was_ready, begun) = (pod.is_ready(), Instant::now());
        self.end_task(&pod.id).await?;
        if was_ready {
            let runtime = self.runtime_label(&pod.handler);
            let took = begun.elapsed();
            self.timers.note("sandbox_runtime_stop", &runtime, took);
        }
        // Whoever watches it tells of the end, after the ends of its containers.
        if tokio::time::timeout(NOTE_LIMIT, pod.ended()).await.is_err() {
            self.pod_ended(pod);
        }
        pod.update(|s| {
            s.state = PodSandboxState::SandboxNotready;
            s.pid = 0;
        });
        turn.at("NRI StopPodSandbox");
        self.plugins_stop_pod(pod).await;
        turn.at("unmount files");
        self.unmount_pod_files(&pod.id).await?;
        if let Some(netns) = &pod.netns {
            turn.at("CNI DEL");
            let detach = self.detach_network(pod, netns);
            self.timers
                .time("sandbox_delete_network", "", detach)
                .await?;
        }
        turn.at("unmount image volumes");
        self.unmount_images(pod).await
    }

    /// Removes a pod and its containers.
    pub(super) async fn remove_pod(self: &Arc<Self>, pod: &Arc<Pod>) -> Result<()> {
        let turn = pod.busy.take("RemovePodSandbox", &pod.name).await?;
        self.remove_pod_locked(pod, &turn).await
    }

    pub(super) async fn remove_pod_locked(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        turn: &Taken<'_>,
    ) -> Result<()> {
        if self.store.pods.find(&pod.id)?.is_none() {
            // Another call removed it meanwhile.
            return Ok(());
        }
        self.stop_pod_locked(pod, turn).await?;
        if let Some(netns) = &pod.netns
            && !netns::is_closed(netns)
        {
            let message = format!(
                "sandbox network namespace {} is not fully closed",
                netns.display()
            );
            return Err(Error::unknown(message));
        }
        turn.at("remove containers");
        let containers = self.store.containers_of(&pod.id);
        let removals = containers.iter().map(|c| self.remove_container(c));
        for removed in futures::future::join_all(removals).await {
            removed?;
        }
        self.plugins_remove_pod(pod).await;
        turn.at("remove");
        self.erase_pod(pod).await?;
        turn.at("end of the shim");
        for id in containers.iter().map(|c| &c.id).chain([&pod.id]) {
            self.tasks.cleared(&self.scope.namespace, id).await;
        }
        let seen = self.look(&pod.id);
        self.store.pods.remove(&pod.id);
        self.store.release(&pod.name);
        let kind = ContainerEventType::ContainerDeletedEvent;
        self.announce_seen(&pod.id, &pod.id, kind, seen);
        Ok(())
    }

    /// Removes what a pod without a network still has. Its record goes last: until then a call that
    /// is made again finds it.
    pub(super) async fn erase_pod(&self, pod: &Pod) -> Result<()> {
        self.kill_task(&pod.id).await?;
        // The configuration may name another one by now.
        let snapshotter = match self.db.containers().get(&self.scope, &pod.id) {
            Ok(record) => record.snapshotter,
            Err(_) => self.snapshotter_of(&pod.handler),
        };
        let (files, snapshot, lease) = tokio::join!(
            self.remove_pod_files(&pod.id),
            self.delete_snapshot(&snapshotter, &pod.id),
            self.delete_lease(&pod.id)
        );
        files?;
        snapshot?;
        lease?;
        self.delete_record(&pod.id).await
    }
}
