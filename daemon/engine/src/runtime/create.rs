//! How a task comes to be: bundle, shim and first process, or nothing of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lighter_proto::containerd::task::v3 as wire;
use lighter_proto::containerd::types::Descriptor;
use lighter_proto::errdefs::render;
use lighter_snapshotter::Mount;
use lighter_store::Scope;
use lighter_store::metadata::Container;
use prost_types::Any;
use tokio_util::sync::DropGuard;
use tracing::{info, warn};

use super::actor;
use super::binary::is_ours;
use super::bootstrap::{Bootstrap, Protocol};
use super::bundle::{Bundle, SANDBOXES};
use super::checkpoint;
use super::connection::Connection;
use super::error::Error;
use super::groups;
use super::handle::Handle;
use super::launch::Created;
use super::reap;
use super::shared::{Shared, Slot};
use super::shim_log;
use super::state::{Stdio, TaskState};

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

/// Makes bundle, shim and first process; undoes all of it when one fails.
pub(super) async fn create(
    shared: &Arc<Shared>,
    bundle: &Bundle,
    task: CreateTask,
) -> Result<Handle, Error> {
    let step = shared.step(bundle, "create bundle");
    let bundle = bundle.clone();
    // A handful of system calls on a file system in memory: a thread of its own would cost more.
    bundle.create(task.spec.as_deref())?;
    step.at("activate mounts");
    let mut task = task;
    let prepared = async {
        let rootfs = std::mem::take(&mut task.rootfs);
        task.rootfs = shared.activate(&bundle, rootfs).await?;
        checkpoint::restore_path(shared, &bundle, &task).await
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
            let state = TaskState::created(pid, stdio);
            let ours = launched.shim.as_deref().is_some_and(is_ours);
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
pub(super) fn adopt(shared: &Arc<Shared>, bundle: Bundle, shim: Shim, state: TaskState) -> Handle {
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
    created: Option<Created>,
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
    let group = task.spec.as_deref().filter(|_| is_ours(&shim));
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
        warn!(container_id = %bundle.id, error = %render(&error), "cannot undo the bundle");
    }
}
