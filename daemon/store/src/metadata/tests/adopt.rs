//! Snapshotters that have layers before anybody unpacks them.

use std::path::PathBuf;
use std::sync::Mutex;

use async_trait::async_trait;
use lighter_snapshotter::{Info, Kind as SnapshotKind, LabelUpdate, Mount, Usage};

use super::*;

type Refused = lighter_snapshotter::Error;

/// A driver that finds some layers by itself: asked to prepare one, it has it committed, and says so.
#[derive(Debug)]
struct Lazy {
    inner: Native,
    /// Targets that are found elsewhere.
    remote: Mutex<HashSet<String>>,
}

#[async_trait]
impl Snapshotter for Lazy {
    async fn prepare(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Refused> {
        let target = labels
            .get(labels::SNAPSHOT_REF)
            .cloned()
            .unwrap_or_default();
        if !self.remote.lock().unwrap().contains(&target) {
            return self.inner.prepare(key, parent, labels).await;
        }
        self.inner.prepare(key, parent, labels.clone()).await?;
        let options = CommitOptions {
            labels,
            ..CommitOptions::default()
        };
        let name = format!("found {target}");
        self.inner.commit(&name, key, options).await?;
        Err(Refused::AlreadyExists { key: name })
    }

    async fn stat(&self, key: &str) -> Result<Info, Refused> {
        self.inner.stat(key).await
    }

    async fn update(&self, key: &str, labels: LabelUpdate) -> Result<Info, Refused> {
        self.inner.update(key, labels).await
    }

    async fn usage(&self, key: &str) -> Result<Usage, Refused> {
        self.inner.usage(key).await
    }

    async fn mounts(&self, key: &str) -> Result<Vec<Mount>, Refused> {
        self.inner.mounts(key).await
    }

    async fn view(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Refused> {
        self.inner.view(key, parent, labels).await
    }

    async fn commit(&self, name: &str, key: &str, options: CommitOptions) -> Result<(), Refused> {
        self.inner.commit(name, key, options).await
    }

    async fn remove(&self, key: &str) -> Result<(), Refused> {
        self.inner.remove(key).await
    }

    async fn walk(&self) -> Result<Vec<Info>, Refused> {
        self.inner.walk().await
    }

    async fn cleanup(&self) -> Result<(), Refused> {
        self.inner.cleanup().await
    }

    async fn durable(&self) -> Result<(), Refused> {
        self.inner.durable().await
    }

    fn root(&self) -> Option<PathBuf> {
        self.inner.root()
    }
}

/// Stores with a driver `lazy` that finds `remote`.
fn lazy_world(remote: &[&str]) -> World {
    let dir = tempfile::tempdir().unwrap();
    let kv = lighter_kv::Db::in_memory().unwrap();
    let content = Arc::new(Local::open(&dir.path().join("content")).unwrap());
    let inner = Native::open(kv.clone(), b"snapshotter/lazy/", &dir.path().join("lazy")).unwrap();
    let remote = remote.iter().map(|target| (*target).to_owned()).collect();
    let lazy: Arc<dyn Snapshotter> = Arc::new(Lazy {
        inner,
        remote: Mutex::new(remote),
    });
    let snapshotters = BTreeMap::from([("lazy".to_owned(), lazy)]);
    let policy = SharingPolicy::Shared;
    let db = Db::open(kv.clone(), content, snapshotters, Exchange::new(), policy).unwrap();
    World { db, kv, dir }
}

fn target(name: &str) -> Labels {
    Labels::from([(labels::SNAPSHOT_REF.into(), name.into())])
}

#[tokio::test]
async fn a_layer_that_the_driver_has_is_recorded_under_its_target() {
    let World { db, dir: _dir, .. } = lazy_world(&["chain 1", "chain 2"]);
    let a = scope("a");
    let held = a.with_lease("l");
    db.leases().create(&a, "l", Labels::new()).await.unwrap();
    let s = db.snapshots("lazy").unwrap();
    // As unpacking does it: one layer on the other, none of them fetched.
    for (n, parent) in [(1, None), (2, Some("chain 1"))] {
        let (key, chain) = (format!("extract {n}"), format!("chain {n}"));
        let taken = s.prepare(&held, &key, parent, target(&chain)).await;
        let taken = taken.unwrap_err();
        assert_eq!(taken.kind(), ErrorKind::AlreadyExists);
        assert_eq!(
            taken.to_string(),
            format!("target snapshot \"{chain}\": already exists")
        );
        let found = s.stat(&a, &chain).await.unwrap();
        assert_eq!(found.kind, SnapshotKind::Committed);
        assert_eq!(found.parent.as_deref(), parent);
        assert_eq!(found.labels[labels::SNAPSHOT_REF], chain);
        assert_eq!(kind(s.stat(&a, &key).await), ErrorKind::NotFound);
    }
    // The driver is not asked again.
    let again = s.prepare(&held, "again", None, target("chain 1")).await;
    assert_eq!(kind(again), ErrorKind::AlreadyExists);
    assert_eq!(s.driver().walk().await.unwrap().len(), 2);
    // What comes on top is made the usual way, and the lease holds all of it.
    let mounts = s
        .prepare(&held, "top", Some("chain 2"), Labels::new())
        .await;
    assert!(!mounts.unwrap().is_empty());
    let held_now = db.leases().resources(&a, "l").unwrap();
    let mut held_now: Vec<_> = held_now.into_iter().map(|r| r.id).collect();
    held_now.sort();
    assert_eq!(held_now, ["chain 1", "chain 2", "top"]);
    assert_eq!(
        kind(s.remove(&a, "chain 2").await),
        ErrorKind::FailedPrecondition
    );
}

#[tokio::test]
async fn a_layer_that_the_driver_lacks_is_unpacked() {
    let World { db, dir: _dir, .. } = lazy_world(&["elsewhere"]);
    let a = scope("a");
    let s = db.snapshots("lazy").unwrap();
    let made = s.prepare(&a, "extract", None, target("chain")).await;
    assert!(!made.unwrap().is_empty());
    s.commit(&a, "chain", "extract", CommitOptions::default())
        .await
        .unwrap();
    // One that the driver has on another parent is not the one asked for.
    s.driver()
        .prepare("stray", None, Labels::new())
        .await
        .unwrap();
    let options = CommitOptions {
        labels: target("elsewhere"),
        ..CommitOptions::default()
    };
    s.driver().commit("other", "stray", options).await.unwrap();
    let found = s.prepare(&a, "on chain", Some("chain"), target("elsewhere"));
    assert_eq!(kind(found.await), ErrorKind::AlreadyExists);
    let adopted = s.stat(&a, "elsewhere").await.unwrap();
    assert_eq!(adopted.parent.as_deref(), Some("chain"));
}
