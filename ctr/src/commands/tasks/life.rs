//! Starting, attaching to, signalling and deleting tasks.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use lighter_proto::containerd::services::containers::v1::Container;
use lighter_proto::containerd::v1::types::{Process as Record, Status};

use serde::Deserialize;

use super::{TaskOptions, container, create, get, kill_all, spec_of, write_pid_file};
use crate::advice::{self, is_not_found};
use crate::attach::{IoFlags, Outcome, Session};
use crate::cli::Ctx;
use crate::client::Client;
use crate::cni::{self, Network};
use crate::commands::create::{CNI_EXTENSION, STOP_SIGNAL_LABEL};
use crate::fifo::{self, Paths};
use crate::process::{Process, exit_code};
use crate::signals;

/// How long a killed process may take to be gone.
const KILLED: Duration = Duration::from_secs(10);

/// Flags of `start`.
#[derive(Debug, Args)]
pub(crate) struct Start {
    #[command(flatten)]
    io: IoFlags,
    /// File to write the pid to
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Leave the container running and return
    #[arg(long, short)]
    detach: bool,
    /// Do not use pivot_root
    #[arg(long)]
    no_pivot: bool,
    /// Container
    id: String,
}

impl Start {
    /// Starts it; its exit code, or 0 when detached.
    pub(super) async fn run(self, ctx: &Ctx) -> anyhow::Result<u8> {
        let container = container(&ctx.client, &self.id).await?;
        let spec = spec_of(&container)?;
        let terminal = spec.terminal();
        let session = Session::prepare(&self.io, &self.id, terminal, !self.detach)?;
        let io_owner = spec.linux.as_ref().and_then(|linux| {
            Some((
                linux.uid_mappings.first()?.host_id,
                linux.gid_mappings.first()?.host_id,
            ))
        });
        let options = TaskOptions {
            no_pivot: self.no_pivot,
            io_owner,
            ..Default::default()
        };
        let pid = create(&ctx.client, &container, &session, terminal, &options).await?;
        let process = Process::init(&ctx.client, &self.id);
        let mut network = None;
        let started = async {
            write_pid_file(self.pid_file.as_deref(), pid)?;
            if container.extensions.contains_key(CNI_EXTENSION) {
                network = Some(join_network(ctx, &container, pid).await?);
            }
            session.fit(&process).await;
            anyhow::Ok(process.start().await?)
        };
        if let Err(error) = started.await {
            destroy(&process).await;
            return Err(error);
        }
        if self.detach {
            session.detach();
            return Ok(0);
        }
        let outcome = session.run(&process).await?;
        if let (Some(network), Outcome::Exited(_)) = (network, outcome) {
            network.remove().await?;
        }
        Ok(outcome.code())
    }
}

/// Gives a created task the network that its container's record asks for, and says its address.
pub(in crate::commands) async fn join_network(
    ctx: &Ctx,
    container: &Container,
    pid: u32,
) -> anyhow::Result<Network> {
    let extension = container.extensions.get(CNI_EXTENSION);
    let asked: NetworkAsked = extension
        .and_then(|any| serde_json::from_slice(&any.value).ok())
        .unwrap_or_default();
    let ports = asked.publish.iter().map(|text| cni::port(text));
    let ports = ports
        .collect::<Result<_, _>>()
        .map_err(anyhow::Error::msg)?;
    let network = Network::of(ctx.client.namespace(), &container.id).await;
    let result = network.setup(pid, ports).await?;
    eprintln!(
        "ctr: {} has the address {}",
        container.id,
        cni::address(&result)
    );
    Ok(network)
}

/// Takes down the network of a container whose task is gone, where it had one.
async fn leave_network(client: &Client, id: &str) -> anyhow::Result<()> {
    match container(client, id).await {
        Ok(record) if record.extensions.contains_key(CNI_EXTENSION) => {
            Network::of(client.namespace(), id).await.remove().await
        }
        _ => Ok(()),
    }
}

/// What the extension of a container's record asks for.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct NetworkAsked {
    publish: Vec<String>,
}

/// Joins the streams of a running task; its exit code.
pub(super) async fn attach(ctx: &Ctx, id: &str) -> anyhow::Result<u8> {
    let record = get(&ctx.client, id, "").await?;
    let session = Session::join(streams(&record), record.terminal)?;
    let process = Process::init(&ctx.client, id);
    let outcome = session.run(&process).await?;
    if matches!(outcome, Outcome::Exited(_)) {
        fifo::discard(&streams(&record));
    }
    Ok(outcome.code())
}

