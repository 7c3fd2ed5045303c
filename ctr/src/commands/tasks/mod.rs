//! `ctr tasks`: what runs.

mod exec;
mod life;
mod metrics;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use lighter_proto::any;
use lighter_proto::containerd::runc::v1::{CheckpointOptions, Options, ProcessDetails};
use lighter_proto::containerd::services::containers::v1::{Container, GetContainerRequest};
use lighter_proto::containerd::services::snapshots::v1::MountsRequest;
use lighter_proto::containerd::services::tasks::v1::{
    CheckpointTaskRequest, CreateTaskRequest, GetRequest, ListPidsRequest, ListTasksRequest,
    PauseTaskRequest, ResumeTaskRequest,
};
use lighter_proto::containerd::types::Descriptor;
use lighter_proto::containerd::v1::types::{Process as Record, Status};
use serde::Serialize;

use crate::attach::Session;
use crate::cli::Ctx;
use crate::client::Client;
use crate::process::Process;
use crate::signals;
use crate::spec::model::Spec;
use crate::table;

pub(super) use exec::Exec;
pub(super) use life::{destroy, join_network, streams};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Attach to the streams of a running container
    Attach {
        /// Container
        id: String,
    },
    /// Checkpoint a container into files or content
    Checkpoint(Checkpoint),
    /// Delete tasks
    #[command(visible_aliases = ["del", "remove", "rm"])]
    Delete(life::Delete),
    /// Run another process in a container
    Exec(Exec),
    /// List tasks
    #[command(visible_alias = "ls")]
    List {
        /// Print only the ids
        #[arg(long, short)]
        quiet: bool,
    },
    /// Send a signal to a container
    Kill(life::Kill),
    /// Print a task's resource use, once
    #[command(visible_alias = "metric")]
    Metrics {
        /// Container
        id: String,
    },
    /// Pause a container
    Pause {
        /// Container
        id: String,
    },
    /// List the processes of a container
    Ps {
        /// Container
        id: String,
    },
    /// Resume a paused container
    Resume {
        /// Container
        id: String,
    },
    /// Start a container that has been created
    Start(life::Start),
}

/// Flags of `checkpoint`.
#[derive(Debug, Args)]
pub(crate) struct Checkpoint {
    /// Stop the container afterwards
    #[arg(long)]
    exit: bool,
    /// Directory for the files of criu; else they become content
    #[arg(long, value_name = "DIR")]
    image_path: Option<PathBuf>,
    /// Directory for criu's working files and logs
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    /// Container
    id: String,
}

impl Command {
    /// Runs the verb; the exit code.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<u8> {
        match self {
            Self::Attach { id } => return life::attach(ctx, &id).await,
            Self::Exec(exec) => return exec.run(ctx).await,
            Self::Start(start) => return start.run(ctx).await,
            Self::Delete(delete) => return delete.run(ctx).await,
            Self::Checkpoint(checkpoint) => checkpoint.run(ctx).await,
            Self::List { quiet } => list(ctx, quiet).await,
            Self::Kill(kill) => kill.run(ctx).await,
            Self::Metrics { id } => metrics::run(ctx, &id).await,
            Self::Pause { id } => {
                let request = PauseTaskRequest { container_id: id };
                ctx.client
                    .tasks()
                    .pause(request)
                    .await
                    .map(drop)
                    .map_err(Into::into)
            }
            Self::Resume { id } => {
                let request = ResumeTaskRequest { container_id: id };
                ctx.client
                    .tasks()
                    .resume(request)
                    .await
                    .map(drop)
                    .map_err(Into::into)
            }
            Self::Ps { id } => ps(ctx, id).await,
        }
        .map(|()| 0)
    }
}

impl Checkpoint {
    async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let path = |path: &Option<PathBuf>| -> anyhow::Result<String> {
            let absolute = path.as_deref().map(std::path::absolute).transpose()?;
            Ok(absolute.unwrap_or_default().to_string_lossy().into_owned())
        };
        let options = CheckpointOptions {
            exit: self.exit,
            image_path: path(&self.image_path)?,
            work_path: path(&self.work_path)?,
            ..Default::default()
        };
        let request = CheckpointTaskRequest {
            container_id: self.id,
            options: Some(any::pack(&options)),
            ..Default::default()
        };
        let made = ctx
            .client
            .tasks()
            .checkpoint(request)
            .await?
            .into_inner()
            .descriptors;
        table::lines(made.iter().map(|descriptor| descriptor.digest.as_str()))
    }
}

/// How a task differs from the plainest one.
#[derive(Debug, Clone, Default)]
pub(super) struct TaskOptions {
    pub(super) no_pivot: bool,
    /// Owner of the stream pipes, as host ids.
    pub(super) io_owner: Option<(u32, u32)>,
    /// What to restore from.
    pub(super) checkpoint: Option<Descriptor>,
}

