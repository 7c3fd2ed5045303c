//! Blobs that namespaces share.

use std::time::Duration;

use lighter_proto::containerd::services::content::v1::{
    WriteAction, WriteContentRequest, WriteContentResponse,
};

use super::*;
use crate::content::Session;
use crate::metadata::content::Scoped;

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

/// A stream and the answer to its first message. A store elsewhere hears a moment later that the
/// stream before it is gone.
async fn begin(
    db: &Db,
    scope: &Scope,
    first: WriteContentRequest,
) -> (Session<Scoped>, WriteContentResponse) {
    let opened = async {
        loop {
            let mut session = db.content().session(scope);
            match session.answer(first.clone()).await {
                Err(error) if error.kind() == ErrorKind::Unavailable => {
                    tokio::task::yield_now().await;
                }
                answer => return (session, answer.unwrap()),
            }
        }
    };
    let opened = tokio::time::timeout(Duration::from_secs(20), opened).await;
    opened.expect("the ref is free")
}

#[tokio::test]
async fn a_write_stream_follows_the_rules_of_offsets() {
    let World { db, dir: _dir, .. } = world();
    let a = scope("a");
    let message = |action: WriteAction, offset: i64, data: &'static [u8]| WriteContentRequest {
        action: action.into(),
        r#ref: "r".to_owned(),
        total: 5,
        offset,
        data: Bytes::from_static(data),
        ..WriteContentRequest::default()
    };
    let mut session = db.content().session(&a);
    let nameless = WriteContentRequest::default();
    assert_eq!(
        kind(session.answer(nameless).await),
        ErrorKind::InvalidArgument
    );
    assert!(session.is_over());
    let first = message(WriteAction::Write, 0, b"he");
    let (mut session, first) = begin(&db, &a, first).await;
    assert_eq!((first.offset, session.is_over()), (2, false));
    let gap = session.answer(message(WriteAction::Write, 1, b"x")).await;
    assert_eq!(
        gap.unwrap_err().to_string(),
        "write @1 must occur at current offset 2: out of range"
    );
    // The stream is over, its ref is free, and the bytes are there still.
    assert!(session.is_over());
    let stat = message(WriteAction::Stat, 0, b"");
    let (mut session, stat) = begin(&db, &a, stat).await;
    assert_eq!((stat.offset, stat.total), (2, 5));
    assert_eq!(stat.digest, Digest::of(b"he").to_string());
    // 0 begins anew.
    let anew = session.answer(message(WriteAction::Write, 0, b"hel")).await;
    assert_eq!(anew.unwrap().offset, 3);
    let done = session.answer(message(WriteAction::Commit, 3, b"lo")).await;
    let done = done.unwrap();
    assert_eq!(done.digest, Digest::of(b"hello").to_string());
    assert_eq!((done.offset, session.is_over()), (5, true));
    // A blob that is there: said at once, or when the stream says what it is about to be.
    let known = |action, offset, data| WriteContentRequest {
        expected: Digest::of(b"hello").to_string(),
        ..message(action, offset, data)
    };
    let mut session = db.content().session(&a);
    let exists = session.answer(known(WriteAction::Stat, 0, b"")).await;
    assert_eq!(kind(exists), ErrorKind::AlreadyExists);
    let begun = message(WriteAction::Write, 0, b"h");
    let (mut session, begun) = begin(&db, &a, begun).await;
    assert_eq!(begun.offset, 1);
    let exists = session.answer(known(WriteAction::Write, 1, b"e")).await;
    assert_eq!(kind(exists), ErrorKind::AlreadyExists);
    assert!(session.is_over());
    assert_eq!(
        kind(db.content().status(&a, "r").await),
        ErrorKind::NotFound
    );
}

#[tokio::test]
async fn an_ingest_that_nobody_finishes_is_removed() {
    let World { db, dir: _dir, .. } = world();
    let a = scope("a");
    let content = db.content();
    let mut dropped = content.unfinished(&a, "dropped").await.unwrap();
    let bytes = Bytes::from_static(b"half of");
    dropped.writer().write(bytes).await.unwrap();
    drop(dropped);
    // Nobody waits for this one to be opened, even.
    let opening = content.unfinished(&a, "forgotten");
    let _given_up = tokio::time::timeout(Duration::ZERO, opening).await;
    let removed = async {
        while !content
            .statuses(&a, &Filter::default())
            .await
            .unwrap()
            .is_empty()
        {
            tokio::task::yield_now().await;
        }
    };
    let removed = tokio::time::timeout(Duration::from_secs(20), removed).await;
    removed.expect("what was begun is removed");
    let mut kept = content.unfinished(&a, "kept").await.unwrap();
    let bytes = Bytes::from_static(b"all of it");
    kept.writer().write(bytes).await.unwrap();
    let digest = kept.finish().commit(0, None, Labels::new()).await.unwrap();
    assert_eq!(digest, Digest::of(b"all of it"));
}
