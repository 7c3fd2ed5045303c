//! The OCI runtime behind a container: one trait, two implementations.
//!
//! [`exec`] runs a runtime binary (`runc`, `crun`, … by the runc options' `binary_name`); `builtin`
//! calls our own library. Neither is ever called under a lock that another container needs.

pub(crate) mod builtin;
pub(crate) mod exec;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use async_trait::async_trait;
use lighter_proto::containerd::runc::v1::{CheckpointOptions, Options};

use crate::cgroup::Followed;
use crate::error::Result;
use crate::io::ChildStdio;
use crate::reaper::Pending;
use crate::task::Core;

/// Where runtime programs keep their state when the options name no root; the namespace is appended.
const DEFAULT_ROOT: &str = "/run/containerd/runc";
/// The same for the built-in runtime. Its records are not runc's, so they are not mixed.
const DEFAULT_BUILTIN_ROOT: &str = "/run/containerd/lighter-oci";

/// A new container.
#[derive(Debug)]
pub(crate) struct Create {
    /// Standard streams of init.
    pub(crate) stdio: ChildStdio,
}

/// A new process in a container.
#[derive(Debug)]
pub(crate) struct Exec {
    /// Id of the exec.
    pub(crate) exec_id: String,
    /// The OCI process, as JSON.
    pub(crate) spec: Vec<u8>,
    /// Its standard streams.
    pub(crate) stdio: ChildStdio,
}

/// A container to restore from a checkpoint.
#[derive(Debug)]
pub(crate) struct Restore {
    /// Directory of the criu images.
    pub(crate) image: PathBuf,
    /// Parent images, if the checkpoint is incremental.
    pub(crate) parent: Option<PathBuf>,
    /// Standard streams of init.
    pub(crate) stdio: ChildStdio,
}

/// A process that runs, and what came with it.
#[derive(Debug)]
pub(crate) struct Running {
    /// Its pid on the host.
    pub(crate) pid: u32,
    /// Its exit, some day.
    pub(crate) exit: Pending,
    /// Master of its terminal, if it has one.
    pub(crate) terminal: Option<OwnedFd>,
    /// What the runtime knows of the container besides.
    pub(crate) known: Option<Known>,
}

/// What a runtime that made a container need not be asked.
#[derive(Debug)]
pub(crate) struct Known {
    /// Its cgroup, watched.
    pub(crate) cgroup: Option<Followed>,
    /// Whether init's end takes every other process with it, by the kernel's doing.
    pub(crate) private_pids: bool,
}

/// Operations on one container. Errors carry the runtime's own text.
///
/// # Cancellation
/// A call that is dropped may or may not have happened: the owner runs it to its end.
#[async_trait]
pub(crate) trait OciRuntime: Send + Sync + std::fmt::Debug {
    /// Creates the container; its init waits for [`start`](Self::start).
    async fn create(&self, create: Create) -> Result<Running>;
    /// Lets init run the user's program.
    async fn start(&self) -> Result<()>;
    /// Starts another process.
    async fn exec(&self, exec: Exec) -> Result<Running>;
    /// Sends a signal to init, or with `all` to every process.
    async fn kill(&self, signal: u32, all: bool) -> Result<()>;
    /// Removes a container whose init ended; `force` kills what is left first.
    async fn delete(&self, force: bool) -> Result<()>;
    /// Freezes every process.
    async fn pause(&self) -> Result<()>;
    /// Thaws every process.
    async fn resume(&self) -> Result<()>;
    /// Pids of every process, as the host sees them.
    async fn pids(&self) -> Result<Vec<u32>>;
    /// Changes limits: LinuxResources as JSON.
    async fn update(&self, resources: Vec<u8>) -> Result<()>;
    /// Writes a checkpoint into a directory.
    async fn checkpoint(&self, path: PathBuf, options: CheckpointOptions) -> Result<()>;
    /// Restores a checkpoint, running.
    async fn restore(&self, restore: Restore) -> Result<Running>;
}

/// Which container a runtime object is for.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// Container id.
    pub(crate) id: String,
    /// Its bundle.
    pub(crate) bundle: PathBuf,
    /// The runtime's state directory, namespace included.
    pub(crate) root: PathBuf,
    /// runc options.
    pub(crate) options: Options,
}

impl Target {
    /// The target of a container of `namespace`.
    pub(crate) fn new(id: &str, bundle: PathBuf, namespace: &str, options: Options) -> Self {
        let root = match (options.root.as_str(), options.binary_name.as_str()) {
            ("", "") => DEFAULT_BUILTIN_ROOT,
            ("", _) => DEFAULT_ROOT,
            (root, _) => root,
        };
        let root = PathBuf::from(root).join(namespace);
        Self {
            id: id.to_owned(),
            bundle,
            root,
            options,
        }
    }

    /// Whether the options leave the choice to us: then it is the built-in runtime.
    pub(crate) fn is_builtin(&self) -> bool {
        self.options.binary_name.is_empty()
    }
}

/// The runtime that the options ask for.
///
/// # Errors
/// When the built-in one cannot look at the machine.
pub(crate) fn open(target: Target, core: &Core) -> Result<Box<dyn OciRuntime>> {
    let (reaper, socket_dir) = (core.reaper.clone(), core.socket_dir.clone());
    if target.is_builtin() {
        let runtime = builtin::BuiltinRuntime::new(target, &core.library, reaper, socket_dir)?;
        return Ok(Box::new(runtime));
    }
    Ok(Box::new(exec::ExecRuntime::new(target, reaper, socket_dir)))
}
