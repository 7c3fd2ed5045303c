//! Conformance tests that every content store passes (feature `testsuite`).
//!
//! [`run`] takes a factory and makes a fresh store for every case. It panics on the first violation.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lighter_proto::errdefs::{Classify, ErrorKind};

use super::{Ingest, Open, Store};
use crate::digest::Algorithm;
use crate::{Digest, Error};

/// A store under test.
pub type Subject = Arc<dyn Store>;

/// How long a lock may outlive its writer: a store in another process hears of it later.
const UNLOCK_LIMIT: Duration = Duration::from_secs(5);

/// Runs every case, each on a fresh directory handed to `make`.
///
/// # Panics
/// When the store does not keep the contract.
pub async fn run<F, Fut>(dir: &Path, make: F)
where
    F: Fn(PathBuf) -> Fut,
    Fut: Future<Output = Subject>,
{
    macro_rules! cases {
        ($($case:ident)*) => {$(
            let root = dir.join(stringify!($case));
            std::fs::create_dir(&root).expect("directory of a case");
            let subject = make(root).await;
            $case(&subject).await;
        )*};
    }
    cases! {
        what_is_written_is_read
        any_split_of_writes_gives_one_blob
        every_algorithm_names_its_blobs
        a_wrong_size_or_digest_keeps_the_ingest
        a_blob_that_exists_ends_the_ingest
        an_ingest_is_resumed_where_it_ended
        a_changed_total_begins_anew
        truncation_begins_anew
        one_writer_has_a_ref
        ingests_are_listed_and_thrown_away
        what_is_not_there_is_not_found
        all_blobs_are_listed
        writers_do_not_disturb_each_other
    }
}

fn open(reference: &str) -> Open {
    Open {
        reference: reference.to_owned(),
        ..Open::default()
    }
}

fn kind_of<T: std::fmt::Debug>(result: Result<T, Error>) -> ErrorKind {
    result.expect_err("must fail").kind()
}

fn bytes(length: usize) -> Vec<u8> {
    (0..=250_u8).cycle().take(length).collect()
}

/// A writer of `reference`, once the one before it has let go.
async fn reopened(subject: &Subject, open: Open) -> Box<dyn Ingest> {
    let deadline = Instant::now() + UNLOCK_LIMIT;
    loop {
        match subject.writer(open.clone()).await {
            Ok(writer) => return writer,
            Err(error) if error.kind() == ErrorKind::Unavailable && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(error) => panic!("writer: {error}"),
        }
    }
}

async fn put(subject: &Subject, reference: &str, data: &[u8]) -> Digest {
    let mut writer = subject.writer(open(reference)).await.expect("writer");
    writer
        .write(Bytes::copy_from_slice(data))
        .await
        .expect("write");
    writer
        .commit(data.len() as u64, Some(&Digest::of(data)))
        .await
        .expect("commit")
}

async fn what_is_written_is_read(subject: &Subject) {
    for length in [0, 1, 70_000, 3 << 20] {
        let data = bytes(length);
        let digest = put(subject, &format!("r{length}"), &data).await;
        assert_eq!(digest, Digest::of(&data));
        let info = subject.info(&digest).await.expect("info");
        assert_eq!((info.size_bytes, &info.digest), (length as u64, &digest));
        assert_eq!(subject.size(&digest).await.expect("size"), length as u64);
        let reader = subject.reader(&digest).await.expect("reader");
        assert_eq!(reader.size_bytes(), length as u64);
        for (offset, wanted) in [
            (0, length),
            (length / 2, 100),
            (length, 10),
            (0, usize::MAX),
        ] {
            let read = reader.read_at(offset as u64, wanted).await.expect("read");
            let end = length.min(offset.saturating_add(wanted));
            assert!(
                read == data[offset..end],
                "{wanted} from {offset} of {length}"
            );
        }
    }
}

async fn any_split_of_writes_gives_one_blob(subject: &Subject) {
    let data = bytes(300_001);
    for (n, piece) in [1 << 20, 65_536, 65_535, 100_000, 7_001]
        .into_iter()
        .enumerate()
    {
        let reference = format!("r{n}");
        let mut writer = subject.writer(open(&reference)).await.expect("writer");
        let mut at = 0;
        for chunk in data.chunks(piece) {
            writer
                .write(Bytes::copy_from_slice(chunk))
                .await
                .expect("write");
            at += chunk.len();
            assert_eq!(writer.status().offset_bytes, at as u64);
            assert_eq!(
                writer.digest().await.expect("digest"),
                Digest::of(&data[..at])
            );
        }
        let digest = writer.commit(0, None).await;
        if n == 0 {
            assert_eq!(digest.expect("commit"), Digest::of(&data));
        } else {
            assert_eq!(kind_of(digest), ErrorKind::AlreadyExists);
        }
    }
}

