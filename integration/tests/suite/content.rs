//! Blobs and ingests: offsets, resume, locks, digests.

use std::collections::HashMap;

use bytes::Bytes;
use lighter_integration::{Daemon, Result, Subject, image};
use lighter_proto::containerd::services::content::v1 as api;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// One write stream, message by message.
struct Session {
    requests: mpsc::Sender<api::WriteContentRequest>,
    answers: Streaming<api::WriteContentResponse>,
}

impl Session {
    async fn open(
        client: &lighter_integration::Client,
        reference: &str,
    ) -> Result<(Self, api::WriteContentResponse), Status> {
        let (requests, receiver) = mpsc::channel(4);
        let first = request(api::WriteAction::Stat, reference, 0, b"");
        requests.send(first).await.expect("open");
        let answers = client
            .content()
            .write(ReceiverStream::new(receiver))
            .await?
            .into_inner();
        let mut session = Self { requests, answers };
        let status = session.answer().await?;
        Ok((session, status))
    }

    async fn send(
        &mut self,
        message: api::WriteContentRequest,
    ) -> Result<api::WriteContentResponse, Status> {
        let _ = self.requests.send(message).await;
        self.answer().await
    }

    async fn answer(&mut self) -> Result<api::WriteContentResponse, Status> {
        self.answers
            .next()
            .await
            .unwrap_or_else(|| Err(Status::internal("the stream ended")))
    }
}

fn request(
    action: api::WriteAction,
    reference: &str,
    offset: i64,
    data: &[u8],
) -> api::WriteContentRequest {
    api::WriteContentRequest {
        action: action.into(),
        r#ref: reference.to_owned(),
        offset,
        data: Bytes::copy_from_slice(data),
        ..Default::default()
    }
}

#[tokio::test]
async fn an_ingest_resumes_where_it_stopped() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let data: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    let (mut session, status) = Session::open(&client, "resume").await?;
    assert_eq!(status.offset, 0);
    let half = data.len() / 2;
    let wrote = session
        .send(request(api::WriteAction::Write, "resume", 0, &data[..half]))
        .await?;
    assert_eq!(
        (wrote.offset, wrote.digest),
        (i64::try_from(half)?, image::digest(&data[..half]))
    );
    let busy = Session::open(&client, "resume")
        .await
        .err()
        .expect("the ref is locked");
    assert_eq!(busy.code(), Code::Unavailable, "{busy}");
    assert!(busy.message().contains("locked"), "{busy}");
    drop(session);
    let (mut session, status) =
        lighter_integration::eventually("the lock dies with its client", async || {
            Ok(Session::open(&client, "resume").await.ok())
        })
        .await?;
    assert_eq!(status.offset, i64::try_from(half)?);
    let gap = session
        .send(request(
            api::WriteAction::Write,
            "resume",
            status.offset + 1,
            b"x",
        ))
        .await;
    assert_eq!(gap.expect_err("a gap").code(), Code::OutOfRange);
    let (mut session, status) =
        lighter_integration::eventually("the failed stream lets go", async || {
            Ok(Session::open(&client, "resume").await.ok())
        })
        .await?;
    assert_eq!(status.offset, i64::try_from(half)?);
    session
        .send(request(
            api::WriteAction::Write,
            "resume",
            status.offset,
            &data[half..],
        ))
        .await?;
    let mut commit = request(
        api::WriteAction::Commit,
        "resume",
        i64::try_from(data.len())?,
        b"",
    );
    commit.expected = image::digest(&data);
    commit.total = i64::try_from(data.len())?;
    let done = session.send(commit).await?;
    assert_eq!(done.digest, image::digest(&data));
    assert_eq!(client.read_blob(&done.digest).await?, data);
    let gone = client
        .content()
        .status(api::StatusRequest {
            r#ref: "resume".into(),
        })
        .await;
    assert_eq!(gone.expect_err("committed").code(), Code::NotFound);
    daemon.finish().await
}

#[tokio::test]
async fn a_reopened_ingest_tells_the_times_that_its_writer_was_told() -> Result {
    if Subject::of_run() == Subject::Containerd {
        // The reference of that age tells the file's time, by the kernel's coarse clock.
        return Ok(());
    }
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    for round in 0..20 {
        let name = format!("times-{round}");
        let (mut session, _) = Session::open(&client, &name).await?;
        let write = request(api::WriteAction::Write, &name, 0, b"data");
        let wrote = session.send(write).await?;
        drop(session);
        let (_, found) = lighter_integration::eventually("the lock is free", async || {
            Ok(Session::open(&client, &name).await.ok())
        })
        .await?;
        assert_eq!(found.started_at, wrote.started_at);
        assert_eq!(found.updated_at, wrote.updated_at);
    }
    daemon.finish().await
}

