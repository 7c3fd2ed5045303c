//! What a call that ran beside the actor brought, and how the actor takes it in.

use lighter_proto::containerd::types::Envelope;
use lighter_proto::errdefs::{ErrorKind, WireError};

use super::{Actor, Reply};
use crate::runtime::error::Error;
use crate::runtime::handle::ExecTask;
use crate::runtime::reap::Found;
use crate::runtime::state::{Exit, Input, Process, Status};

/// What a call that ran beside the actor brought.
pub(super) enum Done {
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

impl Actor {
    /// Takes an outcome in; whether the task is no more.
    pub(super) fn finish(&mut self, done: Done) -> bool {
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
}
