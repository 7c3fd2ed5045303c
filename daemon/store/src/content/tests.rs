//! The local store: any split of writes gives one blob, and what is on disk is containerd's layout.

use std::os::unix::fs::PermissionsExt;

use lighter_proto::errdefs::{Classify, ErrorKind};
use proptest::prelude::*;

use super::*;
use crate::digest::Algorithm;

fn open(reference: &str) -> Open {
    Open {
        reference: reference.to_owned(),
        ..Open::default()
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .build()
        .expect("a runtime")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_split_of_writes_gives_one_digest(
        sizes in proptest::collection::vec(prop_oneof![0..2000_usize, 60_000..200_000_usize], 0..6),
        reopen_at in 0..6_usize,
        algorithm in 0..3_usize,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let data: Vec<u8> = (0..=250_u8).cycle().take(sizes.iter().sum()).collect();
        let expected = Digest::compute(Algorithm::ALL[algorithm], &data);
        runtime().block_on(async {
            let store = Local::open(dir.path()).unwrap();
            let mut writer = store.writer(open("r")).await.unwrap();
            let mut at = 0;
            for (n, size) in sizes.iter().enumerate() {
                if n == reopen_at {
                    drop(writer);
                    writer = store.writer(open("r")).await.unwrap();
                    assert_eq!(writer.status().offset_bytes, at as u64);
                }
                writer.write(Bytes::copy_from_slice(&data[at..at + size])).await.unwrap();
                at += size;
                assert_eq!(writer.digest().await.unwrap(), Digest::of(&data[..at]));
            }
            let digest = writer.commit(data.len() as u64, Some(&expected)).await.unwrap();
            assert_eq!(digest, expected);
            let reader = store.reader(&digest).await.unwrap();
            let mut back = Vec::new();
            while let chunk = reader.read_at(back.len() as u64, 70_000).await.unwrap()
                && !chunk.is_empty()
            {
                back.extend_from_slice(&chunk);
            }
            assert!(back == data);
            assert!(store.statuses().await.unwrap().is_empty());
        });
    }
}

#[tokio::test]
async fn the_layout_is_that_of_containerd() {
    let dir = tempfile::tempdir().unwrap();
    let store = Local::open(dir.path()).unwrap();
    let mut writer = store
        .writer(Open {
            total_bytes: 3,
            ..open("ns/1/ref")
        })
        .await
        .unwrap();
    writer.write(Bytes::from_static(b"abc")).await.unwrap();
    let ingest = dir
        .path()
        .join("ingest")
        .join(Digest::of(b"ns/1/ref").hex());
    let read = |name: &str| std::fs::read_to_string(ingest.join(name)).unwrap();
    assert_eq!(
        (read("ref"), read("data"), read("total")),
        ("ns/1/ref".into(), "abc".into(), "3".into())
    );
    assert!(read("startedat").contains('T'));
    assert_eq!(store.status("ns/1/ref").await.unwrap().offset_bytes, 3);
    let digest = writer.commit(0, None).await.unwrap();
    let blob = dir.path().join("blobs/sha256").join(digest.hex());
    let mode = std::fs::metadata(&blob).unwrap().permissions().mode();
    assert_eq!(mode & 0o222, 0);
    assert!(!ingest.exists());
    assert_eq!(store.walk().await.unwrap()[0].size_bytes, 3);
    store.remove(&digest).await.unwrap();
    assert_eq!(
        store.info(&digest).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[tokio::test]
async fn a_lock_dies_with_its_writer_and_says_who_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = Local::open(dir.path()).unwrap();
    let writer = store
        .writer(Open {
            holder: "lease l".to_owned(),
            ..open("r")
        })
        .await
        .unwrap();
    let error = store.writer(open("r")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let text = error.to_string();
    assert!(
        text.starts_with("ref r locked for ") && text.contains("held by lease l"),
        "{text}"
    );
    drop(writer);
    store.writer(open("r")).await.unwrap();
}

#[tokio::test]
async fn commit_with_wrong_size_or_digest_keeps_the_ingest() {
    let dir = tempfile::tempdir().unwrap();
    let store = Local::open(dir.path()).unwrap();
    for (size, expected) in [(4, None), (0, Some(Digest::of(b"other")))] {
        let mut writer = store.writer(open("r")).await.unwrap();
        if writer.status().offset_bytes == 0 {
            writer.write(Bytes::from_static(b"abc")).await.unwrap();
        }
        let error = writer.commit(size, expected.as_ref()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
        assert!(
            error.to_string().starts_with("unexpected commit "),
            "{error}"
        );
    }
    assert_eq!(store.status("r").await.unwrap().offset_bytes, 3);
    let mut writer = store
        .writer(Open {
            total_bytes: 9,
            ..open("r")
        })
        .await
        .unwrap();
    assert_eq!(writer.status().offset_bytes, 3);
    writer.truncate(0).await.unwrap();
    assert_eq!(writer.digest().await.unwrap(), Digest::of(b""));
    store.abort("r").await.unwrap();
    assert_eq!(
        store.abort("r").await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[tokio::test]
async fn a_blob_that_exists_ends_the_ingest() {
    let dir = tempfile::tempdir().unwrap();
    let store = Local::open(dir.path()).unwrap();
    for n in 0..2 {
        let mut writer = store.writer(open(&format!("r{n}"))).await.unwrap();
        writer.write(Bytes::from_static(b"abc")).await.unwrap();
        match writer.commit(3, None).await {
            Ok(_) => assert_eq!(n, 0),
            Err(error) => assert_eq!((n, error.kind()), (1, ErrorKind::AlreadyExists)),
        }
    }
    assert!(store.statuses().await.unwrap().is_empty());
    let known = Open {
        expected: Some(Digest::of(b"abc")),
        ..open("r")
    };
    assert_eq!(
        store.writer(known).await.unwrap_err().kind(),
        ErrorKind::AlreadyExists
    );
}