#[tokio::test]
async fn a_wrong_digest_or_size_commits_nothing() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let wrong = image::digest(b"something else");
    let status = client
        .write_blob("w", &wrong, b"bytes", HashMap::new())
        .await
        .expect_err("wrong digest");
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    let missing = client
        .content()
        .info(api::InfoRequest { digest: wrong })
        .await;
    assert_eq!(missing.expect_err("nothing there").code(), Code::NotFound);
    client
        .content()
        .abort(api::AbortRequest { r#ref: "w".into() })
        .await?;
    let (mut session, _) = Session::open(&client, "size").await?;
    session
        .send(request(api::WriteAction::Write, "size", 0, b"12345"))
        .await?;
    let mut commit = request(api::WriteAction::Commit, "size", 5, b"");
    commit.total = 6;
    let status = session.send(commit).await.expect_err("wrong size");
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    daemon.finish().await
}

#[tokio::test]
async fn reads_take_any_range() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let data: Vec<u8> = (0..3_000_000_u32)
        .map(|n| u8::try_from(n % 251).unwrap_or(0))
        .collect();
    let digest = image::digest(&data);
    client
        .write_blob("range", &digest, &data, HashMap::new())
        .await?;
    let size = data.len();
    for (offset, length) in [
        (0, 0),
        (0, 10),
        (1, 2_000_000),
        (2_999_999, 5),
        (size, 0),
        (5, 0),
    ] {
        let read = api::ReadContentRequest {
            digest: digest.clone(),
            offset: i64::try_from(offset)?,
            size: i64::try_from(length)?,
        };
        let mut stream = client.content().read(read).await?.into_inner();
        let mut got = Vec::new();
        while let Some(message) = stream.next().await {
            got.extend_from_slice(&message?.data);
        }
        let end = if length == 0 {
            size
        } else {
            (offset + length).min(size)
        };
        assert!(
            got == data[offset..end],
            "{offset}+{length}: {} bytes",
            got.len()
        );
    }
    let beyond = api::ReadContentRequest {
        digest,
        offset: i64::try_from(size)? + 1,
        size: 0,
    };
    let failed = match client.content().read(beyond).await {
        Err(status) => status,
        Ok(stream) => stream
            .into_inner()
            .next()
            .await
            .expect("an answer")
            .expect_err("beyond"),
    };
    assert_eq!(failed.code(), Code::OutOfRange, "{failed}");
    daemon.finish().await
}

#[tokio::test]
async fn labels_change_by_mask() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let digest = image::digest(b"labelled");
    let labels = HashMap::from([
        ("a".to_owned(), "1".to_owned()),
        ("b".to_owned(), "2".to_owned()),
    ]);
    client.write_blob("l", &digest, b"labelled", labels).await?;
    let update = |labels: &[(&str, &str)], paths: &[&str]| api::UpdateRequest {
        info: Some(api::Info {
            digest: digest.clone(),
            labels: labels
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            ..Default::default()
        }),
        update_mask: (!paths.is_empty()).then(|| prost_types::FieldMask {
            paths: paths.iter().map(|p| (*p).to_owned()).collect(),
        }),
    };
    let after = async |request| -> Result<Vec<(String, String)>> {
        let info = client
            .content()
            .update(request)
            .await?
            .into_inner()
            .info
            .expect("info");
        let mut labels: Vec<_> = info.labels.into_iter().collect();
        labels.sort();
        Ok(labels)
    };
    let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
    assert_eq!(
        after(update(&[("c", "3")], &["labels.c"])).await?,
        [pair("a", "1"), pair("b", "2"), pair("c", "3")]
    );
    assert_eq!(
        after(update(&[], &["labels.a"])).await?,
        [pair("b", "2"), pair("c", "3")]
    );
    assert_eq!(
        after(update(&[("z", "9")], &["labels"])).await?,
        [pair("z", "9")]
    );
    let refused = client
        .content()
        .update(update(&[], &["size"]))
        .await
        .expect_err("immutable");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    daemon.finish().await
}
