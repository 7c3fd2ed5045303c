//! The one owner of a task's state.
//!
//! It takes messages one by one, but waits for no shim: calls run beside it (`calls.rs`) and come
//! back as outcomes (`outcome.rs`), so a start that hangs does not keep a kill or an event waiting.
//! What runs beside it is in its own set and ends with it. How a task is taken away is in
//! `removal.rs`, what is done and told when its shim died in `death.rs`.

mod calls;
mod death;
mod outcome;
mod removal;

use std::sync::{Arc, PoisonError, RwLock};

use lighter_proto::containerd::types::Envelope;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::DropGuard;
use tracing::{debug, warn};

use self::outcome::Done;
use super::bundle::Bundle;
use super::connection::Connection;
use super::create::Shim;
use super::error::Error;
use super::forward::Meaning;
use super::handle::{ExecTask, Handle};
use super::shared::Shared;
use super::state::{Exit, Input, Process, Status, TaskState};

/// Messages that wait for the actor; senders wait when it is full.
const INBOX: usize = 32;

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
            Meaning::Freezer => self.look(envelope, reply),
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