/// Creates a container's task, not yet started; its pid.
pub(super) async fn create(
    client: &Client,
    container: &Container,
    session: &Session,
    terminal: bool,
    options: &TaskOptions,
) -> anyhow::Result<u32> {
    let rootfs = if container.snapshot_key.is_empty() {
        Vec::new()
    } else {
        let request = MountsRequest {
            snapshotter: container.snapshotter.clone(),
            key: container.snapshot_key.clone(),
        };
        client
            .snapshots()
            .mounts(request)
            .await?
            .into_inner()
            .mounts
    };
    let paths = session.paths().clone();
    let request = CreateTaskRequest {
        container_id: container.id.clone(),
        rootfs,
        stdin: paths.stdin,
        stdout: paths.stdout,
        stderr: paths.stderr,
        terminal,
        checkpoint: options.checkpoint.clone(),
        options: runc_options(container, options)?,
        ..Default::default()
    };
    Ok(client.tasks().create(request).await?.into_inner().pid)
}

/// Runc options of the task, where they differ from the container's.
fn runc_options(
    container: &Container,
    options: &TaskOptions,
) -> anyhow::Result<Option<prost_types::Any>> {
    if !options.no_pivot && options.io_owner.is_none() {
        return Ok(None);
    }
    let stored = container
        .runtime
        .as_ref()
        .and_then(|runtime| runtime.options.as_ref());
    let mut runc: Options = match stored {
        Some(stored) => any::unpack(stored)
            .context("--no-pivot and id maps need a runtime with runc's options")?,
        None => Options::default(),
    };
    runc.no_pivot_root = options.no_pivot;
    if let Some((uid, gid)) = options.io_owner {
        (runc.io_uid, runc.io_gid) = (uid, gid);
    }
    Ok(Some(any::pack(&runc)))
}

/// A container's record.
pub(super) async fn container(client: &Client, id: &str) -> anyhow::Result<Container> {
    let answer = client
        .containers()
        .get(GetContainerRequest { id: id.to_owned() })
        .await?;
    answer
        .into_inner()
        .container
        .context("the daemon's answer holds no container")
}

/// A container's spec.
pub(super) fn spec_of(container: &Container) -> anyhow::Result<Spec> {
    let stored = container.spec.as_ref();
    let stored = stored.with_context(|| format!("container {} has no spec", container.id))?;
    let read = || {
        let mut value: serde_json::Value = any::unpack_json(stored)?;
        drop_nulls(&mut value);
        serde_json::from_value(value)
    };
    read().with_context(|| format!("the spec of container {} is malformed", container.id))
}

/// Go writes empty lists and maps as `null`.
fn drop_nulls(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        serde_json::Value::Array(list) => list.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// A process as the daemon knows it.
pub(super) async fn get(
    client: &Client,
    container_id: &str,
    exec_id: &str,
) -> Result<Record, tonic::Status> {
    let (container_id, exec_id) = (container_id.to_owned(), exec_id.to_owned());
    let answer = client
        .tasks()
        .get(GetRequest {
            container_id,
            exec_id,
        })
        .await?;
    answer
        .into_inner()
        .process
        .ok_or_else(|| tonic::Status::internal("the daemon's answer holds no process"))
}

/// Writes a pid where `--pid-file` says.
pub(super) fn write_pid_file(path: Option<&Path>, pid: u32) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    std::fs::write(path, pid.to_string())
        .with_context(|| format!("cannot write the pid file {}", path.display()))
}

#[derive(Debug, Serialize)]
struct Row {
    task: String,
    pid: u32,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit_status: Option<u32>,
}

async fn list(ctx: &Ctx, quiet: bool) -> anyhow::Result<()> {
    let answer = ctx.client.tasks().list(ListTasksRequest::default()).await?;
    let mut rows: Vec<_> = answer
        .into_inner()
        .tasks
        .into_iter()
        .map(|task| Row {
            pid: task.pid,
            status: task.status().as_str_name(),
            exit_status: (task.status() == Status::Stopped).then_some(task.exit_status),
            task: task.id,
        })
        .collect();
    rows.sort_by(|a, b| a.task.cmp(&b.task));
    if quiet {
        return table::lines(rows.iter().map(|row| row.task.as_str()));
    }
    table::list(ctx.format, &rows, ["TASK", "PID", "STATUS"], |row| {
        [row.task.clone(), row.pid.to_string(), row.status.to_owned()]
    })
}

#[derive(Debug, Serialize)]
struct ProcessRow {
    pid: u32,
    exec_id: String,
}

async fn ps(ctx: &Ctx, id: String) -> anyhow::Result<()> {
    let request = ListPidsRequest { container_id: id };
    let answer = ctx.client.tasks().list_pids(request).await?.into_inner();
    let rows: Vec<_> = answer
        .processes
        .into_iter()
        .map(|process| {
            let details = process.info.as_ref().map(any::unpack::<ProcessDetails>);
            let exec_id = details.and_then(Result::ok).unwrap_or_default().exec_id;
            ProcessRow {
                pid: process.pid,
                exec_id,
            }
        })
        .collect();
    table::list(ctx.format, &rows, ["PID", "INFO"], |row| {
        let info = if row.exec_id.is_empty() {
            "-".to_owned()
        } else {
            format!("exec_id={}", row.exec_id)
        };
        [row.pid.to_string(), info]
    })
}

/// Sends SIGKILL to everything in a container.
async fn kill_all(process: &Process) -> Result<(), tonic::Status> {
    process.kill(signals::KILL, true).await
}
