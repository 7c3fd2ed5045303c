//! `ctr shim`: talks to one shim itself, past the daemon. For when a daemon is in doubt.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use lighter_proto::any;
use lighter_proto::containerd::task::v3 as api;
use lighter_proto::errdefs::{ErrorKind, WireError};
use serde::Serialize;
use serde_json::json as object;
use sha2::{Digest as _, Sha256};
use ttrpc::asynchronous::Client;

use crate::advice;
use crate::cli::Global;
use crate::json;
use crate::table;

/// Where shims listen, by upstream's rule, when nobody says otherwise.
const SOCKETS: &str = "/run/containerd/s";
/// Longest that a shim may think; upstream's for the same purpose.
const LIMIT: Duration = Duration::from_secs(30);

/// Flags of `ctr shim`.
#[derive(Debug, Args)]
pub(crate) struct Shim {
    /// Container of the shim
    #[arg(long, global = true, default_value = "", value_name = "ID")]
    id: String,
    /// Socket of the shim [default: where one of that container would listen]
    #[arg(long, global = true, value_name = "SOCKET")]
    shim_address: Option<String>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Delete the task, or what is left of it
    Delete,
    /// Make and start another process in the task
    Exec(Exec),
    /// Start the task
    Start,
    /// Show the state of the task's first process
    State,
    /// End the shim, if it has no task
    Shutdown,
    /// Ask a Go shim for profiles of itself
    Pprof {
        /// What to ask for; it has none of it
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        what: Vec<String>,
    },
}

/// Flags of `ctr shim exec`.
#[derive(Debug, Args)]
struct Exec {
    /// ID of the process
    #[arg(long, value_name = "ID")]
    exec_id: String,
    /// Working directory
    #[arg(long, default_value = "/", value_name = "DIR")]
    cwd: String,
    /// Environment variable
    #[arg(long, short, value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// Give it a terminal
    #[arg(long, short)]
    tty: bool,
    /// Fifo of its input
    #[arg(long, default_value = "", value_name = "PATH")]
    stdin: String,
    /// Fifo or file:// of its output
    #[arg(long, default_value = "", value_name = "PATH")]
    stdout: String,
    /// Fifo or file:// of its errors
    #[arg(long, default_value = "", value_name = "PATH")]
    stderr: String,
    /// File with the process as in an OCI spec, in place of the flags
    #[arg(long, value_name = "FILE", conflicts_with_all = ["cwd", "env"])]
    spec: Option<PathBuf>,
    /// What to run
    #[arg(trailing_var_arg = true, value_name = "ARG")]
    args: Vec<String>,
}

/// What `state` prints.
#[derive(Debug, Serialize)]
struct State {
    id: String,
    bundle: String,
    pid: u32,
    status: String,
    stdin: String,
    stdout: String,
    stderr: String,
    terminal: bool,
    exit_status: u32,
    exited_at: Option<String>,
}

/// A shim and its task.
struct Task {
    client: Client,
    namespace: String,
    id: String,
}

impl Shim {
    /// Runs the verb.
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<()> {
        if let Verb::Pprof { .. } = self.verb {
            return advice::fail(
                "shims of lighter are not written in Go and have no such profiles",
                "their threads are in /proc/PID/task/*/stack, and `perf record -g -p PID` profiles \
                 them; a Go shim started with -debug listens on its own debug socket",
            );
        }
        if self.id.is_empty() {
            return advice::fail(
                "no container given",
                "name it: ctr shim --id CONTAINER VERB",
            );
        }
        let address = self.shim_address.clone().unwrap_or_else(|| {
            let path = socket(&global.address, &global.namespace, &self.id);
            format!("unix://{}", path.display())
        });
        let address = match address.split_once("://") {
            Some(_) => address,
            None => format!("unix://{address}"),
        };
        let client = match Client::connect(&address).await {
            Ok(client) => client,
            Err(error) => {
                return advice::fail(
                    format!("cannot reach the shim at {address}: {error}"),
                    "name its socket with --shim-address: it is in bootstrap.json, or in the file \
                     address, of the task's bundle; containers of one group share the first one's",
                );
            }
        };
        let task = Task {
            client,
            namespace: global.namespace.clone(),
            id: self.id,
        };
        match self.verb {
            Verb::Delete => task.delete().await,
            Verb::Exec(exec) => task.exec(exec).await,
            Verb::Start => task.start("").await.map(drop),
            Verb::State => task.state().await,
            Verb::Shutdown => task.shutdown().await,
            Verb::Pprof { .. } => unreachable!("answered above"),
        }
    }
}

