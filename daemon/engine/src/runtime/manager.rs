//! All tasks: ids to handles, and how a task comes to be.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use lighter_proto::containerd::task::v3 as wire;
use lighter_proto::containerd::types::{Descriptor, Envelope};
use lighter_proto::errdefs::{Classify as _, ErrorKind, WireError};
use lighter_snapshotter::Mount;
use lighter_store::events::Exchange;
use lighter_store::metadata::{Container, Db};
use lighter_store::{Identifier, Labels, Namespace, Scope, labels};
use prost_types::Any;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::actor;
use super::bootstrap::{Bootstrap, Protocol};
use super::bundle::{Bundle, SANDBOXES, TASKS};
use super::connection::Connection;
use super::error::Error;
use super::forward;
use super::groups::{self, Groups};
use super::handle::Handle;
use super::launch::{self, Launcher};
use super::reap;
use super::shim_log;
use super::state::Stdio;
use super::steps::{Step, Steps};
use crate::mounts::{Activate, Mounts};

/// How long a question about a task waits for its recovery.
const RECOVERY_PATIENCE: Duration = Duration::from_secs(5);

/// Limits of what is asked of shims.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// Reconnecting one shim at start.
    pub shim_load: Duration,
    /// Cleaning up after one shim.
    pub shim_cleanup: Duration,
    /// A shim's shutdown.
    pub shim_shutdown: Duration,
    /// State of one task in a list.
    pub task_state: Duration,
    /// Statistics of one task.
    pub shim_stats: Duration,
}

/// What a manager is made of.
#[derive(Debug)]
pub struct Config {
    /// Directory that survives a boot.
    pub root: PathBuf,
    /// Directory that does not.
    pub state: PathBuf,
    /// How shims are started.
    pub launcher: Launcher,
    /// Limits.
    pub timeouts: Timeouts,
    /// Records of containers and sandboxes.
    pub db: Db,
    /// What carries out mounts of root filesystems that the kernel alone cannot do.
    pub mounts: Mounts,
}

/// A task to make.
#[derive(Debug, Clone, Default)]
pub struct CreateTask {
    /// Id of the container.
    pub id: String,
    /// OCI spec, byte for byte; `None` for runtimes that need none.
    pub spec: Option<Vec<u8>>,
    /// Runtime name or absolute path of the shim.
    pub runtime: String,
    /// Options for the shim: the task's if it has any, else the container's.
    pub options: Option<Any>,
    /// Mounts of the root filesystem; none means that the bundle's directory is used as it is.
    pub rootfs: Vec<Mount>,
    /// Where the first process reads and writes.
    pub stdio: Stdio,
    /// Checkpoint to restore.
    pub checkpoint: Option<Descriptor>,
    /// Sandbox the container belongs to; empty for none.
    pub sandbox_id: String,
    /// Task service to use in place of a shim of its own: `<protocol>+<address>` and version.
    pub task_api: Option<(String, u32)>,
}

impl CreateTask {
    /// A task for a container as it is on record; without mounts and stdio.
    #[must_use]
    pub fn of(container: &Container) -> Self {
        Self {
            id: container.id.to_string(),
            spec: Some(container.spec.value.clone()),
            runtime: container.runtime.name.clone(),
            options: container.runtime.options.clone(),
            sandbox_id: container.sandbox_id.clone(),
            ..Self::default()
        }
    }
}

/// An exec to make.
#[derive(Debug, Clone, Default)]
pub struct ExecTask {
    /// Its id, unique in the task.
    pub exec_id: String,
    /// OCI process, JSON in an `Any`.
    pub spec: Option<Any>,
    /// Where it reads and writes.
    pub stdio: Stdio,
}

/// All tasks; clones share them.
#[derive(Debug, Clone)]
pub struct Manager {
    pub(super) shared: Arc<Shared>,
}

/// What managers and actors share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) root: PathBuf,
    pub(super) state: PathBuf,
    pub(super) launcher: Launcher,
    pub(super) timeouts: Timeouts,
    pub(super) db: Db,
    mounts: Mounts,
    pub(super) events: Exchange,
    pub(super) stop: CancellationToken,
    pub(super) tracker: TaskTracker,
    steps: Steps,
    slots: RwLock<Slots>,
    pub(super) groups: Groups,
}

