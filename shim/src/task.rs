//! One container: its state machine, its runtime, its streams, and who may touch them when.
//!
//! Operations on init take turns (`ops`); none of them is seen by another container. Execs start in
//! parallel, the state machine keeps them apart. The state itself is behind a lock that is never
//! held across an await, so `State`, `Wait` and exits are never kept waiting by a runtime.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use lighter_proto::containerd::events;
use lighter_proto::containerd::runc::v1::{CheckpointOptions, Options, ProcessDetails};
use lighter_proto::containerd::task::v3 as api;
use lighter_proto::containerd::types::Mount;
use lighter_proto::containerd::v1::types::{ProcessInfo, Status as WireStatus};
use lighter_proto::time::to_timestamp;
use prost_types::Any;
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::bundle::{self, Spec};
use crate::cgroup::{Cgroup, OomWatch};
use crate::error::{Error, Result};
use crate::io::{ChildStdio, Context, ProcessIo, Stdio};
use crate::mount;
use crate::process::{Container, Effect, Exit, Input, Phase, Refusal, Status};
use crate::publish::Publisher;
use crate::reaper::Reaper;
use crate::runtime::builtin::Library;
use crate::runtime::{self, Create, Exec, OciRuntime, Restore, Running, Target};
use crate::sys;

/// How long a delete waits for output that nobody reads.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// How long a delete waits for a process it killed.
const EXIT_LIMIT: Duration = Duration::from_secs(10);
/// Longest id of a container or exec.
const MAX_ID_BYTES: usize = 128;

/// What every task of this shim shares.
#[derive(Debug)]
pub(crate) struct Core {
    /// Namespace of all containers here.
    pub(crate) namespace: String,
    /// Hands out exits.
    pub(crate) reaper: Reaper,
    /// Sends events.
    pub(crate) publisher: Publisher,
    /// Owns every background task.
    pub(crate) tracker: TaskTracker,
    /// Directory of console sockets.
    pub(crate) socket_dir: PathBuf,
    /// Our own OCI runtime.
    pub(crate) library: Library,
}

/// An exec that was registered.
#[derive(Debug)]
struct ExecData {
    stdio: Stdio,
    spec: Vec<u8>,
    io: Option<Arc<ProcessIo>>,
    /// Input was closed before the start.
    input_closed: bool,
}

#[derive(Debug)]
struct Inner {
    machine: Container,
    execs: HashMap<String, ExecData>,
    cgroup: Option<Cgroup>,
    oom: Option<OomWatch>,
    /// Streams of init that a restore will take.
    restore: Option<ChildStdio>,
}

/// One container.
#[derive(Debug)]
pub(crate) struct Task {
    core: Arc<Core>,
    id: String,
    bundle: PathBuf,
    options: Options,
    runtime: Box<dyn OciRuntime>,
    io: Arc<ProcessIo>,
    checkpoint: Option<(PathBuf, Option<PathBuf>)>,
    /// One operation on init at a time.
    ops: tokio::sync::Mutex<()>,
    inner: Mutex<Inner>,
    /// Woken by every change of state.
    changed: Notify,
}

/// Checks an id that becomes part of paths.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn check_id(id: &str) -> Result<()> {
    let good = !id.is_empty()
        && id.len() <= MAX_ID_BYTES
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-+@:".contains(&b));
    if good {
        Ok(())
    } else {
        Err(Error::InvalidArgument(format!("invalid id {id:?}")))
    }
}

impl Task {
    /// Creates a container as a request asks. A failure leaves nothing behind and tells nobody.
    ///
    /// # Errors
    /// `InvalidArgument` for what the request has wrong; else what the system or the runtime said.
    pub(crate) async fn create(
        core: Arc<Core>,
        request: api::CreateTaskRequest,
        options: Options,
    ) -> Result<(Arc<Self>, u32)> {
        let bundle = PathBuf::from(&request.bundle);
        if !bundle.is_absolute() {
            return Err(Error::InvalidArgument(format!(
                "bundle {:?}: not absolute",
                request.bundle
            )));
        }
        bundle::record(&bundle, &options)?;
        let rootfs = bundle.join("rootfs");
        let made = Self::create_recorded(&core, &request, options, bundle.clone(), &rootfs).await;
        if made.is_err() {
            if !request.rootfs.is_empty() {
                mount::unmount(&rootfs);
            }
            bundle::forget(&bundle);
        }
        made
    }