/// Where the shim of a container listens: the hash of the daemon's address and its names.
///
/// Upstream: `pkg/shim`, the socket address of a shim.
fn socket(daemon: &str, namespace: &str, id: &str) -> PathBuf {
    let name = Path::new(daemon).join(namespace).join(id);
    let hash = Sha256::digest(name.as_os_str().as_encoded_bytes());
    Path::new(SOCKETS).join(hex::encode(hash))
}

impl Task {
    /// One call, in the newest version of the service that the shim has.
    async fn call<Req, Res>(&self, method: &str, request: &Req) -> Result<Res, WireError>
    where
        Req: prost::Message,
        Res: prost::Message + Default,
    {
        let mut last = None;
        for service in ["containerd.task.v3.Task", "containerd.task.v2.Task"] {
            let answer = lighter_proto::ttrpc::call(
                &self.client,
                service,
                method,
                &self.namespace,
                request,
                Some(LIMIT),
            )
            .await;
            match answer {
                Err(error) if error.kind == ErrorKind::Unimplemented => last = Some(error),
                other => return other,
            }
        }
        Err(last.expect("was asked for at least one"))
    }

    async fn start(&self, exec_id: &str) -> anyhow::Result<u32> {
        let request = api::StartRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        };
        let answer: api::StartResponse = self.call("Start", &request).await?;
        Ok(answer.pid)
    }

    async fn delete(&self) -> anyhow::Result<()> {
        let request = api::DeleteRequest {
            id: self.id.clone(),
            exec_id: String::new(),
        };
        let answer: api::DeleteResponse = self.call("Delete", &request).await?;
        table::line(&format!(
            "pid {} ended with status {}",
            answer.pid, answer.exit_status
        ))
    }

    async fn shutdown(&self) -> anyhow::Result<()> {
        let request = api::ShutdownRequest {
            id: self.id.clone(),
            now: false,
        };
        match self.call("Shutdown", &request).await {
            Ok(()) => Ok(()),
            // It went before it could say so.
            Err(error) if error.kind == ErrorKind::Unavailable => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    async fn state(&self) -> anyhow::Result<()> {
        let request = api::StateRequest {
            id: self.id.clone(),
            exec_id: String::new(),
        };
        let state: api::StateResponse = self.call("State", &request).await?;
        table::json(&State {
            status: state.status().as_str_name().to_owned(),
            id: state.id,
            bundle: state.bundle,
            pid: state.pid,
            stdin: state.stdin,
            stdout: state.stdout,
            stderr: state.stderr,
            terminal: state.terminal,
            exit_status: state.exit_status,
            exited_at: state
                .exited_at
                .is_some()
                .then(|| json::time(state.exited_at.as_ref())),
        })
    }

    async fn exec(&self, exec: Exec) -> anyhow::Result<()> {
        let process = match &exec.spec {
            Some(path) => {
                let text =
                    std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
                serde_json::from_slice(&text)
                    .with_context(|| format!("{} holds no process", path.display()))?
            }
            None if exec.args.is_empty() => {
                return advice::fail(
                    "no command to run",
                    "put it at the end: ctr shim --id CONTAINER exec --exec-id ID sh",
                );
            }
            None => object!({
                "args": exec.args,
                "cwd": exec.cwd,
                "env": exec.env,
                "terminal": exec.tty,
                "noNewPrivileges": true,
                "user": {"uid": 0, "gid": 0},
            }),
        };
        let request = api::ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec.exec_id.clone(),
            terminal: exec.tty,
            stdin: exec.stdin,
            stdout: exec.stdout,
            stderr: exec.stderr,
            spec: Some(any::pack_json(any::PROCESS, &process)?),
        };
        let (): () = self.call("Exec", &request).await?;
        let pid = self.start(&exec.exec_id).await?;
        table::line(&format!("{} runs with pid {pid}", exec.exec_id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_where_upstream_puts_them() {
        let path = socket("/run/containerd/containerd.sock", "default", "one");
        let name = b"/run/containerd/containerd.sock/default/one";
        assert_eq!(
            path,
            Path::new("/run/containerd/s").join(hex::encode(Sha256::digest(name)))
        );
    }
}