async fn every_algorithm_names_its_blobs(subject: &Subject) {
    let data = bytes(1000);
    for algorithm in Algorithm::ALL {
        let expected = Digest::compute(algorithm, &data);
        for known_before in [true, false] {
            let mut ask = open(&format!("{expected} {known_before}"));
            ask.expected = known_before.then(|| expected.clone());
            let mut writer = subject.writer(ask).await.expect("writer");
            writer
                .write(Bytes::copy_from_slice(&data))
                .await
                .expect("write");
            let committed = writer.commit(1000, Some(&expected)).await;
            assert_eq!(committed.expect("commit"), expected);
            subject.remove(&expected).await.expect("remove");
        }
    }
}

async fn a_wrong_size_or_digest_keeps_the_ingest(subject: &Subject) {
    for (size, expected) in [(4, None), (0, Some(Digest::of(b"other")))] {
        let mut writer = reopened(subject, open("r")).await;
        if writer.status().offset_bytes == 0 {
            writer
                .write(Bytes::from_static(b"abc"))
                .await
                .expect("write");
        }
        let error = writer.commit(size, expected.as_ref()).await;
        let error = error.expect_err("a mismatch");
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
        assert!(error.to_string().contains("unexpected commit "), "{error}");
    }
    assert_eq!(subject.status("r").await.expect("status").offset_bytes, 3);
    let writer = reopened(subject, open("r")).await;
    assert_eq!(writer.status().offset_bytes, 3);
    let digest = writer.commit(3, Some(&Digest::of(b"abc"))).await;
    assert_eq!(digest.expect("commit"), Digest::of(b"abc"));
    assert_eq!(kind_of(subject.status("r").await), ErrorKind::NotFound);
}

async fn a_blob_that_exists_ends_the_ingest(subject: &Subject) {
    put(subject, "first", b"abc").await;
    let mut writer = subject.writer(open("second")).await.expect("writer");
    writer
        .write(Bytes::from_static(b"abc"))
        .await
        .expect("write");
    assert_eq!(
        kind_of(writer.commit(3, None).await),
        ErrorKind::AlreadyExists
    );
    assert_eq!(subject.statuses().await.expect("statuses"), []);
    let known = Open {
        expected: Some(Digest::of(b"abc")),
        ..open("third")
    };
    assert_eq!(
        kind_of(subject.writer(known).await),
        ErrorKind::AlreadyExists
    );
}

async fn an_ingest_is_resumed_where_it_ended(subject: &Subject) {
    let data = bytes(200_000);
    let mut writer = subject
        .writer(Open {
            total_bytes: 200_000,
            ..open("r")
        })
        .await
        .expect("writer");
    let first = Bytes::copy_from_slice(&data[..150_000]);
    writer.write(first).await.expect("write");
    let started = subject.status("r").await.expect("status").started_at;
    drop(writer);
    let mut writer = reopened(subject, open("r")).await;
    let status = writer.status();
    assert_eq!(
        (status.offset_bytes, status.total_bytes),
        (150_000, 200_000)
    );
    assert_eq!(status.started_at, started);
    assert_eq!(
        writer.digest().await.expect("digest"),
        Digest::of(&data[..150_000])
    );
    let rest = Bytes::copy_from_slice(&data[150_000..]);
    writer.write(rest).await.expect("write");
    let digest = writer.commit(200_000, Some(&Digest::of(&data))).await;
    assert_eq!(digest.expect("commit"), Digest::of(&data));
}

async fn a_changed_total_begins_anew(subject: &Subject) {
    let total = |total_bytes| Open {
        total_bytes,
        ..open("r")
    };
    let mut writer = subject.writer(total(9)).await.expect("writer");
    writer
        .write(Bytes::from_static(b"abc"))
        .await
        .expect("write");
    drop(writer);
    let writer = reopened(subject, total(10)).await;
    let status = writer.status();
    assert_eq!((status.offset_bytes, status.total_bytes), (0, 10));
}

