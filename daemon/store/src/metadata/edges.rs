//! What keeps what: the references in each record, as facts for the collector.
//!
//! References never cross namespaces. A reference label is followed by `.`, `/` or nothing, so
//! `containerd.io/gc.ref.contentfoo` is none. The same function reads whole tables for a collection
//! and single writes for its barrier, so the two cannot disagree.

use std::time::{Duration, SystemTime};

use lighter_proto::time::to_nanos;
use prost::Message;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::keys::{Parts, table};
use super::leases::{KIND_CONTENT, KIND_IMAGES, KIND_INGESTS, KIND_SNAPSHOTS};
use super::records::{
    BlobRecord, ContainerRecord, ImageRecord, IngestRecord, LeaseRecord, SandboxRecord,
    SnapshotRecord,
};
use crate::{Labels, labels};

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A lease, by id.
    Lease,
    /// An image, by name.
    Image,
    /// A container, by id.
    Container,
    /// A sandbox, by id.
    Sandbox,
    /// An ingest, by ref.
    Ingest,
    /// A snapshot, by `<snapshotter>/<key>`.
    Snapshot,
    /// A blob, by digest.
    Content,
    /// A mount activation, by name.
    Mount,
    /// A stream, by id.
    Stream,
}

impl Kind {
    /// The word for it in reference labels and answers.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Lease => "lease",
            Self::Image => "image",
            Self::Container => "container",
            Self::Sandbox => "sandbox",
            Self::Ingest => "ingest",
            Self::Snapshot => "snapshot",
            Self::Content => "content",
            Self::Mount => "mount",
            Self::Stream => "stream",
        }
    }
}

/// An object of a namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// Its namespace.
    pub namespace: Box<str>,
    /// Its name, see [`Kind`].
    pub id: Box<str>,
}

impl Node {
    /// An object.
    #[must_use]
    pub fn new(kind: Kind, namespace: &str, id: &str) -> Self {
        Self {
            kind,
            namespace: namespace.into(),
            id: id.into(),
        }
    }
}

impl std::fmt::Display for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} {} (namespace {})",
            self.kind.as_str(),
            self.id,
            self.namespace
        )
    }
}

/// Which references of an object are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reach {
    /// What it cannot be without: a snapshot's parent, an image's blob.
    Flat,
    /// Its labels as well.
    Full,
}

/// One fact about the objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact {
    /// The object has a record.
    Exists(Node),
    /// The object is kept by itself.
    Root(Node, Reach),
    /// `from` keeps `to`; followed from an object reached `by` or more.
    Edge {
        /// The keeper.
        from: Node,
        /// What it keeps.
        to: Node,
        /// How far `from` must be reached.
        by: Reach,
    },
}

/// States the facts of one record. What does not decode states none but that it exists.
pub(crate) fn facts(key: &[u8], value: &[u8], now: SystemTime, state: &mut dyn FnMut(Fact)) {
    let _ = try_facts(key, value, now, state);
}

