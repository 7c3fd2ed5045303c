//! After a restart of the daemon: pods and containers from their records, files and tasks.
//!
//! | record | task | becomes |
//! |---|---|---|
//! | pod, marked as being made | any | NOTREADY, and taken back by itself (`undo.rs`) |
//! | pod | runs | READY, watched |
//! | pod | anything else, or none | NOTREADY |
//! | container | runs | RUNNING, watched |
//! | container | ended | EXITED with its code, which its shim kept |
//! | container | made, not started | CREATED; the task is taken down |
//! | container, started and not ended by its file | none | EXITED 255, `Unknown` |
//! | container, not started by its file | none | CREATED, or EXITED 255 when the machine was restarted since |
//!
//! A task whose shim does not answer leaves its container UNKNOWN, and is asked for again: its
//! process may well live. Directories, leases, snapshots and network attachments that no record
//! knows are removed.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::stream::{self, StreamExt as _};
use lighter_engine::runtime::{Handle, Status};
use lighter_proto::runtime::v1::{
    ContainerState, ContainerUser, LinuxContainerUser, PodSandboxState,
};
use lighter_proto::time::from_nanos;
use lighter_snapshotter::mount;
use lighter_store::filter::Filter;
use lighter_store::metadata;
use serde_json::Value;

use super::records::{CONTAINER, KIND, MAKING, POD};
use super::update::UPDATED;
use crate::error::{Error, Result};
use crate::plugin::{Gate, Plugin};
use crate::store::{Container, ContainerStatus, NewContainer, Pod};

/// Objects recovered at once.
const PARALLEL: usize = 64;
/// First and longest pause before a shim that does not answer is asked again.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// What became of a task over the restart.
pub(super) enum Found {
    Live(Handle),
    None,
    /// Its shim does not answer yet.
    Unsure,
}

/// Whose task is not found out yet.
pub(super) enum Unsure {
    Pod(Arc<Pod>),
    Container(Arc<Container>),
}

/// What a daemon before left that no record knows: found before anybody is served, who might make
/// more, and removed afterwards.
struct Leftovers {
    dirs: Vec<PathBuf>,
    /// Snapshotters and keys.
    snapshots: Vec<(String, String)>,
    leases: Vec<String>,
}

