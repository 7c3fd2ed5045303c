//! What happens to pods and containers by itself: exits, out of memory; and who is told of it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lighter_engine::runtime::Handle;
use lighter_proto::containerd::events::TaskOom;
use lighter_proto::runtime::v1::{
    ContainerEventResponse, ContainerEventType, ContainerState, PodSandboxState,
};
use lighter_proto::time;
use lighter_store::filter::Filter;
use prost::Message as _;

use super::backlog::{Event, Seen};
use crate::error::Error;
use crate::plugin::Plugin;
use crate::store::{Container, Pod};

/// Exit code of a process whose end nobody saw.
const UNKNOWN_EXIT: u32 = 255;
/// Exit code of a process that SIGKILL ended, as the kernel's memory killer does.
const KILLED: u32 = 137;
/// Longest that one try at removing an ended task may take.
const DELETE_LIMIT: Duration = Duration::from_secs(10);
/// First and longest pause between two tries.
const DELETE_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

impl Plugin {
    /// Tells subscribers.
    pub(super) fn announce(&self, id: &str, pod_id: &str, kind: ContainerEventType) {
        self.announce_seen(id, pod_id, kind, self.look(pod_id));
    }

    /// A pod and its containers now, where somebody listens.
    pub(super) fn look(&self, pod_id: &str) -> Option<Box<Seen>> {
        self.events.heard().then(|| Box::new(self.seen(pod_id)))
    }

    /// Tells subscribers what was seen of a pod that is gone since.
    pub(super) fn announce_seen(
        &self,
        id: &str,
        pod_id: &str,
        kind: ContainerEventType,
        seen: Option<Box<Seen>>,
    ) {
        self.events.publish(Event {
            id: id.to_owned(),
            pod_id: pod_id.to_owned(),
            kind,
            at: SystemTime::now(),
            seen,
        });
    }

    fn seen(&self, pod_id: &str) -> Seen {
        let pod = self.store.pods.find(pod_id).ok().flatten();
        let containers = self.store.containers_of(pod_id);
        Seen {
            pod: pod.map(|p| self.pod_status_of(&p)),
            containers: containers.iter().map(|c| self.status_of(c)).collect(),
        }
    }

    /// An event as it is sent.
    pub(super) fn told(&self, event: Event) -> ContainerEventResponse {
        let seen = match event.seen {
            Some(seen) => *seen,
            None => self.seen(&event.pod_id),
        };
        ContainerEventResponse {
            container_id: event.id,
            container_event_type: event.kind.into(),
            created_at: time::to_nanos(event.at),
            pod_sandbox_status: seen.pod,
            containers_statuses: seen.containers,
        }
    }

    /// Waits for the end of a pod's first process.
    pub(super) fn watch_pod(self: &Arc<Self>, pod: Arc<Pod>, handle: Handle) {
        let (this, stop) = (Arc::clone(self), self.stop.clone());
        self.tracker.spawn(async move {
            let Some(ended) = stop.run_until_cancelled(handle.wait("")).await else {
                return;
            };
            if let Err(error) = ended {
                tracing::debug!(sandbox_id = %pod.id, %error, "pod is gone");
            }
            this.pod_ended(&pod);
            stop.run_until_cancelled(this.delete_task(&handle)).await;
        });
    }

    /// A pod's first process is gone; told once.
    pub(super) fn pod_ended(&self, pod: &Pod) {
        let mut was_ready = false;
        pod.update(|s| {
            was_ready = s.state == PodSandboxState::SandboxReady;
            s.state = PodSandboxState::SandboxNotready;
            s.pid = 0;
        });
        if was_ready {
            self.announce(&pod.id, &pod.id, ContainerEventType::ContainerStoppedEvent);
        }
    }

    /// Waits for the end of a container.
    pub(super) fn watch_container(self: &Arc<Self>, container: Arc<Container>, handle: Handle) {
        let (this, stop) = (Arc::clone(self), self.stop.clone());
        self.tracker.spawn(async move {
            let Some(ended) = stop.run_until_cancelled(handle.wait("")).await else {
                return;
            };
            let (code, at) = match ended {
                Ok(exit) => ((!exit.lost).then_some(exit.status), exit.at),
                Err(_) => (None, SystemTime::now()),
            };
            // Its cgroup goes with the task: it is asked before.
            if code == Some(KILLED)
                && !container.status().oom_killed
                && this.ran_out(&container.id).await
            {
                container.update(|s| s.oom_killed = true);
            }
            // Whoever learns of the end finds all output in the log.
            this.drain_output(&container.id).await;
            this.container_ended(&container, code, at).await;
            stop.run_until_cancelled(this.delete_task(&handle)).await;
        });
    }

    /// Whether the kernel killed something in the container for want of memory.
    async fn ran_out(&self, id: &str) -> bool {
        let sample = self.ask_shim(id).await.ok();
        let memory = sample.and_then(|s| s.memory);
        memory.is_some_and(|m| m.oom_kills > 0)
    }

    /// A container ended, with a code if somebody saw it: its status first, then whoever wants to
    /// know.
    pub(super) async fn container_ended(
        self: &Arc<Self>,
        container: &Arc<Container>,
        code: Option<u32>,
        at: SystemTime,
    ) {
        let mut first = false;
        container.update(|s| {
            first = s.state != ContainerState::ContainerExited;
            if !first {
                return;
            }
            s.state = ContainerState::ContainerExited;
            s.pid = 0;
            s.exit_code = i32::try_from(code.unwrap_or(UNKNOWN_EXIT)).unwrap_or(i32::MAX);
            s.finished_at = Some(at);
            s.reason = match code {
                _ if s.oom_killed => "OOMKilled",
                Some(0) => "Completed",
                Some(_) => "Error",
                None => "Unknown",
            }
            .to_owned();
        });
        if first {
            self.save_status(container).await;
            self.plugins_stopped(container).await;
            let kind = ContainerEventType::ContainerStoppedEvent;
            self.announce(&container.id, &container.pod_id, kind);
        }
    }

    /// Removes an ended task, again and again until it is gone.
    async fn delete_task(&self, handle: &Handle) {
        let (mut pause, longest) = DELETE_PAUSE;
        loop {
            let tried = tokio::time::timeout(DELETE_LIMIT, handle.delete()).await;
            match tried.map(|done| done.map_err(Error::from)) {
                Ok(Ok(_)) => return,
                Ok(Err(error)) if error.is_not_found() => return,
                Ok(Err(error)) => tracing::warn!(id = handle.id(), %error, "task not deleted"),
                Err(_) => tracing::warn!(id = handle.id(), "deleting a task takes long"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }

    /// Marks containers that ran out of memory, until the exchange ends.
    pub(crate) async fn follow_oom(&self) {
        let filter = format!("namespace=={},topic==/tasks/oom", crate::NAMESPACE);
        let Ok(filter) = Filter::parse(&[filter]) else {
            return;
        };
        loop {
            let mut events = self.db.events().subscribe(filter.clone());
            while let Ok(envelope) = events.next().await {
                let Some(event) = envelope.event.as_ref() else {
                    continue;
                };
                let Ok(oom) = TaskOom::decode(event.value.as_slice()) else {
                    continue;
                };
                if let Ok(Some(container)) = self.store.containers.find(&oom.container_id) {
                    container.update(|s| {
                        s.oom_killed = true;
                        if s.state == ContainerState::ContainerExited {
                            s.reason = "OOMKilled".to_owned();
                        }
                    });
                    self.save_status(&container).await;
                }
            }
        }
    }
}
