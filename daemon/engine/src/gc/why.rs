//! Why an object is still there: the way to it from a root, each step with its reason.

use lighter_store::labels::{self, Labels};
use lighter_store::metadata::Db;
use lighter_store::metadata::edges::{self, Kind, Node};
use lighter_store::{Digest, Namespace, Scope};

use super::sweep;
use super::{Collector, Error};

/// One object on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The object.
    pub node: Node,
    /// What makes it a root, or how the one before keeps it.
    pub reason: String,
}

impl Collector {
    /// The shortest way from a root to `object`, both included; empty when nothing keeps it.
    /// `None`: there is no such object.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn why(&self, object: Node) -> Result<Option<Vec<Step>>, Error> {
        let path = self
            .look(move |db, engines| {
                let (graph, _items) = sweep::graph(db, engines)?;
                Ok(graph.exists(&object).then(|| graph.why(&object)))
            })
            .await?;
        let Some(path) = path else {
            return Ok(None);
        };
        let mut steps: Vec<Step> = Vec::with_capacity(path.len());
        let mut before: Option<(Node, Labels)> = None;
        for node in path {
            let own = labels_of(self.db(), &node).await;
            let reason = match &before {
                None => root_reason(&node, &own),
                Some((from, labels)) => edge_reason(from, labels, &node, &own),
            };
            steps.push(Step {
                node: node.clone(),
                reason,
            });
            before = Some((node, own));
        }
        Ok(Some(steps))
    }
}

fn root_reason(node: &Node, own: &Labels) -> String {
    match node.kind {
        Kind::Lease => match own.get(labels::GC_EXPIRE) {
            Some(end) => format!("a lease until {end}"),
            None => "a lease without end".to_owned(),
        },
        Kind::Ingest => "written within its time".to_owned(),
        Kind::Snapshot | Kind::Content => format!("label {}", labels::GC_ROOT),
        Kind::Mount | Kind::Stream => "in use, and under no lease".to_owned(),
        Kind::Image | Kind::Container | Kind::Sandbox => {
            format!("the record of the {}", node.kind.as_str())
        }
    }
}

fn edge_reason(from: &Node, labels: &Labels, to: &Node, own: &Labels) -> String {
    match (from.kind, to.kind) {
        (Kind::Lease, _) => return "held by the lease".to_owned(),
        (Kind::Ingest, _) => return "what the ingest shares".to_owned(),
        _ => {}
    }
    if let Some(label) = edges::naming_label(from, labels, to, own) {
        return format!("label {label}");
    }
    match (from.kind, to.kind) {
        (Kind::Image, Kind::Content) => "its target".to_owned(),
        (Kind::Container, Kind::Snapshot) => "its root filesystem".to_owned(),
        (Kind::Snapshot, Kind::Snapshot) => "its parent".to_owned(),
        _ => "a label".to_owned(),
    }
}

/// Labels of an object; none of one that is gone meanwhile.
async fn labels_of(db: &Db, node: &Node) -> Labels {
    let Ok(namespace) = Namespace::new(&node.namespace) else {
        return Labels::new();
    };
    let scope = Scope::new(namespace);
    let id = node.id.as_ref();
    let found = match node.kind {
        Kind::Lease => db.leases().get(&scope, id).map(|o| o.labels),
        Kind::Image => db.images().get(&scope, id).map(|o| o.labels),
        Kind::Container => db.containers().get(&scope, id).map(|o| o.labels),
        Kind::Sandbox => db.sandboxes().get(&scope, id).map(|o| o.labels),
        Kind::Content => Digest::parse(id)
            .map_err(Into::into)
            .and_then(|digest| db.content().info(&scope, &digest))
            .map(|o| o.labels),
        Kind::Snapshot => {
            let (snapshotter, key) = id.split_once('/').unwrap_or_default();
            match db.snapshots(snapshotter) {
                Ok(snapshots) => snapshots.stat(&scope, key).await.map(|o| o.labels),
                Err(error) => Err(error),
            }
        }
        Kind::Ingest | Kind::Mount | Kind::Stream => Ok(Labels::new()),
    };
    found.unwrap_or_default()
}
