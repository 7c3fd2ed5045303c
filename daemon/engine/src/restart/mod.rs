//! Containers that are started again: the monitor behind the labels of [`policy`].
//!
//! Every interval the labelled containers are compared with their tasks: one that should run and
//! does not is started again if its policy says so, one that should be stopped and runs is killed.
//! Between two looks only events are read: while no record of a container changed, the labelled
//! ones of the last look are all there are.

pub mod policy;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lighter_proto::errdefs::{Classify, ErrorKind, render};
use lighter_store::filter::Filter;
use lighter_store::metadata::{Container, Db};
use lighter_store::{Labels, Namespace, Scope};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use self::policy::{COUNT, LOG_URI, POLICY, Policy, STATUS};
use crate::runtime::{CreateTask, Handle, Manager, Status, Stdio};

/// Signal that ends a task.
const SIGKILL: u32 = 9;

/// Why a container was not started again.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Store(#[from] lighter_store::Error),
    #[error(transparent)]
    Task(#[from] crate::runtime::Error),
    #[error("label {POLICY}: {0}")]
    Policy(String),
}

/// The monitor.
#[derive(Debug)]
pub struct Monitor {
    db: Db,
    tasks: Manager,
    /// Between two looks.
    interval: Duration,
    /// Owns the restarts under way.
    tracker: TaskTracker,
    /// Containers that a restart is under way for.
    busy: Arc<Mutex<HashSet<Key>>>,
}

type Key = (Namespace, String);

/// What the last look saw, for the next.
#[derive(Debug, Default)]
struct Seen {
    /// Labelled containers; `None`: look for them.
    labelled: Option<Vec<Key>>,
    /// Tasks that were made and not started: whoever made them is given one interval to do it.
    created: HashSet<Key>,
}

/// What is to be done about a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Leave,
    /// Made, not started: somebody may be about to.
    Wait,
    Start,
    Stop,
}

impl Monitor {
    /// A monitor that looks every `interval`.
    #[must_use]
    pub fn new(db: Db, tasks: Manager, interval: Duration) -> Self {
        Self {
            db,
            tasks,
            interval,
            tracker: TaskTracker::new(),
            busy: Arc::default(),
        }
    }

    /// Looks until `stop`; then waits for what is under way.
    pub async fn run(self, stop: CancellationToken) {
        let filter = ["topic~=|^/containers/|".to_owned()];
        let filter = Filter::parse(&filter).expect("a filter of ours parses");
        let mut changes = self.db.events().subscribe(filter.clone());
        let mut seen = Seen::default();
        loop {
            self.look(&mut seen).await;
            let wake = tokio::time::sleep(self.interval);
            tokio::pin!(wake);
            loop {
                // All branches are cancel-safe: a change not read now is read in the next round.
                tokio::select! {
                    () = stop.cancelled() => {
                        self.tracker.close();
                        self.tracker.wait().await;
                        return;
                    }
                    () = &mut wake => break,
                    change = changes.next() => {
                        seen.labelled = None;
                        if change.is_err() {
                            // Too many to keep up with: any of them may have been about a label.
                            changes = self.db.events().subscribe(filter.clone());
                        }
                    }
                }
            }
        }
    }

    async fn look(&self, seen: &mut Seen) {
        let labelled = match seen.labelled.take() {
            Some(known) => known,
            None => match self.labelled() {
                Ok(found) => found,
                Err(error) => {
                    warn!(%error, "cannot look for containers to restart");
                    return;
                }
            },
        };
        let mut created = HashSet::new();
        for key in &labelled {
            if self.lock().contains(key) {
                continue;
            }
            let scope = Scope::new(key.0.clone());
            let Ok(container) = self.db.containers().get(&scope, &key.1) else {
                continue;
            };
            let verdict = match self.judge(&key.0, &container).await {
                Ok(Verdict::Wait) if seen.created.contains(key) => Verdict::Start,
                Ok(verdict) => verdict,
                Err(error) => {
                    warn!(container_id = key.1, namespace = %key.0, error = %render(&error),
                        "cannot tell whether a container is to be restarted");
                    continue;
                }
            };
            match verdict {
                Verdict::Leave => {}
                Verdict::Wait => {
                    created.insert(key.clone());
                }
                Verdict::Start | Verdict::Stop => self.act(key.clone(), container, verdict),
            }
        }
        seen.created = created;
        seen.labelled = Some(labelled);
    }

    /// Containers with a wanted status, in all namespaces.
    fn labelled(&self) -> Result<Vec<Key>, lighter_store::Error> {
        let filter = Filter::parse(&[format!("labels.\"{STATUS}\"")])?;
        let mut found = Vec::new();
        for (namespace, _) in self.db.namespaces().list()? {
            let scope = Scope::new(namespace.clone());
            let containers = self.db.containers().list(&scope, &filter)?;
            found.extend(
                containers
                    .into_iter()
                    .map(|c| (namespace.clone(), c.id.to_string())),
            );
        }
        Ok(found)
    }