/// Where a process's streams are.
pub(in crate::commands) fn streams(record: &Record) -> Paths {
    Paths {
        stdin: record.stdin.clone(),
        stdout: record.stdout.clone(),
        stderr: record.stderr.clone(),
    }
}

/// Flags of `kill`.
#[derive(Debug, Args)]
pub(crate) struct Kill {
    /// Signal [default: the image's stop signal, else SIGTERM]
    #[arg(long, short)]
    signal: Option<String>,
    /// Send it to this exec
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    exec_id: String,
    /// Send it to every process of the container
    #[arg(long, short)]
    all: bool,
    /// Container
    id: String,
}

impl Kill {
    pub(super) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let container = container(&ctx.client, &self.id).await?;
        let named = self.signal.as_deref();
        let named = named.or_else(|| container.labels.get(STOP_SIGNAL_LABEL).map(String::as_str));
        let signal = named.map_or(Ok(signals::TERM), signals::parse)?;
        let process = Process::exec(&ctx.client, &self.id, &self.exec_id);
        process.kill(signal, self.all).await?;
        Ok(())
    }
}

/// Flags of `delete`.
#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Kill it first if it runs
    #[arg(long, short)]
    force: bool,
    /// Delete this exec instead
    #[arg(long, value_name = "ID")]
    exec_id: Option<String>,
    /// Containers
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,
}

impl Delete {
    /// Deletes them; the exit code of an only one.
    pub(super) async fn run(self, ctx: &Ctx) -> anyhow::Result<u8> {
        let mut code = 0;
        let mut failed = None;
        for id in &self.ids {
            match self.one(&ctx.client, id).await {
                Ok(status) => code = exit_code(status),
                Err(error) => {
                    let error = error.context(format!("cannot delete task {id}"));
                    if let Some(before) = failed.replace(error) {
                        eprintln!("ctr: {before:#}");
                    }
                }
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
        Ok(if self.ids.len() == 1 { code } else { 0 })
    }

    async fn one(&self, client: &Client, id: &str) -> anyhow::Result<u32> {
        let exec_id = self.exec_id.as_deref().unwrap_or_default();
        let process = Process::exec(client, id, exec_id);
        let record = get(client, id, exec_id).await?;
        match record.status() {
            Status::Stopped | Status::Created | Status::Unknown => {}
            running if !self.force => {
                let state = running.as_str_name().to_ascii_lowercase();
                return advice::fail(
                    format!("task must be stopped before deletion: {state}: failed precondition"),
                    format!("stop it first with `ctr tasks kill {id}`, or pass --force"),
                );
            }
            _ => stop(&process, self.exec_id.is_none()).await?,
        }
        let status = process.delete().await?;
        fifo::discard(&streams(&record));
        if exec_id.is_empty() {
            leave_network(client, id)
                .await
                .context("the task is gone, its network is not")?;
        }
        Ok(status)
    }
}

/// Kills a process, and waits until it has ended.
pub(in crate::commands) async fn stop(process: &Process, all: bool) -> anyhow::Result<()> {
    let killed = if all {
        kill_all(process).await
    } else {
        process.kill(signals::KILL, false).await
    };
    match killed {
        Err(status) if is_not_found(&status) => return Ok(()),
        other => other?,
    }
    match tokio::time::timeout(KILLED, process.wait()).await {
        Ok(Err(status)) if !is_not_found(&status) => Err(status.into()),
        Ok(_) => Ok(()),
        Err(_) => advice::fail(
            format!("not gone {} s after SIGKILL", KILLED.as_secs()),
            "a process waits in the kernel (a dead network filesystem?): see /proc/PID/stack",
        ),
    }
}

/// Gets rid of a task after something else failed: says what stays, fails no more.
pub(in crate::commands) async fn destroy(process: &Process) {
    let outcome = async {
        // A created task has no process to wait for.
        let _ = stop(process, true).await;
        process.delete().await
    };
    match outcome.await {
        Err(status) if !is_not_found(&status) => {
            eprintln!("ctr: the task stays: {}", status.message());
        }
        _ => {}
    }
}
