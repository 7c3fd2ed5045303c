//! Collections beside requests.

use super::*;

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
async fn counts_given_back_ask_for_a_collection() {
    let World { db, dir: _dir, .. } = world();
    db.leases()
        .create(&scope("a"), "l", Labels::new())
        .await
        .unwrap();
    let counts = db.take_counts();
    assert_eq!(counts.removals, 0);
    db.give_back(counts);
    db.removed().await;
    let again = db.take_counts();
    assert_eq!((again.mutations, again.removals), (counts.mutations, 1));
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
