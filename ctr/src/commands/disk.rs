//! `ctr why`, `ctr df`, `ctr prune`: what is on the disk, what keeps it there, and getting it back.
//!
//! All three ask an API of our own daemon; another one answers that it has none.

use std::time::Duration;

use clap::{Args, Subcommand};
use lighter_proto::lighter::disk::v1 as api;
use serde::Serialize;
use serde_json::json;

use crate::advice;
use crate::cli::Ctx;
use crate::duration;
use crate::table::{self, Format, Table};

/// Words for the types that people may write.
const TYPES: [(&str, &str); 12] = [
    ("blob", "content"),
    ("container", "container"),
    ("content", "content"),
    ("image", "image"),
    ("ingest", "ingest"),
    ("lease", "lease"),
    ("mount", "mount"),
    ("sandbox", "sandbox"),
    ("snapshot", "snapshot"),
    ("sn", "snapshot"),
    ("stream", "stream"),
    ("digest", "content"),
];

fn size(bytes: u64) -> String {
    duration::size(i64::try_from(bytes).unwrap_or(i64::MAX))
}

fn kind(word: &str) -> Result<&'static str, String> {
    let found = TYPES.iter().find(|(known, _)| *known == word);
    found.map(|(_, kind)| *kind).ok_or_else(|| {
        let known: Vec<_> = TYPES.iter().map(|(known, _)| *known).collect();
        format!("{word:?} is none of {}", known.join(", "))
    })
}

/// Why an object is still there.
#[derive(Debug, Args)]
pub(crate) struct Why {
    /// What it is: content, snapshot, image, container, lease, ingest, sandbox, mount or stream
    #[arg(value_name = "TYPE", value_parser = kind)]
    kind: &'static str,
    /// Its name: a digest, a key, an id
    id: String,
    /// Snapshotter of a snapshot
    #[arg(long, env = "CONTAINERD_SNAPSHOTTER", default_value = "overlayfs")]
    snapshotter: String,
}

#[derive(Debug, Serialize)]
struct Step {
    r#type: String,
    id: String,
    reason: String,
}

impl Why {
    /// Runs the command.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let id = match self.kind {
            "snapshot" => format!("{}/{}", self.snapshotter, self.id),
            _ => self.id,
        };
        let request = api::WhyRequest {
            r#type: self.kind.to_owned(),
            id: id.clone(),
        };
        let answer = ctx.client.disk(false).why(request).await?.into_inner();
        let steps: Vec<Step> = answer.path.into_iter().map(step).collect();
        if ctx.format == Format::Json {
            return table::json(&steps);
        }
        if steps.is_empty() {
            return table::line(&format!(
                "nothing keeps {} {id}: the next collection takes it",
                self.kind
            ));
        }
        let lines = steps.iter().enumerate().map(|(depth, step)| {
            let indent = "  ".repeat(depth);
            format!("{indent}{} {}  ({})", step.r#type, step.id, step.reason)
        });
        table::lines(lines)
    }
}

fn step(step: api::Step) -> Step {
    let object = step.object.unwrap_or_default();
    Step {
        r#type: object.r#type,
        id: object.id,
        reason: step.reason,
    }
}

/// What uses the disk.
#[derive(Debug, Args)]
pub(crate) struct Df {
    /// Of all namespaces
    #[arg(long, short = 'A')]
    all_namespaces: bool,
    /// By image as well
    #[arg(long)]
    images: bool,
}

impl Df {
    /// Runs the command.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let client = &mut ctx.client.disk(self.all_namespaces);
        let used = client.usage(api::UsageRequest {}).await?.into_inner();
        if ctx.format == Format::Json {
            return table::json(&document(&used));
        }
        let mut kinds = Table::new(["NAMESPACE", "KIND", "COUNT", "SIZE", "RECLAIMABLE"]);
        for kind in &used.kinds {
            kinds.row([
                kind.namespace.clone(),
                kind.kind.clone(),
                kind.count.to_string(),
                size(kind.size),
                format!(
                    "{} ({})",
                    size(kind.reclaimable_size),
                    kind.reclaimable_count
                ),
            ]);
        }
        let mut text = kinds.render();
        if self.images {
            let mut images = Table::new([
                "NAMESPACE",
                "IMAGE",
                "CONTENT",
                "SNAPSHOTS",
                "UNIQUE",
                "CONTAINERS",
            ]);
            for image in &used.images {
                images.row([
                    image.namespace.clone(),
                    image.name.clone(),
                    size(image.content_size),
                    size(image.snapshot_size),
                    size(image.unique_size),
                    image.containers.to_string(),
                ]);
            }
            text.push('\n');
            text.push_str(&images.render());
        }
        text.push_str(&format!(
            "\nblobs on disk: {}; filesystem: {} of {} available\n",
            size(used.content_size),
            size(used.filesystem_available),
            size(used.filesystem_size),
        ));
        table::raw(text.as_bytes())
    }
}