async fn truncation_begins_anew(subject: &Subject) {
    let mut writer = subject.writer(open("r")).await.expect("writer");
    writer.truncate(0).await.expect("truncate nothing");
    writer
        .write(Bytes::from_static(b"abc"))
        .await
        .expect("write");
    assert_eq!(kind_of(writer.truncate(2).await), ErrorKind::Unimplemented);
    writer.truncate(0).await.expect("truncate");
    assert_eq!(writer.status().offset_bytes, 0);
    assert_eq!(writer.digest().await.expect("digest"), Digest::of(b""));
    writer
        .write(Bytes::from_static(b"de"))
        .await
        .expect("write");
    let digest = writer.commit(2, None).await.expect("commit");
    assert_eq!(digest, Digest::of(b"de"));
}

async fn one_writer_has_a_ref(subject: &Subject) {
    let writer = subject.writer(open("r")).await.expect("writer");
    let error = subject.writer(open("r")).await.expect_err("locked");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("ref r locked for "), "{error}");
    subject.writer(open("other")).await.expect("another ref");
    drop(writer);
    drop(reopened(subject, open("r")).await);
    assert_eq!(
        kind_of(subject.writer(open("")).await),
        ErrorKind::InvalidArgument
    );
}

async fn ingests_are_listed_and_thrown_away(subject: &Subject) {
    for n in 0..3 {
        let mut writer = subject
            .writer(Open {
                total_bytes: 10,
                ..open(&format!("r{n}/with:odd characters"))
            })
            .await
            .expect("writer");
        writer
            .write(Bytes::from(vec![b'x'; n]))
            .await
            .expect("write");
    }
    let mut found = subject.statuses().await.expect("statuses");
    found.sort_by(|a, b| a.reference.cmp(&b.reference));
    for (n, status) in found.iter().enumerate() {
        assert_eq!(status.reference, format!("r{n}/with:odd characters"));
        assert_eq!((status.offset_bytes, status.total_bytes), (n as u64, 10));
        let one = subject.status(&status.reference).await.expect("status");
        assert_eq!(one.offset_bytes, n as u64);
        subject.abort(&status.reference).await.expect("abort");
    }
    assert_eq!(found.len(), 3);
    assert_eq!(subject.statuses().await.expect("statuses"), []);
}

async fn what_is_not_there_is_not_found(subject: &Subject) {
    let nothing = Digest::of(b"nothing");
    assert_eq!(kind_of(subject.info(&nothing).await), ErrorKind::NotFound);
    assert_eq!(kind_of(subject.size(&nothing).await), ErrorKind::NotFound);
    assert_eq!(kind_of(subject.reader(&nothing).await), ErrorKind::NotFound);
    assert_eq!(kind_of(subject.remove(&nothing).await), ErrorKind::NotFound);
    assert_eq!(kind_of(subject.status("r").await), ErrorKind::NotFound);
    assert_eq!(kind_of(subject.abort("r").await), ErrorKind::NotFound);
    assert_eq!(subject.walk().await.expect("walk"), []);
}

async fn all_blobs_are_listed(subject: &Subject) {
    let mut made = Vec::new();
    for n in 0..230_u32 {
        made.push(put(subject, &format!("r{n}"), &n.to_be_bytes()).await);
    }
    let walk = async || {
        let all = subject.walk().await.expect("walk").into_iter();
        let mut all: Vec<_> = all.map(|stored| stored.digest).collect();
        all.sort();
        all
    };
    made.sort();
    assert_eq!(walk().await, made);
    for digest in made.split_off(200) {
        subject.remove(&digest).await.expect("remove");
    }
    assert_eq!(walk().await, made);
}

async fn writers_do_not_disturb_each_other(subject: &Subject) {
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..16_usize {
        let subject = Arc::clone(subject);
        tasks.spawn(async move {
            // Half of them have the same bytes as another.
            let data = bytes(100_000 + n / 2);
            let mut writer = subject
                .writer(open(&format!("r{n}")))
                .await
                .expect("writer");
            for chunk in data.chunks(30_000) {
                let chunk = Bytes::copy_from_slice(chunk);
                writer.write(chunk).await.expect("write");
            }
            writer.commit(data.len() as u64, None).await.is_ok()
        });
    }
    let won = tasks
        .join_all()
        .await
        .into_iter()
        .filter(|won| *won)
        .count();
    assert_eq!(won, 8);
    assert_eq!(subject.walk().await.expect("walk").len(), 8);
    assert_eq!(subject.statuses().await.expect("statuses"), []);
}
