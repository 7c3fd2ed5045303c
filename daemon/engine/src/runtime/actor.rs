//! The one owner of a task's state.
//!
//! It takes messages one by one, but waits for no shim: calls run beside it and come back as
//! outcomes, so a start that hangs does not keep a kill or an event waiting. What runs beside it
//! is in its own set and ends with it.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use lighter_proto::containerd::events::{TaskDelete, TaskExit};
use lighter_proto::containerd::task::v3 as wire;
use lighter_proto::containerd::types::Envelope;
use lighter_proto::errdefs::{ErrorKind, WireError};
use lighter_proto::time::{from_timestamp, to_timestamp};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::DropGuard;
use tracing::{debug, info, warn};

use super::bundle::Bundle;
use super::connection::Connection;
use super::error::Error;
use super::forward::Meaning;
use super::handle::{Handle, process_of};
use super::manager::{ExecTask, Shared, Shim, Slot};
use super::reap::{self, Found};
use super::state::{Exit, Input, Process, Status, Stdio, TaskState};

/// Messages that wait for the actor; senders wait when it is full.
const INBOX: usize = 32;
/// Longest that the shim may take to say how the first process is.
const STATE_LIMIT: Duration = Duration::from_secs(2);

/// Where an answer goes; whoever asked may have left.
pub(super) type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What an actor is asked.
#[derive(Debug)]
pub(super) enum Message {
    /// Start a process.
    Start { exec_id: String, reply: Reply<u32> },
    /// Make an exec.
    Exec { exec: ExecTask, reply: Reply<()> },
    /// Know an exec that the shim knows.
    Adopt {
        exec_id: String,
        process: Process,
        reply: Reply<()>,
    },
    /// Remove the task.
    Delete { reply: Reply<(Exit, u32)> },
    /// Remove an exec.
    DeleteExec {
        exec_id: String,
        reply: Reply<(Exit, u32)>,
    },
    /// Pause or resume.
    Freeze {
        method: &'static str,
        reply: Reply<()>,
    },
    /// Take an event of the shim in, then publish it.
    Event {
        meaning: Meaning,
        envelope: Envelope,
        reply: Reply<()>,
    },
}

/// What a call that ran beside the actor brought.
enum Done {
    Started {
        exec_id: String,
        result: Result<u32, WireError>,
        seen: Option<Process>,
        reply: Reply<u32>,
    },
    Made {
        exec: ExecTask,
        result: Result<(), WireError>,
        reply: Reply<()>,
    },
    ExecGone {
        exec_id: String,
        result: Result<(Exit, u32), WireError>,
        reply: Reply<(Exit, u32)>,
    },
    Frozen {
        result: Result<(), WireError>,
        seen: Option<Process>,
        reply: Reply<()>,
    },
    Seen {
        seen: Option<Process>,
        envelope: Envelope,
        reply: Reply<()>,
    },
    Waited {
        exec_id: String,
        exit: Option<Exit>,
    },
    Removed {
        result: Result<(Exit, u32), Error>,
        gone: bool,
    },
    Found(Found),
}

/// A task's owner.
pub(super) struct Actor {
    shared: Arc<Shared>,
    bundle: Arc<Bundle>,
    inbox: mpsc::Receiver<Message>,
    state: watch::Sender<TaskState>,
    connection: Arc<RwLock<Connection>>,
    calls: JoinSet<Done>,
    /// Those who wait for the removal under way; `None` when there is none.
    removal: Option<Vec<Reply<(Exit, u32)>>>,
    /// Whether the connection is gone and somebody looks after the shim.
    lost: bool,
    /// Whether the shim is ours.
    ours: bool,
    /// Ends the copying of the shim's log with the task.
    _log: Option<DropGuard>,
}

/// An actor for a task that the shim has made, and the handle on it. The caller runs the actor.
pub(super) fn new(
    shared: Arc<Shared>,
    bundle: Bundle,
    shim: Shim,
    state: TaskState,
) -> (Handle, Actor) {
    let (sender, inbox) = mpsc::channel(INBOX);
    let (state, watched) = watch::channel(state);
    let bundle = Arc::new(bundle);
    let connection = Arc::new(RwLock::new(shim.connection));
    let handle = Handle {
        bundle: Arc::clone(&bundle),
        inbox: sender,
        state: watched,
        connection: Arc::clone(&connection),
    };
    let actor = Actor {
        shared,
        bundle,
        inbox,
        state,
        connection,
        calls: JoinSet::new(),
        removal: None,
        lost: false,
        ours: shim.ours,
        _log: shim.log,
    };
    (handle, actor)
}

