//! What CRI knows in memory: pods, containers, and the names they hold.
//!
//! Lists and status come from here without touching disk, shim or database. The life-cycle calls of
//! a pod or container take its `busy` [`Turn`] one after the other; reading takes only the small
//! state lock.
//!
//! ```text
//! container: CREATED ─start─► RUNNING ─exit─► EXITED       (start fails: CREATED ─► EXITED)
//! pod:       NOTREADY ─run─► READY ─stop, exit─► NOTREADY
//! ```

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::SystemTime;

use lighter_proto::runtime::v1::{
    ContainerConfig, ContainerState, ContainerUser, LinuxContainerResources, NamespaceOption,
    PodSandboxConfig, PodSandboxState,
};
use serde_json::Value;
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::selinux::Labels;
use crate::turn::Turn;
use lighter_proto::errdefs::ErrorKind;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

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
    state: watch::Sender<PodState>,
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

/// Objects by id.
#[derive(Debug)]
pub struct Table<T> {
    /// What they are called in errors.
    what: &'static str,
    objects: RwLock<HashMap<String, Arc<T>>>,
}

/// What a [`Table`] holds.
pub trait Object {
    /// Its id.
    fn id(&self) -> &str;
}

impl Object for Pod {
    fn id(&self) -> &str {
        &self.id
    }
}

impl Object for Container {
    fn id(&self) -> &str {
        &self.id
    }
}

impl<T: Object> Table<T> {
    fn new(what: &'static str) -> Self {
        Self {
            what,
            objects: RwLock::default(),
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, HashMap<String, Arc<T>>> {
        self.objects.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<String, Arc<T>>> {
        self.objects.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an object.
    pub fn add(&self, object: Arc<T>) {
        self.write().insert(object.id().to_owned(), object);
    }

    /// Forgets an object.
    pub fn remove(&self, id: &str) {
        self.write().remove(id);
    }

    /// The object of an id or unambiguous prefix.
    ///
    /// # Errors
    /// For an empty or ambiguous prefix.
    pub fn find(&self, id: &str) -> Result<Option<Arc<T>>> {
        unique(&self.read(), id)
    }

    /// [`Table::find`], which must exist.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, id: &str) -> Result<Arc<T>> {
        self.find(id)?.ok_or_else(|| {
            let what = self.what;
            Error::not_found(format!(
                "an error occurred when try to find {what} {id:?}: not found"
            ))
        })
    }

    /// All for which `keep` holds.
    pub fn select(&self, keep: impl Fn(&T) -> bool) -> Vec<Arc<T>> {
        let objects = self.read();
        objects.values().filter(|o| keep(o)).cloned().collect()
    }
}

/// All pods and containers.
#[derive(Debug)]
pub struct Store {
    /// Pods, those that are being made included.
    pub pods: Table<Pod>,
    /// Containers.
    pub containers: Table<Container>,
    names: Mutex<HashMap<String, String>>,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            pods: Table::new("sandbox"),
            containers: Table::new("container"),
            names: Mutex::default(),
        }
    }
}

/// A name held for an object that is being made; given back when dropped unless kept.
#[derive(Debug)]
pub struct Reservation {
    store: Arc<Store>,
    name: String,
    kept: bool,
}

impl Reservation {
    /// The object stands: its name stays until [`Store::release`].
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.kept {
            self.store.release(&self.name);
        }
    }
}

/// The one whose id is `prefix` or starts with it, if it is the only one.
fn unique<T>(map: &HashMap<String, Arc<T>>, prefix: &str) -> Result<Option<Arc<T>>> {
    if prefix.is_empty() {
        return Err(Error::unknown("prefix can't be empty"));
    }
    if let Some(found) = map.get(prefix) {
        return Ok(Some(Arc::clone(found)));
    }
    let mut found = map.iter().filter(|(id, _)| id.starts_with(prefix));
    match (found.next(), found.next()) {
        (None, _) => Ok(None),
        (Some((_, one)), None) => Ok(Some(Arc::clone(one))),
        (Some(_), Some(_)) => Err(Error::unknown(format!(
            "multiple IDs found with provided prefix: {prefix}"
        ))),
    }
}

impl Store {
    /// Holds `name` for `id`. `kind` is `sandbox` or `container`.
    ///
    /// # Errors
    /// `FailedPrecondition` when another id holds it.
    pub fn reserve(self: &Arc<Self>, kind: &str, name: &str, id: &str) -> Result<Reservation> {
        let mut names = locked(&self.names);
        if let Some(holder) = names.get(name)
            && holder != id
        {
            let hint = if kind == "container" {
                "; check if another CreateContainer request is in progress"
            } else {
                ""
            };
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "failed to reserve {kind} name {name:?}{hint}: name {name:?} is reserved for {holder:?}"
                ),
            ));
        }
        names.insert(name.to_owned(), id.to_owned());
        Ok(Reservation {
            store: Arc::clone(self),
            name: name.to_owned(),
            kept: false,
        })
    }

    /// Id that holds `name`.
    #[must_use]
    pub fn holder(&self, name: &str) -> Option<String> {
        locked(&self.names).get(name).cloned()
    }

    /// Gives a name back.
    pub fn release(&self, name: &str) {
        locked(&self.names).remove(name);
    }

    /// Holds a name that an object of an earlier run has; whoever holds it already keeps it.
    pub fn adopt(&self, name: &str, id: &str) {
        locked(&self.names)
            .entry(name.to_owned())
            .or_insert_with(|| id.to_owned());
    }

    /// All pods that lists show.
    #[must_use]
    pub fn visible_pods(&self) -> Vec<Arc<Pod>> {
        self.pods.select(|pod| pod.state.borrow().visible)
    }

    /// All containers.
    #[must_use]
    pub fn all_containers(&self) -> Vec<Arc<Container>> {
        self.containers.select(|_| true)
    }

    /// Containers of one pod.
    #[must_use]
    pub fn containers_of(&self, pod_id: &str) -> Vec<Arc<Container>> {
        self.containers.select(|c| c.pod_id == pod_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_reservation_gives_the_name_back() {
        let store = Arc::new(Store::default());
        let held = store.reserve("container", "n", "1").unwrap();
        let refused = store
            .reserve("container", "n", "2")
            .unwrap_err()
            .to_string();
        assert!(refused.contains("reserved for \"1\""), "{refused}");
        drop(held);
        store.reserve("container", "n", "2").unwrap().keep();
        assert_eq!(store.holder("n").as_deref(), Some("2"));
    }

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

    #[test]
    fn a_prefix_must_be_unambiguous() {
        let store = Store::default();
        for id in ["ab1", "ab2"] {
            let pod = Pod::new(
                id.into(),
                String::new(),
                PodSandboxConfig::default(),
                String::new(),
                None,
            );
            store.pods.add(Arc::new(pod));
        }
        assert!(store.pods.find("ab").is_err() && store.pods.find("").is_err());
        assert_eq!(store.pods.find("ab2").unwrap().unwrap().id, "ab2");
        assert!(store.pods.find("x").unwrap().is_none());
    }
}
