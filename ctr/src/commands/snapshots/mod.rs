//! `ctr snapshots`.

mod diff;
mod show;

use std::collections::HashMap;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use lighter_proto::containerd::services::snapshots::v1::{
    CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest,
};
use lighter_proto::containerd::types::Mount;

use self::diff::Diff;
use self::show::shown;
use super::each;
use crate::cli::Ctx;
use crate::client::Client;
use crate::content;
use crate::flags::SnapshotterFlag;
use crate::image::model::Descriptor;
use crate::image::platform::Platform;
use crate::image::{self, unpack};
use crate::json;
use crate::labels;
use crate::lease;
use crate::mount;
use crate::snapshot::{self, Access};
use crate::table;

/// Label that keeps a snapshot made by hand.
const GC_ROOT: &str = "containerd.io/gc.root";

/// Manage snapshots
#[derive(Debug, Args)]
pub(crate) struct Snapshots {
    #[command(flatten)]
    snapshotter: SnapshotterFlag,
    #[command(subcommand)]
    verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
enum Verb {
    /// Commit an active snapshot under a name
    Commit {
        /// Name of the result
        name: String,
        /// Active snapshot
        active: String,
    },
    /// Write what differs between two snapshots (by default: a snapshot and its parent) to stdout
    Diff(Diff),
    /// Show a snapshot
    Info {
        /// Snapshot
        key: String,
    },
    /// List snapshots
    #[command(visible_alias = "ls")]
    List {
        /// Filters, e.g. kind==active; any of them
        filters: Vec<String>,
    },
    /// Print the commands that mount a snapshot
    #[command(visible_aliases = ["m", "mount"])]
    Mounts {
        /// Where to mount it
        target: String,
        /// Snapshot
        key: String,
    },
    /// Prepare a snapshot to write to
    Prepare(Prepare),
    /// Remove snapshots
    #[command(visible_aliases = ["del", "remove", "rm"])]
    Delete {
        /// Snapshots
        #[arg(required = true, value_name = "KEY")]
        keys: Vec<String>,
    },
    /// Set and clear labels of a snapshot
    Label {
        /// Snapshot
        key: String,
        /// Labels; without a value a label is cleared
        #[arg(value_name = "KEY=VALUE")]
        labels: Vec<String>,
    },
    /// Show snapshots as a tree
    Tree,
    /// Unpack a manifest's layers into snapshots
    Unpack {
        /// Digest of the manifest (or index)
        digest: String,
    },
    /// Show how much room snapshots take
    Usage {
        /// Sizes in bytes
        #[arg(short)]
        bytes: bool,
        /// Snapshots [default: all]
        keys: Vec<String>,
    },
    /// Make a read-only snapshot of a committed one
    View(Prepare),
}

/// Flags of `prepare` and `view`.
#[derive(Debug, Args)]
struct Prepare {
    /// Print the commands that mount it here
    #[arg(long, short, value_name = "DIR")]
    target: Option<String>,
    /// Print its mounts as JSON
    #[arg(long)]
    mounts: bool,
    /// Name
    key: String,
    /// Committed snapshot to start from
    #[arg(default_value = "", hide_default_value = true)]
    parent: String,
}

/// The snapshotter of all verbs.
struct Scope<'a> {
    client: &'a Client,
    ctx: &'a Ctx,
    snapshotter: String,
}

impl Snapshots {
    /// Runs the verb.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let snapshotter = unpack::snapshotter(&ctx.client, &self.snapshotter.snapshotter).await?;
        let scope = Scope {
            client: &ctx.client,
            ctx,
            snapshotter,
        };
        match self.verb {
            Verb::Commit { name, active } => scope.commit(name, active).await,
            Verb::Diff(diff) => scope.diff(diff).await,
            Verb::Info { key } => table::json(&shown(scope.stat(key).await?)),
            Verb::List { filters } => scope.list(filters).await,
            Verb::Mounts { target, key } => print_mounts(&scope.mounts(key).await?, &target),
            Verb::Prepare(prepare) => scope.prepare(prepare, Access::Write).await,
            Verb::View(prepare) => scope.prepare(prepare, Access::Read).await,
            Verb::Delete { keys } => {
                let scope = &scope;
                each(&keys, "remove snapshot", |key| async move {
                    scope.remove(key).await
                })
                .await
            }
            Verb::Label { key, labels } => scope.label(key, &labels).await,
            Verb::Tree => scope.tree().await,
            Verb::Unpack { digest } => scope.unpack(digest).await,
            Verb::Usage { bytes, keys } => scope.usage(bytes, keys).await,
        }
    }
}

