//! Our own OCI runtime, called as a library: no program is executed and nothing is parsed twice.
//!
//! What may take its time runs in a [worker]; what is a few system calls (signals, lists, a start or a
//! delete without hooks, a create that asks nobody) happens at once. Such a create clones here and lets
//! the new process set itself up; only undoing one takes a worker.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use lighter_oci::cgroup::Host;
use lighter_oci::spec::{Process, Resources, Spec};
use lighter_oci::{
    CgroupDriver, CreateRequest, Creating, Deletion, ExecRequest, Kept, KeyringMode, KillScope,
    Options, Parentage, RootMode, Runtime, Stdio, TerminalSize,
};
use lighter_proto::containerd::runc::v1::CheckpointOptions;
use tokio::io::Interest;
use tracing::warn;

use super::exec::ExecRuntime;
use super::{Create, Exec, Known, OciRuntime, Restore, Running, Target};
use crate::cgroup::{Cgroup, Followed};
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
    /// For a container with a network of its own.
    network: Mutex<Option<OwnedFd>>,
    /// The container as it was created here; `None` if somebody else did.
    kept: Mutex<Option<Arc<Kept>>>,
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
    /// A network namespace for the first container.
    network: Arc<Mutex<Option<OwnedFd>>>,
}

/// Root, and whether systemd makes the cgroups.
type Key = (PathBuf, bool);

/// An opened runtime. Nobody holds the lock across an await, so no worker is born with it held.
type Shared = Arc<Mutex<Runtime>>;

impl Library {
    /// A library that need not look at the machine again, and has a network namespace for the first
    /// container.
    pub(crate) fn knowing(host: Option<Host>, network: Option<OwnedFd>) -> Self {
        Self {
            host,
            network: Arc::new(Mutex::new(network)),
            ..Self::default()
        }
    }