impl Actor {
    /// Runs until the task is no more, or the daemon stops.
    pub(super) async fn run(mut self) {
        self.watch_exits();
        loop {
            let connection = self.connection();
            let watching = !self.lost && self.removal.is_none();
            // All branches are cancel-safe: nothing is taken from a queue that is not handled.
            tokio::select! {
                // A removal that was begun is finished.
                () = self.shared.stop.cancelled(), if self.removal.is_none() => return,
                Some(message) = self.inbox.recv() => self.take(message),
                Some(done) = self.calls.join_next(), if !self.calls.is_empty() => match done {
                    Ok(done) => if self.finish(done) { break },
                    Err(error) => warn!(container_id = %self.bundle.id, %error, "a call was cut off"),
                },
                () = connection.closed(), if watching => self.look_after_shim(),
            }
        }
        self.end();
    }

    fn connection(&self) -> Connection {
        self.connection
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn apply(&self, input: Input) {
        self.state.send_if_modified(|state| state.apply(input));
    }

    /// One wait per process that runs: exits are known even when their event is lost.
    fn watch_exits(&mut self) {
        let open: Vec<String> = {
            let state = self.state.borrow();
            let execs = state.execs.iter().filter(|(_, p)| p.exit.is_none());
            let init = state.init.exit.is_none().then(String::new);
            execs.map(|(id, _)| id.clone()).chain(init).collect()
        };
        for exec_id in open {
            self.wait_at_shim(exec_id);
        }
    }

    fn wait_at_shim(&mut self, exec_id: String) {
        let connection = self.connection();
        let request = wire::WaitRequest {
            id: self.bundle.id.clone(),
            exec_id: exec_id.clone(),
        };
        self.calls.spawn(async move {
            let answer: Result<wire::WaitResponse, _> =
                connection.task("Wait", request, None).await;
            let exit = answer.ok().map(|a| exit_of(a.exit_status, a.exited_at));
            Done::Waited { exec_id, exit }
        });
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Start { exec_id, reply } => self.start(exec_id, reply),
            Message::Exec { exec, reply } => self.exec(exec, reply),
            Message::Adopt {
                exec_id,
                process,
                reply,
            } => {
                self.adopt(&exec_id, &process);
                let _left = reply.send(Ok(()));
            }
            Message::Delete { reply } => self.delete(reply),
            Message::DeleteExec { exec_id, reply } => self.delete_exec(exec_id, reply),
            Message::Freeze { method, reply } => self.freeze(method, reply),
            Message::Event {
                meaning,
                envelope,
                reply,
            } => self.event(meaning, envelope, reply),
        }
    }

    fn start(&mut self, exec_id: String, reply: Reply<u32>) {
        let known = self.state.borrow().process(&exec_id);
        let refusal = match known.as_ref().map(|p| p.status) {
            None => Some(Error::ExecNotFound {
                id: self.bundle.id.clone(),
                exec_id: exec_id.clone(),
            }),
            Some(Status::Created) => None,
            Some(Status::Stopped) => Some(Error::State {
                reason: "cannot start a stopped process".to_owned(),
            }),
            Some(Status::Running | Status::Paused | Status::Pausing) => Some(Error::State {
                reason: "cannot start a running process".to_owned(),
            }),
        };
        if let Some(refusal) = refusal {
            let _left = reply.send(Err(refusal));
            return;
        }
        let connection = self.connection();
        let id = self.bundle.id.clone();
        let step = self.shared.step(&self.bundle, "Task.Start");
        self.calls.spawn(async move {
            let _step = step;
            let request = wire::StartRequest {
                id: id.clone(),
                exec_id: exec_id.clone(),
            };
            let answer: Result<wire::StartResponse, _> =
                connection.task("Start", request, None).await;
            // A start that failed may have ended the process, of which no event tells.
            let seen = match &answer {
                Ok(_) => None,
                Err(_) => seen(&connection, &id, &exec_id).await,
            };
            Done::Started {
                exec_id,
                result: answer.map(|a| a.pid),
                seen,
                reply,
            }
        });
    }

