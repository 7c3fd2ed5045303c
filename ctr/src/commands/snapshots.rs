//! `ctr snapshots`.

use std::collections::{BTreeMap, HashMap};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use lighter_proto::containerd::services::diff::v1::DiffRequest;
use lighter_proto::containerd::services::snapshots::v1::{
    CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest, UsageRequest,
    ViewSnapshotRequest,
};
use lighter_proto::containerd::types::Mount;
use serde::Serialize;

use super::{checkpoint, each};
use crate::cli::Ctx;
use crate::client::Client;
use crate::content;
use crate::duration;
use crate::flags::SnapshotterFlag;
use crate::image::model::Descriptor;
use crate::image::platform::Platform;
use crate::image::{self, unpack};
use crate::json;
use crate::labels;
use crate::lease;
use crate::mount;
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

/// Flags of `diff`.
#[derive(Debug, Args)]
struct Diff {
    /// Form of the result
    #[arg(long, default_value = "application/vnd.oci.image.layer.v1.tar+gzip")]
    media_type: String,
    /// Name of the ingest it is written through
    #[arg(long = "ref", default_value = "", hide_default_value = true)]
    reference: String,
    /// Keep the result as content
    #[arg(long)]
    keep: bool,
    /// Labels of the result
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Snapshot; with a second one, the older of the two
    a: String,
    /// Newer snapshot
    b: Option<String>,
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
            Verb::Prepare(prepare) => scope.prepare(prepare, false).await,
            Verb::View(prepare) => scope.prepare(prepare, true).await,
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

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Shown {
    kind: String,
    name: String,
    parent: String,
    labels: BTreeMap<String, String>,
    created: String,
    updated: String,
}

fn shown(info: Info) -> Shown {
    let kind = info.kind().as_str_name();
    Shown {
        kind: format!("{}{}", &kind[..1], kind[1..].to_ascii_lowercase()),
        name: info.name,
        parent: info.parent,
        labels: info.labels.into_iter().collect(),
        created: json::time(info.created_at.as_ref()),
        updated: json::time(info.updated_at.as_ref()),
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

#[derive(Debug, Serialize)]
struct UsageRow {
    key: String,
    size: i64,
    inodes: i64,
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

    async fn list(&self, filters: Vec<String>) -> anyhow::Result<()> {
        let rows: Vec<_> = self.all(filters).await?.into_iter().map(shown).collect();
        table::list(self.ctx.format, &rows, ["KEY", "PARENT", "KIND"], |row| {
            [row.name.clone(), row.parent.clone(), row.kind.clone()]
        })
    }

    async fn prepare(&self, flags: Prepare, view: bool) -> anyhow::Result<()> {
        let Prepare {
            target,
            mounts: as_json,
            key,
            parent,
        } = flags;
        let (snapshotter, labels) = (self.name(), root_label());
        let mut snapshots = self.client.snapshots();
        let mounts = if view {
            let request = ViewSnapshotRequest {
                snapshotter,
                key,
                parent,
                labels,
            };
            snapshots.view(request).await?.into_inner().mounts
        } else {
            let request = PrepareSnapshotRequest {
                snapshotter,
                key,
                parent,
                labels,
            };
            snapshots.prepare(request).await?.into_inner().mounts
        };
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

    async fn tree(&self) -> anyhow::Result<()> {
        let all = self.all(Vec::new()).await?;
        table::lines(tree(&all))
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

    async fn usage(&self, bytes: bool, keys: Vec<String>) -> anyhow::Result<()> {
        let keys = if keys.is_empty() {
            self.all(Vec::new())
                .await?
                .into_iter()
                .map(|info| info.name)
                .collect()
        } else {
            keys
        };
        let mut rows = Vec::new();
        for key in keys {
            let request = UsageRequest {
                snapshotter: self.name(),
                key: key.clone(),
            };
            let usage = self.client.snapshots().usage(request).await?.into_inner();
            rows.push(UsageRow {
                key,
                size: usage.size,
                inodes: usage.inodes,
            });
        }
        table::list(self.ctx.format, &rows, ["KEY", "SIZE", "INODES"], |row| {
            let size = if bytes {
                row.size.to_string()
            } else {
                duration::size(row.size)
            };
            [row.key.clone(), size, row.inodes.to_string()]
        })
    }

    async fn diff(&self, flags: Diff) -> anyhow::Result<()> {
        lease::hold(self.client, |client| async move {
            let made = match &flags.b {
                None => {
                    let kind = &flags.media_type;
                    checkpoint::diff(&client, &self.snapshotter, &flags.a, kind, &flags.reference)
                        .await?
                }
                Some(newer) => {
                    let request = DiffRequest {
                        left: self.readable(&client, &flags.a).await?,
                        right: self.readable(&client, newer).await?,
                        media_type: flags.media_type.clone(),
                        r#ref: flags.reference.clone(),
                        ..Default::default()
                    };
                    let made = client.diff().diff(request).await?.into_inner().diff;
                    made.context("the daemon made no diff")?
                }
            };
            let mut labels = labels::given(&flags.label);
            if flags.keep {
                labels.extend(root_label());
            }
            unpack::label(&client, &made.digest, labels).await?;
            let mut stream = content::stream(&client, &made.digest).await?;
            while let Some(part) = stream.message().await? {
                table::raw(&part.data)?;
            }
            Ok(())
        })
        .await
    }

    /// Mounts of a snapshot, through a view when it is committed; the view goes with the lease.
    async fn readable(&self, client: &Client, key: &str) -> anyhow::Result<Vec<Mount>> {
        use lighter_proto::containerd::services::snapshots::v1::Kind;
        if self.stat(key.to_owned()).await?.kind() != Kind::Committed {
            return self.mounts(key.to_owned()).await;
        }
        let request = ViewSnapshotRequest {
            snapshotter: self.name(),
            key: format!("{key}-view-{:016x}", rand::random::<u64>()),
            parent: key.to_owned(),
            labels: HashMap::new(),
        };
        Ok(client.snapshots().view(request).await?.into_inner().mounts)
    }
}

/// Lines of the forest of snapshots: children below their parents.
fn tree(all: &[Info]) -> Vec<String> {
    let mut children: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let known: std::collections::BTreeSet<_> = all.iter().map(|info| info.name.as_str()).collect();
    for info in all {
        // A parent that is not listed makes a root, so that nothing is left out.
        let parent = if known.contains(info.parent.as_str()) {
            info.parent.as_str()
        } else {
            ""
        };
        children.entry(parent).or_default().push(&info.name);
    }
    let mut lines = Vec::new();
    let mut stack: Vec<(&str, usize)> = Vec::new();
    let push = |stack: &mut Vec<_>, name: &str, depth: usize| {
        let mut below = children.get(name).cloned().unwrap_or_default();
        below.sort_unstable();
        stack.extend(below.into_iter().rev().map(|child| (child, depth)));
    };
    push(&mut stack, "", 0);
    while let Some((name, depth)) = stack.pop() {
        let indent = if depth == 0 {
            String::new()
        } else {
            format!("{}\\_ ", "  ".repeat(depth))
        };
        lines.push(format!("{indent}{name}"));
        if lines.len() > all.len() {
            break;
        }
        push(&mut stack, name, depth + 1);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &str, parent: &str) -> Info {
        Info {
            name: name.to_owned(),
            parent: parent.to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn children_stand_below_their_parents() {
        let all = [
            info("c", "b"),
            info("a", ""),
            info("b", "a"),
            info("d", "a"),
            info("x", "gone"),
        ];
        assert_eq!(tree(&all), ["a", "  \\_ b", "    \\_ c", "  \\_ d", "x"]);
    }

    #[test]
    fn a_ring_of_parents_ends() {
        assert_eq!(
            tree(&[info("a", "b"), info("b", "a")]),
            Vec::<String>::new()
        );
        assert_eq!(tree(&[info("a", "a")]), Vec::<String>::new());
    }
}