type Slots = BTreeMap<Namespace, HashMap<String, Slot>>;

/// What is known under an id.
#[derive(Debug, Clone)]
pub(super) enum Slot {
    /// Being made; not to be seen yet.
    Creating,
    /// Found after a restart; the sender is dropped when it is settled.
    Recovering(watch::Receiver<()>),
    /// There.
    Live(Handle),
    /// Gone for everybody, but its shim and bundle are still being cleared away; the sender is
    /// dropped when the id is free.
    Removing(watch::Receiver<()>),
}

impl Shared {
    pub(super) fn step(&self, bundle: &Bundle, step: &'static str) -> Step {
        self.steps
            .enter(format!("{}/{}", bundle.namespace, bundle.id), step)
    }

    pub(super) fn publish(&self, envelope: Envelope) -> Result<(), Error> {
        Ok(self.events.forward(envelope)?)
    }

    pub(super) fn slots(&self) -> std::sync::RwLockReadGuard<'_, Slots> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn slots_mut(&self) -> std::sync::RwLockWriteGuard<'_, Slots> {
        self.slots.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the task off the books: from now on its shim's events go straight through.
    pub(super) fn forget(&self, bundle: &Bundle) {
        let mut slots = self.slots_mut();
        if let Some(tasks) = slots.get_mut(&bundle.namespace) {
            tasks.remove(&bundle.id);
            if tasks.is_empty() {
                slots.remove(&bundle.namespace);
            }
        }
    }

    pub(super) fn put(&self, bundle: &Bundle, slot: Slot) {
        self.slots_mut()
            .entry(bundle.namespace.clone())
            .or_default()
            .insert(bundle.id.clone(), slot);
    }

    /// Takes the id, or says that it is taken. What an earlier task of the id left is waited for.
    async fn reserve(&self, bundle: &Bundle) -> Result<(), Error> {
        loop {
            let mut removed = {
                let mut slots = self.slots_mut();
                let tasks = slots.entry(bundle.namespace.clone()).or_default();
                match tasks.get(&bundle.id) {
                    None => {
                        tasks.insert(bundle.id.clone(), Slot::Creating);
                        return Ok(());
                    }
                    Some(Slot::Removing(removed)) => removed.clone(),
                    Some(_) => {
                        return Err(Error::Exists {
                            id: bundle.id.clone(),
                        });
                    }
                }
            };
            let _freed = removed.changed().await;
        }
    }

    /// Whether a task on the books is served by the shim at `address`.
    pub(super) fn shares_shim(&self, address: &str) -> bool {
        let slots = self.slots();
        let mut tasks = slots.values().flat_map(HashMap::values);
        tasks.any(|slot| match slot {
            Slot::Live(handle) => handle.connection().bootstrap().address == address,
            Slot::Creating | Slot::Recovering(_) | Slot::Removing(_) => false,
        })
    }

    /// Whether anything is mounted for the bundle besides what its shim mounts.
    pub(super) fn has_mounts(&self, bundle: &Bundle) -> bool {
        self.mounts.info(&bundle.namespace, &bundle.id).is_ok()
    }

    /// Removes a bundle, and what was mounted for it, on a blocking thread.
    pub(super) async fn delete_bundle(&self, bundle: &Bundle) -> Result<(), Error> {
        let (bundle, mounts) = (bundle.clone(), self.mounts.clone());
        tokio::task::spawn_blocking(move || {
            bundle.delete()?;
            match mounts.deactivate(&bundle.namespace, &bundle.id) {
                Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::Mounts(error)),
                _ => Ok(()),
            }
        })
        .await
        .map_err(|_| Error::Stopping)?
    }

    /// The mounts of a root filesystem as a shim can do them.
    async fn activate(&self, bundle: &Bundle, rootfs: Vec<Mount>) -> Result<Vec<Mount>, Error> {
        if !crate::mounts::needed(&rootfs) {
            return Ok(rootfs);
        }
        let (bundle, mounts) = (bundle.clone(), self.mounts.clone());
        tokio::task::spawn_blocking(move || {
            let labels =
                Labels::from([(format!("{}container", labels::GC_BREF), bundle.id.clone())]);
            // Kept by the container, not by the lease of whoever starts it.
            let scope = Scope::new(bundle.namespace.clone());
            let wanted = Activate {
                name: &bundle.id,
                mounts: &rootfs,
                labels: &labels,
                temporary: false,
            };
            match mounts.activate(&scope, wanted) {
                Ok(activation) => Ok(activation.system),
                Err(error) if error.kind() == ErrorKind::Unimplemented => Ok(rootfs),
                Err(error) => Err(Error::Mounts(error)),
            }
        })
        .await
        .map_err(|_| Error::Stopping)?
    }

