//! One container: its state machine, its runtime, its streams, and who may touch them when.
//!
//! Operations on init take turns (`ops`); none of them is seen by another container. Execs start in
//! parallel, the state machine keeps them apart. The state itself is behind a lock that is never
//! held across an await, so `State`, `Wait` and exits are never kept waiting by a runtime.

mod create;
mod execs;
mod watch;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use lighter_proto::containerd::events;
use lighter_proto::containerd::runc::v1::{CheckpointOptions, Options, ProcessDetails};
use lighter_proto::containerd::task::v3 as api;
use lighter_proto::containerd::v1::types::{ProcessInfo, Status as WireStatus};
use lighter_proto::time::to_timestamp;
use prost_types::Any;
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;
use tracing::{debug, info};

use crate::cgroup::{Cgroup, OomWatch};
use crate::error::{Error, Result};
use crate::io::{ChildStdio, Context, ProcessIo, Stdio};
use crate::mount;
use crate::process::{Container, Exit, Input, Phase, Refusal, Status};
use crate::publish::Publisher;
use crate::reaper::Reaper;
use crate::runtime::builtin::Library;
use crate::runtime::{OciRuntime, Restore, Running};
use crate::sys;

/// How long a delete waits for output that nobody reads.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// How long a delete waits for a process it killed.
const EXIT_LIMIT: Duration = Duration::from_secs(10);
/// How long after a delete the file systems of its mounts are ended: the answer has left by then.
const UNMOUNT_AFTER: Duration = Duration::from_millis(5);
/// The signal that no process survives, unless it is frozen.
const SIGKILL: u32 = 9;
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
    /// Whether init's end takes every other process with it, if the runtime has said.
    private_pids: Option<bool>,
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
    async fn adopt(&self, io: &ProcessIo, running: &mut Running) -> Result<()> {
        io.started();
        let Some(terminal) = running.terminal.take() else {
            return Ok(());
        };
        io.start_terminal(terminal, &io_context(&self.core, &self.id, &self.options))
            .await
    }

    fn locked(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
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
                    self.watch_cgroup(pid, None);
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

    /// What a client sees of a process.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) fn state(&self, exec: Option<String>) -> Result<api::StateResponse> {
        let inner = self.locked();
        let missing = || Refusal::NoExec(exec.clone().unwrap_or_default());
        let process = inner.machine.process(exec.as_deref()).ok_or_else(missing)?;
        let status = inner.machine.status(exec.as_deref()).ok_or_else(missing)?;
        // Of an exec that could not be started nobody is told an exit.
        let exit = process.exit.filter(|_| process.phase == Phase::Stopped);
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
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| to_timestamp(exit.at)),
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
        self.runtime.kill(signal, all).await?;
        // A frozen process dies only when it thaws.
        let frozen = self.locked().machine.status(None) == Some(Status::Paused);
        if frozen
            && signal == SIGKILL
            && let Err(error) = self.runtime.resume().await
        {
            debug!(container_id = %self.id, %error, "nothing to thaw after the kill");
        }
        Ok(())
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
        let rootfs = self.bundle.join("rootfs");
        if mount::is_on_loop(&rootfs) {
            mount::unmount_apart(&self.core.reaper, &rootfs).await;
        }
        let ending = mount::detach(&rootfs);
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
        self.core.tracker.spawn(async move {
            // Nobody has to wait for it; a shim that ends sooner closes them then.
            tokio::time::sleep(UNMOUNT_AFTER).await;
            drop(ending);
        });
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