#[allow(clippy::too_many_lines, reason = "one arm for each table")]
fn try_facts(key: &[u8], value: &[u8], now: SystemTime, state: &mut dyn FnMut(Fact)) -> Option<()> {
    let (table, mut parts) = Parts::of(key)?;
    if !matches!(
        table,
        table::CONTAINERS
            | table::IMAGES
            | table::SANDBOXES
            | table::LEASES
            | table::RESOURCES
            | table::BLOBS
            | table::INGESTS
            | table::SNAPSHOTS
    ) {
        return None;
    }
    let namespace = parts.name()?;
    match table {
        table::CONTAINERS => {
            let node = Node::new(Kind::Container, &namespace, parts.last()?);
            state(Fact::Exists(node.clone()));
            state(Fact::Root(node.clone(), Reach::Full));
            let record = ContainerRecord::decode(value).ok()?;
            if !record.snapshot_key.is_empty() {
                let to = snapshot(&namespace, &record.snapshotter, &record.snapshot_key);
                edge(&node, to, Reach::Flat, state);
            }
            label_facts(&node, &record.labels, now, state);
        }
        table::IMAGES => {
            let node = Node::new(Kind::Image, &namespace, parts.last()?);
            state(Fact::Exists(node.clone()));
            let Ok(record) = ImageRecord::decode(value) else {
                state(Fact::Root(node, Reach::Full));
                return None;
            };
            if !is_expired(&record.labels, now) {
                state(Fact::Root(node.clone(), Reach::Full));
            }
            let target = Node::new(Kind::Content, &namespace, &record.digest);
            edge(&node, target, Reach::Flat, state);
            label_facts(&node, &record.labels, now, state);
        }
        table::SANDBOXES => {
            let node = Node::new(Kind::Sandbox, &namespace, parts.last()?);
            state(Fact::Exists(node.clone()));
            state(Fact::Root(node.clone(), Reach::Full));
            let record = SandboxRecord::decode(value).ok()?;
            label_facts(&node, &record.labels, now, state);
        }
        table::LEASES => {
            let node = Node::new(Kind::Lease, &namespace, parts.last()?);
            state(Fact::Exists(node.clone()));
            let labels = LeaseRecord::decode(value)
                .map(|r| r.labels)
                .unwrap_or_default();
            if !is_expired(&labels, now) {
                let flat = labels.contains_key(labels::GC_FLAT);
                let reach = if flat { Reach::Flat } else { Reach::Full };
                state(Fact::Root(node, reach));
            }
        }
        table::RESOURCES => {
            let lease = Node::new(Kind::Lease, &namespace, &parts.name()?);
            let kind = parts.name()?;
            let id = parts.last()?;
            let to = match kind.as_str() {
                KIND_CONTENT => Node::new(Kind::Content, &namespace, id),
                KIND_INGESTS => Node::new(Kind::Ingest, &namespace, id),
                KIND_IMAGES => Node::new(Kind::Image, &namespace, id),
                kind => snapshot(&namespace, kind.strip_prefix(KIND_SNAPSHOTS)?, id),
            };
            edge(&lease, to, Reach::Flat, state);
        }
        table::BLOBS => {
            let node = Node::new(Kind::Content, &namespace, parts.last()?);
            state(Fact::Exists(node.clone()));
            let record = BlobRecord::decode(value).ok()?;
            object_facts(&node, &record.labels, now, state);
        }
        table::INGESTS => {
            let node = Node::new(Kind::Ingest, &namespace, parts.last()?);
            state(Fact::Exists(node.clone()));
            let record = IngestRecord::decode(value).ok()?;
            if record.expires > to_nanos(now) {
                state(Fact::Root(node.clone(), Reach::Full));
            }
            if !record.expected.is_empty() {
                let to = Node::new(Kind::Content, &namespace, &record.expected);
                edge(&node, to, Reach::Flat, state);
            }
        }
        _ => {
            let snapshotter = parts.name()?;
            let node = snapshot(&namespace, &snapshotter, parts.last()?);
            state(Fact::Exists(node.clone()));
            let record = SnapshotRecord::decode(value).ok()?;
            let becomes = record.committing.iter().map(|c| &c.parent);
            for parent in becomes.chain([&record.parent]).filter(|p| !p.is_empty()) {
                edge(
                    &node,
                    snapshot(&namespace, &snapshotter, parent),
                    Reach::Flat,
                    state,
                );
            }
            object_facts(&node, &record.labels, now, state);
        }
    }
    Some(())
}

fn snapshot(namespace: &str, snapshotter: &str, key: &str) -> Node {
    Node::new(Kind::Snapshot, namespace, &format!("{snapshotter}/{key}"))
}

fn edge(from: &Node, to: Node, by: Reach, state: &mut dyn FnMut(Fact)) {
    state(Fact::Edge {
        from: from.clone(),
        to,
        by,
    });
}

/// Facts of a blob's or snapshot's labels, which may also make it a root.
fn object_facts(node: &Node, labels: &Labels, now: SystemTime, state: &mut dyn FnMut(Fact)) {
    if labels.contains_key(labels::GC_ROOT) {
        state(Fact::Root(node.clone(), Reach::Full));
    }
    label_facts(node, labels, now, state);
}

/// References and back references in labels.
fn label_facts(node: &Node, labels: &Labels, now: SystemTime, state: &mut dyn FnMut(Fact)) {
    for (key, value) in labels {
        if let Some(rest) = key.strip_prefix(labels::GC_REF) {
            if let Some(to) = referenced(rest, &node.namespace, value) {
                edge(node, to, Reach::Full, state);
            }
        } else if let Some(rest) = key.strip_prefix(labels::GC_BREF) {
            if let Some(from) = back_referenced(rest, &node.namespace, value) {
                edge(&from, node.clone(), Reach::Full, state);
            }
        } else if let Some(rest) = key.strip_prefix(labels::GC_COND)
            && let Some(to) = conditional(rest, node, value, labels, now)
        {
            edge(node, to, Reach::Full, state);
        }
    }
}

/// Splits `content`, `content.x` and `content/x` into the word and what follows.
fn word<'a>(rest: &'a str, word: &str) -> Option<&'a str> {
    let after = rest.strip_prefix(word)?;
    (after.is_empty() || after.starts_with(['.', '/'])).then_some(after)
}

/// The snapshotter in `.<name>` or `.<name>/anything`.
fn snapshotter(after: &str) -> Option<&str> {
    let name = after.strip_prefix('.')?.split('/').next()?;
    (!name.is_empty()).then_some(name)
}

fn referenced(rest: &str, namespace: &str, id: &str) -> Option<Node> {
    if let Some(after) = word(rest, "snapshot") {
        return Some(snapshot(namespace, snapshotter(after)?, id));
    }
    [Kind::Content, Kind::Image, Kind::Mount, Kind::Stream]
        .into_iter()
        .find(|kind| word(rest, kind.as_str()).is_some())
        .map(|kind| Node::new(kind, namespace, id))
}

