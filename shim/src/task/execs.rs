//! Processes beside init: registered, started, deleted.

use std::sync::Arc;
use std::time::SystemTime;

use lighter_proto::containerd::task::v3 as api;

use super::{DRAIN_LIMIT, ExecData, Task, check_id, deleted, io_context};
use crate::error::{Error, Result};
use crate::io::{ProcessIo, Stdio};
use crate::process::{Input, Refusal};
use crate::runtime::{Exec, Running};
use crate::{bundle, sys};

impl Task {
    pub(super) async fn start_exec(self: &Arc<Self>, id: String) -> Result<u32> {
        let (stdio, spec) = {
            let inner = self.locked();
            let data = inner
                .execs
                .get(&id)
                .ok_or_else(|| Refusal::NoExec(id.clone()))?;
            (data.stdio.clone(), data.spec.clone())
        };
        self.apply(Input::Start(Some(id.clone())))?;
        match self.launch_exec(&id, &stdio, spec).await {
            Ok(running) => {
                let pid = running.pid;
                self.apply(Input::Started(Some(id.clone()), pid))?;
                self.watch_exit(Some(id), running);
                Ok(pid)
            }
            Err(error) => {
                self.apply(Input::StartFailed(Some(id), SystemTime::now()))?;
                Err(error)
            }
        }
    }

    pub(super) async fn launch_exec(
        &self,
        id: &str,
        stdio: &Stdio,
        spec: Vec<u8>,
    ) -> Result<Running> {
        let context = io_context(&self.core, &self.id, &self.options);
        let (io, child) = ProcessIo::open(stdio, &context).await?;
        let io = Arc::new(io);
        let exec = Exec {
            exec_id: id.to_owned(),
            spec,
            stdio: child,
        };
        let launched = match self.runtime.exec(exec).await {
            Ok(mut running) => match self.adopt(&io, &mut running).await {
                Ok(()) => Ok(running),
                Err(error) => {
                    let _ = sys::kill(running.pid, 9);
                    Err(error)
                }
            },
            Err(error) => Err(error),
        };
        if launched.is_err() {
            io.close().await;
        } else if let Some(data) = self.locked().execs.get_mut(id) {
            if data.input_closed {
                io.close_stdin();
            }
            data.io = Some(io);
        }
        launched
    }

    /// Registers an exec.
    ///
    /// # Errors
    /// `AlreadyExists`, `InvalidArgument`, `FailedPrecondition`.
    pub(crate) fn add_exec(self: &Arc<Self>, request: api::ExecProcessRequest) -> Result<()> {
        check_id(&request.exec_id)?;
        let spec = request.spec.map(|any| any.value).unwrap_or_default();
        let Some(spec) = with_terminal(spec, request.terminal) else {
            return Err(Error::InvalidArgument(format!(
                "exec {}: its spec is not JSON",
                request.exec_id
            )));
        };
        let data = ExecData {
            stdio: Stdio {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
            spec,
            io: None,
            input_closed: false,
        };
        self.apply(Input::ExecAdd(request.exec_id.clone()))?;
        self.locked().execs.insert(request.exec_id, data);
        Ok(())
    }

    pub(super) async fn delete_exec(self: &Arc<Self>, id: String) -> Result<api::DeleteResponse> {
        let process = {
            let inner = self.locked();
            let process = inner.machine.process(Some(&id));
            process
                .cloned()
                .ok_or_else(|| Refusal::NoExec(id.clone()))?
        };
        self.apply(Input::Delete(Some(id.clone())))?;
        let data = self.locked().execs.remove(&id);
        if let Some(io) = data.and_then(|data| data.io) {
            io.drained(DRAIN_LIMIT).await;
            io.close().await;
        }
        let _ = std::fs::remove_file(bundle::exec_pid_file(&self.bundle, &id));
        Ok(deleted(process.pid, process.exit))
    }
}

/// The process with `terminal` as the request has it, which is what counts; `None` if it is no
/// process.
fn with_terminal(spec: Vec<u8>, terminal: bool) -> Option<Vec<u8>> {
    #[derive(serde::Deserialize)]
    struct Said {
        #[serde(default)]
        terminal: bool,
    }
    let said: Said = serde_json::from_slice(&spec).ok()?;
    if said.terminal == terminal {
        return Some(spec);
    }
    let mut process: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&spec).ok()?;
    process.insert("terminal".to_owned(), terminal.into());
    serde_json::to_vec(&process).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_says_whether_there_is_a_terminal() {
        let same = br#"{ "args": ["a"], "terminal": true }"#.to_vec();
        assert_eq!(with_terminal(same.clone(), true), Some(same));
        let set = with_terminal(br#"{"args":["a"]}"#.to_vec(), true).unwrap();
        let set: serde_json::Value = serde_json::from_slice(&set).unwrap();
        assert_eq!(set, serde_json::json!({"args": ["a"], "terminal": true}));
        for wrong in ["", "7", "[]x", r#"{"terminal": "yes"}"#] {
            assert_eq!(with_terminal(wrong.into(), false), None, "{wrong:?}");
        }
    }
}