    async fn judge(&self, namespace: &Namespace, container: &Container) -> Result<Verdict, Error> {
        let task = match self.tasks.get(namespace, container.id.as_str()).await {
            Ok(task) => Some(task.init()),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error.into()),
        };
        let status = task.as_ref().map(|init| init.status);
        let exit = task
            .and_then(|init| init.exit)
            .map_or(0, |exit| exit.status);
        verdict(&container.labels, status, exit).map_err(Error::Policy)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<Key>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn act(&self, key: Key, container: Container, verdict: Verdict) {
        self.lock().insert(key.clone());
        let (db, tasks, busy) = (self.db.clone(), self.tasks.clone(), Arc::clone(&self.busy));
        self.tracker.spawn(async move {
            let (namespace, id) = (&key.0, key.1.as_str());
            let done = match verdict {
                Verdict::Start => start(&db, &tasks, namespace, container).await,
                _ => end(&tasks, namespace, id).await,
            };
            match done {
                Ok(()) if verdict == Verdict::Start => {
                    info!(container_id = id, %namespace, "container restarted");
                }
                Ok(()) => info!(container_id = id, %namespace, "container stopped as labelled"),
                Err(error) => {
                    warn!(container_id = id, %namespace, error = %render(&error),
                        "a container was not restarted; it is tried again");
                }
            }
            busy.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&key);
        });
    }
}

/// What labels ask for, given what the task is doing (`None`: there is none).
fn verdict(labels: &Labels, status: Option<Status>, exit_status: u32) -> Result<Verdict, String> {
    match labels.get(STATUS).map(String::as_str) {
        Some("running") => match status {
            Some(Status::Running | Status::Paused | Status::Pausing) => Ok(Verdict::Leave),
            Some(Status::Created) => Ok(Verdict::Wait),
            Some(Status::Stopped) | None => {
                let policy = labels.get(POLICY).map_or("", String::as_str);
                let restarts = Policy::parse(policy)?.restarts(exit_status, labels);
                Ok(if restarts {
                    Verdict::Start
                } else {
                    Verdict::Leave
                })
            }
        },
        Some("stopped") => match status {
            Some(Status::Stopped) | None => Ok(Verdict::Leave),
            Some(_) => Ok(Verdict::Stop),
        },
        _ => Ok(Verdict::Leave),
    }
}

/// Ends what is left of a task and starts it anew, as the container's record has it.
async fn start(
    db: &Db,
    tasks: &Manager,
    namespace: &Namespace,
    mut container: Container,
) -> Result<(), Error> {
    let scope = Scope::new(namespace.clone());
    let count = policy::count(&container.labels).saturating_add(1);
    container.labels.insert(COUNT.to_owned(), count.to_string());
    let mask = [format!("labels.{COUNT}")];
    let container = db.containers().update(&scope, container, &mask).await?;
    if let Err(error) = end(tasks, namespace, container.id.as_str()).await {
        debug!(container_id = %container.id, error = %render(&error), "what is left of a task");
    }
    let rootfs = if container.snapshot_key.is_empty() {
        Vec::new()
    } else {
        let snapshots = db.snapshots(&container.snapshotter)?;
        snapshots.mounts(&scope, &container.snapshot_key).await?
    };
    let task = CreateTask {
        rootfs,
        stdio: stdio(&container),
        ..CreateTask::of(&container)
    };
    let handle = tasks.create(&scope, task).await?;
    if let Err(error) = handle.start("").await {
        // A task that cannot start must not stand in the way of the next try.
        let _gone = handle.delete().await;
        return Err(error.into());
    }
    Ok(())
}

/// Where the first process writes: where the label says, or nowhere.
fn stdio(container: &Container) -> Stdio {
    let Some(uri) = container.labels.get(LOG_URI) else {
        return Stdio::default();
    };
    let spec: serde_json::Value = serde_json::from_slice(&container.spec.value).unwrap_or_default();
    let terminal = spec["process"]["terminal"].as_bool().unwrap_or_default();
    Stdio {
        stdin: String::new(),
        stdout: uri.clone(),
        stderr: if terminal { String::new() } else { uri.clone() },
        terminal,
    }
}

/// Kills a task and removes it; one that is gone is fine.
async fn end(tasks: &Manager, namespace: &Namespace, id: &str) -> Result<(), Error> {
    let task: Handle = match tasks.get(namespace, id).await {
        Ok(task) => task,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if task.init().status != Status::Stopped {
        match task.kill("", SIGKILL, true).await {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                // One that was never started may be deleted as it is.
                return task.delete().await.map(drop).map_err(|_| error.into());
            }
            _ => {}
        }
        task.wait("").await?;
    }
    match task.delete().await {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_the_task_decide_together() {
        let labels = |status: &str, policy: &str| {
            Labels::from([
                (STATUS.to_owned(), status.to_owned()),
                (POLICY.to_owned(), policy.to_owned()),
            ])
        };
        for (wanted, policy, status, exit, verdict_) in [
            ("running", "", None, 0, Verdict::Start),
            ("running", "", Some(Status::Stopped), 0, Verdict::Start),
            ("running", "no", Some(Status::Stopped), 0, Verdict::Leave),
            (
                "running",
                "on-failure",
                Some(Status::Stopped),
                0,
                Verdict::Leave,
            ),
            (
                "running",
                "on-failure",
                Some(Status::Stopped),
                3,
                Verdict::Start,
            ),
            ("running", "", Some(Status::Running), 0, Verdict::Leave),
            ("running", "", Some(Status::Paused), 0, Verdict::Leave),
            ("running", "", Some(Status::Created), 0, Verdict::Wait),
            ("stopped", "", Some(Status::Running), 0, Verdict::Stop),
            ("stopped", "", Some(Status::Stopped), 0, Verdict::Leave),
            ("stopped", "", None, 0, Verdict::Leave),
            ("dancing", "", None, 0, Verdict::Leave),
        ] {
            let found = verdict(&labels(wanted, policy), status, exit);
            assert_eq!(found, Ok(verdict_), "{wanted} {policy} {status:?}");
        }
        assert!(verdict(&labels("running", "often"), None, 0).is_err());
        assert_eq!(verdict(&Labels::new(), None, 0), Ok(Verdict::Leave));
    }
}
