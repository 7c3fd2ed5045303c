//! What the daemon itself tells of a task's end, where the shim cannot any more.

use lighter_proto::containerd::events::{TaskDelete, TaskExit};
use lighter_proto::time::to_timestamp;
use lighter_store::Namespace;
use tracing::warn;

use super::shared::Shared;
use super::state::Exit;

/// The end of a process: of the container's first one where `id` is the container's.
pub(super) fn exited(container_id: &str, id: &str, pid: u32, exit: Exit) -> TaskExit {
    TaskExit {
        container_id: container_id.to_owned(),
        id: id.to_owned(),
        pid,
        exit_status: exit.status,
        exited_at: Some(to_timestamp(exit.at)),
    }
}

/// The end of the task, whose first process ended with `exit`.
pub(super) fn deleted(container_id: &str, pid: u32, exit: Exit) -> TaskDelete {
    TaskDelete {
        container_id: container_id.to_owned(),
        id: container_id.to_owned(),
        pid,
        exit_status: exit.status,
        exited_at: Some(to_timestamp(exit.at)),
    }
}

impl Shared {
    /// Publishes an event of ours; a failure is logged, since there is nobody to tell.
    pub(super) fn tell<M>(&self, namespace: &Namespace, topic: &str, event: &M)
    where
        M: prost::Message + prost::Name,
    {
        if let Err(error) = self.events.publish(namespace, topic, event) {
            warn!(%error, topic, "cannot publish");
        }
    }
}