fn is_object_id(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

fn text(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or_default().to_owned()
}

fn time_of(value: &Value, key: &str) -> Option<SystemTime> {
    value[key].as_i64().filter(|n| *n > 0).map(from_nanos)
}

/// When this machine was started.
fn booted_at() -> SystemTime {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let seconds = stat
        .lines()
        .find_map(|line| line.strip_prefix("btime "))
        .and_then(|text| text.trim().parse().ok());
    UNIX_EPOCH + Duration::from_secs(seconds.unwrap_or(0))
}

/// Names of the directories in `dir`.
fn directories(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// Metadata of a record: the part in the envelope, and whether the object was only being made.
fn metadata_of(record: &metadata::Container, extension: &str) -> Result<(Value, bool)> {
    let missing = || Error::not_found(format!("record {} has no metadata", record.id));
    let packed = record.extensions.get(extension).ok_or_else(missing)?;
    let mut value: Value = serde_json::from_slice(&packed.value)?;
    let making = value[MAKING].as_bool() == Some(true);
    Ok((value["Metadata"].take(), making))
}

impl Plugin {
    /// Finds what earlier runs left, then opens `gate`. Tasks must be on the books.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub async fn recover(self: &Arc<Self>, gate: &Gate) -> Result<()> {
        self.images.load().await?;
        let containers = self.db.containers();
        let records = containers.list(&self.scope, &Filter::default())?;
        let ids: HashSet<String> = records.iter().map(|r| r.id.to_string()).collect();
        let of_kind = |kind: &str| {
            let of = |r: &&metadata::Container| r.labels.get(KIND).is_some_and(|k| k == kind);
            records.iter().filter(of).cloned().collect::<Vec<_>>()
        };
        let pods = stream::iter(of_kind("sandbox")).map(|record| async move {
            if let Err(error) = self.recover_pod(record.clone()).await {
                tracing::error!(sandbox_id = %record.id, %error, "pod not recovered whole");
                self.salvage_pod(&record).await;
            }
        });
        pods.buffer_unordered(PARALLEL).collect::<Vec<()>>().await;
        let containers = stream::iter(of_kind("container")).map(|record| async move {
            if let Err(error) = self.recover_container(record.clone()).await {
                tracing::error!(container_id = %record.id, %error, "container not recovered whole");
                self.salvage_container(&record).await;
            }
        });
        containers
            .buffer_unordered(PARALLEL)
            .collect::<Vec<()>>()
            .await;
        let leftovers = self.leftovers(&ids).await;
        let stale = self.cni.journaled_except(&ids).await;
        tracing::info!(
            pods = self.store.visible_pods().len(),
            containers = self.store.all_containers().len(),
            "CRI serves"
        );
        self.admit_plugins().await?;
        gate.open(Arc::clone(self));
        // From here on nobody waits, however much is left over and whatever hangs.
        self.sweep(leftovers).await;
        // What a killed daemon had begun is held by nothing now.
        self.collect().await;
        for id in stale {
            self.detach_lost(String::new(), id);
        }
        Ok(())
    }

    pub(super) async fn find_task(&self, id: &str) -> Found {
        match self.task(id).await {
            Ok(Some(handle)) => Found::Live(handle),
            Ok(None) => Found::None,
            Err(error) => {
                tracing::warn!(id, %error, "task not found out yet");
                Found::Unsure
            }
        }
    }

    async fn recover_pod(self: &Arc<Self>, record: metadata::Container) -> Result<()> {
        let (value, making) = metadata_of(&record, POD.0)?;
        let id = record.id.to_string();
        let netns = Some(text(&value, "NetNSPath")).filter(|path| !path.is_empty());
        let pod = Arc::new(Pod::new(
            id.clone(),
            text(&value, "Name"),
            self.json.read(&value["Config"])?,
            text(&value, "RuntimeHandler"),
            netns.map(PathBuf::from),
        ));
        pod.label(self.selinux.recorded(&text(&value, "ProcessLabel")));
        let others = value["AdditionalIPs"].as_array().into_iter().flatten();
        let others = others.filter_map(|ip| ip.as_str().map(str::to_owned));
        pod.update(|s| {
            s.created_at = record.created_at;
            s.ip = text(&value, "IP");
            s.additional_ips = others.collect();
            s.cni_result = Some(value["CNIResult"].clone()).filter(|r| !r.is_null());
        });
        if let Some(extension) = record.extensions.get(UPDATED) {
            self.recover_pod_resources(&pod, extension)?;
        }
        self.store.adopt(&pod.name, &id);
        self.store.pods.add(Arc::clone(&pod));
        if self.stop_told(&id).exists() {
            self.hooks.was_told(&id).await;
        }
        if making {
            tracing::info!(sandbox_id = %id, "a half-made pod is taken back");
            self.abandon(&pod);
            return Ok(());
        }
        match self.find_task(&id).await {
            Found::Live(handle) => self.take_pod(&pod, handle).await,
            Found::None => {}
            // Its process may live; it is not ready as long as nobody knows.
            Found::Unsure => self.ask_again(Unsure::Pod(Arc::clone(&pod))),
        }
        pod.update(|s| s.visible = true);
        Ok(())
    }

    pub(super) async fn take_pod(self: &Arc<Self>, pod: &Arc<Pod>, handle: Handle) {
        let process = handle.init();
        match process.status {
            Status::Running | Status::Pausing | Status::Paused => {
                pod.update(|s| {
                    s.state = PodSandboxState::SandboxReady;
                    s.pid = process.pid;
                });
                self.watch_pod(Arc::clone(pod), handle);
            }
            Status::Stopped => {
                // Ended while no daemon ran: whoever listens is told, and the task goes.
                pod.update(|s| s.state = PodSandboxState::SandboxReady);
                self.watch_pod(Arc::clone(pod), handle);
                pod.ended().await;
            }
            Status::Created => {
                if let Err(error) = self.kill_task(&pod.id).await {
                    tracing::warn!(sandbox_id = %pod.id, %error, "task not taken down");
                }
            }
        }
    }

    /// Asks for a task until its shim answers.
    pub(super) fn ask_again(self: &Arc<Self>, of: Unsure) {
        let (this, stop) = (Arc::clone(self), self.stop.clone());
        self.tracker.spawn(async move {
            let again = async {
                let (mut pause, longest) = AGAIN;
                loop {
                    tokio::time::sleep(pause).await;
                    if this.ask(&of).await {
                        return;
                    }
                    pause = (pause * 2).min(longest);
                }
            };
            stop.run_until_cancelled(again).await;
        });
    }

    /// One try; whether the answer is known now.
    async fn ask(self: &Arc<Self>, of: &Unsure) -> bool {
        let id = match of {
            Unsure::Pod(pod) => &pod.id,
            Unsure::Container(container) => &container.id,
        };
        match (self.find_task(id).await, of) {
            (Found::Unsure, _) => return false,
            (Found::Live(handle), Unsure::Pod(pod)) => self.take_pod(pod, handle).await,
            (Found::None, Unsure::Pod(_)) => {}
            (Found::Live(handle), Unsure::Container(container)) => {
                self.take_unknown(container, handle).await;
            }
            (Found::None, Unsure::Container(container)) => {
                container.update(|s| {
                    // Not one that was stopped meanwhile.
                    if s.state == ContainerState::ContainerUnknown {
                        s.state = s.by_times(ContainerState::ContainerRunning);
                    }
                });
                self.settle_container(container).await;
            }
        }
        true
    }

    async fn recover_container(self: &Arc<Self>, record: metadata::Container) -> Result<()> {
        let (value, _) = metadata_of(&record, CONTAINER.0)?;
        let spec: Value = serde_json::from_slice(&record.spec.value)?;
        let signal = &value["StopSignal"];
        let log_path = Some(text(&value, "LogPath")).filter(|path| !path.is_empty());
        let file = self.read_status(record.id.as_str());
        let config = self.json.read(&value["Config"])?;
        let status = self.status_from(&record, &config, file.as_ref());
        let container = Arc::new(Container::new(
            NewContainer {
                id: record.id.to_string(),
                name: text(&value, "Name"),
                pod_id: text(&value, "SandboxID"),
                config,
                image_id: text(&value, "ImageRef"),
                log_path: log_path.map(PathBuf::from),
                stop_signal: signal
                    .as_str()
                    .and_then(super::signals::signal_number)
                    .unwrap_or(15),
                snapshotter: record.snapshotter.clone(),
                user: user_from(&spec),
                labels: self.selinux.recorded(&text(&value, "ProcessLabel")),
            },
            status,
        ));
        self.store.adopt(&container.name, &container.id);
        self.store.containers.add(Arc::clone(&container));
        if container.status().finished_at.is_some() {
            // Plugins that come now are not shown it.
            self.hooks.was_told(&container.id).await;
        }
        match self.find_task(&container.id).await {
            Found::Live(handle) => self.take_container(&container, handle).await,
            Found::None => self.settle_container(&container).await,
            Found::Unsure => {
                container.update(|s| s.state = ContainerState::ContainerUnknown);
                self.ask_again(Unsure::Container(Arc::clone(&container)));
            }
        }
        Ok(())
    }

    /// The status of a container as its record and its file tell it, its task aside.
    fn status_from(
        &self,
        record: &metadata::Container,
        config: &lighter_proto::runtime::v1::ContainerConfig,
        file: Option<&Value>,
    ) -> ContainerStatus {
        let asked = config.linux.as_ref().and_then(|l| l.resources.clone());
        let mut status = ContainerStatus::created(asked);
        status.created_at = record.created_at;
        let Some(file) = file else {
            return status;
        };
        status.started_at = time_of(file, "StartedAt");
        status.finished_at = time_of(file, "FinishedAt");
        status.exit_code = file["ExitCode"]
            .as_i64()
            .and_then(|code| i32::try_from(code).ok())
            .unwrap_or_default();
        status.reason = text(file, "Reason");
        status.message = text(file, "Message");
        status.stop_sent = file["StopSent"].as_bool() == Some(true);
        status.oom_killed = file["OomKilled"].as_bool() == Some(true);
        if let Some(resources) = Some(&file["Resources"]).filter(|r| !r.is_null())
            && let Ok(resources) = self.json.read(resources)
        {
            status.resources = Some(resources);
        }
        status.state = status.by_times(ContainerState::ContainerCreated);
        status
    }

    /// Takes over an UNKNOWN container whose shim answers at last, unless another call did: only one
    /// reads its output.
    pub(super) async fn take_unknown(self: &Arc<Self>, container: &Arc<Container>, handle: Handle) {
        let created = handle.init().status == Status::Created;
        let mut first = false;
        container.update(|s| {
            first = s.state == ContainerState::ContainerUnknown;
            if first && !created {
                s.state = ContainerState::ContainerRunning;
            }
        });
        if first {
            self.take_container(container, handle).await;
        }
    }

    pub(super) async fn take_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
        handle: Handle,
    ) {
        let process = handle.init();
        let known_end = container.status().finished_at.is_some();
        match process.status {
            Status::Created => {
                self.take_down(container).await;
                // Not before its turn is held: one that is CREATED can be started.
                container.update(|s| {
                    if s.state == ContainerState::ContainerUnknown {
                        s.state = s.by_times(ContainerState::ContainerCreated);
                    }
                });
                self.settle_container(container).await;
            }
            // Its end was noted; only the task is left.
            Status::Stopped if known_end => {
                container.update(|s| s.state = ContainerState::ContainerExited);
                self.watch_container(Arc::clone(container), handle);
            }
            Status::Running | Status::Pausing | Status::Paused | Status::Stopped => {
                container.update(|s| {
                    s.state = ContainerState::ContainerRunning;
                    s.pid = process.pid;
                    // Started, and killed before that was noted.
                    s.started_at = s.started_at.or(Some(s.created_at));
                });
                let ended = process.status == Status::Stopped;
                if !ended && let Err(error) = self.read_output(container).await {
                    tracing::error!(container_id = %container.id, %error, "output not logged");
                }
                self.watch_container(Arc::clone(container), handle);
                if ended {
                    container.ended().await;
                }
            }
        }
    }

    /// Takes down the task of a container that was not started. Nobody waits for that but those who
    /// want something of this container.
    async fn take_down(self: &Arc<Self>, container: &Arc<Container>) {
        let (this, container, stop) = (Arc::clone(self), Arc::clone(container), self.stop.clone());
        let (held, turn_is_held) = tokio::sync::oneshot::channel();
        self.tracker.spawn(async move {
            let turn = container.busy.lock().await;
            turn.at("taking down the task of an interrupted start");
            // Whoever recovers goes on.
            let _ = held.send(());
            let (mut pause, longest) = AGAIN;
            let again = async {
                while let Err(error) = this.kill_task(&container.id).await {
                    tracing::warn!(container_id = %container.id, %error, "task not taken down");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(longest);
                }
            };
            stop.run_until_cancelled(again).await;
        });
        // It is held, or the daemon ends.
        let _ = turn_is_held.await;
    }

    /// A container without a task: what its status says, or lost.
    pub(super) async fn settle_container(self: &Arc<Self>, container: &Arc<Container>) {
        let status = container.status();
        let lost = match status.state {
            ContainerState::ContainerRunning => true,
            ContainerState::ContainerCreated => status.created_at < booted_at(),
            ContainerState::ContainerExited | ContainerState::ContainerUnknown => false,
        };
        if lost {
            let root = self.container_root(&container.id);
            // Its directory may have gone with an interrupted removal.
            let _ = tokio::fs::create_dir_all(&root).await;
            self.container_ended(container, None, SystemTime::now())
                .await;
        }
    }

    /// What no record knows.
    async fn leftovers(&self, ids: &HashSet<String>) -> Leftovers {
        let dirs = [&self.root, &self.state].into_iter().flat_map(|base| {
            let kinds = ["sandboxes", "containers", "image-volumes"];
            kinds.map(|kind| base.join(kind)).into_iter()
        });
        let (dirs, known): (Vec<_>, _) = (dirs.collect(), ids.clone());
        let fifos = self.state.join("fifo");
        let found = tokio::task::spawn_blocking(move || {
            // Execs of the daemon before.
            remove_tree(&fifos);
            let lost = dirs.iter().flat_map(|dir| {
                let names = directories(dir).into_iter();
                let unknown = names.filter(|name| !known.contains(name));
                unknown.map(|name| dir.join(name)).collect::<Vec<_>>()
            });
            lost.collect::<Vec<_>>()
        });
        let dirs = found.await.unwrap_or_else(|error| {
            tracing::warn!(%error, "leftover directories not looked for");
            Vec::new()
        });
        let unknown = |name: &str| is_object_id(name) && !ids.contains(name);
        let mut found = Vec::new();
        for name in self.snapshotters() {
            let Ok(snapshots) = self.db.snapshots(&name) else {
                continue;
            };
            let all = snapshots.list(&self.scope, &Filter::default()).await;
            let all = all.unwrap_or_default().into_iter();
            let lost = all.filter(|info| unknown(&info.name));
            found.extend(lost.map(|info| (name.clone(), info.name)));
        }
        let leases = self.db.leases().list(&self.scope, &Filter::default());
        let leases = leases.unwrap_or_default().into_iter();
        Leftovers {
            dirs,
            snapshots: found,
            leases: leases
                .map(|lease| lease.id)
                .filter(|id| unknown(id))
                .collect(),
        }
    }

    async fn sweep(&self, lost: Leftovers) {
        let dirs = lost.dirs;
        let removed = tokio::task::spawn_blocking(move || {
            for dir in dirs {
                remove_tree(&dir);
            }
        });
        if removed.await.is_err() {
            tracing::warn!("leftover directories not removed");
        }
        for (snapshotter, key) in lost.snapshots {
            if let Err(error) = self.delete_snapshot(&snapshotter, &key).await {
                tracing::warn!(key, %error, "leftover snapshot not removed");
            }
        }
        for lease in lost.leases {
            if let Err(error) = self.delete_lease(&lease).await {
                tracing::warn!(lease, %error, "leftover lease not removed");
            }
        }
    }
}

/// Unmounts what is mounted below and removes the tree; failures are logged.
fn remove_tree(path: &Path) {
    if let Err(error) = mount::unmount_recursive(path) {
        tracing::warn!(path = %path.display(), %error, "leftover not unmounted");
        return;
    }
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "leftover not removed");
        }
        _ => {}
    }
}

/// Who a container runs as, by its spec.
pub(super) fn user_from(spec: &Value) -> ContainerUser {
    let user = &spec["process"]["user"];
    let number = |value: &Value| value.as_i64().unwrap_or_default();
    let groups = user["additionalGids"].as_array().into_iter().flatten();
    ContainerUser {
        linux: Some(LinuxContainerUser {
            uid: number(&user["uid"]),
            gid: number(&user["gid"]),
            supplemental_groups: groups.map(number).collect(),
        }),
    }
}
