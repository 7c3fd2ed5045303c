//! Removal of what is still kept, but by nothing that anybody uses.
//!
//! The same graph decides as in a collection, but some of its roots are given up. What is then
//! unreachable goes: the roots themselves here, by the calls that clients make, the rest by the
//! collection that follows.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use lighter_proto::errdefs::{Classify as _, ErrorKind};
use lighter_store::filter::Filter;
use lighter_store::metadata::Db;
use lighter_store::metadata::edges::{Kind, Node};
use lighter_store::{Digest, Labels, Namespace, Scope, labels};

use super::disk::{self, Sizes};
use super::sweep;
use super::{Collector, Error, failed};

/// Label of images that must not be removed to make space; the CRI plugin sets it.
const PINNED: &str = "io.cri-containerd.pinned";

/// What is given up.
#[derive(Debug, Clone, Default)]
pub struct Prune {
    /// Where; everywhere when no namespace is named.
    pub namespace: Option<Namespace>,
    /// Images that no container was made from, unless they are pinned.
    pub images: bool,
    /// Leases older than this.
    pub leases_older: Option<Duration>,
    /// Blobs that only their own root label keeps.
    pub labelled_content: bool,
    /// Snapshots that only their own root label keeps.
    pub labelled_snapshots: bool,
    /// Only say what would go.
    pub dry_run: bool,
}

/// What went, or would.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Objects and their bytes, children before their parents.
    pub removed: Vec<(Node, u64)>,
    /// Bytes that are free then.
    pub freed_bytes: u64,
}

impl Collector {
    /// Removes what is not needed and collects; says what went.
    ///
    /// # Errors
    /// When the database or a snapshotter fails, or the collection.
    pub async fn prune(&self, prune: &Prune) -> Result<Pruned, Error> {
        let db = self.db();
        let names = disk::namespaces(db, prune.namespace.as_ref()).map_err(failed)?;
        let given_up = given_up(db, prune, &names).await.map_err(failed)?;
        let asked = given_up.clone();
        let (graph, _items) = self
            .look(move |db, engines| sweep::graph_without(db, engines, &asked))
            .await?;
        let sizes = disk::sizes(db, &disk::namespaces(db, None).map_err(failed)?)
            .await
            .map_err(failed)?;
        let mut garbage = graph.garbage();
        garbage.retain(|node| names.iter().any(|name| name.as_str() == &*node.namespace));
        if !prune.dry_run {
            for node in garbage.iter().filter(|node| given_up.contains(node)) {
                give_up(db, node).await.map_err(failed)?;
            }
            self.run_now().await?;
        }
        let freed_bytes = freed(&garbage, &sizes);
        let removed = garbage.into_iter().map(|node| {
            let bytes = sizes.of.get(&node).copied().unwrap_or_default();
            (node, bytes)
        });
        Ok(Pruned {
            removed: removed.collect(),
            freed_bytes,
        })
    }
}

/// The bytes of `garbage`; those of a blob only when no namespace keeps it.
fn freed(garbage: &[Node], sizes: &Sizes) -> u64 {
    let gone: HashSet<&Node> = garbage.iter().collect();
    let kept: HashSet<&str> = sizes
        .of
        .keys()
        .filter(|node| node.kind == Kind::Content && !gone.contains(node))
        .map(|node| &*node.id)
        .collect();
    let mut blobs: HashSet<&str> = HashSet::new();
    let mut freed = 0;
    for node in garbage {
        if node.kind == Kind::Content && (kept.contains(&*node.id) || !blobs.insert(&node.id)) {
            continue;
        }
        freed += sizes.of.get(node).copied().unwrap_or_default();
    }
    freed
}

/// The roots that are none for once.
async fn given_up(
    db: &Db,
    prune: &Prune,
    names: &[Namespace],
) -> Result<HashSet<Node>, lighter_store::Error> {
    let all = Filter::default();
    let now = SystemTime::now();
    let mut found = HashSet::new();
    for name in names {
        let scope = Scope::new(name.clone());
        let node = |kind, id: &str| Node::new(kind, name.as_str(), id);
        if prune.images {
            let unused = unused_images(db, &scope)?;
            found.extend(unused.iter().map(|image| node(Kind::Image, image)));
        }
        if let Some(limit) = prune.leases_older {
            for lease in db.leases().list(&scope, &all)? {
                if now
                    .duration_since(lease.created_at)
                    .is_ok_and(|age| age > limit)
                {
                    found.insert(node(Kind::Lease, &lease.id));
                }
            }
        }
        let rooted = |labels: &Labels| labels.contains_key(labels::GC_ROOT);
        if prune.labelled_content {
            for info in db.content().list(&scope, &all)? {
                if rooted(&info.labels) {
                    found.insert(node(Kind::Content, info.digest.as_str()));
                }
            }
        }
        if prune.labelled_snapshots {
            for snapshotter in db.snapshotters() {
                for info in db.snapshots(snapshotter)?.list(&scope, &all).await? {
                    if rooted(&info.labels) {
                        let id = format!("{snapshotter}/{}", info.name);
                        found.insert(node(Kind::Snapshot, &id));
                    }
                }
            }
        }
    }
    Ok(found)
}

/// Names of images that no container was made from, under this name or another of the same image.
fn unused_images(db: &Db, scope: &Scope) -> Result<Vec<String>, lighter_store::Error> {
    let all = Filter::default();
    let containers = db.containers().list(scope, &all)?;
    let names: HashSet<&str> = containers.iter().map(|c| c.image.as_str()).collect();
    let images = db.images().list(scope, &all)?;
    let used: HashSet<&Digest> = images
        .iter()
        .filter(|image| names.contains(image.name.as_str()) || image.labels.contains_key(PINNED))
        .map(|image| &image.target.digest)
        .collect();
    Ok(images
        .iter()
        .filter(|image| !used.contains(&image.target.digest))
        .map(|image| image.name.clone())
        .collect())
}

/// Removes the record of a root; one that went meanwhile, or came into use, is fine.
async fn give_up(db: &Db, node: &Node) -> Result<(), lighter_store::Error> {
    let scope = Scope::new(Namespace::new(&node.namespace)?);
    let id = node.id.as_ref();
    let done = match node.kind {
        Kind::Image => db.images().delete(&scope, id, None).await,
        Kind::Lease => db.leases().delete(&scope, id).await,
        Kind::Content => db.content().delete(&scope, &Digest::parse(id)?).await,
        Kind::Snapshot => {
            let (snapshotter, key) = id.split_once('/').unwrap_or_default();
            db.snapshots(snapshotter)?.remove(&scope, key).await
        }
        _ => Ok(()),
    };
    match done {
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::FailedPrecondition
            ) =>
        {
            tracing::info!(%error, object = %node, "not pruned");
            Ok(())
        }
        other => other.map(drop),
    }
}
