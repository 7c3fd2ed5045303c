//! After a restart of the daemon: every bundle is a task to be found again.
//!
//! The ids are on the books before anything is served, each as "recovering"; then all shims are
//! greeted in parallel. A shim is dead when nobody listens on its socket; one that does not
//! answer is asked again for as long as the daemon runs, because its container may well live.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lighter_proto::any;
use lighter_proto::containerd::runc::v1::ProcessDetails;
use lighter_proto::containerd::task::v3 as wire;
use lighter_proto::containerd::types::Envelope;
use lighter_proto::errdefs::{ErrorKind, WireError, render};
use lighter_proto::time::now;
use lighter_store::{Namespace, Scope};
use prost::Name;
use tokio::sync::{Semaphore, watch};
use tracing::{info, warn};

use super::binary::is_ours;
use super::bundle::{Bundle, TASKS};
use super::connection::Connection;
use super::create::{Shim, adopt};
use super::ending::{deleted, exited};
use super::error::Error;
use super::handle::{Handle, process_of};
use super::manager::Manager;
use super::reap;
use super::shared::{Shared, Slot};
use super::shim_log;
use super::state::{Exit, Process, Status, Stdio, TaskState};

/// Shims greeted at once.
const PARALLEL: usize = 64;
/// How long an exit that happened while no daemon ran is left to its shim to tell: shims repeat
/// an event that failed for about fifteen seconds.
const SHIM_TELLS: Duration = Duration::from_secs(20);
/// Pause before a shim that does not answer is asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// Longest such pause.
const AGAIN_AT_MOST: Duration = Duration::from_secs(30);

impl Manager {
    /// Puts every bundle of earlier runs on the books and recovers them beside what comes next.
    /// Returns how many there are, at once.
    pub fn recover(&self) -> usize {
        let shared = &self.shared;
        let mut found = Vec::new();
        let state = shared.state.join(TASKS);
        for name in directories(&state) {
            let Ok(namespace) = Namespace::new(&name) else {
                continue;
            };
            for id in directories(&state.join(&name)) {
                let bundle = shared.bundle(TASKS, &namespace, &id);
                if id.starts_with('.') {
                    // Its removal was cut off.
                    let _gone = std::fs::remove_dir_all(&bundle.path);
                    continue;
                }
                found.push(bundle);
            }
        }
        let warming = Arc::clone(shared);
        shared
            .tracker
            .spawn(async move { warming.launcher.warm_up().await });
        let limit = Arc::new(Semaphore::new(PARALLEL));
        let count = found.len();
        for bundle in &found {
            let (settle, settled) = watch::channel(());
            shared.put(bundle, Slot::Recovering(settled));
            let (shared, limit, bundle) = (Arc::clone(shared), Arc::clone(&limit), bundle.clone());
            self.shared.tracker.spawn(async move {
                let stop = shared.stop.clone();
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = one(&shared, bundle, &limit) => {}
                }
                drop(settle);
            });
        }
        self.sweep_work(&found);
        if count > 0 {
            info!(tasks = count, "recovering tasks");
        }
        count
    }

    /// Work directories of tasks that died with an earlier boot.
    fn sweep_work(&self, found: &[Bundle]) {
        let root = self.shared.root.join(TASKS);
        let known: std::collections::BTreeSet<_> = found.iter().map(|b| b.work.clone()).collect();
        for namespace in directories(&root) {
            for id in directories(&root.join(&namespace)) {
                let work = root.join(&namespace).join(&id);
                if !known.contains(&work)
                    && let Err(error) = std::fs::remove_dir_all(&work)
                {
                    warn!(%error, path = %work.display(), "cannot remove a stale work directory");
                }
            }
        }
    }
}

