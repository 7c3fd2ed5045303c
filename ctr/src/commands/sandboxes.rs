//! `ctr sandboxes`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use lighter_proto::any;
use lighter_proto::containerd::services::sandbox::v1::{
    ControllerCreateRequest, ControllerShutdownRequest, ControllerStartRequest,
    ControllerStatusRequest, ControllerStopRequest, StoreCreateRequest, StoreDeleteRequest,
    StoreGetRequest, StoreListRequest,
};
use lighter_proto::containerd::types::{Sandbox, sandbox::Runtime};
use serde::Serialize;
use serde_json::{Value, json};

use super::each;
use crate::advice::is_not_found;
use crate::cli::Ctx;
use crate::json::{self, Decoder};
use crate::spec::model::Spec;
use crate::table;

/// The controller that runs sandboxes as shims.
const SANDBOXER: &str = "shim";
/// How long a sandbox may take to stop, seconds.
const STOP_TIMEOUT: u32 = 10;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a new sandbox
    #[command(visible_aliases = ["create", "c", "r"])]
    Run(Run),
    /// List sandboxes
    #[command(visible_alias = "ls")]
    List {
        /// Filters; any of them
        #[arg(long)]
        filters: Vec<String>,
    },
    /// Stop and remove sandboxes
    #[command(visible_alias = "rm")]
    Remove {
        /// Remove the record even if the sandbox cannot be shut down
        #[arg(long, short)]
        force: bool,
        /// Sandboxes
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
    /// Show a sandbox
    #[command(visible_alias = "i")]
    Info {
        /// Sandbox
        id: String,
    },
}

/// Flags of `run`.
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// Runtime
    #[arg(long, default_value = "io.containerd.runc.v2")]
    runtime: String,
    /// Runtime spec of the sandbox (JSON)
    #[arg(value_name = "SPEC")]
    config: PathBuf,
    /// Its ID
    id: String,
}

#[derive(Debug, Serialize)]
struct Row {
    id: String,
    created_at: String,
    sandboxer: String,
    runtime: String,
    labels: BTreeMap<String, String>,
}

fn row(sandbox: Sandbox) -> Row {
    Row {
        created_at: json::time(sandbox.created_at.as_ref()),
        runtime: sandbox
            .runtime
            .map(|runtime| runtime.name)
            .unwrap_or_default(),
        labels: sandbox.labels.into_iter().collect(),
        sandboxer: sandbox.sandboxer,
        id: sandbox.sandbox_id,
    }
}

impl Command {
    /// Runs the verb.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        match self {
            Self::Run(run) => run.run(ctx).await,
            Self::List { filters } => {
                let answer = ctx
                    .client
                    .sandbox_store()
                    .list(StoreListRequest { filters })
                    .await?;
                let rows: Vec<_> = answer.into_inner().list.into_iter().map(row).collect();
                table::list(
                    ctx.format,
                    &rows,
                    ["ID", "CREATED", "SANDBOXER", "RUNTIME"],
                    |row| {
                        let Row {
                            id,
                            created_at,
                            sandboxer,
                            runtime,
                            ..
                        } = row;
                        [
                            id.clone(),
                            created_at.clone(),
                            sandboxer.clone(),
                            runtime.clone(),
                        ]
                    },
                )
            }
            Self::Remove { force, ids } => {
                each(&ids, "remove sandbox", |id| remove(ctx, id, force)).await
            }
            Self::Info { id } => info(ctx, id).await,
        }
    }
}

impl Run {
    async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let path = self.config.display();
        let text = std::fs::read(&self.config).with_context(|| format!("cannot read {path}"))?;
        let spec: Spec = serde_json::from_slice(&text)
            .with_context(|| format!("{path} is no runtime spec (`ctr oci spec` prints one)"))?;
        let sandbox = Sandbox {
            sandbox_id: self.id.clone(),
            runtime: Some(Runtime {
                name: self.runtime,
                options: None,
            }),
            spec: Some(any::pack_json(any::SPEC, &spec)?),
            sandboxer: SANDBOXER.to_owned(),
            ..Default::default()
        };
        let mut store = ctx.client.sandbox_store();
        let mut controller = ctx.client.sandbox_controller();
        store
            .create(StoreCreateRequest {
                sandbox: Some(sandbox.clone()),
            })
            .await?;
        let started = async {
            let request = ControllerCreateRequest {
                sandbox_id: self.id.clone(),
                sandbox: Some(sandbox),
                sandboxer: SANDBOXER.to_owned(),
                ..Default::default()
            };
            controller.create(request).await?;
            let sandbox_id = self.id.clone();
            let sandboxer = SANDBOXER.to_owned();
            controller
                .start(ControllerStartRequest {
                    sandbox_id,
                    sandboxer,
                })
                .await
        };
        if let Err(status) = started.await {
            // The failure matters more than what it leaves, which `sandboxes rm -f` removes.
            let _ = store
                .delete(StoreDeleteRequest {
                    sandbox_id: self.id,
                })
                .await;
            return Err(status.into());
        }
        table::line(&self.id)
    }
}

async fn remove(ctx: &Ctx, id: String, force: bool) -> anyhow::Result<()> {
    let mut store = ctx.client.sandbox_store();
    let found = store
        .get(StoreGetRequest {
            sandbox_id: id.clone(),
        })
        .await?
        .into_inner()
        .sandbox;
    let sandboxer = match found.unwrap_or_default().sandboxer {
        named if named.is_empty() => SANDBOXER.to_owned(),
        named => named,
    };
    let mut controller = ctx.client.sandbox_controller();
    let stopped = async {
        let request = ControllerStopRequest {
            sandbox_id: id.clone(),
            timeout_secs: STOP_TIMEOUT,
            sandboxer: sandboxer.clone(),
        };
        controller.stop(request).await?;
        let request = ControllerShutdownRequest {
            sandbox_id: id.clone(),
            sandboxer,
        };
        controller.shutdown(request).await.map(drop)
    };
    match stopped.await {
        Err(status) if force || is_not_found(&status) => {
            eprintln!("ctr: sandbox {id} was not shut down: {}", status.message());
        }
        other => other?,
    }
    store
        .delete(StoreDeleteRequest {
            sandbox_id: id.clone(),
        })
        .await?;
    table::line(&id)
}

async fn info(ctx: &Ctx, id: String) -> anyhow::Result<()> {
    let mut store = ctx.client.sandbox_store();
    let found = store
        .get(StoreGetRequest {
            sandbox_id: id.clone(),
        })
        .await?
        .into_inner()
        .sandbox;
    let sandbox = found.context("the daemon's answer holds no sandbox")?;
    let request = ControllerStatusRequest {
        sandbox_id: id,
        verbose: true,
        sandboxer: sandbox.sandboxer.clone(),
    };
    let decoder = Decoder::new();
    let spec = sandbox.spec.as_ref().map(|spec| decoder.decode(spec));
    let mut shown = json!({ "spec": spec });
    if let (Value::Object(shown), Value::Object(row)) =
        (&mut shown, serde_json::to_value(row(sandbox))?)
    {
        shown.extend(row);
    }
    if let Ok(status) = ctx.client.sandbox_controller().status(request).await {
        let status = status.into_inner();
        shown["status"] = json!({
            "state": status.state,
            "pid": status.pid,
            "info": status.info.into_iter().collect::<BTreeMap<_, _>>(),
        });
    }
    table::json(&shown)
}
