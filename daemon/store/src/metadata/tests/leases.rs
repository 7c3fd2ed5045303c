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
        ("content/x", ErrorKind::InvalidArgument),
        ("ingests/x", ErrorKind::InvalidArgument),
        ("images/x", ErrorKind::InvalidArgument),
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
async fn a_long_list_goes_with_its_lease_and_not_with_the_next_of_its_name() {
    let World { db, kv, dir } = world();
    let (leases, scope) = (db.leases(), scope("n"));
    let resource = |n: u32| Resource {
        id: format!("image-{n}"),
        kind: "images".into(),
    };
    let fill = async |count: u32| {
        leases.create(&scope, "long", Labels::new()).await.unwrap();
        for n in 0..count {
            leases.add(&scope, "long", resource(n)).await.unwrap();
        }
    };
    let list = keys::resources(&scope.namespace, "long").prefix();
    let listed = || kv.scan(&list).unwrap().len();
    // Several pages of it.
    fill(700).await;
    assert_eq!(listed(), 700);
    leases.delete(&scope, "long").await.unwrap();
    assert_eq!(listed(), 0);

    // One that was cut off leaves a list without a lease: the next of its name does not get it.
    fill(700).await;
    let cut_off = db.inner.update(|change| {
        super::super::leases::remove(change, &scope, "long");
        Ok(())
    });
    cut_off.await.unwrap();
    assert_eq!(listed(), 700);
    fill(1).await;
    assert_eq!(leases.resources(&scope, "long").unwrap(), [resource(0)]);

    // And a start takes it off.
    let cut_off = db.inner.update(|change| {
        super::super::leases::remove(change, &scope, "long");
        Ok(())
    });
    cut_off.await.unwrap();
    let db = open(&kv, dir.path(), SharingPolicy::Shared);
    db.reconcile().await.unwrap();
    assert_eq!(listed(), 0);
}