    pub(super) fn bundle(&self, kind: &str, namespace: &Namespace, id: &str) -> Bundle {
        Bundle::at(&self.state, &self.root, kind, namespace, id)
    }
}

impl Manager {
    /// No tasks yet; [`Manager::recover`] finds those of earlier runs.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            shared: Arc::new(Shared {
                root: config.root,
                state: config.state,
                launcher: config.launcher,
                timeouts: config.timeouts,
                events: config.db.events().clone(),
                db: config.db,
                mounts: config.mounts,
                stop: CancellationToken::new(),
                tracker: TaskTracker::new(),
                steps: Steps::default(),
                slots: RwLock::default(),
                groups: Groups::default(),
            }),
        }
    }

    /// How shims are started.
    #[must_use]
    pub fn launcher(&self) -> &Launcher {
        &self.shared.launcher
    }

    /// Limits.
    #[must_use]
    pub fn timeouts(&self) -> Timeouts {
        self.shared.timeouts
    }

    /// The exchange that events of tasks go to.
    #[must_use]
    pub fn events(&self) -> &Exchange {
        &self.shared.events
    }

    /// Operations under way.
    #[must_use]
    pub fn steps(&self) -> &Steps {
        &self.shared.steps
    }

    /// Runs work that must finish in a task of ours; whoever waits may leave.
    async fn owned<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        self.shared
            .tracker
            .spawn(work)
            .await
            .map_err(|_| Error::Stopping)?
    }

    /// Makes a task: its first process exists afterwards and waits to be started. A failure
    /// leaves nothing behind and publishes nothing.
    ///
    /// # Errors
    /// `AlreadyExists`, or why the shim did not start or did not make it.
    ///
    /// # Cancellation
    /// The work goes on.
    pub async fn create(&self, scope: &Scope, task: CreateTask) -> Result<Handle, Error> {
        let id = Identifier::new(&task.id).map_err(lighter_store::Error::from)?;
        let bundle = self.shared.bundle(TASKS, &scope.namespace, id.as_str());
        self.shared.reserve(&bundle).await?;
        let shared = Arc::clone(&self.shared);
        self.owned(async move {
            let made = create(&shared, &bundle, task).await;
            if made.is_err() {
                shared.forget(&bundle);
            }
            made
        })
        .await
    }

    /// A task.
    ///
    /// # Errors
    /// `NotFound`; `Unavailable` while it is still being recovered after a restart.
    pub async fn get(&self, namespace: &Namespace, id: &str) -> Result<Handle, Error> {
        let missing = || Error::NotFound { id: id.to_owned() };
        let slot = self.slot(namespace, id).ok_or_else(missing)?;
        let mut settled = match slot {
            Slot::Live(handle) => return Ok(handle),
            Slot::Creating | Slot::Removing(_) => return Err(missing()),
            Slot::Recovering(settled) => settled,
        };
        let _settled = tokio::time::timeout(RECOVERY_PATIENCE, settled.changed()).await;
        match self.slot(namespace, id) {
            Some(Slot::Live(handle)) => Ok(handle),
            Some(Slot::Recovering(_)) => Err(WireError::new(
                ErrorKind::Unavailable,
                format!("task {id} is being recovered: its shim does not answer yet"),
            )
            .into()),
            Some(Slot::Creating | Slot::Removing(_)) | None => Err(missing()),
        }
    }

    /// Waits until nothing is left of a task that was deleted: its shim has ended, unless it serves
    /// others, and its bundle is gone. At once where there is no such task, or one that lives.
    pub async fn cleared(&self, namespace: &Namespace, id: &str) {
        if let Some(Slot::Removing(mut removed)) = self.slot(namespace, id) {
            let _freed = removed.changed().await;
        }
    }

    fn slot(&self, namespace: &Namespace, id: &str) -> Option<Slot> {
        self.shared.slots().get(namespace)?.get(id).cloned()
    }

    /// Tasks of a namespace in no order. Those still being recovered are waited for, but not
    /// longer than the limit for one state.
    pub async fn list(&self, namespace: &Namespace) -> Vec<Handle> {
        let waiting: Vec<_> = {
            let slots = self.shared.slots();
            let tasks = slots.get(namespace).into_iter().flat_map(HashMap::values);
            tasks
                .filter_map(|slot| match slot {
                    Slot::Recovering(settled) => Some(settled.clone()),
                    Slot::Creating | Slot::Live(_) | Slot::Removing(_) => None,
                })
                .collect()
        };
        let all = futures::future::join_all(waiting.into_iter().map(|mut settled| async move {
            let _settled = settled.changed().await;
        }));
        let _late = tokio::time::timeout(self.shared.timeouts.task_state, all).await;
        let slots = self.shared.slots();
        let tasks = slots.get(namespace).into_iter().flat_map(HashMap::values);
        tasks
            .filter_map(|slot| match slot {
                Slot::Live(handle) => Some(handle.clone()),
                Slot::Creating | Slot::Recovering(_) | Slot::Removing(_) => None,
            })
            .collect()
    }

    /// Tasks by namespace, for reports.
    #[must_use]
    pub fn counts(&self) -> Vec<(Namespace, usize)> {
        let slots = self.shared.slots();
        slots
            .iter()
            .map(|(n, tasks)| {
                let there = |slot: &&Slot| !matches!(slot, Slot::Removing(_));
                (n.clone(), tasks.values().filter(there).count())
            })
            .collect()
    }

    /// Takes an event of a shim: the state of its task first, then its subscribers.
    ///
    /// # Errors
    /// `InvalidArgument` for a malformed envelope.
    pub async fn forward(&self, envelope: Envelope) -> Result<(), Error> {
        let Some((id, meaning)) = forward::read(&envelope) else {
            return self.shared.publish(envelope);
        };
        let Ok(namespace) = Namespace::new(&envelope.namespace) else {
            return self.shared.publish(envelope);
        };
        // An event of a task that is being recovered waits: its state must come first.
        let handle = match self.slot(&namespace, &id) {
            Some(Slot::Recovering(_)) => self.get(&namespace, &id).await.ok(),
            Some(Slot::Live(handle)) => Some(handle),
            Some(Slot::Creating | Slot::Removing(_)) | None => None,
        };
        let Some(handle) = handle else {
            return self.shared.publish(envelope);
        };
        let (reply, answer) = tokio::sync::oneshot::channel();
        let message = actor::Message::Event {
            meaning,
            envelope,
            reply,
        };
        if let Err(unsent) = handle.inbox.send(message).await {
            return match unsent.0 {
                actor::Message::Event { envelope, .. } => self.shared.publish(envelope),
                _ => Ok(()),
            };
        }
        answer.await.unwrap_or(Ok(()))
    }

    /// Lets go of all tasks without touching them, and waits for what must finish.
    pub async fn stop(&self) {
        self.shared.tracker.close();
        self.shared.stop.cancel();
        self.shared.tracker.wait().await;
    }

    /// What the runtime `name` says of itself.
    ///
    /// # Errors
    /// When there is none or it does not say.
    pub async fn info(
        &self,
        name: &str,
        options: Option<&Any>,
    ) -> Result<lighter_proto::containerd::types::RuntimeInfo, Error> {
        let shim = self.shared.launcher.resolve(name)?;
        self.shared.launcher.info(&shim, options).await
    }
}

