//! The records as requests see them, and collections beside them.

mod adopt;
mod collection;
mod content;
mod leases;
mod measured;
mod objects;
mod restart;
mod snapshots;

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
    let proxied = std::env::var_os(PROXIED).is_some();
    open_stores(kv, dir, policy, proxied)
}

/// With the stores behind a socket, whatever the environment says.
fn proxied_world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let kv = lighter_kv::Db::in_memory().unwrap();
    let db = open_stores(&kv, dir.path(), SharingPolicy::Shared, true);
    World { db, kv, dir }
}

fn open_stores(
    kv: &lighter_kv::Db,
    dir: &std::path::Path,
    policy: SharingPolicy,
    proxied: bool,
) -> Db {
    let content = Arc::new(Local::open(&dir.join("content")).unwrap());
    let native = Native::open(kv.clone(), b"snapshotter/native/", &dir.join("native")).unwrap();
    let (mut content, mut native): (Arc<dyn Store>, Arc<dyn Snapshotter>) =
        (content, Arc::new(native));
    if proxied {
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
