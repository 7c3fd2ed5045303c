//! Our own OCI runtime, called as a library: no program is executed and nothing is parsed twice.
//!
//! What may take its time runs in a [worker]; what is a few system calls (signals, lists, a start or a
//! delete without hooks) happens at once.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use lighter_oci::cgroup::Host;
use lighter_oci::spec::{Process, Resources, Spec};
use lighter_oci::{
    CgroupDriver, CreateRequest, Deletion, ExecRequest, KeyringMode, KillScope, Options, Parentage,
    RootMode, Runtime, Stdio, TerminalSize,
};
use lighter_proto::containerd::runc::v1::CheckpointOptions;
use tokio::io::Interest;

use super::exec::ExecRuntime;
use super::{Create, Exec, OciRuntime, Restore, Running, Target};
use crate::error::{Error, Result};
use crate::io::ChildStdio;
use crate::process::Refusal;
use crate::reaper::Reaper;
use crate::sys;
use crate::worker::{self, Answer, Failure, Fault};

/// The built-in runtime of one container.
#[derive(Debug)]
pub(crate) struct BuiltinRuntime {
    target: Target,
    runtime: Shared,
    /// Pid of init; 0 before there is one.
    init: AtomicU32,
    reaper: Reaper,
    /// For the runtime's command line.
    socket_dir: PathBuf,
}

impl From<lighter_oci::Error> for Failure {
    fn from(error: lighter_oci::Error) -> Self {
        let fault = match error {
            lighter_oci::Error::NotFound { .. } => Fault::NotFound,
            lighter_oci::Error::NotRunning => Fault::NotRunning,
            _ => Fault::Other,
        };
        Self {
            fault,
            text: error.to_string(),
        }
    }
}

fn failed(what: &str, failure: &Failure) -> Error {
    Error::Runtime(format!("{what}: {}", failure.text))
}

fn malformed(what: &str) -> impl FnOnce(serde_json::Error) -> Failure {
    let what = what.to_owned();
    move |error| Failure {
        fault: Fault::Other,
        text: format!("{what}: {error}"),
    }
}

/// The library, opened once per root and cgroup driver: what it finds out about the machine is known
/// to every worker from its birth.
#[derive(Debug, Clone, Default)]
pub(crate) struct Library {
    opened: Arc<Mutex<Vec<(Key, Shared)>>>,
    /// The machine's control groups, if somebody has looked already.
    host: Option<Host>,
}

/// Root, and whether systemd makes the cgroups.
type Key = (PathBuf, bool);

/// An opened runtime. Nobody holds the lock across an await, so no worker is born with it held.
type Shared = Arc<Mutex<Runtime>>;

impl Library {
    /// A library that need not look at the machine again.
    pub(crate) fn knowing(host: Option<Host>) -> Self {
        Self {
            host,
            ..Self::default()
        }
    }

    fn open(&self, target: &Target) -> lighter_oci::Result<Shared> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (target.root.clone(), target.options.systemd_cgroup);
        if let Some((_, runtime)) = opened.iter().find(|(known, _)| *known == key) {
            return Ok(runtime.clone());
        }
        let runtime = match &self.host {
            Some(host) => Runtime::on(options(target), Some(host.clone())),
            None => Runtime::open(options(target))?,
        };
        let runtime = Arc::new(Mutex::new(runtime));
        opened.push((key, runtime.clone()));
        Ok(runtime)
    }
}

fn locked(runtime: &Shared) -> MutexGuard<'_, Runtime> {
    runtime.lock().unwrap_or_else(PoisonError::into_inner)
}

fn options(target: &Target) -> Options {
    let mut options = Options::new(&target.root);
    if target.options.systemd_cgroup {
        options.driver = CgroupDriver::Systemd;
    }
    options
}

fn streams(stdio: ChildStdio, process: Option<&Process>) -> Stdio {
    match stdio {
        ChildStdio::Streams {
            stdin,
            stdout,
            stderr,
        } => Stdio::Fds {
            stdin,
            stdout,
            stderr,
        },
        ChildStdio::Terminal => {
            let size = process.and_then(|process| process.console_size.as_ref());
            let size = size.map(|size| TerminalSize {
                columns: size.width,
                rows: size.height,
            });
            Stdio::Terminal { size }
        }
    }
}