/// Makes bundle, shim and first process; undoes all of it when one fails.
async fn create(shared: &Arc<Shared>, bundle: &Bundle, task: CreateTask) -> Result<Handle, Error> {
    let step = shared.step(bundle, "create bundle");
    let bundle = bundle.clone();
    // A handful of system calls on a file system in memory: a thread of its own would cost more.
    bundle.create(task.spec.as_deref())?;
    step.at("activate mounts");
    let mut task = task;
    let prepared = async {
        let rootfs = std::mem::take(&mut task.rootfs);
        task.rootfs = shared.activate(&bundle, rootfs).await?;
        super::checkpoint::restore_path(shared, &bundle, &task).await
    };
    let checkpoint = match prepared.await {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            undo_bundle(shared, &bundle).await;
            return Err(error);
        }
    };
    step.at("start shim");
    let request = request(&bundle, &mut task, checkpoint);
    let mut launched = match launch(shared, &bundle, &task, &request).await {
        Ok(launched) => launched,
        Err(error) => {
            undo_bundle(shared, &bundle).await;
            return Err(error);
        }
    };
    step.at("Task.Create");
    let stdio = task.stdio;
    let made = match launched.created.take() {
        Some(created) => created,
        None => launched.connection.task("Create", request, None).await,
    };
    match made {
        Ok(answer) => {
            let answer: wire::CreateTaskResponse = answer;
            let pid = answer.pid;
            // The shim may have turned out to speak an older version than it said.
            let bootstrap = launched.connection.bootstrap();
            if bootstrap != launched.bootstrap {
                bundle.write_bootstrap(&bootstrap)?;
            }
            info!(container_id = %bundle.id, namespace = %bundle.namespace, pid, "task created");
            let state = actor::fresh(pid, stdio);
            let ours = launched.shim.as_deref().is_some_and(launch::is_ours);
            let shim = Shim {
                connection: launched.connection,
                ours,
                log: launched.log,
            };
            Ok(adopt(shared, bundle, shim, state))
        }
        Err(error) => {
            step.at("undo");
            undo_shim(shared, &bundle, &launched).await;
            Err(Error::Create(error))
        }
    }
}

