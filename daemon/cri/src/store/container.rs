//! One container: what was asked, and what changes in its life.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::SystemTime;

use lighter_proto::runtime::v1::{
    ContainerConfig, ContainerState, ContainerUser, LinuxContainerResources,
};
use tokio::sync::watch;

use super::locked;
use crate::selinux::Labels;
use crate::turn::Turn;

/// What changes in a container's life. Written to disk with every step.
#[derive(Debug, Clone)]
pub struct ContainerStatus {
    /// Where it is in its life.
    pub state: ContainerState,
    /// Pid while it runs.
    pub pid: u32,
    /// When it was made.
    pub created_at: SystemTime,
    /// When it was started, if it was.
    pub started_at: Option<SystemTime>,
    /// When it ended, if it did.
    pub finished_at: Option<SystemTime>,
    /// How it ended.
    pub exit_code: i32,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, `Unknown`.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Resources as last applied.
    pub resources: Option<LinuxContainerResources>,
    /// Whether a start is under way.
    pub starting: bool,
    /// Whether a removal is under way.
    pub removing: bool,
    /// Whether the stop signal was sent: it is sent once in a life.
    pub stop_sent: bool,
    /// Whether the kernel killed something in it for want of memory.
    pub oom_killed: bool,
}

impl ContainerStatus {
    /// Made now.
    #[must_use]
    pub fn created(resources: Option<LinuxContainerResources>) -> Self {
        Self {
            state: ContainerState::ContainerCreated,
            pid: 0,
            created_at: SystemTime::now(),
            started_at: None,
            finished_at: None,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            resources,
            starting: false,
            removing: false,
            stop_sent: false,
            oom_killed: false,
        }
    }

    /// Where it is in its life by its times alone. `unstarted` is what it is without any: a task that is
    /// lost may have been started by a daemon that could not note it any more.
    #[must_use]
    pub fn by_times(&self, unstarted: ContainerState) -> ContainerState {
        match (self.started_at, self.finished_at) {
            (_, Some(_)) => ContainerState::ContainerExited,
            (Some(_), None) => ContainerState::ContainerRunning,
            (None, None) => unstarted,
        }
    }
}

/// One container.
#[derive(Debug)]
pub struct Container {
    /// 64 hex digits.
    pub id: String,
    /// Name that is reserved for it.
    pub name: String,
    /// Pod it belongs to.
    pub pod_id: String,
    /// As the kubelet sent it.
    pub config: ContainerConfig,
    /// Image id: digest of the config.
    pub image_id: String,
    /// Absolute path of its log; `None` when its output is dropped.
    pub log_path: Option<PathBuf>,
    /// Signal that ends it.
    pub stop_signal: u32,
    /// Snapshotter of its root.
    pub snapshotter: String,
    /// Who it runs as.
    pub user: ContainerUser,
    /// Its SELinux labels.
    pub labels: Labels,
    /// What lists say of it that never changes, as they encode it.
    pub(crate) listed: OnceLock<Box<[u8]>>,
    status: watch::Sender<ContainerStatus>,
    /// Held while its status file is written.
    file: Mutex<()>,
    /// Taken by start, update and remove in turn.
    pub busy: Turn,
}

/// What is fixed when a container is made.
#[derive(Debug)]
pub struct NewContainer {
    /// See [`Container`].
    pub id: String,
    /// See [`Container`].
    pub name: String,
    /// See [`Container`].
    pub pod_id: String,
    /// See [`Container`].
    pub config: ContainerConfig,
    /// See [`Container`].
    pub image_id: String,
    /// See [`Container`].
    pub log_path: Option<PathBuf>,
    /// See [`Container`].
    pub stop_signal: u32,
    /// See [`Container`].
    pub snapshotter: String,
    /// See [`Container`].
    pub user: ContainerUser,
    /// See [`Container`].
    pub labels: Labels,
}

impl Container {
    /// A container in `status`.
    #[must_use]
    pub fn new(new: NewContainer, status: ContainerStatus) -> Self {
        Self {
            id: new.id,
            name: new.name,
            pod_id: new.pod_id,
            config: new.config,
            image_id: new.image_id,
            log_path: new.log_path,
            stop_signal: new.stop_signal,
            snapshotter: new.snapshotter,
            user: new.user,
            labels: new.labels,
            listed: OnceLock::new(),
            status: watch::Sender::new(status),
            file: Mutex::default(),
            busy: Turn::default(),
        }
    }

    /// Held by whoever writes its status file, so that the newest status is the last one written.
    pub(crate) fn file(&self) -> MutexGuard<'_, ()> {
        locked(&self.file)
    }

    /// Its status now.
    #[must_use]
    pub fn status(&self) -> ContainerStatus {
        self.status.borrow().clone()
    }

    /// Its state and when it was made, without copying the rest.
    #[must_use]
    pub fn brief(&self) -> (ContainerState, SystemTime) {
        let status = self.status.borrow();
        (status.state, status.created_at)
    }

    /// Changes its status and wakes those who wait for it.
    pub fn update(&self, change: impl FnOnce(&mut ContainerStatus)) {
        self.status.send_modify(change);
    }

    /// Waits until it has ended.
    pub async fn ended(&self) {
        let mut status = self.status.subscribe();
        // The sender lives as long as the container.
        let _ = status
            .wait_for(|s| s.state == ContainerState::ContainerExited)
            .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_follows_from_the_times() {
        let mut status = ContainerStatus::created(None);
        let unstarted = ContainerState::ContainerCreated;
        assert_eq!(status.by_times(unstarted), unstarted);
        status.started_at = Some(SystemTime::now());
        let running = ContainerState::ContainerRunning;
        assert_eq!(status.by_times(unstarted), running);
        status.finished_at = status.started_at;
        let exited = ContainerState::ContainerExited;
        assert_eq!(status.by_times(unstarted), exited);
        // A start that failed.
        status.started_at = None;
        assert_eq!(status.by_times(running), exited);
    }
}
