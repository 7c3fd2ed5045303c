//! Calls of the shim: each runs beside the actor, and what it brings is an outcome.

use std::time::Duration;

use lighter_proto::containerd::task::v3 as wire;
use lighter_proto::containerd::types::Envelope;

use super::outcome::Done;
use super::{Actor, Reply};
use crate::runtime::connection::Connection;
use crate::runtime::error::Error;
use crate::runtime::handle::{ExecTask, process_of};
use crate::runtime::state::{Exit, Process, Status};

/// Longest that the shim may take to say how the first process is.
const STATE_LIMIT: Duration = Duration::from_secs(2);

impl Actor {
    pub(super) fn wait_at_shim(&mut self, exec_id: String) {
        let connection = self.connection();
        let request = wire::WaitRequest {
            id: self.bundle.id.clone(),
            exec_id: exec_id.clone(),
        };
        self.calls.spawn(async move {
            let answer: Result<wire::WaitResponse, _> =
                connection.task("Wait", request, None).await;
            let exit = answer
                .ok()
                .map(|a| Exit::from_wire(a.exit_status, a.exited_at));
            Done::Waited { exec_id, exit }
        });
    }

    pub(super) fn start(&mut self, exec_id: String, reply: Reply<u32>) {
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

    pub(super) fn exec(&mut self, exec: ExecTask, reply: Reply<()>) {
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

    pub(super) fn delete_exec(&mut self, exec_id: String, reply: Reply<(Exit, u32)>) {
        let connection = self.connection();
        let request = wire::DeleteRequest {
            id: self.bundle.id.clone(),
            exec_id: exec_id.clone(),
        };
        self.calls.spawn(async move {
            let answer: Result<wire::DeleteResponse, _> =
                connection.task("Delete", request, None).await;
            let result = answer.map(|a| (Exit::from_wire(a.exit_status, a.exited_at), a.pid));
            Done::ExecGone {
                exec_id,
                result,
                reply,
            }
        });
    }

    pub(super) fn freeze(&mut self, method: &'static str, reply: Reply<()>) {
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

    /// Asks how the first process is; then the event that made that a question is published.
    pub(super) fn look(&mut self, envelope: Envelope, reply: Reply<()>) {
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