    fn exec(&mut self, exec: ExecTask, reply: Reply<()>) {
        if self.state.borrow().execs.contains_key(&exec.exec_id) {
            let _left = reply.send(Err(Error::ExecExists {
                exec_id: exec.exec_id,
            }));
            return;
        }
        let connection = self.connection();
        let request = wire::ExecProcessRequest {
            id: self.bundle.id.clone(),
            exec_id: exec.exec_id.clone(),
            terminal: exec.stdio.terminal,
            stdin: exec.stdio.stdin.clone(),
            stdout: exec.stdio.stdout.clone(),
            stderr: exec.stdio.stderr.clone(),
            spec: exec.spec.clone(),
        };
        self.calls.spawn(async move {
            let result = connection.task("Exec", request, None).await;
            Done::Made {
                exec,
                result,
                reply,
            }
        });
    }

    fn adopt(&mut self, exec_id: &str, process: &Process) {
        self.apply(Input::ExecAdded {
            exec_id: exec_id.to_owned(),
            stdio: process.stdio.clone(),
        });
        if process.status != Status::Created {
            self.apply(Input::Started {
                exec_id: exec_id.to_owned(),
                pid: process.pid,
            });
        }
        match process.exit {
            Some(exit) => self.apply(Input::Exited {
                exec_id: exec_id.to_owned(),
                exit,
            }),
            None => self.wait_at_shim(exec_id.to_owned()),
        }
    }

    fn delete_exec(&mut self, exec_id: String, reply: Reply<(Exit, u32)>) {
        let connection = self.connection();
        let request = wire::DeleteRequest {
            id: self.bundle.id.clone(),
            exec_id: exec_id.clone(),
        };
        self.calls.spawn(async move {
            let answer: Result<wire::DeleteResponse, _> =
                connection.task("Delete", request, None).await;
            let result = answer.map(|a| (exit_of(a.exit_status, a.exited_at), a.pid));
            Done::ExecGone {
                exec_id,
                result,
                reply,
            }
        });
    }

    fn freeze(&mut self, method: &'static str, reply: Reply<()>) {
        let connection = self.connection();
        let id = self.bundle.id.clone();
        self.calls.spawn(async move {
            let result = if method == "Pause" {
                connection
                    .task(method, wire::PauseRequest { id: id.clone() }, None)
                    .await
            } else {
                connection
                    .task(method, wire::ResumeRequest { id: id.clone() }, None)
                    .await
            };
            let seen = seen(&connection, &id, "").await;
            Done::Frozen {
                result,
                seen,
                reply,
            }
        });
    }

    fn event(&mut self, meaning: Meaning, envelope: Envelope, reply: Reply<()>) {
        match meaning {
            Meaning::Input(input) => {
                let exited = match &input {
                    Input::Exited { exec_id, .. } => Some(exec_id.clone()),
                    _ => None,
                };
                self.apply(input);
                let tell = exited.is_none_or(|exec_id| self.announce(&exec_id));
                let told = if tell {
                    self.shared.publish(envelope)
                } else {
                    Ok(())
                };
                let _left = reply.send(told);
            }
            Meaning::Freezer => {
                let connection = self.connection();
                let id = self.bundle.id.clone();
                self.calls.spawn(async move {
                    let seen = seen(&connection, &id, "").await;
                    Done::Seen {
                        seen,
                        envelope,
                        reply,
                    }
                });
            }
        }
    }

    /// Whether subscribers are still to be told of this process's end.
    fn announce(&self, exec_id: &str) -> bool {
        let mut tell = false;
        self.state.send_if_modified(|state| {
            tell = state.announce(exec_id);
            // Nobody who waits for a state cares.
            false
        });
        if tell && exec_id.is_empty() {
            self.bundle.mark_announced();
        }
        tell
    }

    fn delete(&mut self, reply: Reply<(Exit, u32)>) {
        if self.lost {
            // The shim is being looked after; the task is gone when that is done.
            self.removal_waiters().push(reply);
            return;
        }
        if let Some(waiters) = &mut self.removal {
            waiters.push(reply);
            return;
        }
        self.removal = Some(vec![reply]);
        let (shared, bundle) = (Arc::clone(&self.shared), Arc::clone(&self.bundle));
        let (connection, ours) = (self.connection(), self.ours);
        self.calls.spawn(async move {
            let (result, gone) = remove(&shared, &bundle, &connection, ours).await;
            Done::Removed { result, gone }
        });
    }

    fn removal_waiters(&mut self) -> &mut Vec<Reply<(Exit, u32)>> {
        self.removal.get_or_insert_default()
    }

    fn look_after_shim(&mut self) {
        self.lost = true;
        let (shared, bundle) = (Arc::clone(&self.shared), Arc::clone(&self.bundle));
        let bootstrap = self.connection().bootstrap();
        self.calls
            .spawn(async move { Done::Found(reap::look(&shared, &bundle, &bootstrap).await) });
    }

