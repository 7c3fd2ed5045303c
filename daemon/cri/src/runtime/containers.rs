//! Making and starting containers.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lighter_engine::runtime::{CreateTask, Handle, Stdio};
use lighter_proto::any;
use lighter_proto::containerd::runc::v1::Options;
use lighter_proto::runtime::v1::{
    ContainerConfig, ContainerEventType, ContainerState, ContainerUser, LinuxContainerUser,
    NamespaceMode, NamespaceOption,
};
use lighter_snapshotter::mount::{Access, TempMount};
use nix::sys::stat::Mode;
use serde_json::Value;

use super::output::writes_logs;
use super::records::{CONTAINER, New};
use super::signals::stop_signal;
use super::{new_id, task_runtime};
use crate::error::{Error, Result, io};
use crate::image::Image;
use crate::plugin::Plugin;
use crate::spec::user::{self, Tables, User};
use crate::spec::{self, container};
use crate::store::{Container, ContainerStatus, NewContainer, Pod};

/// Where the output of a container without a log goes.
const NO_LOG: &str = "/dev/null";
/// Exit code of a container that could not be started.
const START_FAILED: i32 = 128;

/// CDI devices of a request: those of its field, then those of its annotations.
fn cdi_devices(config: &ContainerConfig) -> Result<Vec<String>> {
    let mut names: Vec<String> = config.cdi_devices.iter().map(|d| d.name.clone()).collect();
    let annotated = crate::cdi::from_annotations(&config.annotations)
        .map_err(|e| Error::unknown(lighter_proto::errdefs::render(&e)))?;
    for name in annotated {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(names)
}

/// What a container asks of its namespaces.
fn namespace_options(config: &ContainerConfig) -> Option<&NamespaceOption> {
    let security = config.linux.as_ref()?.security_context.as_ref()?;
    security.namespace_options.as_ref()
}

/// Who a spec's process is on the machine. Its streams must be its own: it may open them again.
fn host_owner(spec: &Value) -> (u32, u32) {
    let mapped = |id: &str, lines: &str| {
        let id = spec["process"]["user"][id].as_u64().unwrap_or_default();
        let mut lines = spec["linux"][lines].as_array().into_iter().flatten();
        let host = lines.find_map(|line| {
            let number = |key: &str| line[key].as_u64();
            let (first, size) = (number("containerID")?, number("size")?);
            let offset = id.checked_sub(first).filter(|o| *o < size)?;
            number("hostID")?.checked_add(offset)
        });
        u32::try_from(host.unwrap_or_default()).unwrap_or_default()
    };
    (mapped("uid", "uidMappings"), mapped("gid", "gidMappings"))
}

/// Where the container's log goes; `None` when either half of the path is missing.
fn log_path(pod: &Pod, config: &ContainerConfig) -> Option<PathBuf> {
    let directory = Path::new(&pod.config.log_directory);
    let logged = !config.log_path.is_empty() && !pod.config.log_directory.is_empty();
    logged.then(|| directory.join(&config.log_path))
}

impl Plugin {
    /// Makes a container in a pod that is ready; its id.
    pub(super) async fn create_container(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        config: ContainerConfig,
    ) -> Result<String> {
        if !pod.is_ready() {
            return Err(Error::unknown(format!(
                "sandbox container {:?} is not running",
                pod.id
            )));
        }
        let metadata = config
            .metadata
            .clone()
            .ok_or_else(|| Error::unknown("container config must include metadata"))?;
        let owner = pod.config.metadata.clone().unwrap_or_default();
        let name = format!(
            "{}_{}_{}_{}_{}",
            metadata.name, owner.name, owner.namespace, owner.uid, metadata.attempt
        );
        let id = new_id();
        let reservation = self.store.reserve("container", &name, &id)?;
        let wanted = config
            .image
            .as_ref()
            .map(|i| i.image.clone())
            .unwrap_or_default();
        let origin = self.origin(&wanted).await?;
        let snapshotter = self.snapshotter_of(&pod.handler);
        let _blocked = self.block_plugins().await;
        let made = async {
            let mut config = config;
            let base = self.base_of(pod, &id, origin, &mut config, &snapshotter);
            let image = base.await?;
            self.build_container(pod, &id, &name, config, &image, &snapshotter)
                .await
        };
        match made.await {
            Ok(container) => {
                self.store.containers.add(Arc::clone(&container));
                reservation.keep();
                if self.store.pods.find(&pod.id)?.is_none() {
                    // The pod was removed meanwhile, and with it what it had then.
                    self.remove_container(&container).await?;
                    let message = format!("sandbox {:?} was removed meanwhile", pod.id);
                    return Err(Error::not_found(message));
                }
                self.plugins_created(&container).await;
                self.announce(&id, &pod.id, ContainerEventType::ContainerCreatedEvent);
                Ok(id)
            }
            Err(error) => {
                for undone in [
                    self.delete_record(&id).await,
                    self.delete_snapshot(&snapshotter, &id).await,
                    super::files::remove_dirs([
                        self.container_root(&id),
                        self.container_state(&id),
                    ])
                    .await,
                ] {
                    if let Err(failure) = undone {
                        tracing::warn!(container = %id, error = %failure, "container not undone");
                    }
                }
                Err(error)
            }
        }
    }

    async fn build_container(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        id: &str,
        name: &str,
        mut config: ContainerConfig,
        image: &Image,
        snapshotter: &str,
    ) -> Result<Arc<Container>> {
        let rootfs = self.container_rootfs(pod, id, image, snapshotter).await?;
        let stop_signal = stop_signal(&config, &image.process.stop_signal)?;
        let mut volumes = self.mount_images(pod, &mut config, snapshotter).await?;
        let declared = self.declared_volumes(id, &config, image, &rootfs);
        volumes.append(&mut declared.await?);
        let user = self.user_of(&config, image, &rootfs).await?;
        let handler = self.handler(&pod.handler)?;
        let image_name = image.first_name();
        let mut spec = self
            .container_spec(pod, id, &config, image, &user, volumes)
            .await?;
        let labels = self.label_container(pod, id, &config, &mut spec).await?;
        self.inject_devices(&mut spec, cdi_devices(&config)?)
            .await?;
        self.plugins_create(pod, id, &config, image, &mut spec)
            .await?;
        spec::resources::clamp_rlimits(&mut spec);
        let resources = spec::resources::recorded(&spec);
        let made = Arc::new(Container::new(
            NewContainer {
                id: id.to_owned(),
                name: name.to_owned(),
                pod_id: pod.id.clone(),
                image_id: image.id.clone(),
                log_path: log_path(pod, &config),
                stop_signal,
                snapshotter: snapshotter.to_owned(),
                user: encode_user(&user),
                labels,
                config,
            },
            ContainerStatus::created(resources),
        ));
        let labels = super::labels::merged(image, &made.config.labels);
        let record = self.record(New {
            id,
            kind: "container",
            labels: &labels,
            image: image_name,
            handler,
            spec: &spec,
            snapshotter: snapshotter.to_owned(),
            extension: CONTAINER,
            metadata: self.container_metadata(&made, image)?,
            making: false,
            pod_id: &pod.id,
        });
        let created_at = match record.await {
            Ok(record) => record.created_at,
            Err(error) => {
                self.plugins_undo_create(pod, id, &made.config).await;
                return Err(error);
            }
        };
        made.update(|s| s.created_at = created_at);
        Ok(made)
    }

    /// The spec of a container before labels, devices and plugins.
    async fn container_spec(
        &self,
        pod: &Pod,
        id: &str,
        config: &ContainerConfig,
        image: &Image,
        user: &User,
        volumes: Vec<Value>,
    ) -> Result<Value> {
        // Asking a runtime takes a process, and hardly any container wants to know.
        let recursive_readonly = config.mounts.iter().any(|m| m.recursive_read_only) && {
            let features = self.features(&pod.handler, Duration::ZERO).await;
            features.is_ok_and(|f| f.told.recursive_read_only_mounts)
        };
        let spec = container::spec(&container::Input {
            id,
            pod_id: &pod.id,
            pod: &pod.config,
            pause_pid: pod.state().pid,
            hostname: &Self::hostname(&pod.config),
            config,
            image: &image.process,
            image_name: &image.first_name(),
            files: &self.pod_files(&pod.id, &pod.config),
            runtime: &self.config.runtime,
            handler: self.handler(&pod.handler)?,
            user,
            machine: self.machine,
            target_pid: self.target_pid(pod, config)?,
            volumes,
            recursive_readonly,
            classes: &self.classes,
            base: self.base_spec(&pod.handler),
        })?;
        self.check_features(&pod.handler, &spec).await?;
        Ok(spec)
    }

    /// A container's directory and writable layer, which is durable when the container's record is:
    /// that follows, and is waited for.
    async fn container_rootfs(
        &self,
        pod: &Pod,
        id: &str,
        image: &Image,
        snapshotter: &str,
    ) -> Result<Vec<lighter_snapshotter::Mount>> {
        let dir = self.container_root(id);
        let scope = self.scope.with_lease(&pod.id);
        let snapshots = self.db.snapshots(snapshotter)?;
        let parent = image.chain_id.as_deref();
        let labels = crate::userns::snapshot_labels(pod.namespace_options());
        let prepared = snapshots.prepare_ahead(&scope, id, parent, labels.clone());
        let (made, prepared) = tokio::join!(tokio::fs::create_dir_all(&dir), prepared);
        made.map_err(io("create", &dir))?;
        let (rootfs, ticket) = match prepared {
            // It was pulled for another snapshotter.
            Err(error) if parent.is_some() && Error::from_store(&error).is_not_found() => {
                self.images.unpack(image, snapshotter).await?;
                let again = snapshots.prepare_ahead(&scope, id, parent, labels);
                again.await?
            }
            other => other?,
        };
        ticket.with_next();
        Ok(rootfs)
    }

    /// Who the container runs as, by the tables of its root filesystem.
    async fn user_of(
        &self,
        config: &ContainerConfig,
        image: &Image,
        rootfs: &[lighter_snapshotter::Mount],
    ) -> Result<User> {
        let security = config
            .linux
            .as_ref()
            .and_then(|l| l.security_context.clone());
        let security = security.unwrap_or_default();
        let text = user::wanted(&security, &image.process.user)?;
        let chain = image.chain_id.as_deref().unwrap_or_default();
        if let Some(tables) = self.tables.get(chain) {
            return user::resolve(&tables, &text, &security);
        }
        let (below, rootfs) = (self.state.clone(), rootfs.to_vec());
        let read = tokio::task::spawn_blocking(move || {
            let failed = |e: lighter_snapshotter::mount::Error| {
                Error::unknown(lighter_proto::errdefs::render(&e))
            };
            let root = TempMount::new(&below, &rootfs, Access::ReadOnly).map_err(failed)?;
            Tables::read(root.path()).map(Arc::new)
        });
        let tables = read.await.map_err(|e| Error::unknown(e.to_string()))??;
        self.tables.keep(chain, &tables);
        user::resolve(&tables, &text, &security)
    }

    /// Pid of the container whose pid namespace is joined.
    fn target_pid(&self, pod: &Pod, config: &ContainerConfig) -> Result<Option<u32>> {
        let options = config
            .linux
            .as_ref()
            .and_then(|l| l.security_context.as_ref())
            .and_then(|s| s.namespace_options.as_ref());
        let Some(options) = options.filter(|o| o.pid() == NamespaceMode::Target) else {
            return Ok(None);
        };
        let target = self.store.containers.get(&options.target_id)?;
        let status = target.status();
        if target.pod_id != pod.id || status.state != ContainerState::ContainerRunning {
            return Err(Error::unknown(format!(
                "invalid target container {:?}: not running in the same sandbox",
                target.id
            )));
        }
        Ok(Some(status.pid))
    }

    /// Starts a container that was made and not started.
    pub(super) async fn start_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
    ) -> Result<()> {
        let turn = container
            .busy
            .take("StartContainer", &container.name)
            .await?;
        self.check_restore(container)?;
        let mut refused = None;
        container.update(|s| {
            if s.state != ContainerState::ContainerCreated {
                refused = Some(format!("container is in {} state", s.state.as_str_name()));
            } else if s.removing {
                refused = Some("container is in removing state, can't be started".to_owned());
            } else {
                s.starting = true;
            }
        });
        if let Some(reason) = refused {
            let message = format!(
                "failed to set starting state for container {:?}: {reason}",
                container.id
            );
            return Err(Error::unknown(message));
        }
        turn.at("create and start the task");
        match self.launch(container).await {
            Ok(handle) => {
                self.save_status(container).await;
                self.plugins_started(container).await;
                let kind = ContainerEventType::ContainerStartedEvent;
                self.announce(&container.id, &container.pod_id, kind);
                // Not before: its end comes after its start, however short its life.
                self.watch_container(Arc::clone(container), handle);
                Ok(())
            }
            Err(error) => {
                if let Err(failure) = self.kill_task(&container.id).await {
                    tracing::warn!(container = %container.id, error = %failure, "task not undone");
                }
                self.end_output(&container.id);
                container.update(|s| {
                    s.starting = false;
                    s.state = ContainerState::ContainerExited;
                    s.exit_code = START_FAILED;
                    s.reason = "StartError".to_owned();
                    s.message = error.to_string();
                    s.finished_at = Some(SystemTime::now());
                });
                self.save_status(container).await;
                Err(error.context("failed to start container"))
            }
        }
    }

    async fn launch(&self, container: &Container) -> Result<Handle> {
        let pod = self.store.pods.get(&container.pod_id)?;
        if !pod.is_ready() {
            return Err(Error::unknown(format!(
                "sandbox container {:?} is not running",
                pod.id
            )));
        }
        let record = self.db.containers().get(&self.scope, &container.id)?;
        let snapshots = self.db.snapshots(&container.snapshotter)?;
        let handler = self.handler(&pod.handler)?;
        let runtime = task_runtime(handler);
        let rootfs = snapshots.mounts(&self.scope, &container.id);
        let (rootfs, stdio) = tokio::join!(rootfs, self.stdio(container, &runtime));
        let (rootfs, stdio) = (rootfs?, stdio?);
        let checkpoint = self.prepare_restore(container, &rootfs).await?;
        let restores = checkpoint.is_some();
        let mut task = CreateTask {
            rootfs: self.labelled(rootfs, &record.spec.value)?,
            stdio,
            runtime,
            checkpoint,
            ..CreateTask::of(&record)
        };
        if handler.takes_runc_options()
            && crate::userns::own(namespace_options(&container.config)).is_some()
        {
            let known = task.options.as_ref();
            let options = known.and_then(|o| any::unpack::<Options>(o).ok());
            let (io_uid, io_gid) = host_owner(&serde_json::from_slice(&record.spec.value)?);
            task.options = Some(any::pack(&Options {
                io_uid,
                io_gid,
                ..options.unwrap_or_default()
            }));
        }
        let created = self.tasks.create(&self.scope, task).await;
        let handle =
            created.map_err(|e| Error::from(e).context("failed to create containerd task"))?;
        self.plugins_start(container, handle.init().pid).await?;
        // Before it starts: it may have ended when the answer comes.
        let started_at = SystemTime::now();
        let started = handle.start("").await;
        let pid = started.map_err(|e| Error::from(e).context("failed to start containerd task"))?;
        container.update(|s| {
            s.starting = false;
            s.state = ContainerState::ContainerRunning;
            s.pid = pid;
            s.started_at = Some(started_at);
        });
        if restores {
            self.forget_restore(&container.id).await;
        }
        Ok(handle)
    }

    /// The log that the shim writes, or the fifos that it writes to where it knows no logs, and the
    /// fifo that attached clients write to. Without a log the output goes nowhere, but can be attached
    /// to.
    async fn stdio(&self, container: &Container, runtime: &str) -> Result<Stdio> {
        let path = container.log_path.as_deref().unwrap_or(Path::new(NO_LOG));
        if let Some(dir) = path.parent() {
            tokio::fs::create_dir_all(dir)
                .await
                .map_err(io("create", dir))?;
        }
        let tty = container.config.tty;
        let stdin = if container.config.stdin {
            let fifo = self.stdin_fifo(&container.id);
            make_fifo(&fifo).await?;
            fifo.display().to_string()
        } else {
            String::new()
        };
        let (stdout, stderr) = if writes_logs(runtime) {
            let most = self.config.runtime.max_container_log_line_size;
            let uri = format!("cri-log://{}?max={most}", escape(path));
            let stderr = if tty { String::new() } else { uri.clone() };
            (uri, stderr)
        } else {
            self.make_output(container).await?
        };
        Ok(Stdio {
            stdin,
            stdout,
            stderr,
            terminal: tty,
        })
    }

    /// Where attached clients write to a container's input.
    pub(super) fn stdin_fifo(&self, id: &str) -> PathBuf {
        self.container_state(id).join("stdin")
    }
}

pub(super) async fn make_fifo(path: &Path) -> Result<()> {
    if let Some(dir) = path.parent() {
        tokio::fs::create_dir_all(dir)
            .await
            .map_err(io("create", dir))?;
    }
    match nix::unistd::mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR) {
        // Of a start that failed.
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(error) => Err(io("make fifo", path)(error.into())),
    }
}

/// A path in a URI: everything but the plainest characters as `%XX`.
fn escape(path: &Path) -> String {
    let mut text = String::new();
    for byte in path.as_os_str().as_encoded_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-_.~".contains(byte) {
            text.push(char::from(*byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

fn encode_user(user: &User) -> ContainerUser {
    ContainerUser {
        linux: Some(LinuxContainerUser {
            uid: user.uid.into(),
            gid: user.gid.into(),
            supplemental_groups: user.additional_gids.iter().map(|g| i64::from(*g)).collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_path_is_escaped() {
        assert_eq!(escape(Path::new("/a b?c")), "/a%20b%3Fc");
    }
}