fn back_referenced(rest: &str, namespace: &str, id: &str) -> Option<Node> {
    if let Some(after) = word(rest, "snapshot") {
        return Some(snapshot(namespace, snapshotter(after)?, id));
    }
    [Kind::Container, Kind::Content, Kind::Image]
        .into_iter()
        .find(|kind| word(rest, kind.as_str()).is_some())
        .map(|kind| Node::new(kind, namespace, id))
}

/// A reference that holds while the labelled snapshot was used lately: `usedat<24h|key`.
fn conditional(
    rest: &str,
    node: &Node,
    value: &str,
    labels: &Labels,
    now: SystemTime,
) -> Option<Node> {
    let after = word(rest, "snapshot")?;
    let (condition, key) = value.split_once('|')?;
    let limit = go_duration(condition.strip_prefix("usedat<")?)?;
    let used = parse_time(labels.get(labels::GC_COND_USED_AT)?)?;
    let age = now.duration_since(used).unwrap_or_default();
    (age < limit).then_some(())?;
    Some(snapshot(&node.namespace, snapshotter(after)?, key))
}

/// A duration as Go writes it, of hours, minutes and seconds.
fn go_duration(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let count: u32 = rest.get(..digits)?.parse().ok()?;
        let unit = rest[digits..].find(|c: char| c.is_ascii_digit());
        let end = unit.map_or(rest.len(), |unit| digits + unit);
        let seconds = match &rest[digits..end] {
            "h" => 3600,
            "m" => 60,
            "s" => 1,
            _ => return None,
        };
        total = total.checked_add(Duration::from_secs(seconds).checked_mul(count)?)?;
        rest = &rest[end..];
    }
    (!text.is_empty()).then_some(total)
}

fn parse_time(text: &str) -> Option<SystemTime> {
    let time = OffsetDateTime::parse(text, &Rfc3339).ok()?;
    Some(SystemTime::from(time))
}

/// Whether an object's own end has passed; what cannot be read never passes.
fn is_expired(labels: &Labels, now: SystemTime) -> bool {
    labels
        .get(labels::GC_EXPIRE)
        .and_then(|text| parse_time(text))
        .is_some_and(|end| end < now)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_labels(pairs: &[(&str, &str)]) -> Vec<String> {
        let labels: Labels = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        let node = Node::new(Kind::Content, "n", "x");
        let mut found = Vec::new();
        object_facts(&node, &labels, SystemTime::now(), &mut |fact| {
            found.push(match fact {
                Fact::Root(..) => "root".to_owned(),
                Fact::Edge { from, to, .. } if from == node => {
                    format!("> {} {}", to.kind.as_str(), to.id)
                }
                Fact::Edge { from, .. } => format!("< {} {}", from.kind.as_str(), from.id),
                Fact::Exists(_) => "exists".to_owned(),
            });
        });
        found
    }

    #[test]
    fn labels_refer_only_when_a_separator_follows_the_word() {
        for (key, want) in [
            ("containerd.io/gc.ref.content", "> content v"),
            ("containerd.io/gc.ref.content.l.0", "> content v"),
            ("containerd.io/gc.ref.content/any", "> content v"),
            ("containerd.io/gc.ref.image.x", "> image v"),
            (
                "containerd.io/gc.ref.snapshot.overlayfs",
                "> snapshot overlayfs/v",
            ),
            (
                "containerd.io/gc.ref.snapshot.overlayfs/a/b",
                "> snapshot overlayfs/v",
            ),
            ("containerd.io/gc.ref.mount", "> mount v"),
            ("containerd.io/gc.bref.container.x", "< container v"),
            (
                "containerd.io/gc.bref.snapshot.native/a",
                "< snapshot native/v",
            ),
            ("containerd.io/gc.root", "root"),
        ] {
            assert_eq!(of_labels(&[(key, "v")]), [want], "{key}");
        }
        for key in [
            "containerd.io/gc.ref.contentfoo",
            "containerd.io/gc.ref.snapshot",
            "containerd.io/gc.ref.snapshot/x",
            "containerd.io/gc.ref.lease",
            "containerd.io/gc.refs.content",
            "containerd.io/gc.rooted",
        ] {
            assert!(of_labels(&[(key, "v")]).is_empty(), "{key}");
        }
    }

    #[test]
    fn a_condition_holds_while_its_object_is_in_use() {
        let at = |ago: u64| {
            let time = SystemTime::now() - Duration::from_secs(ago);
            OffsetDateTime::from(time).format(&Rfc3339).expect("a time")
        };
        let key = "containerd.io/gc.cond.snapshot.overlayfs";
        for (value, ago, holds) in [
            ("usedat<24h|k", 60, true),
            ("usedat<24h|k", 90_000, false),
            ("usedat<1h30m|k", 5000, true),
            ("usedat<soon|k", 0, false),
        ] {
            let found = of_labels(&[(key, value), (labels::GC_COND_USED_AT, &at(ago))]);
            assert_eq!(!found.is_empty(), holds, "{value} {ago}");
        }
    }
}
