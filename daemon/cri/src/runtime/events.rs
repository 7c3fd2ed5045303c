//! What happens to pods and containers by itself: exits, out of memory; and who is told of it.

use std::sync::Arc;

use lighter_engine::runtime::Handle;
use lighter_proto::containerd::events::TaskOom;
use lighter_proto::runtime::v1::{
    ContainerEventResponse, ContainerEventType, ContainerState, PodSandboxState,
};
use lighter_proto::time;
use lighter_store::filter::Filter;
use prost::Message as _;

use crate::plugin::Plugin;
use crate::store::{Container, Pod};

/// Exit code of a process whose end nobody saw.
const UNKNOWN_EXIT: u32 = 255;

impl Plugin {
    /// Tells subscribers.
    pub(super) fn announce(&self, id: &str, pod_id: &str, kind: ContainerEventType) {
        if self.events.receiver_count() == 0 {
            return;
        }
        let pod = self.store.find_pod(pod_id).ok().flatten();
        let containers = self.store.containers_of(pod_id);
        // Nobody may be listening any more; that is fine.
        let _ = self.events.send(ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind.into(),
            created_at: time::to_nanos(std::time::SystemTime::now()),
            pod_sandbox_status: pod.map(|p| self.pod_status_of(&p)),
            containers_statuses: containers.iter().map(|c| self.status_of(c)).collect(),
        });
    }

    /// Waits for the end of a pod's first process.
    pub(super) fn watch_pod(self: &Arc<Self>, pod: Arc<Pod>, handle: Handle) {
        let (this, stop) = (Arc::clone(self), self.stop.clone());
        self.tracker.spawn(async move {
            let Some(ended) = stop.run_until_cancelled(handle.wait("")).await else {
                return;
            };
            if let Err(error) = ended {
                tracing::debug!(pod = %pod.id, %error, "pod is gone");
            }
            pod.update(|s| {
                s.state = PodSandboxState::SandboxNotready;
                s.pid = 0;
            });
            this.announce(&pod.id, &pod.id, ContainerEventType::ContainerStoppedEvent);
            this.delete_task(&handle).await;
        });
    }

    /// Waits for the end of a container.
    pub(super) fn watch_container(self: &Arc<Self>, container: Arc<Container>, handle: Handle) {
        let (this, stop) = (Arc::clone(self), self.stop.clone());
        self.tracker.spawn(async move {
            let Some(ended) = stop.run_until_cancelled(handle.wait("")).await else {
                return;
            };
            let (code, at) = match ended {
                Ok(exit) => (exit.status, exit.at),
                Err(_) => (UNKNOWN_EXIT, std::time::SystemTime::now()),
            };
            this.delete_task(&handle).await;
            container.update(|s| {
                s.state = ContainerState::ContainerExited;
                s.pid = 0;
                s.exit_code = i32::try_from(code).unwrap_or(i32::MAX);
                s.finished_at = Some(at);
                s.reason = match code {
                    _ if s.oom_killed => "OOMKilled",
                    0 => "Completed",
                    UNKNOWN_EXIT => "Unknown",
                    _ => "Error",
                }
                .to_owned();
            });
            this.save_status(&container).await;
            let kind = ContainerEventType::ContainerStoppedEvent;
            this.announce(&container.id, &container.pod_id, kind);
        });
    }

    async fn delete_task(&self, handle: &Handle) {
        if let Err(error) = handle.delete().await.map_err(crate::error::Error::from)
            && !error.is_not_found()
        {
            tracing::warn!(id = handle.id(), %error, "task not deleted");
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
                if let Ok(Some(container)) = self.store.find_container(&oom.container_id) {
                    container.update(|s| {
                        s.oom_killed = true;
                        if s.state == ContainerState::ContainerExited {
                            s.reason = "OOMKilled".to_owned();
                        }
                    });
                }
            }
        }
    }
}
