//! One pod: what was asked, and what changes in its life.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::SystemTime;

use lighter_proto::runtime::v1::{
    LinuxContainerResources, NamespaceOption, PodSandboxConfig, PodSandboxState,
};
use serde_json::Value;
use tokio::sync::watch;

use crate::selinux::Labels;
use crate::turn::Turn;

/// What changes in a pod's life.
#[derive(Debug, Clone)]
pub struct PodState {
    /// READY or not.
    pub state: PodSandboxState,
    /// When it was run.
    pub created_at: SystemTime,
    /// Pid of its first process; 0 once that is gone.
    pub pid: u32,
    /// Main address; empty on the host's network and once the network is gone.
    pub ip: String,
    /// Other addresses.
    pub additional_ips: Vec<String>,
    /// What CNI answered.
    pub cni_result: Option<Value>,
    /// Overhead and resources as last updated.
    pub overhead: Option<LinuxContainerResources>,
    /// See `overhead`.
    pub resources: Option<LinuxContainerResources>,
    /// Whether lists show it: not before it ran, not once it is removed.
    pub visible: bool,
    /// Whether its making did not end: it is taken back unless somebody removes it before.
    pub abandoned: bool,
}

/// One pod.
#[derive(Debug)]
pub struct Pod {
    /// 64 hex digits.
    pub id: String,
    /// Name that is reserved for it.
    pub name: String,
    /// As the kubelet sent it.
    pub config: PodSandboxConfig,
    /// Runtime handler as asked; empty for the default.
    pub handler: String,
    /// Its network namespace; `None` on the host's network.
    pub netns: Option<PathBuf>,
    /// Its SELinux labels, once they are given.
    labels: OnceLock<Labels>,
    /// What lists say of it that never changes, as they encode it.
    pub(crate) listed: OnceLock<Box<[u8]>>,
    pub(super) state: watch::Sender<PodState>,
    /// Taken by run, stop and remove in turn.
    pub busy: Turn,
}

impl Pod {
    /// A pod that is being made.
    #[must_use]
    pub fn new(
        id: String,
        name: String,
        config: PodSandboxConfig,
        handler: String,
        netns: Option<PathBuf>,
    ) -> Self {
        let state = PodState {
            state: PodSandboxState::SandboxNotready,
            created_at: SystemTime::now(),
            pid: 0,
            ip: String::new(),
            additional_ips: Vec::new(),
            cni_result: None,
            overhead: None,
            resources: None,
            visible: false,
            abandoned: false,
        };
        Self {
            id,
            name,
            config,
            handler,
            netns,
            labels: OnceLock::new(),
            listed: OnceLock::new(),
            state: watch::Sender::new(state),
            busy: Turn::default(),
        }
    }

    /// Gives it its SELinux labels, which it has from then on.
    pub fn label(&self, labels: Labels) {
        // Once in its life: by whoever makes or recovers it.
        let _ = self.labels.set(labels);
    }

    /// SELinux label of its processes; empty for none.
    #[must_use]
    pub fn process_label(&self) -> &str {
        self.labels.get().map_or("", Labels::process)
    }

    /// SELinux label of its files; empty for none.
    #[must_use]
    pub fn mount_label(&self) -> &str {
        self.labels.get().map_or("", Labels::mount)
    }

    /// Its state now.
    #[must_use]
    pub fn state(&self) -> PodState {
        self.state.borrow().clone()
    }

    /// Its state and when it was run, without copying the rest.
    #[must_use]
    pub fn brief(&self) -> (PodSandboxState, SystemTime) {
        let state = self.state.borrow();
        (state.state, state.created_at)
    }

    /// Changes its state and wakes those who wait for it.
    pub fn update(&self, change: impl FnOnce(&mut PodState)) {
        self.state.send_modify(change);
    }

    /// Waits until it is not ready.
    pub async fn ended(&self) {
        let mut state = self.state.subscribe();
        // The sender lives as long as the pod.
        let _ = state
            .wait_for(|s| s.state != PodSandboxState::SandboxReady)
            .await;
    }

    /// Which namespaces it asked for.
    #[must_use]
    pub fn namespace_options(&self) -> Option<&NamespaceOption> {
        let linux = self.config.linux.as_ref()?;
        linux.security_context.as_ref()?.namespace_options.as_ref()
    }

    /// Whether containers can be made in it.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.state.borrow().state == PodSandboxState::SandboxReady
    }
}
