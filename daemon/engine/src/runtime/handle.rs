//! What others hold of a task: its state to read, its actor to ask, its shim to call.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use lighter_proto::containerd::task::v3 as wire;
use lighter_proto::containerd::v1::types::ProcessInfo;
use lighter_proto::errdefs::ErrorKind;
use lighter_store::Namespace;
use prost_types::Any;
use tokio::sync::{mpsc, oneshot, watch};

use super::actor::{Message, Reply};
use super::bundle::Bundle;
use super::connection::Connection;
use super::error::Error;
use super::state::{Exit, Process, Status, Stdio, TaskState};

/// Longest that a question to a shim may take where the caller set no limit.
const ASK_LIMIT: Duration = Duration::from_secs(10);

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

/// A task; clones share it. Dropping it leaves the task alone.
#[derive(Debug, Clone)]
pub struct Handle {
    pub(super) bundle: Arc<Bundle>,
    /// Senders: handles. Receiver: the actor. Closed when the task is no more.
    pub(super) inbox: mpsc::Sender<Message>,
    /// Sender: the actor. Receivers: everyone who reads or waits. Closed when the task is no more.
    pub(super) state: watch::Receiver<TaskState>,
    /// The connection in use; the actor replaces it when it had to reconnect.
    pub(super) connection: Arc<RwLock<Connection>>,
}

