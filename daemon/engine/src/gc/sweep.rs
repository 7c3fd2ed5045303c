//! One collection: scan, mark, removal in small batches, and the stores below afterwards.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lighter_store::filter::Filter;
use lighter_store::metadata::Db;
use lighter_store::metadata::collect::{Judge as _, Reclaimed};
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

/// An object of an engine, as it was when the collection looked.
pub(super) type Held = (Arc<dyn Collectable>, Item);

fn node(held: &Held) -> Node {
    Node::new(held.0.kind(), &held.1.namespace, &held.1.id)
}

/// States what engines have.
fn engine_facts(items: &[Held], state: &mut dyn FnMut(Fact)) {
    for held in items {
        let (node, item) = (node(held), &held.1);
        state(Fact::Exists(node.clone()));
        if item.is_root() {
            state(Fact::Root(node, Reach::Full));
            continue;
        }
        if let Some(lease) = &item.lease {
            state(Fact::Edge {
                from: Node::new(Kind::Lease, &item.namespace, lease),
                to: node.clone(),
                by: Reach::Flat,
            });
        }
        for keeper in &item.keepers {
            state(Fact::Edge {
                from: keeper.clone(),
                to: node.clone(),
                by: Reach::Full,
            });
        }
    }
}

/// All facts, marked; and what engines had. Blocks.
pub(super) fn graph(db: &Db, engines: &Engines) -> Result<(Graph, Vec<Held>), Error> {
    let mut graph = Graph::default();
    // Before the records: what an object is kept by is recorded before the object is made.
    let held = |engine: &Arc<dyn Collectable>| {
        let items = engine.items().into_iter();
        items
            .map(|item| (Arc::clone(engine), item))
            .collect::<Vec<_>>()
    };
    let items: Vec<Held> = engines.iter().flat_map(held).collect();
    engine_facts(&items, &mut |fact| graph.state(fact));
    db.facts(&mut |fact| graph.state(fact))?;
    graph.mark();
    Ok((graph, items))
}

/// Removes the records of what nothing keeps, and says which objects of engines nothing keeps
/// either. Blocks for long, others for at most a batch.
pub(super) fn sweep(db: &Db, engines: &Engines) -> Result<(Summary, Vec<Held>), Error> {
    let collection = db.collection()?;
    let (mut graph, mut items) = graph(db, engines)?;
    let mut summary = Summary::default();
    let mut records = graph.garbage();
    records.retain(|node| !matches!(node.kind, Kind::Mount | Kind::Stream));
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
    // References that came since the scan count for the engines' objects as well.
    collection.catch_up(&mut graph)?;
    items.retain(|held| graph.is_garbage(&node(held)));
    Ok((summary, items))
}

/// Removes objects of engines.
pub(super) async fn remove_items(items: &[Held], summary: &mut Summary) {
    for held in items {
        match held.0.remove(&held.1).await {
            Ok(()) => *summary.removed.entry(held.0.kind().as_str()).or_default() += 1,
            Err(error) => {
                tracing::warn!(%error, object = %node(held), "removal by a collection");
            }
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
