//! Records and stores after a restart, and after a loss.

use super::*;

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
