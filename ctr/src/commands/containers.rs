//! `ctr containers`: records, running or not.

use std::collections::{BTreeMap, HashMap};

use clap::{Args, Subcommand};
use lighter_proto::any;
use lighter_proto::containerd::services::containers::v1::{
    Container, DeleteContainerRequest, ListContainersRequest, UpdateContainerRequest,
};
use lighter_proto::containerd::services::snapshots::v1::RemoveSnapshotRequest;
use lighter_proto::containerd::v1::types::Status;
use serde::Serialize;
use serde_json::Value;
use tonic::Code;

use super::create::{self, Target};
use super::{checkpoint, each, tasks};
use crate::advice::{self, is_not_found};
use crate::cli::Ctx;
use crate::client::Client;
use crate::fifo;
use crate::flags::ContainerFlags;
use crate::json::{self, Decoder};
use crate::labels;
use crate::process::Process;
use crate::table;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a container
    Create(Box<Create>),
    /// Delete containers and their snapshots
    #[command(visible_aliases = ["del", "remove", "rm"])]
    Delete {
        /// Leave the snapshot
        #[arg(long)]
        keep_snapshot: bool,
        /// Containers
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
    /// Show a container
    Info {
        /// Only the spec
        #[arg(long)]
        spec: bool,
        /// Container
        id: String,
    },
    /// List containers
    #[command(visible_alias = "ls")]
    List {
        /// Print only the ids
        #[arg(long, short)]
        quiet: bool,
        /// Filters, e.g. labels.a==b; any of them
        filters: Vec<String>,
    },
    /// Set and clear labels of a container
    Label {
        /// Container
        id: String,
        /// Labels; without a value a label is cleared
        #[arg(value_name = "KEY=VALUE")]
        labels: Vec<String>,
    },
    /// Checkpoint a container into an image
    Checkpoint(checkpoint::Checkpoint),
    /// Restore a container from a checkpoint image
    Restore(checkpoint::Restore),
}

/// Create a container
#[derive(Debug, Args)]
#[command(override_usage = "ctr containers create [FLAGS] <IMAGE|ROOTFS> <ID> [COMMAND] [ARG]...")]
pub(crate) struct Create {
    #[command(flatten)]
    container: ContainerFlags,
    /// Image (or directory, with --rootfs), the container's ID, and what to run
    #[arg(trailing_var_arg = true, required = true, value_name = "ARG")]
    args: Vec<String>,
}

impl Command {
    /// Runs the verb.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        match self {
            Self::Create(create) => {
                let target = Target::parse(&create.container, &create.args)?;
                create::create(&ctx.client, &create.container, &target)
                    .await
                    .map(drop)
            }
            Self::Delete { keep_snapshot, ids } => {
                each(&ids, "delete container", |id| async move {
                    delete(&ctx.client, &id, keep_snapshot).await
                })
                .await
            }
            Self::Info { spec, id } => info(ctx, &id, spec).await,
            Self::List { quiet, filters } => list(ctx, quiet, filters).await,
            Self::Label { id, labels } => label(ctx, id, &labels).await,
            Self::Checkpoint(checkpoint) => checkpoint.run(ctx).await,
            Self::Restore(restore) => restore.run(ctx).await,
        }
    }
}

/// Removes a container that does not run.
async fn delete(client: &Client, id: &str, keep_snapshot: bool) -> anyhow::Result<()> {
    match tasks::get(client, id, "").await {
        Err(status) if is_not_found(&status) => {}
        Ok(task) if matches!(task.status(), Status::Stopped | Status::Created) => {
            Process::init(client, id).delete().await?;
            fifo::discard(&tasks::streams(&task));
        }
        Ok(task) => {
            let state = task.status().as_str_name().to_ascii_lowercase();
            return advice::fail(
                format!("cannot delete a container with a task that is {state}"),
                format!("stop it first with `ctr tasks kill -s KILL {id}` and `ctr tasks rm {id}`"),
            );
        }
        Err(status) => return Err(status.into()),
    }
    remove(client, id, keep_snapshot).await
}

