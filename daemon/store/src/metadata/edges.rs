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
    /// Every kind.
    pub const ALL: [Self; 9] = [
        Self::Lease,
        Self::Image,
        Self::Container,
        Self::Sandbox,
        Self::Ingest,
        Self::Snapshot,
        Self::Content,
        Self::Mount,
        Self::Stream,
    ];

    /// The kind of a word, as [`Kind::as_str`] says it.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word)
    }

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
    /// `from`, reached full, keeps `to` as long as the last use of `to` is as `when` says.
    Conditional {
        /// The keeper.
        from: Node,
        /// What it keeps.
        to: Node,
        /// For which uses.
        when: Condition,
    },
    /// When the object was last used, as its label says.
    UsedAt(Node, SystemTime),
}

/// Which last use a conditional reference asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// Less than this ago.
    Within(Duration),
    /// More than this ago.
    Before(Duration),
}

impl Condition {
    /// Whether a last use at `used`, seen from `now`, fulfils it. One in the future is no time ago.
    #[must_use]
    pub fn holds(self, used: SystemTime, now: SystemTime) -> bool {
        let age = now.duration_since(used).unwrap_or_default();
        match self {
            Self::Within(limit) => age < limit,
            Self::Before(limit) => age > limit,
        }
    }
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
            label_facts(&node, &record.labels, state);
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
            label_facts(&node, &record.labels, state);
            conditional_facts(&node, &record.labels, state);
        }
        table::SANDBOXES => {
            let node = Node::new(Kind::Sandbox, &namespace, parts.last()?);
            state(Fact::Exists(node.clone()));
            state(Fact::Root(node.clone(), Reach::Full));
            let record = SandboxRecord::decode(value).ok()?;
            label_facts(&node, &record.labels, state);
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
            object_facts(&node, &record.labels, state);
            conditional_facts(&node, &record.labels, state);
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
            object_facts(&node, &record.labels, state);
            let used = record.labels.get(labels::GC_COND_USED_AT);
            if let Some(used) = used.and_then(|text| parse_time(text)) {
                state(Fact::UsedAt(node, used));
            }
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
fn object_facts(node: &Node, labels: &Labels, state: &mut dyn FnMut(Fact)) {
    if labels.contains_key(labels::GC_ROOT) {
        state(Fact::Root(node.clone(), Reach::Full));
    }
    label_facts(node, labels, state);
}

/// References and back references in labels.
fn label_facts(node: &Node, labels: &Labels, state: &mut dyn FnMut(Fact)) {
    for (key, value) in labels {
        if let Some(rest) = key.strip_prefix(labels::GC_REF)
            && let Some(to) = referenced(rest, &node.namespace, value)
        {
            edge(node, to, Reach::Full, state);
        }
    }
    back_references(node, labels, &mut |from| {
        edge(&from, node.clone(), Reach::Full, state);
    });
}

/// The objects that keep `node` because its labels name them.
pub fn back_references(node: &Node, labels: &Labels, each: &mut dyn FnMut(Node)) {
    for (key, value) in labels {
        if let Some(rest) = key.strip_prefix(labels::GC_BREF)
            && let Some(from) = back_referenced(rest, &node.namespace, value)
        {
            each(from);
        }
    }
}

/// The label of `from` or of `to` by which `from` keeps `to`, given the labels of both.
#[must_use]
pub fn naming_label<'a>(
    from: &Node,
    from_labels: &'a Labels,
    to: &Node,
    to_labels: &'a Labels,
) -> Option<&'a str> {
    let refers = from_labels.iter().find(|(key, value)| {
        let rest = key.strip_prefix(labels::GC_REF);
        rest.and_then(|rest| referenced(rest, &from.namespace, value))
            .as_ref()
            == Some(to)
            || key.starts_with(labels::GC_COND) && {
                let (name, target) = (to.id.split('/').next(), to.id.split_once('/'));
                to.kind == Kind::Snapshot
                    && value.split_once('|').map(|(_, key)| key) == target.map(|(_, key)| key)
                    && name.is_some_and(|name| key.contains(name))
            }
    });
    let referred = || {
        to_labels.iter().find(|(key, value)| {
            let rest = key.strip_prefix(labels::GC_BREF);
            rest.and_then(|rest| back_referenced(rest, &to.namespace, value))
                .as_ref()
                == Some(from)
        })
    };
    refers.or_else(referred).map(|(key, _)| key.as_str())
}

