//! What leases hold.

use super::*;

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