/// Removes a container's snapshot and record.
pub(super) async fn remove(client: &Client, id: &str, keep_snapshot: bool) -> anyhow::Result<()> {
    let container = tasks::container(client, id).await?;
    if !keep_snapshot && !container.snapshot_key.is_empty() {
        let request = RemoveSnapshotRequest {
            snapshotter: container.snapshotter,
            key: container.snapshot_key,
        };
        match client.snapshots().remove(request).await {
            Err(status) if is_not_found(&status) => {}
            other => drop(other?),
        }
    }
    client
        .containers()
        .delete(DeleteContainerRequest { id: id.to_owned() })
        .await?;
    Ok(())
}

/// A container as upstream's JSON shows it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Shown {
    #[serde(rename = "ID")]
    id: String,
    labels: BTreeMap<String, String>,
    image: String,
    runtime: RuntimeShown,
    spec: Value,
    snapshot_key: String,
    snapshotter: String,
    created_at: String,
    updated_at: String,
    extensions: BTreeMap<String, Value>,
    #[serde(rename = "SandboxID")]
    sandbox_id: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct RuntimeShown {
    name: String,
    options: Value,
}

fn shown(decoder: &Decoder, container: Container) -> Shown {
    let runtime = container.runtime.unwrap_or_default();
    let decode = |value: &prost_types::Any| decoder.decode(value);
    Shown {
        id: container.id,
        labels: container.labels.into_iter().collect(),
        image: container.image,
        runtime: RuntimeShown {
            name: runtime.name,
            options: runtime.options.as_ref().map(decode).unwrap_or_default(),
        },
        spec: container.spec.as_ref().map(decode).unwrap_or_default(),
        snapshot_key: container.snapshot_key,
        snapshotter: container.snapshotter,
        created_at: json::time(container.created_at.as_ref()),
        updated_at: json::time(container.updated_at.as_ref()),
        extensions: container
            .extensions
            .iter()
            .map(|(k, v)| (k.clone(), decode(v)))
            .collect(),
        sandbox_id: container.sandbox,
    }
}

async fn info(ctx: &Ctx, id: &str, spec: bool) -> anyhow::Result<()> {
    let container = tasks::container(&ctx.client, id).await?;
    if spec {
        return table::json(&any::unpack_json::<Value>(
            &container.spec.unwrap_or_default(),
        )?);
    }
    table::json(&shown(&Decoder::new(), container))
}

async fn list(ctx: &Ctx, quiet: bool, filters: Vec<String>) -> anyhow::Result<()> {
    let containers = all(&ctx.client, filters).await?;
    if quiet {
        return table::lines(containers.iter().map(|container| container.id.as_str()));
    }
    let decoder = Decoder::new();
    let rows: Vec<_> = containers
        .into_iter()
        .map(|container| shown(&decoder, container))
        .collect();
    table::list(
        ctx.format,
        &rows,
        ["CONTAINER", "IMAGE", "RUNTIME"],
        |row| {
            let image = if row.image.is_empty() {
                "-"
            } else {
                &row.image
            };
            [row.id.clone(), image.to_owned(), row.runtime.name.clone()]
        },
    )
}

/// All containers; by stream, or at once from daemons that cannot.
async fn all(client: &Client, filters: Vec<String>) -> anyhow::Result<Vec<Container>> {
    let request = ListContainersRequest { filters };
    let streamed = async {
        let mut stream = client
            .containers()
            .list_stream(request.clone())
            .await?
            .into_inner();
        let mut found = Vec::new();
        while let Some(message) = stream.message().await? {
            found.extend(message.container);
        }
        Ok::<_, tonic::Status>(found)
    };
    match streamed.await {
        Err(status) if status.code() == Code::Unimplemented => Ok(client
            .containers()
            .list(request)
            .await?
            .into_inner()
            .containers),
        other => Ok(other?),
    }
}

async fn label(ctx: &Ctx, id: String, args: &[String]) -> anyhow::Result<()> {
    let labels: HashMap<_, _> = labels::changes(args);
    let stored = if labels.is_empty() {
        tasks::container(&ctx.client, &id).await?
    } else {
        let update_mask = Some(labels::mask(&labels));
        let container = Some(Container {
            id,
            labels,
            ..Default::default()
        });
        let request = UpdateContainerRequest {
            container,
            update_mask,
        };
        ctx.client
            .containers()
            .update(request)
            .await?
            .into_inner()
            .container
            .unwrap_or_default()
    };
    table::line(&labels::show(&stored.labels))
}