fn print_mounts(mounts: &[Mount], target: &str) -> anyhow::Result<()> {
    table::lines(mounts.iter().map(|entry| mount::command(entry, target)))
}

/// A label that keeps a snapshot until it is removed by hand.
fn root_label() -> HashMap<String, String> {
    let now = json::time(Some(&lighter_proto::time::now()));
    HashMap::from([(GC_ROOT.to_owned(), now)])
}

impl Scope<'_> {
    fn name(&self) -> String {
        self.snapshotter.clone()
    }

    async fn stat(&self, key: String) -> anyhow::Result<Info> {
        let request = StatSnapshotRequest {
            snapshotter: self.name(),
            key,
        };
        let info = self
            .client
            .snapshots()
            .stat(request)
            .await?
            .into_inner()
            .info;
        info.context("the daemon's answer holds no snapshot")
    }

    async fn mounts(&self, key: String) -> anyhow::Result<Vec<Mount>> {
        let request = MountsRequest {
            snapshotter: self.name(),
            key,
        };
        Ok(self
            .client
            .snapshots()
            .mounts(request)
            .await?
            .into_inner()
            .mounts)
    }

    async fn remove(&self, key: String) -> anyhow::Result<()> {
        let request = RemoveSnapshotRequest {
            snapshotter: self.name(),
            key,
        };
        self.client.snapshots().remove(request).await?;
        Ok(())
    }

    async fn all(&self, filters: Vec<String>) -> anyhow::Result<Vec<Info>> {
        let request = ListSnapshotsRequest {
            snapshotter: self.name(),
            filters,
        };
        let mut stream = self.client.snapshots().list(request).await?.into_inner();
        let mut found = Vec::new();
        while let Some(part) = stream.message().await? {
            found.extend(part.info);
        }
        Ok(found)
    }

    async fn commit(&self, name: String, key: String) -> anyhow::Result<()> {
        let request = CommitSnapshotRequest {
            snapshotter: self.name(),
            name,
            key,
            labels: root_label(),
            ..Default::default()
        };
        self.client.snapshots().commit(request).await?;
        Ok(())
    }

    async fn prepare(&self, flags: Prepare, access: Access) -> anyhow::Result<()> {
        let Prepare {
            target,
            mounts: as_json,
            key,
            parent,
        } = flags;
        let request = PrepareSnapshotRequest {
            snapshotter: self.name(),
            key,
            parent,
            labels: root_label(),
        };
        let mounts = snapshot::make(self.client, access, request).await?;
        if as_json {
            let shown: Vec<_> = mounts
                .iter()
                .map(|entry| {
                    serde_json::json!({
                        "Type": entry.r#type,
                        "Source": entry.source,
                        "Target": entry.target,
                        "Options": entry.options,
                    })
                })
                .collect();
            return table::json(&shown);
        }
        match target {
            Some(target) => print_mounts(&mounts, &target),
            None => Ok(()),
        }
    }

    async fn label(&self, key: String, args: &[String]) -> anyhow::Result<()> {
        let labels = labels::changes(args);
        let stored = if labels.is_empty() {
            self.stat(key).await?
        } else {
            let update_mask = Some(labels::mask(&labels));
            let info = Some(Info {
                name: key,
                labels,
                ..Default::default()
            });
            let request = UpdateSnapshotRequest {
                snapshotter: self.name(),
                info,
                update_mask,
            };
            self.client
                .snapshots()
                .update(request)
                .await?
                .into_inner()
                .info
                .unwrap_or_default()
        };
        table::line(&labels::show(&stored.labels))
    }

    async fn unpack(&self, digest: String) -> anyhow::Result<()> {
        let bytes = content::read(self.client, &digest).await?;
        // A bare digest does not say what it names; the document does.
        let json: serde_json::Value = serde_json::from_slice(&bytes)
            .with_context(|| format!("{digest} is neither manifest nor index"))?;
        let kinds = if json.get("manifests").is_some() {
            image::model::INDEX_TYPES
        } else {
            image::model::MANIFEST_TYPES
        };
        let target = Descriptor {
            media_type: kinds[0].to_owned(),
            digest,
            ..Default::default()
        };
        let top = lease::hold(self.client, |client| async move {
            let resolved = image::resolve(&client, &target, &Platform::host()).await?;
            unpack::unpack(&client, &resolved, &self.snapshotter, false).await
        })
        .await?;
        table::line(&format!("unpacked: {top}"))
    }
}