    async fn create_recorded(
        core: &Arc<Core>,
        request: &api::CreateTaskRequest,
        options: Options,
        bundle: PathBuf,
        rootfs: &Path,
    ) -> Result<(Arc<Self>, u32)> {
        mount::mount_all(&core.reaper, &request.rootfs, rootfs).await?;
        let target = Target::new(
            &request.id,
            bundle.clone(),
            &core.namespace,
            options.clone(),
        );
        let runtime = runtime::open(target, core)?;
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let context = io_context(core, &request.id, &options);
        let (io, child) = ProcessIo::open(&stdio, &context).await?;
        let io = Arc::new(io);
        let mut task = Self {
            core: core.clone(),
            id: request.id.clone(),
            bundle,
            options: options.clone(),
            runtime,
            io: io.clone(),
            checkpoint: None,
            ops: tokio::sync::Mutex::new(()),
            inner: Mutex::new(Inner {
                machine: Container::created(&request.id, 0),
                execs: HashMap::new(),
                cgroup: None,
                oom: None,
                restore: None,
            }),
            changed: Notify::new(),
        };
        if !request.checkpoint.is_empty() {
            let parent = Some(&request.parent_checkpoint).filter(|p| !p.is_empty());
            task.checkpoint = Some((
                PathBuf::from(&request.checkpoint),
                parent.map(PathBuf::from),
            ));
            task.locked().restore = Some(child);
            let task = Arc::new(task);
            task.announce_create(&request.rootfs, &request.checkpoint, 0);
            return Ok((task, 0));
        }
        let created = match task.runtime.create(Create { stdio: child }).await {
            Ok(mut running) => match task.adopt(&io, &mut running).await {
                Ok(()) => Ok(running),
                Err(error) => {
                    // The container exists, but without its streams it is of no use.
                    if let Err(error) = task.runtime.delete(true).await {
                        warn!(container_id = %task.id, %error, "cannot delete after a failed create");
                    }
                    Err(error)
                }
            },
            Err(error) => Err(error),
        };
        let running = match created {
            Ok(running) => running,
            Err(error) => {
                io.close().await;
                return Err(error);
            }
        };
        let pid = running.pid;
        task.locked().machine = Container::created(&request.id, pid);
        let task = Arc::new(task);
        task.watch_cgroup(pid);
        task.announce_create(&request.rootfs, "", pid);
        task.watch_exit(None, running);
        info!(container_id = %task.id, pid, "container created");
        Ok((task, pid))
    }

    async fn adopt(&self, io: &ProcessIo, running: &mut Running) -> Result<()> {
        let Some(terminal) = running.terminal.take() else {
            return Ok(());
        };
        io.start_terminal(terminal, &io_context(&self.core, &self.id, &self.options))
            .await
    }

    fn announce_create(&self, rootfs: &[Mount], checkpoint: &str, pid: u32) {
        let stdio = self.io.stdio();
        self.core.publisher.publish(
            "/tasks/create",
            &events::TaskCreate {
                container_id: self.id.clone(),
                bundle: self.bundle.display().to_string(),
                rootfs: rootfs.to_vec(),
                io: Some(events::TaskIo {
                    stdin: stdio.stdin.clone(),
                    stdout: stdio.stdout.clone(),
                    stderr: stdio.stderr.clone(),
                    terminal: stdio.terminal,
                }),
                checkpoint: checkpoint.to_owned(),
                pid,
            },
        );
    }