    fn take_network(&self) -> Option<OwnedFd> {
        let mut network = self.network.lock().unwrap_or_else(PoisonError::into_inner);
        network.take()
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

fn has_private_pids(spec: &Spec) -> bool {
    let linux = spec.linux.as_ref();
    linux.is_some_and(|linux| {
        let mut namespaces = linux.namespaces.iter();
        namespaces.any(|namespace| namespace.kind == "pid" && namespace.path.is_empty())
    })
}

/// Hears what the first process says, until it is ready.
async fn until_ready(creating: &mut Creating) -> Result<()> {
    let line = creating
        .as_fd()
        .try_clone_to_owned()
        .and_then(|line| sys::register(line, Interest::READABLE))
        .map_err(Error::system("watch a new container"))?;
    loop {
        match creating.advance() {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => {
                let text = format!("OCI runtime create failed: {error}");
                return Err(Error::Runtime(text));
            }
        }
        let ready = line.readable().await;
        ready
            .map_err(Error::system("watch a new container"))?
            .clear_ready();
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
            network: Mutex::new(library.take_network()),
            kept: Mutex::default(),
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

    /// Keeps at hand what somebody else created; without it, starting and deleting take a worker.
    fn keep(&self) {
        let kept = locked(&self.runtime)
            .container(&self.target.id)
            .and_then(lighter_oci::Container::keep);
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = kept.ok().map(Arc::new);
    }

    fn kept(&self) -> Option<Arc<Kept>> {
        let kept = self.kept.lock();
        kept.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn keyring(&self) -> KeyringMode {
        if self.target.options.no_new_keyring {
            KeyringMode::Inherited
        } else {
            KeyringMode::Own
        }
    }

    /// Waits for a container that was begun; undoes it if it fails.
    async fn see_through(&self, mut creating: Creating, private_pids: bool) -> Result<Running> {
        let pid = u32::try_from(creating.pid()).unwrap_or(0);
        let exit = self.reaper.claim(pid);
        // While the new process is busy: what is of no use to it.
        let cgroup = creating.group().map(Cgroup::of_group).map(Followed::from);
        let noted = self.note_init(pid);
        let ready = match noted {
            Ok(()) => until_ready(&mut creating).await,
            Err(error) => Err(error),
        };
        if let Err(error) = ready {
            // Killing and removing may wait; this process may not.
            let undone = worker::call(&self.reaper, || {
                creating.undo();
                Ok(Answer::default())
            });
            if let Err(error) = undone.await {
                warn!(container_id = %self.target.id, %error, "cannot undo a create");
            }
            creating.forget();
            return Err(error);
        }
        let (made, kept) = creating.finish();
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(kept));
        Ok(Running {
            pid,
            exit,
            terminal: made.console,
            known: Some(Known {
                cgroup,
                private_pids,
            }),
        })
    }

    fn note_init(&self, pid: u32) -> Result<()> {
        self.init.store(pid, Ordering::Relaxed);
        let pid_file = self.target.bundle.join("init.pid");
        std::fs::write(&pid_file, pid.to_string()).map_err(Error::io("write", &pid_file))
    }

    /// Creates in a worker, which may wait.
    async fn create_apart(&self, request: CreateRequest<'_>) -> Result<Running> {
        let runtime = &self.runtime;
        let window = self.reaper.window();
        let answer = worker::call(&self.reaper, move || {
            let request = CreateRequest {
                parentage: Parentage::Sibling,
                ..request
            };
            Ok(made(locked(runtime).create(&request)?))
        })
        .await?
        .map_err(|failure| failed("OCI runtime create failed", &failure))?;
        self.note_init(answer.pid)?;
        self.keep();
        Ok(Running {
            pid: answer.pid,
            exit: window.claim(answer.pid),
            terminal: answer.terminal,
            known: None,
        })
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
        let failed = |text: String| Error::Runtime(format!("OCI runtime create failed: {text}"));
        let target = &self.target;
        let spec = Spec::load(&target.bundle).map_err(|error| failed(error.to_string()))?;
        let network = self
            .network
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let root_mode = if target.options.no_pivot_root {
            RootMode::NoPivot
        } else {
            RootMode::Pivot
        };
        let request = CreateRequest {
            stdio: streams(create.stdio, spec.process.as_ref()),
            keyring: self.keyring(),
            root_mode,
            network: network.as_ref().map(AsFd::as_fd),
            ..CreateRequest::new(&target.id, &target.bundle, &spec)
        };
        let begun = locked(&self.runtime)
            .begin_create(&request)
            .map_err(|error| failed(error.to_string()))?;
        let Some(creating) = begun else {
            return self.create_apart(request).await;
        };
        // Streams and namespace are the new process's now.
        drop(request);
        drop(network);
        let private_pids = has_private_pids(&spec);
        drop(spec);
        self.see_through(creating, private_pids).await
    }

    async fn start(&self) -> Result<()> {
        let failed = |error: lighter_oci::Error| {
            Error::Runtime(format!("OCI runtime start failed: {error}"))
        };
        // Without hooks there is nothing to wait for but the program itself.
        let kept = self.kept();
        let begun = kept
            .as_ref()
            .map(|kept| kept.begin_start())
            .transpose()
            .map_err(failed)?
            .flatten();
        if let (Some(kept), Some(running)) = (kept, begun) {
            let running = sys::register(running, Interest::ERROR)
                .map_err(Error::system("watch the start"))?;
            let seen = running.ready(Interest::ERROR).await;
            drop(seen.map_err(Error::system("watch the start"))?);
            return kept.finish_start().map_err(failed);
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
            known: None,
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
        // Somebody may have deleted it by the runtime's command line; its exit is on its way then.
        if self.kept().is_some_and(|kept| kept.is_deleted()) {
            return Err(Error::NotFound("container does not exist".to_owned()));
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
        // What cannot be done at once a worker does, which may wait and says what is wrong.
        if !force
            && let Some(kept) = self.kept()
            && kept.delete_at_once().unwrap_or(false)
        {
            return Ok(());
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
        self.keep();
        Ok(running)
    }
}