impl Handle {
    /// Id of the container.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.bundle.id
    }

    /// Namespace of the task.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.bundle.namespace
    }

    /// Its bundle.
    #[must_use]
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// The connection to its shim.
    #[must_use]
    pub fn connection(&self) -> Connection {
        self.connection
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The state now.
    #[must_use]
    pub fn state(&self) -> TaskState {
        self.state.borrow().clone()
    }

    /// Status and exit of the first process, without copying the rest.
    #[must_use]
    pub fn init(&self) -> Process {
        self.state.borrow().init.clone()
    }

    /// A receiver of every later state.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<TaskState> {
        self.state.clone()
    }

    fn not_found(&self) -> Error {
        Error::NotFound {
            id: self.id().to_owned(),
        }
    }

    /// Asks the actor and waits for its answer; the work goes on when the caller leaves.
    async fn ask<T>(&self, message: impl FnOnce(Reply<T>) -> Message) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.inbox
            .send(message(reply))
            .await
            .map_err(|_| self.not_found())?;
        answer.await.map_err(|_| self.not_found())?
    }

    /// A process; an empty `exec_id` is the first one. An exec made before the daemon restarted
    /// is looked up at the shim.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn process(&self, exec_id: &str) -> Result<Process, Error> {
        if let Some(process) = self.state.borrow().process(exec_id) {
            return Ok(process);
        }
        let missing = || Error::ExecNotFound {
            id: self.id().to_owned(),
            exec_id: exec_id.to_owned(),
        };
        let request = wire::StateRequest {
            id: self.id().to_owned(),
            exec_id: exec_id.to_owned(),
        };
        let seen: wire::StateResponse = match self
            .connection()
            .task("State", request, Some(ASK_LIMIT))
            .await
        {
            Ok(seen) => seen,
            Err(error) if error.kind == ErrorKind::NotFound => return Err(missing()),
            Err(error) => return Err(error.into()),
        };
        let process = process_of(&seen).ok_or_else(missing)?;
        self.ask(|reply| Message::Adopt {
            exec_id: exec_id.to_owned(),
            process: process.clone(),
            reply,
        })
        .await?;
        Ok(process)
    }

    /// The first process as its shim knows it at this moment: [`Handle::init`] may not have heard of its
    /// end yet.
    ///
    /// # Errors
    /// The shim's own.
    pub async fn seen(&self) -> Result<Process, Error> {
        let request = wire::StateRequest {
            id: self.id().to_owned(),
            exec_id: String::new(),
        };
        let seen: wire::StateResponse = self
            .connection()
            .task("State", request, Some(ASK_LIMIT))
            .await?;
        process_of(&seen).ok_or_else(|| Error::State {
            reason: format!("the shim of task {} does not say how it is", self.id()),
        })
    }

    /// Starts the first process or an exec; its pid.
    ///
    /// # Errors
    /// The shim's own; `FailedPrecondition` for what was started before.
    pub async fn start(&self, exec_id: &str) -> Result<u32, Error> {
        self.ask(|reply| Message::Start {
            exec_id: exec_id.to_owned(),
            reply,
        })
        .await
    }

    /// Makes an exec; [`Handle::start`] runs it.
    ///
    /// # Errors
    /// `AlreadyExists`, or the shim's own.
    pub async fn exec(&self, exec: ExecTask) -> Result<(), Error> {
        self.ask(|reply| Message::Exec { exec, reply }).await
    }

    /// Sends a signal; to every process in the container with `all`.
    ///
    /// # Errors
    /// `NotFound` when the process ended, or the shim's own.
    pub async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let request = wire::KillRequest {
            id: self.id().to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            all,
        };
        Ok(self.connection().task("Kill", request, None).await?)
    }

    /// Waits for the end of a process, for ever if need be. Answers at once when it has ended.
    ///
    /// # Errors
    /// `NotFound` for an unknown exec; `Unavailable` once the daemon stops, which ends no process.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn wait(&self, exec_id: &str) -> Result<Exit, Error> {
        self.process(exec_id).await?;
        let mut states = self.state.clone();
        loop {
            {
                let state = states.borrow_and_update();
                if let Some(exit) = state.exit(exec_id) {
                    return Ok(exit);
                }
                if state.gone {
                    return Ok(Exit::unknown());
                }
                if state.process(exec_id).is_none() {
                    return Err(Error::ExecNotFound {
                        id: self.id().to_owned(),
                        exec_id: exec_id.to_owned(),
                    });
                }
            }
            if states.changed().await.is_err() {
                // The last state says so if the task is no more; else its actor let go of it.
                let last = states.borrow();
                return match last.exit(exec_id) {
                    Some(exit) => Ok(exit),
                    None if last.gone => Ok(Exit::unknown()),
                    None => Err(Error::Stopping),
                };
            }
        }
    }

    /// Removes the task: its first process must be created or stopped. How it ended, and its pid.
    ///
    /// # Errors
    /// The shim's own, when it refuses.
    pub async fn delete(&self) -> Result<(Exit, u32), Error> {
        self.ask(|reply| Message::Delete { reply }).await
    }

    /// Removes an exec.
    ///
    /// # Errors
    /// The shim's own, when it refuses.
    pub async fn delete_exec(&self, exec_id: &str) -> Result<(Exit, u32), Error> {
        self.ask(|reply| Message::DeleteExec {
            exec_id: exec_id.to_owned(),
            reply,
        })
        .await
    }

    /// Freezes every process.
    ///
    /// # Errors
    /// The shim's own.
    pub async fn pause(&self) -> Result<(), Error> {
        self.ask(|reply| Message::Freeze {
            method: "Pause",
            reply,
        })
        .await
    }

    /// Thaws every process.
    ///
    /// # Errors
    /// The shim's own.
    pub async fn resume(&self) -> Result<(), Error> {
        self.ask(|reply| Message::Freeze {
            method: "Resume",
            reply,
        })
        .await
    }

    /// Sets the size of a terminal, in characters.
    ///
    /// # Errors
    /// The shim's own.
    pub async fn resize_pty(&self, exec_id: &str, width: u32, height: u32) -> Result<(), Error> {
        let request = wire::ResizePtyRequest {
            id: self.id().to_owned(),
            exec_id: exec_id.to_owned(),
            width,
            height,
        };
        Ok(self
            .connection()
            .task("ResizePty", request, Some(ASK_LIMIT))
            .await?)
    }

    /// Closes the shim's end of a process's stdin.
    ///
    /// # Errors
    /// The shim's own.
    pub async fn close_io(&self, exec_id: &str) -> Result<(), Error> {
        let request = wire::CloseIoRequest {
            id: self.id().to_owned(),
            exec_id: exec_id.to_owned(),
            stdin: true,
        };
        Ok(self
            .connection()
            .task("CloseIO", request, Some(ASK_LIMIT))
            .await?)
    }

    /// Every process in the container.
    ///
    /// # Errors
    /// The shim's own.
    pub async fn pids(&self) -> Result<Vec<ProcessInfo>, Error> {
        let request = wire::PidsRequest {
            id: self.id().to_owned(),
        };
        let answer: wire::PidsResponse = self
            .connection()
            .task("Pids", request, Some(ASK_LIMIT))
            .await?;
        Ok(answer.processes)
    }

    /// Statistics of the container's cgroup.
    ///
    /// # Errors
    /// The shim's own, `DeadlineExceeded` after `limit`.
    pub async fn stats(&self, limit: Duration) -> Result<Any, Error> {
        let request = wire::StatsRequest {
            id: self.id().to_owned(),
        };
        let answer: wire::StatsResponse = self
            .connection()
            .task("Stats", request, Some(limit))
            .await?;
        answer.stats.ok_or_else(|| Error::State {
            reason: format!("task {} has no statistics", self.id()),
        })
    }

    /// Changes resources.
    ///
    /// # Errors
    /// The shim's own.
    pub async fn update(
        &self,
        resources: Option<Any>,
        annotations: std::collections::HashMap<String, String>,
    ) -> Result<(), Error> {
        let request = wire::UpdateTaskRequest {
            id: self.id().to_owned(),
            resources,
            annotations,
        };
        Ok(self.connection().task("Update", request, None).await?)
    }

    /// Writes a checkpoint into directory `path`.
    ///
    /// # Errors
    /// The shim's own.
    pub async fn checkpoint(&self, path: &str, options: Option<Any>) -> Result<(), Error> {
        let request = wire::CheckpointTaskRequest {
            id: self.id().to_owned(),
            path: path.to_owned(),
            options,
        };
        Ok(self.connection().task("Checkpoint", request, None).await?)
    }
}

/// The process a shim describes; `None` when it says nothing of it.
pub(super) fn process_of(seen: &wire::StateResponse) -> Option<Process> {
    let status = Status::from_wire(seen.status)?;
    let stopped = status == Status::Stopped;
    let exit = stopped.then(|| Exit::from_wire(seen.exit_status, seen.exited_at));
    Some(Process {
        pid: seen.pid,
        status,
        stdio: Stdio {
            stdin: seen.stdin.clone(),
            stdout: seen.stdout.clone(),
            stderr: seen.stderr.clone(),
            terminal: seen.terminal,
        },
        exit,
        failed: None,
        announced: false,
    })
}
