//! The local store: any split of writes gives one blob, and what is on disk is containerd's layout.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

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

/// A store behind a socket below `dir`, served on the runtime of `handle`.
fn proxied(dir: &std::path::Path, handle: &tokio::runtime::Handle) -> Proxy {
    let local = Local::open(&dir.join("store")).expect("open");
    let address = dir.join("sock");
    let listener = {
        let _inside = handle.enter();
        tokio::net::UnixListener::bind(&address).expect("bind")
    };
    let service = Serve::new(Arc::new(local), tokio_util::task::TaskTracker::new());
    handle.spawn(async move {
        let incoming = tokio_stream::wrappers::UnixListenerStream::new(listener);
        let server = tonic::transport::Server::builder().add_service(service);
        server.serve_with_incoming(incoming).await.expect("serve");
    });
    Proxy::connect(address.to_str().expect("text")).expect("connect")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn local_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    testsuite::run(dir.path(), |root| {
        let store = Local::open(&root).expect("open");
        std::future::ready(Arc::new(store) as testsuite::Subject)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    testsuite::run(dir.path(), |root| {
        let proxy = proxied(&root, &tokio::runtime::Handle::current());
        std::future::ready(Arc::new(proxy) as testsuite::Subject)
    })
    .await;
}

/// Writes `data` in pieces of `sizes`, closing and opening again before piece `reopen_at`.
async fn write_in_pieces(
    store: &dyn Store,
    data: &[u8],
    sizes: &[usize],
    reopen_at: usize,
    expected: &Digest,
) {
    let mut writer = store.writer(open("r")).await.unwrap();
    let mut at = 0;
    for (n, size) in sizes.iter().enumerate() {
        if n == reopen_at {
            drop(writer);
            writer = loop {
                match store.writer(open("r")).await {
                    Ok(writer) => break writer,
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable),
                }
                tokio::task::yield_now().await;
            };
            assert_eq!(writer.status().offset_bytes, at as u64);
        }
        let piece = Bytes::copy_from_slice(&data[at..at + size]);
        writer.write(piece).await.unwrap();
        at += size;
        assert_eq!(writer.digest().await.unwrap(), Digest::of(&data[..at]));
    }
    let digest = writer.commit(data.len() as u64, Some(expected)).await;
    let digest = digest.unwrap();
    assert_eq!(digest, *expected);
    let reader = store.reader(&digest).await.unwrap();
    let mut back = Vec::new();
    while let chunk = reader.read_at(back.len() as u64, 70_000).await.unwrap()
        && !chunk.is_empty()
    {
        back.extend_from_slice(&chunk);
    }
    assert!(back == data);
    assert!(store.statuses().await.unwrap().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_split_of_writes_gives_one_digest(
        sizes in proptest::collection::vec(prop_oneof![0..2000_usize, 60_000..200_000_usize], 0..6),
        reopen_at in 0..6_usize,
        algorithm in 0..3_usize,
        remote in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let data: Vec<u8> = (0..=250_u8).cycle().take(sizes.iter().sum()).collect();
        let expected = Digest::compute(Algorithm::ALL[algorithm], &data);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let store: Box<dyn Store> = if remote {
                Box::new(proxied(dir.path(), &tokio::runtime::Handle::current()))
            } else {
                Box::new(Local::open(dir.path()).unwrap())
            };
            write_in_pieces(store.as_ref(), &data, &sizes, reopen_at, &expected).await;
        });
    }
}

#[tokio::test]
async fn a_peer_that_dies_or_lies_fails_only_the_calls_that_meet_it() {
    let dir = tempfile::tempdir().unwrap();
    let address = dir.path().join("sock");
    let proxy = Proxy::connect(address.to_str().unwrap()).unwrap();
    let digest = Digest::of(b"abc");
    // Nobody there.
    let error = proxy.info(&digest).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    // Somebody who talks something else.
    let listener = tokio::net::UnixListener::bind(&address).unwrap();
    let mut liar = tokio::task::JoinSet::new();
    liar.spawn(async move {
        use tokio::io::AsyncWriteExt as _;
        while let Ok((mut stream, _)) = listener.accept().await {
            let _broken = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nhello").await;
        }
    });
    assert!(proxy.info(&digest).await.is_err());
    liar.shutdown().await;
    std::fs::remove_file(&address).unwrap();
    // The right one, at last.
    let server = || {
        let mut server = tokio::runtime::Builder::new_multi_thread();
        server
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("runtime")
    };
    let first = server();
    let _other = proxied(dir.path(), first.handle());
    let mut writer = proxy.writer(open("r")).await.unwrap();
    writer.write(Bytes::from_static(b"abc")).await.unwrap();
    first.shutdown_background();
    assert!(writer.write(Bytes::from_static(b"def")).await.is_err());
    drop(writer);
    std::fs::remove_file(&address).unwrap();
    // After its return everything goes on; what was written stayed.
    let second = server();
    let _other = proxied(dir.path(), second.handle());
    let writer = proxy.writer(open("r")).await.unwrap();
    assert_eq!(writer.status().offset_bytes, 3);
    assert_eq!(writer.commit(3, None).await.unwrap(), digest);
    second.shutdown_background();
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