/// References of images and blobs that hold as long as the snapshot they name says so by its own
/// label: `usedat<24h|key`, several conditions with `,` between them, of which one is enough.
fn conditional_facts(node: &Node, labels: &Labels, state: &mut dyn FnMut(Fact)) {
    for (key, value) in labels {
        let Some(rest) = key.strip_prefix(labels::GC_COND) else {
            continue;
        };
        let Some((conditions, target)) = value.split_once('|') else {
            continue;
        };
        let named = word(rest, "snapshot").map(|after| after.trim_start_matches(['.', '/']));
        let Some(name) = named.and_then(|after| after.split('/').next()) else {
            continue;
        };
        for when in conditions.split(',').filter_map(condition) {
            state(Fact::Conditional {
                from: node.clone(),
                to: snapshot(&node.namespace, name, target),
                when,
            });
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

/// `usedat<24h` or `usedat>1h30m`; what is neither holds never.
fn condition(text: &str) -> Option<Condition> {
    let rest = text.strip_prefix("usedat")?;
    match rest.split_at_checked(1)? {
        ("<", limit) => Some(Condition::Within(go_duration(limit)?)),
        (">", limit) => Some(Condition::Before(go_duration(limit)?)),
        _ => None,
    }
}

/// A duration as Go writes it: numbers with a unit each, from `h` to `ns`.
fn go_duration(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
        let count: f64 = rest.get(..digits)?.parse().ok()?;
        let unit = rest[digits..].find(|c: char| c.is_ascii_digit() || c == '.');
        let end = unit.map_or(rest.len(), |unit| digits + unit);
        let seconds = match &rest[digits..end] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        let part = Duration::try_from_secs_f64(count * seconds).ok()?;
        total = total.checked_add(part)?;
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
        object_facts(&node, &labels, &mut |fact| {
            found.push(match fact {
                Fact::Root(..) => "root".to_owned(),
                Fact::Edge { from, to, .. } if from == node => {
                    format!("> {} {}", to.kind.as_str(), to.id)
                }
                Fact::Edge { from, .. } => format!("< {} {}", from.kind.as_str(), from.id),
                other => format!("{other:?}"),
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
    fn a_condition_is_read_from_the_referrer() {
        let of = |key: &str, value: &str| {
            let node = Node::new(Kind::Image, "n", "x");
            let labels = Labels::from([(key.to_owned(), value.to_owned())]);
            let mut found = Vec::new();
            conditional_facts(&node, &labels, &mut |fact| {
                if let Fact::Conditional { from, to, when } = fact {
                    assert_eq!(from, node);
                    found.push((to.id.to_string(), when));
                }
            });
            found
        };
        let hours = |count: u64| Duration::from_secs(count * 3600);
        let within = |count| ("overlayfs/k".to_owned(), Condition::Within(hours(count)));
        let key = "containerd.io/gc.cond.snapshot.overlayfs";
        assert_eq!(of(key, "usedat<24h|k"), [within(24)]);
        assert_eq!(of(&format!("{key}/name"), "usedat<60m|k"), [within(1)]);
        assert_eq!(
            of("containerd.io/gc.cond.snapshot/overlayfs", "usedat<1h|k"),
            [within(1)]
        );
        assert_eq!(
            of(key, "usedat<1h,usedat>1500ms|k"),
            [
                within(1),
                (
                    "overlayfs/k".to_owned(),
                    Condition::Before(Duration::from_millis(1500))
                )
            ]
        );
        for bad in [
            "usedat<soon|k",
            "usedat=1h|k",
            "usedat<1h",
            "size<1h|k",
            "usedat|k",
            "",
        ] {
            assert!(of(key, bad).is_empty(), "{bad}");
        }
        assert!(of("containerd.io/gc.cond.content", "usedat<1h|k").is_empty());
    }

    #[test]
    fn a_condition_holds_by_age() {
        let now = SystemTime::now();
        let used = now - Duration::from_secs(60);
        assert!(Condition::Within(Duration::from_secs(61)).holds(used, now));
        assert!(!Condition::Within(Duration::from_secs(60)).holds(used, now));
        assert!(Condition::Before(Duration::from_secs(59)).holds(used, now));
        assert!(!Condition::Before(Duration::from_secs(60)).holds(used, now));
        assert!(Condition::Within(Duration::from_secs(1)).holds(now + Duration::from_secs(9), now));
    }
}