/// What serves a task.
pub(super) struct Shim {
    pub(super) connection: Connection,
    /// Whether it is ours, which has unmounted everything when it answers a deletion.
    pub(super) ours: bool,
    /// Ends the copying of its log.
    pub(super) log: Option<DropGuard>,
}

/// Puts a task on the books and lets its actor run.
pub(super) fn adopt(
    shared: &Arc<Shared>,
    bundle: Bundle,
    shim: Shim,
    state: super::state::TaskState,
) -> Handle {
    let (handle, actor) = actor::new(Arc::clone(shared), bundle, shim, state);
    shared.put(&handle.bundle, Slot::Live(handle.clone()));
    shared.tracker.spawn(actor.run());
    handle
}

/// A shim that serves a bundle.
struct Launched {
    connection: Connection,
    bootstrap: Bootstrap,
    /// Binary that was run; `None` for a shim that was there before.
    shim: Option<PathBuf>,
    /// Ends the copying of its log.
    log: Option<DropGuard>,
    /// What it said to the request, where that was sent along with its start.
    created: Option<launch::Created>,
}

async fn launch(
    shared: &Arc<Shared>,
    bundle: &Bundle,
    task: &CreateTask,
    request: &wire::CreateTaskRequest,
) -> Result<Launched, Error> {
    let joined = match &task.task_api {
        Some((address, version)) => Some(task_api(address, *version)?),
        None => sandbox_shim(shared, bundle, &task.sandbox_id),
    };
    if let Some(bootstrap) = joined {
        bundle.write_bootstrap(&bootstrap)?;
        bundle.write_sandbox(&task.sandbox_id)?;
        let connection = Connection::open(&bootstrap, bundle.namespace.as_str()).await?;
        return Ok(Launched {
            connection,
            bootstrap,
            shim: None,
            log: None,
            created: None,
        });
    }
    let shim = shared.launcher.resolve(&task.runtime)?;
    // On the books before it runs: whatever happens next, the shim can be found again.
    bundle.write_shim_path(&shim)?;
    let group = task.spec.as_deref().filter(|_| launch::is_ours(&shim));
    let group = group.and_then(groups::group_of);
    if let Some(connection) = join_group(shared, bundle, group.as_deref(), &shim).await {
        return Ok(Launched {
            bootstrap: connection.bootstrap(),
            connection,
            shim: Some(shim),
            log: None,
            created: None,
        });
    }
    let log = shim_log::follow(&shared.tracker, bundle)?;
    // A group may turn out to be served by somebody else.
    let early = group.is_none().then_some(request);
    let connected = shared
        .launcher
        .connect(&shim, bundle, task.options.as_ref(), early);
    match connected.await {
        Ok((connection, created)) => {
            let bootstrap = connection.bootstrap();
            if let Some(group) = group {
                let server = (shim.clone(), bootstrap.clone());
                shared.groups.remember(&bundle.namespace, group, server);
            }
            Ok(Launched {
                bootstrap,
                connection,
                shim: Some(shim),
                log: Some(log),
                created,
            })
        }
        // Without a server there is nothing to clean up after.
        Err(error @ Error::Start { .. }) => Err(error),
        Err(error) => {
            reap::delete_action(shared, &shim, bundle).await;
            Err(error)
        }
    }
}