/// Names of sub-directories; none where there is no directory.
fn directories(path: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(path) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// Recovers one bundle: afterwards it is a task, or nothing.
async fn one(shared: &Arc<Shared>, bundle: Bundle, limit: &Semaphore) {
    let step = shared.step(&bundle, "recover");
    let mut pause = AGAIN;
    loop {
        let permit = limit.acquire().await;
        let outcome = try_one(shared, &bundle).await;
        drop(permit);
        match outcome {
            Ok(Some(recovered)) => {
                settle(shared, bundle, recovered);
                return;
            }
            Ok(None) => {
                shared.forget(&bundle);
                return;
            }
            Err(error) => {
                step.at("recover: the shim does not answer");
                warn!(
                    container_id = %bundle.id,
                    namespace = %bundle.namespace,
                    error = %render(&error),
                    "cannot recover a task yet; its container is left alone"
                );
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(AGAIN_AT_MOST);
    }
}

struct Recovered {
    connection: Connection,
    state: TaskState,
}

fn settle(shared: &Arc<Shared>, bundle: Bundle, recovered: Recovered) {
    let Recovered { connection, state } = recovered;
    let log = shim_log::follow(&shared.tracker, &bundle).inspect_err(|error| {
        warn!(container_id = %bundle.id, error = %render(error), "cannot follow the shim's log");
    });
    let untold = state.init.exit.filter(|_| !state.init.announced);
    let ours = bundle.shim_path().as_deref().is_some_and(is_ours);
    let shim = Shim {
        connection,
        ours,
        log: log.ok(),
    };
    let handle = adopt(shared, bundle, shim, state);
    if let Some(exit) = untold {
        shared
            .tracker
            .spawn(tell_later(Arc::clone(shared), handle, exit));
    }
}

/// Tells of an exit that happened while no daemon ran, unless the shim does it first.
async fn tell_later(shared: Arc<Shared>, handle: Handle, exit: Exit) {
    tokio::select! {
        () = shared.stop.cancelled() => return,
        () = tokio::time::sleep(SHIM_TELLS) => {}
    }
    let event = exited(handle.id(), handle.id(), handle.init().pid, exit);
    let envelope = envelope(handle.namespace(), "/tasks/exit", &event);
    let manager = Manager { shared };
    if let Err(error) = manager.forward(envelope).await {
        warn!(container_id = handle.id(), error = %render(&error), "cannot tell of an exit");
    }
}

fn envelope<M: prost::Message + Name>(namespace: &Namespace, topic: &str, event: &M) -> Envelope {
    Envelope {
        timestamp: Some(now()),
        namespace: namespace.to_string(),
        topic: topic.to_owned(),
        event: Some(any::pack(event)),
    }
}

/// One try. `None`: there is no task, and nothing is left of it.
///
/// # Errors
/// When that cannot be told yet.
async fn try_one(shared: &Arc<Shared>, bundle: &Bundle) -> Result<Option<Recovered>, Error> {
    let Ok(bootstrap) = bundle.read_bootstrap() else {
        half_made(shared, bundle).await;
        return Ok(None);
    };
    let limit = shared.timeouts.shim_load;
    let connection = match reap::greet(bundle, &bootstrap, limit).await {
        Ok(connection) => connection,
        Err(error) if error.kind == ErrorKind::Unavailable => {
            dead(shared, bundle).await;
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let request = wire::StateRequest {
        id: bundle.id.clone(),
        exec_id: String::new(),
    };
    let answer: Result<wire::StateResponse, WireError> =
        connection.task("State", request, Some(limit)).await;
    let seen = match answer {
        Ok(seen) => process_of(&seen),
        Err(error) if error.kind == ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    let init = match seen {
        Some(init) => init,
        None => match bundle.init_pid().filter(|pid| alive(*pid)) {
            // The shim has no such task, but its process lives: nobody may be killed for that.
            Some(pid) => Process {
                status: Status::Running,
                ..Process::created(pid, Stdio::default())
            },
            None => {
                leaked(shared, bundle, &connection).await;
                return Ok(None);
            }
        },
    };
    let mut state = TaskState::created(init.pid, init.stdio.clone());
    state.init = init;
    state.init.announced = bundle.announced();
    if state.init.exit.is_none() {
        state.execs = execs(&connection, bundle, limit).await;
    }
    Ok(Some(Recovered { connection, state }))
}

/// Execs that run, as the shim lists them.
async fn execs(
    connection: &Connection,
    bundle: &Bundle,
    limit: Duration,
) -> std::collections::BTreeMap<String, Process> {
    let request = wire::PidsRequest {
        id: bundle.id.clone(),
    };
    let answer: Result<wire::PidsResponse, _> = connection.task("Pids", request, Some(limit)).await;
    let mut execs = std::collections::BTreeMap::new();
    for process in answer.map(|a| a.processes).unwrap_or_default() {
        let details = process.info.as_ref();
        let Some(details) = details.and_then(|info| any::unpack::<ProcessDetails>(info).ok())
        else {
            continue;
        };
        let request = wire::StateRequest {
            id: bundle.id.clone(),
            exec_id: details.exec_id.clone(),
        };
        let seen: Result<wire::StateResponse, _> =
            connection.task("State", request, Some(limit)).await;
        if let Some(process) = seen.ok().as_ref().and_then(process_of) {
            execs.insert(details.exec_id, process);
        }
    }
    execs
}

fn alive(pid: u32) -> bool {
    // A pid that was taken by another process since then only delays a cleanup.
    Path::new("/proc").join(pid.to_string()).exists()
}

/// The daemon died between starting a shim and keeping its address. The shim is asked for it
/// once more; then everything is taken down, since nobody was told of the task.
async fn half_made(shared: &Arc<Shared>, bundle: &Bundle) {
    info!(container_id = %bundle.id, namespace = %bundle.namespace, "removing a half-made task");
    let shim = bundle
        .shim_path()
        .or_else(|| recorded_runtime(shared, bundle));
    if let Some(shim) = shim {
        if let Ok(bootstrap) = shared.launcher.start(&shim, bundle, None).await
            && let Ok(connection) = Connection::open(&bootstrap, bundle.namespace.as_str()).await
        {
            leaked_shim(shared, bundle, &connection).await;
        }
        reap::delete_action(shared, &shim, bundle).await;
    }
    remove(shared, bundle).await;
}

/// The shim of the runtime that the container's record names.
fn recorded_runtime(shared: &Shared, bundle: &Bundle) -> Option<PathBuf> {
    let scope = Scope::new(bundle.namespace.clone());
    let container = shared.db.containers().get(&scope, &bundle.id).ok()?;
    shared.launcher.resolve(&container.runtime.name).ok()
}

/// The shim lives but has no task: the daemon died before the task was made.
async fn leaked(shared: &Arc<Shared>, bundle: &Bundle, connection: &Connection) {
    info!(container_id = %bundle.id, namespace = %bundle.namespace, "removing a shim without a task");
    leaked_shim(shared, bundle, connection).await;
    remove(shared, bundle).await;
}

async fn leaked_shim(shared: &Arc<Shared>, bundle: &Bundle, connection: &Connection) {
    let request = wire::DeleteRequest {
        id: bundle.id.clone(),
        exec_id: String::new(),
    };
    let limit = Some(shared.timeouts.shim_cleanup);
    let _gone: Result<wire::DeleteResponse, _> = connection.task("Delete", request, limit).await;
    reap::dismiss(shared, bundle, connection).await;
}

/// The shim died while no daemon ran: what it left is cleaned up and its end is told.
async fn dead(shared: &Arc<Shared>, bundle: &Bundle) {
    let told = bundle.announced();
    let (exit, pid) = reap::bury(shared, bundle).await;
    shared.forget(bundle);
    if !told {
        let event = exited(&bundle.id, &bundle.id, pid, exit);
        shared.tell(&bundle.namespace, "/tasks/exit", &event);
    }
    let event = deleted(&bundle.id, pid, exit);
    shared.tell(&bundle.namespace, "/tasks/delete", &event);
}

async fn remove(shared: &Arc<Shared>, bundle: &Bundle) {
    if let Err(error) = shared.delete_bundle(bundle).await {
        warn!(container_id = %bundle.id, error = %render(&error), "cannot remove a bundle");
    }
}