    /// Takes an outcome in; whether the task is no more.
    fn finish(&mut self, done: Done) -> bool {
        match done {
            Done::Started {
                exec_id,
                result,
                seen,
                reply,
            } => {
                match &result {
                    Ok(pid) => {
                        self.apply(Input::Started {
                            exec_id: exec_id.clone(),
                            pid: *pid,
                        });
                        if !exec_id.is_empty() {
                            self.wait_at_shim(exec_id);
                        }
                    }
                    Err(_) => match seen.map(|p| (p.status, p.exit)) {
                        Some((_, Some(exit))) => self.apply(Input::Exited { exec_id, exit }),
                        Some((Status::Created, None)) => self.apply(Input::Failed {
                            exec_id,
                            exit: Exit::unknown(),
                        }),
                        _ => {}
                    },
                }
                let _left = reply.send(result.map_err(Error::from));
            }
            Done::Made {
                exec,
                result,
                reply,
            } => {
                if result.is_ok() {
                    self.apply(Input::ExecAdded {
                        exec_id: exec.exec_id,
                        stdio: exec.stdio,
                    });
                }
                let _left = reply.send(result.map_err(Error::from));
            }
            Done::ExecGone {
                exec_id,
                result,
                reply,
            } => {
                let missing = matches!(&result, Err(e) if e.kind == ErrorKind::NotFound);
                if result.is_ok() || missing {
                    self.apply(Input::ExecDeleted { exec_id });
                }
                let _left = reply.send(result.map_err(Error::from));
            }
            Done::Frozen {
                result,
                seen,
                reply,
            } => {
                self.see(seen);
                let _left = reply.send(result.map_err(Error::from));
            }
            Done::Seen {
                seen,
                envelope,
                reply,
            } => {
                self.see(seen);
                let _left = reply.send(self.shared.publish(envelope));
            }
            Done::Waited { exec_id, exit } => {
                if let Some(exit) = exit {
                    self.apply(Input::Exited { exec_id, exit });
                }
            }
            Done::Removed { result, gone } => return self.removed(result, gone),
            Done::Found(found) => return self.found(found),
        }
        false
    }

    fn see(&self, seen: Option<Process>) {
        if let Some(process) = seen {
            self.apply(Input::Seen {
                status: process.status,
            });
        }
    }

    fn removed(&mut self, result: Result<(Exit, u32), Error>, gone: bool) -> bool {
        let waiters = self.removal.take().unwrap_or_default();
        let exit = result.as_ref().map(|(exit, _)| *exit);
        if gone {
            self.apply(Input::Gone {
                exit: exit.unwrap_or_else(|_| Exit::unknown()),
            });
        }
        let mut first = Some(result);
        for reply in waiters {
            // One removal, one answer; who came second finds nothing.
            let answer = first.take().unwrap_or_else(|| {
                Err(Error::NotFound {
                    id: self.bundle.id.clone(),
                })
            });
            let _left = reply.send(answer);
        }
        gone
    }

    fn found(&mut self, found: Found) -> bool {
        match found {
            Found::Alive(connection) => {
                info!(container_id = %self.bundle.id, "reconnected to the shim");
                *self
                    .connection
                    .write()
                    .unwrap_or_else(PoisonError::into_inner) = connection;
                self.lost = false;
                self.watch_exits();
                if let Some(waiters) = self.removal.take() {
                    for reply in waiters {
                        self.delete(reply);
                    }
                }
                false
            }
            Found::Dead { exit, pid } => {
                self.mourn(exit, pid);
                self.removed(
                    Err(Error::NotFound {
                        id: self.bundle.id.clone(),
                    }),
                    true,
                )
            }
        }
    }

    /// Tells of everything that ended with the shim: state first, then events.
    fn mourn(&self, exit: Exit, pid: u32) {
        let before = self.state.borrow().clone();
        self.shared.forget(&self.bundle);
        self.apply(Input::Gone { exit });
        let container_id = self.bundle.id.clone();
        let running = before
            .execs
            .iter()
            .filter(|(_, p)| p.status == Status::Running);
        for (exec_id, process) in running {
            if self.announce(exec_id) {
                self.tell_exit(&container_id, exec_id, process.pid, exit);
            }
        }
        let last = before.init.exit.unwrap_or(exit);
        let pid = if before.init.pid == 0 {
            pid
        } else {
            before.init.pid
        };
        if self.announce("") {
            self.tell_exit(&container_id, &container_id, pid, last);
        }
        let event = TaskDelete {
            container_id: container_id.clone(),
            pid,
            exit_status: last.status,
            exited_at: Some(to_timestamp(last.at)),
            id: container_id,
        };
        self.tell("/tasks/delete", &event);
        info!(container_id = %self.bundle.id, exit_status = last.status, "cleaned up after a dead shim");
    }