fn document(used: &api::UsageResponse) -> serde_json::Value {
    let kinds = used.kinds.iter().map(|kind| {
        json!({
            "namespace": kind.namespace,
            "kind": kind.kind,
            "count": kind.count,
            "size": kind.size,
            "reclaimable_count": kind.reclaimable_count,
            "reclaimable_size": kind.reclaimable_size,
        })
    });
    let images = used.images.iter().map(|image| {
        json!({
            "namespace": image.namespace,
            "name": image.name,
            "content_size": image.content_size,
            "snapshot_size": image.snapshot_size,
            "unique_size": image.unique_size,
            "containers": image.containers,
        })
    });
    json!({
        "kinds": kinds.collect::<Vec<_>>(),
        "images": images.collect::<Vec<_>>(),
        "content_size": used.content_size,
        "filesystem_size": used.filesystem_size,
        "filesystem_available": used.filesystem_available,
    })
}

/// How far a removal goes.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Reach {
    /// Only say what would go
    #[arg(long)]
    dry_run: bool,
    /// In all namespaces
    #[arg(long, short = 'A')]
    all_namespaces: bool,
}

/// What is removed. What nothing keeps goes with each of them.
#[derive(Debug, Subcommand)]
pub(crate) enum Prune {
    /// Images that no container was made from, and what only they keep
    Images {
        #[command(flatten)]
        reach: Reach,
    },
    /// Expired leases and what only they keep
    Leases {
        #[command(flatten)]
        reach: Reach,
        /// Leases of this age too, whether they expire or not: engines keep what they need under
        /// leases, so look at a dry run first
        #[arg(long, value_parser = duration::parse, value_name = "DURATION", default_value = "0")]
        older_than: Duration,
    },
    /// Blobs that nothing keeps
    Content {
        #[command(flatten)]
        reach: Reach,
        /// Those too that only their own label containerd.io/gc.root keeps
        #[arg(long)]
        labelled: bool,
    },
    /// Snapshots that nothing keeps
    Snapshots {
        #[command(flatten)]
        reach: Reach,
        /// Those too that only their own label containerd.io/gc.root keeps
        #[arg(long)]
        labelled: bool,
    },
}

impl Prune {
    /// Runs the verb.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let mut request = api::PruneRequest::default();
        let reach = match self {
            Self::Images { reach } => {
                request.images = true;
                reach
            }
            Self::Leases { reach, older_than } => {
                request.leases_older_than_seconds = older_than.as_secs();
                if !older_than.is_zero() && older_than < Duration::from_secs(1) {
                    return advice::fail(
                        format!("--older-than {older_than:?} is less than a second"),
                        "name whole seconds, or leave it out for expired leases only",
                    );
                }
                reach
            }
            Self::Content { reach, labelled } => {
                request.labelled_content = labelled;
                reach
            }
            Self::Snapshots { reach, labelled } => {
                request.labelled_snapshots = labelled;
                reach
            }
        };
        request.dry_run = reach.dry_run;
        let client = &mut ctx.client.disk(reach.all_namespaces);
        let pruned = client.prune(request).await?.into_inner();
        report(ctx.format, reach, &pruned)
    }
}

fn report(format: Format, reach: Reach, pruned: &api::PruneResponse) -> anyhow::Result<()> {
    let removed = pruned.removed.iter();
    let rows = removed.map(|one| (one.object.clone().unwrap_or_default(), one.size));
    if format == Format::Json {
        let rows = rows.map(|(object, size)| {
            json!({
                "namespace": object.namespace,
                "type": object.r#type,
                "id": object.id,
                "size": size,
            })
        });
        return table::json(&json!({
            "dry_run": reach.dry_run,
            "removed": rows.collect::<Vec<_>>(),
            "freed": pruned.freed,
        }));
    }
    let mut table = Table::new(["NAMESPACE", "TYPE", "ID", "SIZE"]);
    for (object, bytes) in rows {
        table.row([object.namespace, object.r#type, object.id, size(bytes)]);
    }
    let mut text = table.render();
    let verb = if reach.dry_run { "would free" } else { "freed" };
    text.push_str(&format!("\n{verb} {}\n", size(pruned.freed)));
    table::raw(text.as_bytes())
}