/// Connects to the server that the container's group has already. `None` when there is none for
/// sure: then the shim finds out.
async fn join_group(
    shared: &Shared,
    bundle: &Bundle,
    group: Option<&str>,
    shim: &Path,
) -> Option<Connection> {
    let server = shared.groups.server(&bundle.namespace, group?, shim)?;
    // A server without a task of ours may be on its way out.
    if !shared.shares_shim(&server.address) {
        return None;
    }
    let connection = Connection::open(&server, bundle.namespace.as_str())
        .await
        .ok()?;
    bundle.write_bootstrap(&server).ok()?;
    Some(connection)
}

/// The shim of the container's sandbox, where that has one that speaks version 3.
fn sandbox_shim(shared: &Shared, bundle: &Bundle, sandbox_id: &str) -> Option<Bootstrap> {
    if sandbox_id.is_empty() {
        return None;
    }
    let scope = Scope::new(bundle.namespace.clone());
    shared.db.sandboxes().get(&scope, sandbox_id).ok()?;
    let sandbox = shared.bundle(SANDBOXES, &bundle.namespace, sandbox_id);
    sandbox.read_bootstrap().ok().filter(|b| b.version >= 3)
}

/// `ttrpc+unix:///path` as a bootstrap.
fn task_api(address: &str, version: u32) -> Result<Bootstrap, Error> {
    let invalid = || Error::Invalid {
        reason: format!("task api address {address:?} is not of the form <protocol>+<scheme>://…"),
    };
    let (protocol, address) = address.split_once('+').ok_or_else(invalid)?;
    Ok(Bootstrap {
        version,
        address: address.to_owned(),
        protocol: match protocol {
            "ttrpc" => Protocol::Ttrpc,
            "grpc" => Protocol::Grpc,
            _ => return Err(invalid()),
        },
    })
}

/// What the shim is asked for a task; takes the mounts out of it.
fn request(bundle: &Bundle, task: &mut CreateTask, checkpoint: String) -> wire::CreateTaskRequest {
    let rootfs = std::mem::take(&mut task.rootfs);
    wire::CreateTaskRequest {
        id: bundle.id.clone(),
        bundle: bundle.path.display().to_string(),
        rootfs: rootfs.into_iter().map(Into::into).collect(),
        terminal: task.stdio.terminal,
        stdin: task.stdio.stdin.clone(),
        stdout: task.stdio.stdout.clone(),
        stderr: task.stdio.stderr.clone(),
        checkpoint,
        parent_checkpoint: String::new(),
        options: task.options.clone(),
    }
}

/// Undoes a shim that did not make its task.
async fn undo_shim(shared: &Arc<Shared>, bundle: &Bundle, launched: &Launched) {
    let request = wire::DeleteRequest {
        id: bundle.id.clone(),
        exec_id: String::new(),
    };
    let limit = Some(shared.timeouts.shim_cleanup);
    let deleted: Result<wire::DeleteResponse, _> =
        launched.connection.task("Delete", request, limit).await;
    let lost = launched.connection.is_closed();
    drop(deleted);
    reap::dismiss(shared, bundle, &launched.connection).await;
    if lost && let Some(shim) = &launched.shim {
        reap::delete_action(shared, shim, bundle).await;
    }
    undo_bundle(shared, bundle).await;
}

async fn undo_bundle(shared: &Arc<Shared>, bundle: &Bundle) {
    if let Err(error) = shared.delete_bundle(bundle).await {
        warn!(container_id = %bundle.id, error = %lighter_proto::errdefs::render(&error), "cannot undo the bundle");
    }
}

/// Names of sub-directories; none where there is no directory.
pub(super) fn directories(path: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(path) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}
