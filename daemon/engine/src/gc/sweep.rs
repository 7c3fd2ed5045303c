//! One collection: scan, mark, removal in small batches, and the stores below afterwards.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lighter_store::filter::Filter;
use lighter_store::metadata::Db;
use lighter_store::metadata::collect::Reclaimed;
use lighter_store::metadata::edges::{Fact, Kind, Node, Reach};
use lighter_store::{Error, Scope};

use super::mark::Graph;
use super::{Collectable, Item};

/// Objects removed in one change: it takes well under the 50 ms that a request may wait.
const BATCH: usize = 8;
/// Least pause between two batches, in which requests go first.
const PAUSE: Duration = Duration::from_millis(1);

/// What a collection did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Records removed, by kind.
    pub removed: BTreeMap<&'static str, u64>,
    /// What went with them below.
    pub reclaimed: Reclaimed,
    /// How long it took.
    pub took: Duration,
    /// The longest that it kept other changes waiting.
    pub longest_batch: Duration,
}

/// Disk use of one kind of object in one namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
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

type Engines = [Arc<dyn Collectable>];

/// States what engines have.
fn engine_facts(engines: &Engines, state: &mut dyn FnMut(Fact)) {
    for engine in engines {
        for item in engine.items() {
            let Item {
                namespace,
                id,
                lease,
                active,
            } = item;
            let node = Node::new(engine.kind(), &namespace, &id);
            state(Fact::Exists(node.clone()));
            match lease {
                Some(lease) => state(Fact::Edge {
                    from: Node::new(Kind::Lease, &namespace, &lease),
                    to: node,
                    by: Reach::Flat,
                }),
                None if active => state(Fact::Root(node, Reach::Full)),
                None => {}
            }
        }
    }
}

/// All facts, marked. Blocks.
pub(super) fn graph(db: &Db, engines: &Engines) -> Result<Graph, Error> {
    let mut graph = Graph::default();
    db.facts(&mut |fact| graph.state(fact))?;
    engine_facts(engines, &mut |fact| graph.state(fact));
    graph.mark();
    Ok(graph)
}

/// Removes the records of what nothing keeps. Blocks for long, others for at most a batch.
pub(super) fn sweep(db: &Db, engines: &Engines) -> Result<(Summary, Vec<Node>), Error> {
    let collection = db.collection()?;
    let mut graph = graph(db, engines)?;
    let mut summary = Summary::default();
    let (mut records, mut others) = (Vec::new(), Vec::new());
    for node in graph.garbage() {
        match node.kind {
            Kind::Mount | Kind::Stream => others.push(node),
            _ => records.push(node),
        }
    }
    let mut last = None;
    for batch in records.chunks(BATCH) {
        let began = Instant::now();
        let (removed, ticket) = collection.remove(batch, &mut graph)?;
        let took = began.elapsed();
        summary.longest_batch = summary.longest_batch.max(took);
        for node in removed {
            *summary.removed.entry(node.kind.as_str()).or_default() += 1;
        }
        last = Some(ticket);
        std::thread::sleep(took.max(PAUSE));
    }
    if let Some(ticket) = last {
        ticket.wait_blocking()?;
    }
    Ok((summary, others))
}

/// Removes objects of engines.
pub(super) async fn remove_items(engines: &Engines, nodes: &[Node], summary: &mut Summary) {
    for node in nodes {
        let Some(engine) = engines.iter().find(|engine| engine.kind() == node.kind) else {
            continue;
        };
        match engine.remove(&node.namespace, &node.id).await {
            Ok(()) => *summary.removed.entry(node.kind.as_str()).or_default() += 1,
            Err(error) => tracing::warn!(%error, object = %node, "removal by a collection"),
        }
    }
}

/// What uses the disk, and how much of it nothing keeps.
pub(super) async fn usage(db: &Db, graph: &Graph) -> Result<Vec<Usage>, Error> {
    let garbage: std::collections::HashSet<Node> = graph.garbage().into_iter().collect();
    let mut all = Vec::new();
    for (namespace, _) in db.namespaces().list()? {
        let scope = Scope::new(namespace.clone());
        let fresh = |kind: String| Usage {
            namespace: namespace.as_str().to_owned(),
            kind,
            ..Usage::default()
        };
        let mut content = fresh("content".to_owned());
        for info in db.content().list(&scope, &Filter::default())? {
            let node = Node::new(Kind::Content, namespace.as_str(), info.digest.as_str());
            content.add(info.size_bytes, garbage.contains(&node));
        }
        all.push(content);
        for name in db.snapshotters() {
            let snapshots = db.snapshots(name)?;
            let mut used = fresh(format!("snapshots/{name}"));
            for info in snapshots.list(&scope, &Filter::default()).await? {
                // One that vanishes meanwhile uses nothing.
                let size = snapshots.usage(&scope, &info.name).await;
                let id = format!("{name}/{}", info.name);
                let node = Node::new(Kind::Snapshot, namespace.as_str(), &id);
                used.add(size.map_or(0, |u| u.size_bytes), garbage.contains(&node));
            }
            all.push(used);
        }
    }
    all.retain(|usage| usage.count > 0);
    Ok(all)
}

impl Usage {
    fn add(&mut self, bytes: u64, garbage: bool) {
        self.count += 1;
        self.bytes += bytes;
        if garbage {
            self.garbage_count += 1;
            self.garbage_bytes += bytes;
        }
    }
}
