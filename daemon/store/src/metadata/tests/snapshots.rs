//! Snapshots under client keys.

use lighter_snapshotter::LabelUpdate;

use super::*;

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
async fn a_label_that_is_refused_does_not_reach_the_driver() {
    let World { db, dir: _dir, .. } = world();
    let a = scope("a");
    let s = db.snapshots("native").unwrap();
    s.prepare(&a, "k", None, Labels::new()).await.unwrap();
    let long = (
        format!("{}x", labels::SNAPSHOT_PREFIX),
        "x".repeat(labels::MAX_BYTES),
    );
    let all = LabelUpdate::Replace(Labels::from([long.clone()]));
    let some = LabelUpdate::Merge(BTreeMap::from([(long.0, Some(long.1))]));
    for labels in [all, some] {
        let refused = s.update(&a, "k", labels).await;
        assert_eq!(kind(refused), ErrorKind::InvalidArgument);
    }
    let below = s.driver().walk().await.unwrap();
    assert_eq!(below.len(), 1);
    assert!(below[0].labels.is_empty());
}

#[tokio::test]
async fn what_a_driver_elsewhere_lost_is_neither_listed_nor_found() {
    let World { db, dir: _dir, .. } = proxied_world();
    let (a, b) = (scope("a"), scope("b"));
    let s = db.snapshots("native").unwrap();
    for key in ["kept", "lost"] {
        s.prepare(&a, key, None, Labels::new()).await.unwrap();
    }
    s.prepare(&b, "lost", None, Labels::new()).await.unwrap();
    let below = s.driver().walk().await.unwrap();
    let backend = |prefix: &str, key: &str| {
        let found = below
            .iter()
            .find(|info| info.name.starts_with(prefix) && info.name.ends_with(key));
        found.expect("it was prepared").name.clone()
    };
    s.driver().remove(&backend("a/", "lost")).await.unwrap();
    // What the driver says of its own accord is seen; what the record says goes before it.
    let own = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let (added, both) = (
        "containerd.io/snapshot/added",
        "containerd.io/snapshot/both",
    );
    let labels = LabelUpdate::Replace(Labels::from([own(both, "record")]));
    s.update(&a, "kept", labels).await.unwrap();
    let labels = Labels::from([own(added, "driver"), own(both, "driver")]);
    let kept = backend("a/", "kept");
    let labels = LabelUpdate::Replace(labels);
    s.driver().update(&kept, labels).await.unwrap();
    let listed = s.list(&a, &Filter::default()).await.unwrap();
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!(listed[0], s.stat(&a, "kept").await.unwrap());
    assert_eq!(
        (listed[0].name.as_str(), &listed[0].parent),
        ("kept", &None)
    );
    assert_eq!(
        listed[0].labels,
        Labels::from([own(added, "driver"), own(both, "record")])
    );
    assert_eq!(kind(s.stat(&a, "lost").await), ErrorKind::NotFound);
    assert_eq!(
        kind(
            s.update(&a, "lost", LabelUpdate::Replace(Labels::new()))
                .await
        ),
        ErrorKind::NotFound
    );
    // Another namespace's of that name is not touched by it.
    assert_eq!(s.stat(&b, "lost").await.unwrap().name, "lost");
}