    fn locked(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds the container's cgroup while init is surely alive, and watches it for OOM kills.
    fn watch_cgroup(self: &Arc<Self>, pid: u32) {
        let cgroup = match Cgroup::of(pid) {
            Ok(cgroup) => cgroup,
            Err(error) => {
                warn!(container_id = %self.id, %error, "no cgroup: no metrics, no OOM events");
                return;
            }
        };
        match cgroup.watch_oom() {
            Ok(watch) => {
                self.locked().oom = Some(watch.clone());
                let task = self.clone();
                self.core.tracker.spawn(async move {
                    while watch.changed().await {
                        task.report_oom();
                    }
                });
            }
            Err(error) => warn!(container_id = %self.id, %error, "no OOM events"),
        }
        self.locked().cgroup = Some(cgroup);
    }

    fn report_oom(&self) {
        let inner = self.locked();
        self.report_oom_locked(&inner);
    }

    /// Announces OOM kills that were not announced yet.
    fn report_oom_locked(&self, inner: &Inner) {
        let Some(watch) = &inner.oom else { return };
        for _ in 0..watch.take() {
            let event = events::TaskOom {
                container_id: self.id.clone(),
            };
            self.core.publisher.publish("/tasks/oom", &event);
        }
    }

    /// Waits for a process's exit in the background.
    fn watch_exit(self: &Arc<Self>, exec: Option<String>, running: Running) {
        let task = self.clone();
        self.core.tracker.spawn(async move {
            let exit = running.exit.exit().await;
            task.exited(exec, exit);
        });
    }

    fn exited(self: &Arc<Self>, exec: Option<String>, exit: Exit) {
        {
            let inner = self.locked();
            let io = match exec.as_deref() {
                None => Some(self.io.clone()),
                Some(id) => inner.execs.get(id).and_then(|data| data.io.clone()),
            };
            if let Some(io) = io {
                io.finish();
            }
        }
        // The process may have been deleted by force meanwhile.
        let _ = self.apply(Input::Exited(exec, exit));
    }

    /// Feeds the state machine and carries out what it says.
    fn apply(self: &Arc<Self>, input: Input) -> std::result::Result<(), Refusal> {
        let mut inner = self.locked();
        let effects = inner.machine.apply(input)?;
        for effect in effects {
            self.carry_out(&mut inner, effect);
        }
        drop(inner);
        self.changed.notify_waiters();
        Ok(())
    }

    fn carry_out(self: &Arc<Self>, inner: &mut Inner, effect: Effect) {
        let publisher = &self.core.publisher;
        let container_id = self.id.clone();
        match effect {
            Effect::ExecAdded(exec_id) => publisher.publish(
                "/tasks/exec-added",
                &events::TaskExecAdded {
                    container_id,
                    exec_id,
                },
            ),
            Effect::Started(None, pid) => {
                publisher.publish("/tasks/start", &events::TaskStart { container_id, pid });
            }
            Effect::Started(Some(exec_id), pid) => publisher.publish(
                "/tasks/exec-started",
                &events::TaskExecStarted {
                    container_id,
                    exec_id,
                    pid,
                },
            ),
            Effect::Exited(who, pid, exit) => {
                if who.is_none() {
                    self.report_oom_locked(inner);
                    if let Some(watch) = inner.oom.take() {
                        watch.stop();
                    }
                }
                info!(container_id = %self.id, pid, status = exit.status, "process exited");
                let id = who.unwrap_or_else(|| self.id.clone());
                publisher.publish(
                    "/tasks/exit",
                    &events::TaskExit {
                        container_id,
                        id,
                        pid,
                        exit_status: exit.status,
                        exited_at: Some(to_timestamp(exit.at)),
                    },
                );
            }
            Effect::InitGone { thaw } => {
                let task = self.clone();
                self.core
                    .tracker
                    .spawn(async move { task.clear_out(thaw).await });
            }
            Effect::Paused => {
                publisher.publish("/tasks/paused", &events::TaskPaused { container_id });
            }
            Effect::Resumed => {
                publisher.publish("/tasks/resumed", &events::TaskResumed { container_id });
            }
        }
    }

    /// Init is gone: what else runs in the container goes too.
    async fn clear_out(&self, thaw: bool) {
        if thaw && let Err(error) = self.runtime.resume().await {
            warn!(container_id = %self.id, %error, "cannot thaw");
        }
        // Without a readable spec the safe assumption is that processes are left.
        let private = Spec::read(&self.bundle).is_ok_and(|spec| spec.has_private_pids());
        if !private
            && let Err(error) = self.runtime.kill(9, true).await
            && !matches!(error, Error::NotFound(_))
        {
            warn!(container_id = %self.id, %error, "cannot kill what init left behind");
        }
    }

    /// Pid of init; 0 before there is one.
    pub(crate) fn pid(&self) -> u32 {
        self.locked()
            .machine
            .process(None)
            .map_or(0, |process| process.pid)
    }

    /// Starts init or an exec.
    ///
    /// # Errors
    /// `FailedPrecondition` by state, else the runtime's.
    pub(crate) async fn start(self: &Arc<Self>, exec: Option<String>) -> Result<u32> {
        match exec {
            None => self.start_init().await,
            Some(id) => self.start_exec(id).await,
        }
    }

    async fn start_init(self: &Arc<Self>) -> Result<u32> {
        let _turn = self.ops.lock().await;
        self.apply(Input::Start(None))?;
        let started = match &self.checkpoint {
            None => self.runtime.start().await.map(|()| (self.pid(), None)),
            Some(_) => self
                .restore()
                .await
                .map(|running| (running.pid, Some(running))),
        };
        match started {
            Ok((pid, restored)) => {
                self.apply(Input::Started(None, pid))?;
                if let Some(running) = restored {
                    self.watch_cgroup(pid);
                    self.watch_exit(None, running);
                }
                info!(container_id = %self.id, pid, "container started");
                Ok(pid)
            }
            Err(error) => {
                self.apply(Input::StartFailed(None, SystemTime::now()))?;
                Err(error)
            }
        }
    }

    async fn restore(&self) -> Result<Running> {
        let stdio = self.locked().restore.take();
        let (Some((image, parent)), Some(stdio)) = (self.checkpoint.clone(), stdio) else {
            return Err(Error::Precondition(
                "cannot restore a second time".to_owned(),
            ));
        };
        let mut running = self
            .runtime
            .restore(Restore {
                image,
                parent,
                stdio,
            })
            .await?;
        self.adopt(&self.io, &mut running).await?;
        Ok(running)
    }

    async fn start_exec(self: &Arc<Self>, id: String) -> Result<u32> {
        let (stdio, spec) = {
            let inner = self.locked();
            let data = inner
                .execs
                .get(&id)
                .ok_or_else(|| Refusal::NoExec(id.clone()))?;
            (data.stdio.clone(), data.spec.clone())
        };
        self.apply(Input::Start(Some(id.clone())))?;
        match self.launch_exec(&id, &stdio, spec).await {
            Ok(running) => {
                let pid = running.pid;
                self.apply(Input::Started(Some(id.clone()), pid))?;
                self.watch_exit(Some(id), running);
                Ok(pid)
            }
            Err(error) => {
                self.apply(Input::StartFailed(Some(id), SystemTime::now()))?;
                Err(error)
            }
        }
    }

    async fn launch_exec(&self, id: &str, stdio: &Stdio, spec: Vec<u8>) -> Result<Running> {
        let context = io_context(&self.core, &self.id, &self.options);
        let (io, child) = ProcessIo::open(stdio, &context).await?;
        let io = Arc::new(io);
        let exec = Exec {
            exec_id: id.to_owned(),
            spec,
            stdio: child,
        };
        let launched = match self.runtime.exec(exec).await {
            Ok(mut running) => match self.adopt(&io, &mut running).await {
                Ok(()) => Ok(running),
                Err(error) => {
                    let _ = sys::kill(running.pid, 9);
                    Err(error)
                }
            },
            Err(error) => Err(error),
        };
        if launched.is_err() {
            io.close().await;
        } else if let Some(data) = self.locked().execs.get_mut(id) {
            if data.input_closed {
                io.close_stdin();
            }
            data.io = Some(io);
        }
        launched
    }

    /// Registers an exec.
    ///
    /// # Errors
    /// `AlreadyExists`, `InvalidArgument`, `FailedPrecondition`.
    pub(crate) fn add_exec(self: &Arc<Self>, request: api::ExecProcessRequest) -> Result<()> {
        check_id(&request.exec_id)?;
        let spec = request.spec.map(|any| any.value).unwrap_or_default();
        if serde_json::from_slice::<serde::de::IgnoredAny>(&spec).is_err() {
            return Err(Error::InvalidArgument(format!(
                "exec {}: its spec is not JSON",
                request.exec_id
            )));
        }
        let data = ExecData {
            stdio: Stdio {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
            spec,
            io: None,
            input_closed: false,
        };
        self.apply(Input::ExecAdd(request.exec_id.clone()))?;
        self.locked().execs.insert(request.exec_id, data);
        Ok(())
    }

    /// What a client sees of a process.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) fn state(&self, exec: Option<String>) -> Result<api::StateResponse> {
        let inner = self.locked();
        let missing = || Refusal::NoExec(exec.clone().unwrap_or_default());
        let process = inner.machine.process(exec.as_deref()).ok_or_else(missing)?;
        let status = inner.machine.status(exec.as_deref()).ok_or_else(missing)?;
        let stdio = match exec.as_deref() {
            None => self.io.stdio(),
            Some(id) => &inner.execs.get(id).ok_or_else(missing)?.stdio,
        };
        Ok(api::StateResponse {
            // Clients of execs find the exec's id here.
            id: exec.clone().unwrap_or_else(|| self.id.clone()),
            bundle: self.bundle.display().to_string(),
            pid: process.pid,
            status: wire_status(status).into(),
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            exit_status: process.exit.map_or(0, |exit| exit.status),
            exited_at: process.exit.map(|exit| to_timestamp(exit.at)),
            exec_id: exec.unwrap_or_default(),
        })
    }

    /// Waits until a process ended and its exit was announced.
    ///
    /// # Errors
    /// `NotFound`, also when the process is deleted meanwhile.
    pub(crate) async fn wait(&self, exec: Option<String>) -> Result<Exit> {
        loop {
            let changed = self.changed.notified();
            {
                let inner = self.locked();
                let missing = || Refusal::NoExec(exec.clone().unwrap_or_default());
                let process = inner.machine.process(exec.as_deref()).ok_or_else(missing)?;
                if let Some(exit) = process.exit {
                    return Ok(exit);
                }
            }
            changed.await;
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `NotFound` for what ended, `FailedPrecondition` for what has no process yet.
    pub(crate) async fn kill(&self, exec: Option<String>, signal: u32, all: bool) -> Result<()> {
        if let Some(id) = exec {
            let pid = {
                let inner = self.locked();
                let process = inner
                    .machine
                    .process(Some(&id))
                    .ok_or_else(|| Refusal::NoExec(id.clone()))?;
                if inner.machine.gone(Some(&id)) {
                    return Err(Refusal::Finished.into());
                }
                if process.phase != Phase::Running {
                    return Err(Error::Precondition("process not created".to_owned()));
                }
                process.pid
            };
            return sys::kill(pid, signal).map_err(|error| match error.raw_os_error() {
                Some(libc::ESRCH) => Refusal::Finished.into(),
                Some(libc::EINVAL) => Error::InvalidArgument(format!("unknown signal {signal}")),
                _ => Error::system("kill")(error),
            });
        }
        {
            let inner = self.locked();
            if inner.machine.init_gone() && !all {
                return Err(Refusal::Finished.into());
            }
            if inner.machine.process(None).is_none_or(|init| init.pid == 0) {
                return Err(Error::Precondition("process not created".to_owned()));
            }
        }
        self.runtime.kill(signal, all).await
    }

    /// Deletes an exec, or the whole container; then the owner forgets this task.
    ///
    /// # Errors
    /// `FailedPrecondition` while it runs; else what the runtime said.
    pub(crate) async fn delete(
        self: &Arc<Self>,
        exec: Option<String>,
    ) -> Result<api::DeleteResponse> {
        match exec {
            Some(id) => self.delete_exec(id).await,
            None => self.delete_init().await,
        }
    }

    async fn delete_exec(self: &Arc<Self>, id: String) -> Result<api::DeleteResponse> {
        let process = {
            let inner = self.locked();
            let process = inner.machine.process(Some(&id));
            process
                .cloned()
                .ok_or_else(|| Refusal::NoExec(id.clone()))?
        };
        self.apply(Input::Delete(Some(id.clone())))?;
        let data = self.locked().execs.remove(&id);
        if let Some(io) = data.and_then(|data| data.io) {
            io.drained(DRAIN_LIMIT).await;
            io.close().await;
        }
        let _ = std::fs::remove_file(bundle::exec_pid_file(&self.bundle, &id));
        Ok(deleted(process.pid, process.exit))
    }

    async fn delete_init(self: &Arc<Self>) -> Result<api::DeleteResponse> {
        let _turn = self.ops.lock().await;
        self.apply(Input::Delete(None))?;
        let (pid, alive) = {
            let inner = self.locked();
            let init = inner.machine.process(None).expect("init is always known");
            (init.pid, init.phase == Phase::Created && init.pid != 0)
        };
        if alive {
            // Created and never started: it ends now, and its exit is announced before the delete.
            self.runtime.delete(true).await?;
            let exit = tokio::time::timeout(EXIT_LIMIT, self.wait(None)).await;
            exit.map_err(|_| Error::Timeout {
                what: format!("exit of process {pid}"),
                seconds: EXIT_LIMIT.as_secs(),
            })??;
        }
        self.io.drained(DRAIN_LIMIT).await;
        if pid != 0 {
            self.runtime.delete(false).await?;
        }
        self.io.close().await;
        let execs: Vec<_> = self.locked().execs.drain().collect();
        for io in execs.into_iter().filter_map(|(_, data)| data.io) {
            io.close().await;
        }
        mount::unmount(&self.bundle.join("rootfs"));
        let exit = self
            .locked()
            .machine
            .process(None)
            .and_then(|init| init.exit);
        let response = deleted(pid, exit);
        self.core.publisher.publish(
            "/tasks/delete",
            &events::TaskDelete {
                container_id: self.id.clone(),
                pid,
                exit_status: response.exit_status,
                exited_at: response.exited_at,
                id: String::new(),
            },
        );
        info!(container_id = %self.id, "container deleted");
        Ok(response)
    }

    /// Freezes the container.
    ///
    /// # Errors
    /// `FailedPrecondition` by state, else the runtime's.
    pub(crate) async fn pause(self: &Arc<Self>) -> Result<()> {
        let _turn = self.ops.lock().await;
        self.apply(Input::Pause)?;
        let paused = self.runtime.pause().await;
        self.apply(Input::PauseDone {
            frozen: paused.is_ok(),
        })?;
        paused
    }

    /// Thaws the container.
    ///
    /// # Errors
    /// `FailedPrecondition` by state, else the runtime's.
    pub(crate) async fn resume(self: &Arc<Self>) -> Result<()> {
        let _turn = self.ops.lock().await;
        self.apply(Input::Resume)?;
        let resumed = self.runtime.resume().await;
        self.apply(Input::ResumeDone {
            thawed: resumed.is_ok(),
        })?;
        resumed
    }

    /// Lists the container's processes.
    ///
    /// # Errors
    /// The runtime's.
    pub(crate) async fn pids(&self) -> Result<Vec<ProcessInfo>> {
        let pids = self.runtime.pids().await?;
        let inner = self.locked();
        let exec_of = |pid: u32| inner.machine.execs().find(|(_, exec)| exec.pid == pid);
        Ok(pids
            .into_iter()
            .map(|pid| ProcessInfo {
                pid,
                info: exec_of(pid).map(|(id, _)| {
                    lighter_proto::any::pack(&ProcessDetails {
                        exec_id: id.to_owned(),
                    })
                }),
            })
            .collect())
    }

    /// Writes a checkpoint.
    ///
    /// # Errors
    /// `FailedPrecondition` by state, else the runtime's.
    pub(crate) async fn checkpoint(&self, path: PathBuf, options: CheckpointOptions) -> Result<()> {
        let _turn = self.ops.lock().await;
        match self.locked().machine.status(None) {
            Some(Status::Created) => {
                return Err(Error::Precondition(
                    "cannot checkpoint a task in created state".to_owned(),
                ));
            }
            Some(Status::Stopped) => {
                return Err(Error::Precondition(
                    "cannot checkpoint a stopped container".to_owned(),
                ));
            }
            _ => {}
        }
        self.runtime.checkpoint(path, options).await
    }

    /// Changes limits.
    ///
    /// # Errors
    /// `FailedPrecondition` when stopped, else the runtime's.
    pub(crate) async fn update(&self, resources: Option<Any>) -> Result<()> {
        let resources = resources.map(|any| any.value).unwrap_or_default();
        if serde_json::from_slice::<serde::de::IgnoredAny>(&resources).is_err() {
            return Err(Error::InvalidArgument("resources are not JSON".to_owned()));
        }
        let _turn = self.ops.lock().await;
        if self.locked().machine.init_gone() {
            return Err(Error::Precondition(
                "cannot update a stopped container".to_owned(),
            ));
        }
        self.runtime.update(resources).await
    }

    /// Reads the container's metrics.
    ///
    /// # Errors
    /// `NotFound` without a cgroup.
    pub(crate) fn stats(&self) -> Result<Any> {
        let cgroup = self.locked().cgroup.clone();
        cgroup
            .ok_or_else(|| Error::NotFound("cgroup does not exist".to_owned()))?
            .stats()
    }

    /// Streams of a process, once it has some.
    ///
    /// # Errors
    /// `NotFound` for an unknown exec, `FailedPrecondition` for one that was not started.
    pub(crate) fn io(&self, exec: Option<&str>) -> Result<Arc<ProcessIo>> {
        match exec {
            None => Ok(self.io.clone()),
            Some(id) => {
                let inner = self.locked();
                let data = inner
                    .execs
                    .get(id)
                    .ok_or_else(|| Refusal::NoExec(id.to_owned()))?;
                data.io
                    .clone()
                    .ok_or_else(|| Error::Precondition("process not created".to_owned()))
            }
        }
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` for an exec that ended.
    pub(crate) fn resize(&self, exec: Option<&str>, width: u32, height: u32) -> Result<()> {
        if exec.is_some() && self.locked().machine.gone(exec) {
            return Err(Error::Precondition(
                "cannot resize a stopped process".to_owned(),
            ));
        }
        match self.io(exec) {
            Ok(io) => io.resize(width, height),
            // Registered and not started: there is no terminal to resize yet.
            Err(Error::Precondition(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Ends a process's input.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) fn close_stdin(&self, exec: Option<&str>) -> Result<()> {
        match self.io(exec) {
            Ok(io) => {
                io.close_stdin();
                Ok(())
            }
            Err(Error::Precondition(_)) => {
                // Registered and not started: remembered for then.
                let mut inner = self.locked();
                if let Some(data) = exec.and_then(|id| inner.execs.get_mut(id)) {
                    data.input_closed = true;
                }
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

fn io_context<'a>(core: &'a Core, id: &'a str, options: &Options) -> Context<'a> {
    Context {
        id,
        namespace: &core.namespace,
        owner: (options.io_uid, options.io_gid),
        reaper: &core.reaper,
    }
}

fn deleted(pid: u32, exit: Option<Exit>) -> api::DeleteResponse {
    api::DeleteResponse {
        pid,
        exit_status: exit.map_or(0, |exit| exit.status),
        exited_at: exit.map(|exit| to_timestamp(exit.at)),
    }
}

fn wire_status(status: Status) -> WireStatus {
    match status {
        Status::Created => WireStatus::Created,
        Status::Running => WireStatus::Running,
        Status::Pausing => WireStatus::Pausing,
        Status::Paused => WireStatus::Paused,
        Status::Stopped => WireStatus::Stopped,
    }
}
