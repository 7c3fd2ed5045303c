//! What uses the disk: by namespace and kind, and by image with all that it keeps.

use std::collections::{HashMap, HashSet};

use lighter_store::filter::Filter;
use lighter_store::metadata::Db;
use lighter_store::metadata::edges::{Kind, Node};
use lighter_store::{Namespace, Scope};

use super::mark::Graph;
use super::sweep;
use super::{Collector, Error, failed};

/// Disk use of one kind of object in one namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KindUsage {
    /// Namespace.
    pub namespace: String,
    /// `content`, or `snapshots/<snapshotter>`.
    pub kind: String,
    /// Objects.
    pub count: u64,
    /// Bytes; a blob that several namespaces hold counts in each.
    pub bytes: u64,
    /// Objects that nothing keeps.
    pub garbage_count: u64,
    /// Their bytes.
    pub garbage_bytes: u64,
}

/// An image with everything that it keeps, itself or by labels.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageUsage {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Bytes of its blobs.
    pub content_bytes: u64,
    /// Bytes of its snapshots.
    pub snapshot_bytes: u64,
    /// The part of both that no other image of the namespace keeps.
    pub unique_bytes: u64,
    /// Containers made from it.
    pub containers: u64,
}

/// What uses the disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskUsage {
    /// By namespace and kind.
    pub kinds: Vec<KindUsage>,
    /// By image.
    pub images: Vec<ImageUsage>,
    /// Bytes of blobs, each counted once.
    pub content_bytes: u64,
}

impl KindUsage {
    fn add(&mut self, bytes: u64, garbage: bool) {
        self.count += 1;
        self.bytes += bytes;
        if garbage {
            self.garbage_count += 1;
            self.garbage_bytes += bytes;
        }
    }
}

/// Bytes of every blob and snapshot of some namespaces.
#[derive(Debug, Default)]
pub(super) struct Sizes {
    pub(super) of: HashMap<Node, u64>,
}

impl Collector {
    /// What uses the disk in `namespace`, or in all, and how much of it a collection would free.
    /// Active snapshots are measured, which takes its time.
    ///
    /// # Errors
    /// When the database or a snapshotter fails.
    pub async fn disk_usage(&self, namespace: Option<Namespace>) -> Result<DiskUsage, Error> {
        let (graph, _items) = self.look(sweep::graph).await?;
        let db = self.db();
        let names = namespaces(db, namespace.as_ref()).map_err(failed)?;
        let sizes = sizes(db, &names).await.map_err(failed)?;
        let garbage: HashSet<Node> = graph.garbage().into_iter().collect();
        let mut kinds: std::collections::BTreeMap<(String, String), KindUsage> =
            std::collections::BTreeMap::new();
        let mut blobs = HashMap::new();
        for (node, bytes) in &sizes.of {
            let kind = match node.kind {
                Kind::Snapshot => {
                    let name = node.id.split('/').next().unwrap_or_default();
                    format!("snapshots/{name}")
                }
                _ => {
                    blobs.insert(node.id.clone(), *bytes);
                    "content".to_owned()
                }
            };
            let of = (node.namespace.to_string(), kind);
            let used = kinds.entry(of.clone()).or_insert_with(|| KindUsage {
                namespace: of.0,
                kind: of.1,
                ..KindUsage::default()
            });
            used.add(*bytes, garbage.contains(node));
        }
        let mut images = Vec::new();
        for name in &names {
            images.extend(images_of(db, &graph, &sizes, name).map_err(failed)?);
        }
        Ok(DiskUsage {
            kinds: kinds.into_values().collect(),
            images,
            content_bytes: blobs.values().sum(),
        })
    }
}

/// `only`, or all there are.
pub(super) fn namespaces(
    db: &Db,
    only: Option<&Namespace>,
) -> Result<Vec<Namespace>, lighter_store::Error> {
    if let Some(only) = only {
        return Ok(vec![only.clone()]);
    }
    let all = db.namespaces().list()?;
    Ok(all.into_iter().map(|(name, _)| name).collect())
}

/// Measures everything in some namespaces; what vanishes meanwhile uses nothing.
pub(super) async fn sizes(db: &Db, names: &[Namespace]) -> Result<Sizes, lighter_store::Error> {
    let mut sizes = Sizes::default();
    for name in names {
        let scope = Scope::new(name.clone());
        for info in db.content().list(&scope, &Filter::default())? {
            let node = Node::new(Kind::Content, name.as_str(), info.digest.as_str());
            sizes.of.insert(node, info.size_bytes);
        }
        for snapshotter in db.snapshotters() {
            let snapshots = db.snapshots(snapshotter)?;
            for info in snapshots.list(&scope, &Filter::default()).await? {
                let used = snapshots.usage(&scope, &info.name).await;
                let id = format!("{snapshotter}/{}", info.name);
                let node = Node::new(Kind::Snapshot, name.as_str(), &id);
                sizes.of.insert(node, used.map_or(0, |u| u.size_bytes));
            }
        }
    }
    Ok(sizes)
}

/// Images of a namespace with what each keeps.
fn images_of(
    db: &Db,
    graph: &Graph,
    sizes: &Sizes,
    name: &Namespace,
) -> Result<Vec<ImageUsage>, lighter_store::Error> {
    let scope = Scope::new(name.clone());
    let mut containers: HashMap<String, u64> = HashMap::new();
    for container in db.containers().list(&scope, &Filter::default())? {
        *containers.entry(container.image).or_default() += 1;
    }
    let images = db.images().list(&scope, &Filter::default())?;
    let nodes: Vec<Node> = images
        .iter()
        .map(|image| Node::new(Kind::Image, name.as_str(), &image.name))
        .collect();
    let kept = graph.kept_by(&nodes);
    let mut keepers: HashMap<&Node, u32> = HashMap::new();
    for node in kept.iter().flatten() {
        *keepers.entry(node).or_default() += 1;
    }
    let usage = images.iter().zip(&kept).map(|(image, kept)| {
        let mut usage = ImageUsage {
            namespace: name.to_string(),
            name: image.name.clone(),
            containers: containers.get(&image.name).copied().unwrap_or_default(),
            ..ImageUsage::default()
        };
        for node in kept {
            let bytes = sizes.of.get(*node).copied().unwrap_or_default();
            match node.kind {
                Kind::Content => usage.content_bytes += bytes,
                Kind::Snapshot => usage.snapshot_bytes += bytes,
                _ => continue,
            }
            if keepers.get(*node) == Some(&1) {
                usage.unique_bytes += bytes;
            }
        }
        usage
    });
    Ok(usage.collect())
}