fn made(created: lighter_oci::Created) -> Answer {
    Answer {
        pid: u32::try_from(created.pid).unwrap_or(0),
        terminal: created.console,
    }
}

/// Force-deletes a container that may not exist, in this process; for the `delete` action.
///
/// # Errors
/// What the runtime said.
pub(crate) fn force_delete(target: &Target) -> Result<()> {
    let delete = || -> lighter_oci::Result<()> {
        Runtime::open(options(target))?
            .container(&target.id)?
            .delete(Deletion::Forced)
    };
    match delete() {
        Ok(()) | Err(lighter_oci::Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(Error::Runtime(error.to_string())),
    }
}

impl BuiltinRuntime {
    /// The runtime of a container.
    ///
    /// # Errors
    /// When the machine cannot be looked at.
    pub(crate) fn new(
        target: Target,
        library: &Library,
        reaper: Reaper,
        socket_dir: PathBuf,
    ) -> Result<Self> {
        let runtime = library
            .open(&target)
            .map_err(|error| Error::Runtime(error.to_string()))?;
        Ok(Self {
            target,
            runtime,
            init: AtomicU32::new(0),
            reaper,
            socket_dir,
        })
    }

    /// The same runtime as a command: checkpoints are criu's work, for minutes perhaps, and criu is
    /// talked to by the runtime's command line.
    fn command_line(&self) -> ExecRuntime {
        ExecRuntime::new(
            self.target.clone(),
            self.reaper.clone(),
            self.socket_dir.clone(),
        )
    }

    fn keyring(&self) -> KeyringMode {
        if self.target.options.no_new_keyring {
            KeyringMode::Inherited
        } else {
            KeyringMode::Own
        }
    }

    /// Runs work on the container in a worker.
    async fn on_container(
        &self,
        what: &str,
        work: impl FnOnce(&lighter_oci::Container<'_>) -> std::result::Result<(), Failure> + Send,
    ) -> Result<()> {
        self.on_container_raw(work)
            .await?
            .map_err(|failure| failed(what, &failure))
    }

    async fn on_container_raw(
        &self,
        work: impl FnOnce(&lighter_oci::Container<'_>) -> std::result::Result<(), Failure> + Send,
    ) -> Result<std::result::Result<(), Failure>> {
        let (target, runtime) = (&self.target, &self.runtime);
        let done = worker::call(&self.reaper, move || {
            let runtime = locked(runtime);
            work(&runtime.container(&target.id)?)?;
            Ok(Answer::default())
        });
        Ok(done.await?.map(|_| ()))
    }
}

#[async_trait]
impl OciRuntime for BuiltinRuntime {
    async fn create(&self, create: Create) -> Result<Running> {
        let (target, runtime) = (&self.target, &self.runtime);
        let keyring = self.keyring();
        let window = self.reaper.window();
        let answer = worker::call(&self.reaper, move || {
            let spec = Spec::load(&target.bundle)?;
            let root_mode = if target.options.no_pivot_root {
                RootMode::NoPivot
            } else {
                RootMode::Pivot
            };
            let request = CreateRequest {
                stdio: streams(create.stdio, spec.process.as_ref()),
                parentage: Parentage::Sibling,
                keyring,
                root_mode,
                ..CreateRequest::new(&target.id, &target.bundle, &spec)
            };
            Ok(made(locked(runtime).create(&request)?))
        })
        .await?
        .map_err(|failure| failed("OCI runtime create failed", &failure))?;
        self.init.store(answer.pid, Ordering::Relaxed);
        let pid_file = self.target.bundle.join("init.pid");
        std::fs::write(&pid_file, answer.pid.to_string()).map_err(Error::io("write", &pid_file))?;
        Ok(Running {
            pid: answer.pid,
            exit: window.claim(answer.pid),
            terminal: answer.terminal,
        })
    }

    async fn start(&self) -> Result<()> {
        let failed = |error: lighter_oci::Error| {
            Error::Runtime(format!("OCI runtime start failed: {error}"))
        };
        // Without hooks there is nothing to wait for but the program itself.
        let begun = locked(&self.runtime)
            .container(&self.target.id)
            .and_then(|container| container.begin_start())
            .map_err(failed)?;
        if let Some(running) = begun {
            let running = sys::register(running, Interest::ERROR)
                .map_err(Error::system("watch the start"))?;
            let seen = running.ready(Interest::ERROR).await;
            drop(seen.map_err(Error::system("watch the start"))?);
            return locked(&self.runtime)
                .container(&self.target.id)
                .and_then(|container| container.finish_start())
                .map_err(failed);
        }
        self.on_container("OCI runtime start failed", |container| {
            Ok(container.start()?)
        })
        .await
    }

    async fn exec(&self, exec: Exec) -> Result<Running> {
        let (target, runtime) = (&self.target, &self.runtime);
        let window = self.reaper.window();
        let answer = worker::call(&self.reaper, move || {
            let process: Process =
                serde_json::from_slice(&exec.spec).map_err(malformed("process"))?;
            let request = ExecRequest {
                stdio: streams(exec.stdio, Some(&process)),
                parentage: Parentage::Sibling,
                ..ExecRequest::new(&process)
            };
            let runtime = locked(runtime);
            Ok(made(runtime.container(&target.id)?.exec(&request)?))
        })
        .await?
        .map_err(|failure| failed("OCI runtime exec failed", &failure))?;
        Ok(Running {
            pid: answer.pid,
            exit: window.claim(answer.pid),
            terminal: answer.terminal,
        })
    }

    async fn kill(&self, signal: u32, all: bool) -> Result<()> {
        let signal = i32::try_from(signal)
            .map_err(|_| Error::InvalidArgument(format!("unknown signal {signal}")))?;
        if all {
            // A whole cgroup may take several rounds.
            let kill = self.on_container_raw(move |c| Ok(c.kill(signal, KillScope::All)?));
            return kill.await?.map_err(|failure| match failure.fault {
                Fault::NotRunning => Refusal::Finished.into(),
                Fault::NotFound => Error::NotFound("no such container".to_owned()),
                Fault::Other => failed("unknown error after kill", &failure),
            });
        }
        // Init is our child and not reaped, or the state would say so: its pid is its own.
        let number = signal.cast_unsigned();
        sys::kill(self.init.load(Ordering::Relaxed), number).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::ESRCH) => Refusal::Finished.into(),
                Some(libc::EINVAL) => Error::InvalidArgument(format!("unknown signal {number}")),
                _ => Error::system("kill")(error),
            }
        })
    }

    async fn delete(&self, force: bool) -> Result<()> {
        if !force {
            let done = locked(&self.runtime)
                .container(&self.target.id)
                .and_then(|container| container.delete_at_once());
            match done {
                Ok(true) | Err(lighter_oci::Error::NotFound { .. }) => return Ok(()),
                // A worker may wait, and says what is wrong.
                Ok(false) | Err(_) => {}
            }
        }
        let deletion = if force {
            Deletion::Forced
        } else {
            Deletion::Stopped
        };
        match self
            .on_container_raw(move |container| Ok(container.delete(deletion)?))
            .await?
        {
            Ok(())
            | Err(Failure {
                fault: Fault::NotFound,
                ..
            }) => Ok(()),
            Err(failure) => Err(failed("OCI runtime delete failed", &failure)),
        }
    }

    async fn pause(&self) -> Result<()> {
        self.on_container("OCI runtime pause failed", |container| {
            Ok(container.pause()?)
        })
        .await
    }

    async fn resume(&self) -> Result<()> {
        self.on_container("OCI runtime resume failed", |container| {
            Ok(container.resume()?)
        })
        .await
    }

    async fn pids(&self) -> Result<Vec<u32>> {
        let list = || {
            locked(&self.runtime)
                .container(&self.target.id)?
                .processes()
        };
        let pids =
            list().map_err(|error| Error::Runtime(format!("OCI runtime ps failed: {error}")))?;
        Ok(pids
            .into_iter()
            .filter_map(|pid| u32::try_from(pid).ok())
            .collect())
    }

    async fn update(&self, resources: Vec<u8>) -> Result<()> {
        self.on_container("OCI runtime update failed", move |container| {
            let resources: Resources =
                serde_json::from_slice(&resources).map_err(malformed("resources"))?;
            Ok(container.update(&resources)?)
        })
        .await
    }

    async fn checkpoint(&self, path: PathBuf, options: CheckpointOptions) -> Result<()> {
        self.command_line().checkpoint(path, options).await
    }

    async fn restore(&self, restore: Restore) -> Result<Running> {
        let running = self.command_line().restore(restore).await?;
        self.init.store(running.pid, Ordering::Relaxed);
        Ok(running)
    }
}
