//! The records as requests see them, and collections beside them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_snapshotter::Native;
use lighter_snapshotter::{CommitOptions, Snapshotter};
use prost_types::Any;

use super::collect::Judge;
use super::edges::{Fact, Kind, Node};
use super::*;
use crate::content::Local;
use crate::filter::Filter;
use crate::{Digest, Error, Identifier, Labels, Namespace, Scope, labels};

struct World {
    db: Db,
    kv: lighter_kv::Db,
    dir: tempfile::TempDir,
}

fn world_with(policy: SharingPolicy) -> World {
    let dir = tempfile::tempdir().unwrap();
    let kv = lighter_kv::Db::in_memory().unwrap();
    let db = open(&kv, dir.path(), policy);
    World { db, kv, dir }
}

/// Set in the environment: the stores below are in another process's place, behind a socket.
const PROXIED: &str = "LIGHTER_TEST_PROXIED";

fn open(kv: &lighter_kv::Db, dir: &std::path::Path, policy: SharingPolicy) -> Db {
    let content = Arc::new(Local::open(&dir.join("content")).unwrap());
    let native = Native::open(kv.clone(), b"snapshotter/native/", &dir.join("native")).unwrap();
    let (mut content, mut native): (Arc<dyn Store>, Arc<dyn Snapshotter>) =
        (content, Arc::new(native));
    if std::env::var_os(PROXIED).is_some() {
        (content, native) = behind_a_socket(dir, content, native);
    }
    let snapshotters = BTreeMap::from([("native".to_owned(), native)]);
    Db::open(kv.clone(), content, snapshotters, Exchange::new(), policy).unwrap()
}

fn behind_a_socket(
    dir: &std::path::Path,
    content: Arc<dyn Store>,
    native: Arc<dyn Snapshotter>,
) -> (Arc<dyn Store>, Arc<dyn Snapshotter>) {
    let address = (0..)
        .map(|n| dir.join(format!("{n}.sock")))
        .find(|path| !path.exists())
        .expect("numbers do not end");
    let listener = std::os::unix::net::UnixListener::bind(&address).unwrap();
    listener.set_nonblocking(true).unwrap();
    // On a runtime of its own, so that a test that blocks does not stop it.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = tokio::net::UnixListener::from_std(listener).unwrap();
            let incoming = tokio_stream::wrappers::UnixListenerStream::new(listener);
            tonic::transport::Server::builder()
                .add_service(crate::content::Serve::new(content, Default::default()))
                .add_service(lighter_snapshotter::Serve::new(native))
                .serve_with_incoming(incoming)
                .await
                .unwrap();
        });
    });
    let address = address.to_str().unwrap();
    (
        Arc::new(crate::content::Proxy::connect(address).unwrap()),
        Arc::new(lighter_snapshotter::Proxy::connect(address, "native").unwrap()),
    )
}

