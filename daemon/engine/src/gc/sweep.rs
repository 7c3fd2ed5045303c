//! One collection: scan, mark, removal in small batches, and the stores below afterwards.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lighter_store::Error;
use lighter_store::metadata::Db;
use lighter_store::metadata::collect::{Judge as _, Reclaimed};
use lighter_store::metadata::edges::{Fact, Kind, Node, Reach};

use super::mark::Graph;
use super::{Collectable, Item};

/// Objects removed in one change: it takes well under the 50 ms that a request may wait.
const BATCH: usize = 8;
/// Least pause between two batches, in which requests go first.
const PAUSE: Duration = Duration::from_millis(1);
/// Priority of the thread that marks, as nice(2) counts: it holds nothing that others wait for, and
/// with 100,000 objects it wants a processor for seconds.
const MARK_NICE: i32 = 10;

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
    graph_without(db, engines, &HashSet::new())
}

/// [`graph`], as if those of `given_up` were no roots.
pub(super) fn graph_without(
    db: &Db,
    engines: &Engines,
    given_up: &HashSet<Node>,
) -> Result<(Graph, Vec<Held>), Error> {
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
    db.facts(&mut |fact| match fact {
        Fact::Root(node, _) if given_up.contains(&node) => {}
        fact => graph.state(fact),
    })?;
    graph.mark();
    Ok((graph, items))
}

/// Removes the records of what nothing keeps, and says which objects of engines nothing keeps
/// either. Blocks for long, others for at most a batch.
pub(super) fn sweep(db: &Db, engines: &Engines) -> Result<(Summary, Vec<Held>), Error> {
    let collection = db.collection()?;
    let (mut graph, mut items, mut records) = in_background(|| {
        let (graph, items) = graph(db, engines)?;
        let records = graph.garbage();
        Ok::<_, Error>((graph, items, records))
    })?;
    let mut summary = Summary::default();
    records.retain(|node| !matches!(node.kind, Kind::Mount | Kind::Stream));
    let mut last = None;
    for batch in records.chunks(BATCH) {
        collection.give_way();
        collection.absorb(&mut graph);
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

/// Runs `work` on a thread of its own that leaves the processors to others. A thread of the pool
/// could be slowed as easily, but not every daemon may make it fast again.
fn in_background<T: Send>(work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
    std::thread::scope(|scope| {
        let mark = std::thread::Builder::new().name("mark".to_owned());
        let mark = mark.spawn_scoped(scope, || {
            // Without it the collection only costs others more.
            let _ = rustix::process::setpriority_process(None, MARK_NICE);
            work()
        });
        let failed = |source| Error::Io {
            operation: "mark on",
            path: "a thread".into(),
            source,
        };
        let done = mark.map_err(failed)?.join();
        done.unwrap_or_else(|_| Err(failed(std::io::Error::other("it panicked"))))
    })
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
