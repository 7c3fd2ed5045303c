//! Blobs that namespaces share.

use super::*;

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