#[test]
fn everything_holds_through_proxies_as_well() {
    if std::env::var_os(PROXIED).is_some() {
        return;
    }
    let this = std::env::current_exe().unwrap();
    let output = std::process::Command::new(this)
        .args(["metadata::tests::", "--test-threads=2"])
        .env(PROXIED, "1")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

fn world() -> World {
    world_with(SharingPolicy::Shared)
}

fn scope(namespace: &str) -> Scope {
    Scope::new(Namespace::new(namespace).unwrap())
}

fn kind<T: std::fmt::Debug>(result: Result<T, Error>) -> ErrorKind {
    result.expect_err("a refusal").kind()
}

fn container(id: &str) -> Container {
    Container {
        id: Identifier::new(id).unwrap(),
        labels: Labels::from([("a".into(), "1".into()), ("empty".into(), String::new())]),
        image: "image".into(),
        runtime: Runtime {
            name: "io.containerd.runc.v2".into(),
            options: None,
        },
        spec: Any {
            type_url: "spec".into(),
            value: b"{}".to_vec(),
        },
        snapshotter: "native".into(),
        snapshot_key: id.into(),
        created_at: SystemTime::UNIX_EPOCH,
        updated_at: SystemTime::UNIX_EPOCH,
        extensions: BTreeMap::new(),
        sandbox_id: String::new(),
    }
}

fn image(name: &str, target: &Digest) -> Image {
    Image {
        name: name.into(),
        labels: Labels::new(),
        target: Descriptor {
            media_type: "m".into(),
            digest: target.clone(),
            size_bytes: 1,
            annotations: Labels::new(),
        },
        created_at: SystemTime::UNIX_EPOCH,
        updated_at: SystemTime::UNIX_EPOCH,
    }
}

async fn blob(db: &Db, scope: &Scope, data: &[u8], labels: &[(&str, &str)]) -> Digest {
    let reference = format!("r{}", Digest::of(data));
    let mut writer = db
        .content()
        .writer(scope, &reference, 0, None)
        .await
        .unwrap();
    writer.write(Bytes::copy_from_slice(data)).await.unwrap();
    let labels = labels
        .iter()
        .map(|(k, v)| ((*k).into(), (*v).into()))
        .collect();
    writer.commit(0, None, labels).await.unwrap()
}

#[tokio::test]
async fn a_container_lives_in_its_namespace() {
    let World { db, dir: _dir, .. } = world();
    let (a, b) = (scope("a"), scope("b"));
    let containers = db.containers();
    let mut events = db.events().subscribe(Filter::default());
    let made = containers.create(&a, container("c1")).await.unwrap();
    assert!(!made.labels.contains_key("empty"));
    assert_eq!(
        kind(containers.create(&a, container("c1")).await),
        ErrorKind::AlreadyExists
    );
    let error = containers.get(&b, "c1").unwrap_err();
    assert_eq!(
        error.to_string(),
        "container \"c1\" in namespace \"b\": not found"
    );
    let mask = [
        "labels.a.b".to_owned(),
        "labels.a".to_owned(),
        "image".to_owned(),
    ];
    let change = Container {
        labels: Labels::from([("a.b".into(), "2".into())]),
        image: "other".into(),
        spec: Any::default(),
        ..container("c1")
    };
    let updated = containers.update(&a, change, &mask).await.unwrap();
    assert_eq!(updated.labels, Labels::from([("a.b".into(), "2".into())]));
    assert_eq!(
        (updated.image.as_str(), updated.spec.value.len()),
        ("other", 2)
    );
    assert!(updated.updated_at > updated.created_at);
    let runtime = Container {
        snapshotter: "overlayfs".into(),
        ..container("c1")
    };
    assert_eq!(
        kind(containers.update(&a, runtime, &[]).await),
        ErrorKind::InvalidArgument
    );
    for path in ["runtime", "id", "snapshot_key", "sandbox", "labelsx"] {
        let refused = containers
            .update(&a, container("c1"), &[path.to_owned()])
            .await;
        assert_eq!(kind(refused), ErrorKind::InvalidArgument, "{path}");
    }
    containers.create(&a, container("b0")).await.unwrap();
    let ids = |filter: &str| -> Vec<String> {
        let filter = Filter::parse(&[filter]).unwrap();
        let found = containers.list(&a, &filter).unwrap();
        found
            .into_iter()
            .map(|c| c.id.as_str().to_owned())
            .collect()
    };
    assert_eq!(ids(""), ["b0", "c1"]);
    assert_eq!(ids("labels.a.b==2,runtime.name~=runc"), ["c1"]);
    containers.delete(&a, "c1").await.unwrap();
    assert_eq!(kind(containers.delete(&a, "c1").await), ErrorKind::NotFound);
    for topic in ["create", "update", "create", "delete"] {
        let event = events.next().await.unwrap();
        assert_eq!(event.topic, format!("/containers/{topic}"));
    }
}

#[tokio::test]
async fn a_namespace_is_there_once_written_in_and_goes_only_empty() {
    let World { db, dir: _dir, .. } = world();
    let a = scope("a");
    let namespaces = db.namespaces();
    assert!(namespaces.labels(&a.namespace).unwrap().is_empty());
    assert!(namespaces.list().unwrap().is_empty());
    let digest = blob(&db, &a, b"x", &[]).await;
    db.images()
        .create(&a, image("i", &digest), None)
        .await
        .unwrap();
    db.leases().create(&a, "l", Labels::new()).await.unwrap();
    db.snapshots("native")
        .unwrap()
        .prepare(&a, "s", None, Labels::new())
        .await
        .unwrap();
    assert_eq!(
        kind(namespaces.create(&a.namespace, Labels::new()).await),
        ErrorKind::AlreadyExists
    );
    let text = namespaces
        .delete(&a.namespace)
        .await
        .unwrap_err()
        .to_string();
    assert_eq!(
        text,
        "namespace \"a\" must be empty, but it still has images, blobs, snapshots on \"native\" \
         snapshotter: failed precondition"
    );
    db.images().delete(&a, "i", None).await.unwrap();
    db.content().delete(&a, &digest).await.unwrap();
    db.snapshots("native")
        .unwrap()
        .remove(&a, "s")
        .await
        .unwrap();
    namespaces.delete(&a.namespace).await.unwrap();
    assert!(namespaces.list().unwrap().is_empty());
    assert!(db.leases().list(&a, &Filter::default()).unwrap().is_empty());
}

#[tokio::test]
async fn an_image_may_be_deleted_only_as_it_is() {
    let World { db, dir: _dir, .. } = world();
    let a = scope("a");
    let images = db.images();
    let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
    let mut bad = image("i", &one);
    bad.target.size_bytes = 0;
    assert_eq!(
        kind(images.create(&a, bad, None).await),
        ErrorKind::InvalidArgument
    );
    let epoch = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(7);
    let made = images
        .create(&a, image("i", &one), Some(epoch))
        .await
        .unwrap();
    assert_eq!((made.created_at, made.updated_at), (epoch, epoch));
    images
        .update(&a, image("i", &two), &["target".into()], None)
        .await
        .unwrap();
    assert_eq!(
        kind(images.delete(&a, "i", Some(&one)).await),
        ErrorKind::NotFound
    );
    images.delete(&a, "i", Some(&two)).await.unwrap();
}

#[tokio::test]
async fn a_blob_of_another_namespace_needs_no_bytes_when_shared() {
    for policy in [SharingPolicy::Shared, SharingPolicy::Isolated] {
        let World { db, dir: _dir, .. } = world_with(policy);
        let (a, b) = (scope("a"), scope("b"));
        let content = db.content();
        let digest = blob(&db, &a, b"hello", &[]).await;
        assert_eq!(kind(content.info(&b, &digest)), ErrorKind::NotFound);
        let mut writer = content.writer(&b, "r", 5, Some(&digest)).await.unwrap();
        if policy == SharingPolicy::Isolated {
            assert_eq!(writer.status().offset_bytes, 0);
            writer.write(Bytes::from_static(b"hello")).await.unwrap();
        } else {
            assert_eq!(writer.status().offset_bytes, 5);
            // The first holder goes; the ingest keeps the file.
            content.delete(&a, &digest).await.unwrap();
            db.reclaim().await;
        }
        writer
            .commit(5, Some(&digest), Labels::new())
            .await
            .unwrap();
        assert_eq!(content.read(&b, &digest, 5).await.unwrap(), "hello");
        let again = content.writer(&b, "r", 0, Some(&digest)).await;
        assert_eq!(kind(again), ErrorKind::AlreadyExists);
        content.delete(&b, &digest).await.unwrap();
        let _ = content.delete(&a, &digest).await;
        assert_eq!(db.reclaim().await.blobs, 1);
        assert_eq!(db.reconcile().await.unwrap(), collect::Reclaimed::default());
    }
}

#[tokio::test]
async fn a_shared_ingest_takes_other_bytes_as_well() {
    let World { db, dir: _dir, .. } = world();
    let (a, b) = (scope("a"), scope("b"));
    let digest = blob(&db, &a, b"hello", &[]).await;
    let mut writer = db
        .content()
        .writer(&b, "r", 0, Some(&digest))
        .await
        .unwrap();
    writer.write(Bytes::from_static(b" you")).await.unwrap();
    assert_eq!(writer.digest().await.unwrap(), Digest::of(b"hello you"));
    writer.truncate(0).await.unwrap();
    writer.write(Bytes::from_static(b"x")).await.unwrap();
    drop(writer);
    assert_eq!(db.content().status(&b, "r").await.unwrap().offset_bytes, 1);
    db.content().abort(&b, "r").await.unwrap();
    assert_eq!(kind(db.content().abort(&b, "r").await), ErrorKind::NotFound);
}

#[tokio::test]
async fn a_lease_holds_what_is_made_and_found_under_it() {
    let World { db, dir: _dir, .. } = world();
    let a = scope("a");
    let held = a.with_lease("l");
    let missing = db.content().writer(&held, "r", 0, None).await;
    assert_eq!(
        missing.unwrap_err().to_string(),
        "lease does not exist: not found"
    );
    db.leases().create(&a, "l", Labels::new()).await.unwrap();
    let old = blob(&db, &a, b"old", &[]).await;
    let found = db.content().writer(&held, "r", 0, Some(&old)).await;
    assert_eq!(kind(found), ErrorKind::AlreadyExists);
    let new = blob(&db, &held, b"new", &[]).await;
    let snapshots = db.snapshots("native").unwrap();
    snapshots
        .prepare(&held, "k", None, Labels::new())
        .await
        .unwrap();
    snapshots
        .commit(&held, "c", "k", CommitOptions::default())
        .await
        .unwrap();
    snapshots
        .prepare(&held, "k2", Some("c"), Labels::new())
        .await
        .unwrap();
    let held_now = || -> Vec<String> {
        let all = db.leases().resources(&a, "l").unwrap();
        all.into_iter()
            .map(|r| format!("{} {}", r.kind, r.id))
            .collect()
    };
    let mut want = vec![format!("content {new}"), format!("content {old}")];
    want.sort();
    want.extend([
        "snapshots/native c".to_owned(),
        "snapshots/native k2".to_owned(),
    ]);
    assert_eq!(held_now(), want);
    snapshots.remove(&held, "k2").await.unwrap();
    db.content().delete(&held, &new).await.unwrap();
    assert_eq!(held_now().len(), 2);
    for (kind_, want) in [
        ("snapshots/", ErrorKind::InvalidArgument),
        ("snapshots", ErrorKind::InvalidArgument),
        ("streams", ErrorKind::Unimplemented),
    ] {
        let resource = Resource {
            id: "x".into(),
            kind: kind_.into(),
        };
        assert_eq!(
            kind(db.leases().add(&a, "l", resource).await),
            want,
            "{kind_}"
        );
    }
}

#[tokio::test]
async fn snapshots_follow_the_contract_under_client_keys() {
    let World { db, dir: _dir, .. } = world();
    let a = scope("a");
    let s = db.snapshots("native").unwrap();
    let target = Labels::from([(labels::SNAPSHOT_REF.into(), "chain".into())]);
    s.prepare(&a, "x", None, target.clone()).await.unwrap();
    s.commit(&a, "chain", "x", CommitOptions::default())
        .await
        .unwrap();
    let text = s
        .prepare(&a, "y", None, target)
        .await
        .unwrap_err()
        .to_string();
    assert_eq!(text, "target snapshot \"chain\": already exists");
    s.prepare(&a, "y", Some("chain"), Labels::new())
        .await
        .unwrap();
    let refused = s
        .prepare(&a, "z", Some("y"), Labels::new())
        .await
        .unwrap_err();
    assert_eq!(
        refused.to_string(),
        "parent \"y\" is not committed snapshot: invalid argument"
    );
    assert_eq!(
        kind(s.prepare(&a, "z", Some("none"), Labels::new()).await),
        ErrorKind::NotFound
    );
    let text = s.mounts(&a, "chain").await.unwrap_err().to_string();
    assert_eq!(
        text,
        "requested snapshot chain not active or view: failed precondition"
    );
    assert_eq!(
        kind(s.remove(&a, "chain").await),
        ErrorKind::FailedPrecondition
    );
    assert_eq!(
        kind(s.commit(&a, "chain", "y", CommitOptions::default()).await),
        ErrorKind::AlreadyExists
    );
    s.view(&a, "v", Some("chain"), Labels::new()).await.unwrap();
    assert_eq!(
        kind(s.commit(&a, "w", "v", CommitOptions::default()).await),
        ErrorKind::FailedPrecondition
    );
    // The same key again, and the same in another namespace, are other snapshots below.
    s.remove(&a, "y").await.unwrap();
    s.prepare(&a, "y", None, Labels::new()).await.unwrap();
    s.prepare(&scope("b"), "y", None, Labels::new())
        .await
        .unwrap();
    assert_eq!(db.reclaim().await.snapshots, 1);
    let filter = Filter::parse(&["kind==view", "name==y"]).unwrap();
    let names: Vec<_> = s
        .list(&a, &filter)
        .await
        .unwrap()
        .into_iter()
        .map(|i| i.name)
        .collect();
    assert_eq!(names, ["v", "y"]);
    // Rebase: only of what has no parent, only on what is committed.
    let on = |parent: &str| CommitOptions {
        parent: Some(parent.into()),
        ..CommitOptions::default()
    };
    assert_eq!(
        kind(s.commit(&a, "n", "y", on("v")).await),
        ErrorKind::FailedPrecondition
    );
    assert_eq!(
        db.snapshots("none").unwrap_err().to_string(),
        "snapshotter not loaded: none: invalid argument"
    );
    assert_eq!(
        db.snapshots("").unwrap_err().to_string(),
        "snapshotter argument missing: invalid argument"
    );
}

#[tokio::test]
async fn a_restart_brings_stores_and_records_in_line() {
    let World { db, kv, dir } = world();
    let a = scope("a");
    let (kept, lost) = (
        blob(&db, &a, b"kept", &[]).await,
        blob(&db, &a, b"lost", &[]).await,
    );
    std::fs::remove_file(dir.path().join("content/blobs/sha256").join(lost.hex())).unwrap();
    std::fs::write(
        dir.path()
            .join("content/blobs/sha256")
            .join(Digest::of(b"orphan").hex()),
        "orphan",
    )
    .unwrap();
    let s = db.snapshots("native").unwrap();
    s.driver()
        .prepare("a/999/orphan", None, Labels::new())
        .await
        .unwrap();
    // A commit that stops between the driver and the record.
    s.prepare(&a, "k", None, Labels::new()).await.unwrap();
    let key = keys::snapshots(&a.namespace, "native").last("k");
    let mut record: records::SnapshotRecord = db.inner.get(&key, String::new).unwrap().unwrap();
    let active = record.backend.clone();
    record.committing = Some(records::Committing {
        name: "c".into(),
        backend: "a/998/c".into(),
        ..records::Committing::default()
    });
    db.inner
        .update(|change| {
            change.put(key, &record);
            Ok(())
        })
        .await
        .unwrap();
    s.driver()
        .commit("a/998/c", &active, CommitOptions::default())
        .await
        .unwrap();
    drop((db, s));
    let db = open(&kv, dir.path(), SharingPolicy::Shared);
    let done = db.reconcile().await.unwrap();
    assert_eq!((done.blobs, done.snapshots, done.broken), (1, 1, 1));
    let info = db.snapshots("native").unwrap().stat(&a, "c").await.unwrap();
    assert_eq!(info.kind, lighter_snapshotter::Kind::Committed);
    assert_eq!(kind(db.content().info(&a, &lost)), ErrorKind::NotFound);
    assert!(db.content().info(&a, &kept).is_ok());
    assert_eq!(db.reconcile().await.unwrap(), collect::Reclaimed::default());
}

#[tokio::test]
async fn what_lost_its_bytes_is_dropped_and_can_be_made_anew() {
    let World { db, kv, dir } = world();
    let a = scope("a");
    let s = db.snapshots("native").unwrap();
    s.prepare(&a, "k", None, Labels::new()).await.unwrap();
    s.commit(&a, "base", "k", CommitOptions::default())
        .await
        .unwrap();
    s.prepare(&a, "lost", Some("base"), Labels::new())
        .await
        .unwrap();
    let mut writer = db.content().writer(&a, "r", 0, None).await.unwrap();
    writer.write(Bytes::from_static(b"half")).await.unwrap();
    drop((writer, db, s));
    let ingests = dir.path().join("content/ingest");
    for entry in std::fs::read_dir(&ingests).unwrap() {
        std::fs::remove_dir_all(entry.unwrap().path()).unwrap();
    }
    // One that was being made, and one that was being removed.
    std::fs::create_dir_all(ingests.join("half-made")).unwrap();
    std::fs::remove_dir_all(dir.path().join("native/snapshots")).unwrap();
    let db = open(&kv, dir.path(), SharingPolicy::Shared);
    let done = db.reconcile().await.unwrap();
    // What was never whole is the store's own affair, in whichever process it is.
    let half_made = usize::from(std::env::var_os(PROXIED).is_some());
    assert_eq!((done.ingests + half_made as u64, done.broken), (1, 3));
    assert_eq!(std::fs::read_dir(&ingests).unwrap().count(), half_made);
    assert_eq!(
        kind(db.content().status(&a, "r").await),
        ErrorKind::NotFound
    );
    if half_made > 0 {
        // What a snapshotter in another process has lost may come back with it: it is reported.
        return;
    }
    let s = db.snapshots("native").unwrap();
    assert!(s.list(&a, &Filter::default()).await.unwrap().is_empty());
    s.prepare(&a, "lost", None, Labels::new()).await.unwrap();
    db.content().writer(&a, "r", 0, None).await.unwrap();
    assert_eq!(db.reconcile().await.unwrap(), collect::Reclaimed::default());
}

/// A plain judge: full reach over everything.
#[derive(Default)]
struct Plain {
    edges: HashMap<Node, Vec<Node>>,
    found: Vec<Node>,
    kept: HashSet<Node>,
}

impl Plain {
    fn scan(db: &Db) -> Self {
        let mut plain = Self::default();
        let mut roots = Vec::new();
        db.facts(&mut |fact| match fact {
            Fact::Exists(node) => plain.found.push(node),
            Fact::Root(node, _) => roots.push(node),
            Fact::Edge { from, to, .. } | Fact::Conditional { from, to, .. } => {
                plain.edges.entry(from).or_default().push(to);
            }
            Fact::UsedAt(..) => {}
        })
        .unwrap();
        for root in roots {
            plain.shade(&root);
        }
        plain
    }
}

impl Judge for Plain {
    fn shade(&mut self, node: &Node) {
        let mut grey = vec![node.clone()];
        while let Some(node) = grey.pop() {
            if self.kept.insert(node.clone()) {
                grey.extend(self.edges.get(&node).into_iter().flatten().cloned());
            }
        }
    }

    fn is_garbage(&self, node: &Node) -> bool {
        !self.kept.contains(node)
    }
}

#[tokio::test]
async fn what_is_referred_to_while_a_collection_runs_is_kept() {
    let World { db, dir: _dir, .. } = world();
    let a = scope("a");
    let layer = blob(&db, &a, b"layer", &[]).await;
    let label = [("containerd.io/gc.ref.content.l.0", layer.as_str())];
    let manifest = blob(&db, &a, b"manifest", &label).await;
    let garbage = blob(&db, &a, b"garbage", &[]).await;
    let collection = db.collection().unwrap();
    assert_eq!(kind(db.collection()), ErrorKind::FailedPrecondition);
    let mut judge = Plain::scan(&db);
    assert!(judge.is_garbage(&Node::new(Kind::Content, "a", manifest.as_str())));
    // Between the scan and the removal an image comes.
    db.images()
        .create(&a, image("i", &manifest), None)
        .await
        .unwrap();
    let candidates = judge.found.clone();
    let (removed, ticket) = collection.remove(&candidates, &mut judge).unwrap();
    ticket.wait().await.unwrap();
    assert_eq!(removed, [Node::new(Kind::Content, "a", garbage.as_str())]);
    assert_eq!(db.reclaim().await.blobs, 1);
    assert_eq!(db.content().read(&a, &layer, 99).await.unwrap(), "layer");
    drop(collection);
    db.collection().unwrap();
}

#[tokio::test]
async fn only_removals_ask_for_a_collection() {
    let World { db, dir: _dir, .. } = world();
    let a = scope("a");
    let digest = blob(&db, &a, b"x", &[]).await;
    db.content()
        .update(&a, &digest, Labels::new(), &[])
        .await
        .unwrap();
    db.images()
        .create(&a, image("i", &digest), None)
        .await
        .unwrap();
    assert_eq!(db.take_counts().removals, 0);
    db.images().delete(&a, "i", None).await.unwrap();
    assert_eq!(db.take_counts().removals, 1);
}

#[tokio::test]
async fn an_open_ingest_outlives_its_lease() {
    let World { db, dir: _dir, .. } = world();
    let a = scope("a");
    db.leases().create(&a, "l", Labels::new()).await.unwrap();
    let writer = db
        .content()
        .writer(&a.with_lease("l"), "r", 0, None)
        .await
        .unwrap();
    db.leases().delete(&a, "l").await.unwrap();
    let collect = || {
        let collection = db.collection().unwrap();
        let mut judge = Plain::scan(&db);
        let candidates = judge.found.clone();
        collection.remove(&candidates, &mut judge).unwrap().0
    };
    assert!(collect().is_empty());
    drop(writer);
    assert_eq!(collect(), [Node::new(Kind::Ingest, "a", "r")]);
    db.inner.kv.durable().wait().await.unwrap();
    assert_eq!(db.reclaim().await.ingests, 1);
}

/// 100,000 blobs and 20,000 snapshots that nothing keeps, collected from a real database while
/// requests go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: `cargo test -p lighter-store -- --ignored --nocapture measured`"]
#[allow(clippy::too_many_lines, reason = "one measurement, top to bottom")]
async fn measured_a_large_collection_beside_requests() {
    use std::time::{Duration, Instant};

    /// Longest that a request may be held up.
    const LONGEST: Duration = Duration::from_millis(50);
    let dir = tempfile::tempdir().unwrap();
    let kv = lighter_kv::Db::open(&dir.path().join("db"), &lighter_kv::Options::default()).unwrap();
    let db = open(&kv, dir.path(), SharingPolicy::Shared);
    let a = scope("a");
    for page in 0..120_u32 {
        let fill = |change: &mut db::Change<'_, '_>| {
            for n in page * 1000..(page + 1) * 1000 {
                if n < 100_000 {
                    let digest = Digest::of(&n.to_be_bytes());
                    change.put(
                        keys::blob(&a.namespace, &digest),
                        &records::BlobRecord::default(),
                    );
                    change.mark(keys::holder(digest.as_str(), &a.namespace, ""));
                } else {
                    let key = keys::snapshots(&a.namespace, "native").last(&format!("s{n}"));
                    let record = records::SnapshotRecord {
                        backend: format!("a/{n}/s{n}"),
                        kind: 3,
                        ..records::SnapshotRecord::default()
                    };
                    change.put(key, &record);
                }
            }
            Ok(())
        };
        db.inner.update(fill).await.unwrap();
    }
    // What a create takes on this machine by itself.
    let mut alone = Vec::new();
    for n in 0..2000 {
        let began = Instant::now();
        let id = format!("alone{n}");
        db.containers().create(&a, container(&id)).await.unwrap();
        alone.push(began.elapsed());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    alone.sort();
    println!(
        "alone: p50 {:?} p99 {:?} max {:?}",
        alone[1000], alone[1980], alone[1999]
    );
    let began = Instant::now();
    let sweep = tokio::task::spawn_blocking({
        let db = db.clone();
        move || {
            let collection = db.collection().unwrap();
            let mut judge = Plain::scan(&db);
            let scanned = began.elapsed();
            let mut longest = Duration::ZERO;
            for batch in judge.found.clone().chunks(8) {
                collection.absorb(&mut judge);
                let began = Instant::now();
                let (_removed, _ticket) = collection.remove(batch, &mut judge).unwrap();
                longest = longest.max(began.elapsed());
                std::thread::sleep(began.elapsed().max(Duration::from_millis(1)));
            }
            (scanned, longest)
        }
    });
    let mut delays = Vec::new();
    while !sweep.is_finished() {
        let id = format!("c{}", delays.len());
        let began = Instant::now();
        db.containers().create(&a, container(&id)).await.unwrap();
        delays.push(began.elapsed());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (scanned, longest) = sweep.await.unwrap();
    delays.sort();
    println!(
        "scan {scanned:?}, all {:?}, longest batch {longest:?}; {} creates: p50 {:?} p99 {:?} max {:?}",
        began.elapsed(),
        delays.len(),
        delays[delays.len() / 2],
        delays[delays.len() * 99 / 100],
        delays[delays.len() - 1],
    );
    assert!(
        longest < LONGEST,
        "a batch held the writer lock for {longest:?}"
    );
    assert!(
        db.content()
            .list(&a, &Filter::default())
            .unwrap()
            .is_empty()
    );
}

/// Durable create, get and delete by 16 callers, and a large blob, on real disks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement: `cargo test -p lighter-store -- --ignored --nocapture measured`"]
async fn measured_records_and_blobs() {
    use std::time::Instant;
    let dir = tempfile::tempdir().unwrap();
    let kv = lighter_kv::Db::open(&dir.path().join("db"), &lighter_kv::Options::default()).unwrap();
    let db = open(&kv, dir.path(), SharingPolicy::Shared);
    let began = Instant::now();
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..16 {
        let db = db.clone();
        callers.spawn(async move {
            let (a, containers) = (scope("a"), db.containers());
            for n in 0..200 {
                let id = format!("c{caller}-{n}");
                containers.create(&a, container(&id)).await.unwrap();
                containers.get(&a, &id).unwrap();
                containers.delete(&a, &id).await.unwrap();
            }
        });
    }
    callers.join_all().await;
    println!("{:.0} cycles/s", 3200.0 / began.elapsed().as_secs_f64());
    let a = scope("a");
    let chunk = Bytes::from(vec![7; 1 << 20]);
    let began = Instant::now();
    let mut writer = db.content().writer(&a, "large", 0, None).await.unwrap();
    for _ in 0..64 {
        writer.write(chunk.clone()).await.unwrap();
    }
    let digest = writer.commit(64 << 20, None, Labels::new()).await.unwrap();
    println!("64 MiB written in {:?}", began.elapsed());
    let began = Instant::now();
    let reader = db.content().reader(&a, &digest).await.unwrap();
    for n in 0..64 {
        assert_eq!(
            reader.read_at(n << 20, 1 << 20).await.unwrap().len(),
            1 << 20
        );
    }
    println!("64 MiB read in {:?}", began.elapsed());
}