    fn tell_exit(&self, container_id: &str, id: &str, pid: u32, exit: Exit) {
        let event = TaskExit {
            container_id: container_id.to_owned(),
            id: id.to_owned(),
            pid,
            exit_status: exit.status,
            exited_at: Some(to_timestamp(exit.at)),
        };
        self.tell("/tasks/exit", &event);
    }

    fn tell<M: prost::Message + prost::Name>(&self, topic: &str, event: &M) {
        if let Err(error) = self
            .shared
            .events
            .publish(&self.bundle.namespace, topic, event)
        {
            warn!(%error, topic, "cannot publish");
        }
    }

    /// Answers what is still in the inbox, then lets go of the state: waiters see the end of it.
    fn end(&mut self) {
        self.inbox.close();
        while let Ok(message) = self.inbox.try_recv() {
            if let Message::Event {
                envelope, reply, ..
            } = message
            {
                let _left = reply.send(self.shared.publish(envelope));
            }
            // The others find their reply dropped, which means the task is not there.
        }
        debug!(container_id = %self.bundle.id, "task removed");
    }
}

/// How the shim says a process is.
async fn seen(connection: &Connection, id: &str, exec_id: &str) -> Option<Process> {
    let request = wire::StateRequest {
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
    };
    let answer: wire::StateResponse = connection
        .task("State", request, Some(STATE_LIMIT))
        .await
        .ok()?;
    process_of(&answer)
}

fn exit_of(status: u32, at: Option<prost_types::Timestamp>) -> Exit {
    Exit {
        status,
        at: at
            .and_then(from_timestamp)
            .unwrap_or_else(|| Exit::unknown().at),
        lost: false,
    }
}

/// Deletes at the shim, then everything of ours. The flag says whether the task is no more.
async fn remove(
    shared: &Arc<Shared>,
    bundle: &Arc<Bundle>,
    connection: &Connection,
    ours: bool,
) -> (Result<(Exit, u32), Error>, bool) {
    let _step = shared.step(bundle, "Task.Delete");
    let request = wire::DeleteRequest {
        id: bundle.id.clone(),
        exec_id: String::new(),
    };
    let answer: Result<wire::DeleteResponse, _> = connection.task("Delete", request, None).await;
    let gone = match &answer {
        Ok(_) => true,
        Err(error) => error.kind == ErrorKind::NotFound || connection.is_closed(),
    };
    if !gone {
        return (
            Err(answer.err().map_or(Error::Stopping, Error::from)),
            false,
        );
    }
    // Off the books before the shim goes: its end must not be taken for a death.
    let clearing = clear_away(shared, bundle, connection);
    // Our shim has unmounted the root filesystem when it answers, and the id stays taken: nobody
    // needs to wait for the rest.
    if answer.is_ok() && ours && !shared.has_mounts(bundle) {
        shared.tracker.spawn(clearing);
    } else {
        clearing.await;
    }
    let answer = answer
        .map(|a| (exit_of(a.exit_status, a.exited_at), a.pid))
        .map_err(Error::from);
    (answer, true)
}

/// Takes a deleted task off the books at once; the future sends its shim away, removes the bundle
/// and frees the id.
fn clear_away(
    shared: &Arc<Shared>,
    bundle: &Arc<Bundle>,
    connection: &Connection,
) -> impl Future<Output = ()> + Send + 'static {
    let (freed, waiting) = watch::channel(());
    shared.put(bundle, Slot::Removing(waiting));
    let step = shared.step(bundle, "Task.Shutdown");
    let (shared, bundle) = (Arc::clone(shared), Arc::clone(bundle));
    let connection = connection.clone();
    async move {
        let address = connection.bootstrap().address;
        if !shared.shares_shim(&address) {
            shared.groups.forget(&address);
        }
        reap::dismiss(&shared, &bundle, &connection).await;
        step.at("delete bundle");
        if let Err(error) = shared.delete_bundle(&bundle).await {
            warn!(container_id = %bundle.id, error = %lighter_proto::errdefs::render(&error), "cannot delete the bundle");
        }
        shared.forget(&bundle);
        drop(freed);
    }
}

/// A state for a process that was just made.
pub(super) fn fresh(pid: u32, stdio: Stdio) -> TaskState {
    TaskState::created(pid, stdio)
}
