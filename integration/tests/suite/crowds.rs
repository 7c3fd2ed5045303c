//! Many of everything, too much at once, and clients that leave in the middle.
//!
//! `LIGHTER_FULL=1` runs with the numbers that the daemon is made for; without it they are small
//! enough for every run.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lighter_integration::{Client, Daemon, Result, Subject, eventually, image};
use lighter_proto::containerd::services as svc;
use prost_types::{Any, FieldMask};
use svc::content::v1 as content;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// `full` where that was asked for, else `small`.
fn scaled(small: usize, full: usize) -> usize {
    match std::env::var_os("LIGHTER_FULL") {
        Some(_) => full,
        None => small,
    }
}

/// Streams that one connection carries.
const PER_CONNECTION: usize = 500;

/// A write under way.
struct Write {
    requests: mpsc::Sender<content::WriteContentRequest>,
    answers: Streaming<content::WriteContentResponse>,
}

async fn begin(client: &Client, reference: &str, data: &[u8]) -> Result<Write, Status> {
    let (requests, outgoing) = mpsc::channel(2);
    let first = content::WriteContentRequest {
        action: content::WriteAction::Write.into(),
        r#ref: reference.to_owned(),
        data: Bytes::copy_from_slice(data),
        ..Default::default()
    };
    requests.send(first).await.expect("there is room");
    let outgoing = ReceiverStream::new(outgoing);
    let mut answers = client.content().write(outgoing).await?.into_inner();
    let answer = answers.message().await?.expect("an answer");
    assert_eq!(usize::try_from(answer.offset), Ok(data.len()));
    Ok(Write { requests, answers })
}

async fn statuses(client: &Client) -> Result<usize> {
    let all = content::ListStatusesRequest { filters: vec![] };
    let found = client.content().list_statuses(all).await?.into_inner();
    Ok(found.statuses.len())
}

async fn connections(daemon: &Daemon, streams: usize) -> Result<Vec<Client>> {
    let mut clients = Vec::new();
    for _ in 0..streams.div_ceil(PER_CONNECTION) {
        clients.push(daemon.client().await?);
    }
    Ok(clients)
}

/// Resident memory of the daemon, in bytes.
fn resident(daemon: &Daemon) -> Result<u64> {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", daemon.pid()?))?;
    let pages: u64 = statm.split(' ').nth(1).unwrap_or_default().parse()?;
    Ok(pages * 4096)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_open_ingests_leave_room_for_others() -> Result {
    let daemon = Daemon::start().await?;
    let count = scaled(600, 10_000);
    let clients = connections(&daemon, count).await?;
    let mut writes = Vec::new();
    for (at, client) in clients.iter().enumerate() {
        let mine = at * PER_CONNECTION..count.min((at + 1) * PER_CONNECTION);
        let mut opening = tokio::task::JoinSet::new();
        for n in mine {
            let client = client.clone();
            opening.spawn(async move { begin(&client, &format!("ref-{n}"), b"some bytes").await });
            if opening.len() >= 64 {
                writes.extend(opening.join_next().await.transpose()?.transpose()?);
            }
        }
        while let Some(done) = opening.join_next().await {
            writes.push(done??);
        }
    }
    let client = daemon.client().await?;
    assert_eq!(writes.len(), count);
    assert_eq!(statuses(&client).await?, count);
    let began = Instant::now();
    client.version().await?;
    let digest = image::digest(b"beside");
    client
        .write_blob("beside", &digest, b"beside", HashMap::new())
        .await?;
    assert_eq!(client.read_blob(&digest).await?, b"beside");
    let took = began.elapsed();
    assert!(took < Duration::from_secs(5), "others waited {took:?}");
    let held = begin(&client, "ref-0", b"x").await.err().expect("held");
    assert_eq!(held.code(), Code::Unavailable, "{held}");
    assert!(held.message().contains("locked"), "{held}");
    // Half of the clients go away, half of them are cut off.
    writes.truncate(count / 2);
    drop(clients);
    drop(writes);
    eventually("nobody holds a ref", async || {
        Ok(begin(&client, "ref-0", b"some bytes").await.ok().map(drop))
    })
    .await?;
    assert_eq!(statuses(&client).await?, count, "what was written stays");
    let mut aborting = tokio::task::JoinSet::new();
    for n in 0..count {
        let client = client.clone();
        aborting.spawn(async move {
            // A ref whose client was cut off just now may be held for a moment longer.
            for _ in 0..3000 {
                let abort = content::AbortRequest {
                    r#ref: format!("ref-{n}"),
                };
                match client.content().abort(abort).await {
                    Err(status) if status.code() == Code::Unavailable => {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    other => return other.map(drop),
                }
            }
            Err(Status::unavailable("the ingest stays locked"))
        });
        if aborting.len() >= 64 {
            aborting.join_next().await.transpose()?.transpose()?;
        }
    }
    while let Some(done) = aborting.join_next().await {
        done??;
    }
    assert_eq!(statuses(&client).await?, 0);
    daemon.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscribers_that_never_read_hold_nobody_up() -> Result {
    let daemon = Daemon::start().await?;
    let count = scaled(100, 1000);
    let events = scaled(500, 2000);
    let (readers, sleepers) = (
        connections(&daemon, count / 2).await?,
        connections(&daemon, count / 2).await?,
    );
    let open = |clients: &[Client], n: usize| clients[n / PER_CONNECTION].clone();
    let filter = || svc::events::v1::SubscribeRequest {
        filters: vec![format!("namespace=={}", daemon.namespace())],
    };
    // containerd answers a subscription with its first event, so each is opened by its own task.
    let mut asleep = tokio::task::JoinSet::new();
    for n in 0..count / 2 {
        let (mut service, filter) = (open(&sleepers, n).events(), filter());
        asleep.spawn(async move {
            let stream = service.subscribe(filter).await;
            std::future::pending::<()>().await;
            drop(stream);
        });
    }
    let (ready, mut warm) = mpsc::channel::<()>(count);
    let mut reading = tokio::task::JoinSet::new();
    for n in 0..count / 2 {
        let (mut service, filter, ready) = (open(&readers, n).events(), filter(), ready.clone());
        reading.spawn(async move {
            let mut stream = service.subscribe(filter).await?.into_inner();
            let mut seen = 0;
            while seen < events {
                let envelope = stream.message().await?.expect("more events");
                if envelope.topic == "/test/warm" {
                    let _ = ready.try_send(());
                    continue;
                }
                assert_eq!(envelope.topic, format!("/test/n{seen}"));
                seen += 1;
            }
            Ok::<_, Status>(())
        });
    }
    let client = daemon.client().await?;
    let publish = async |topic: String, bytes: usize| {
        let publish = svc::events::v1::PublishRequest {
            topic,
            event: Some(Any {
                type_url: "test".to_owned(),
                value: vec![7; bytes],
            }),
        };
        client.events().publish(publish).await
    };
    // Each reader tells of each of these; all of one round mean that all listen.
    eventually("everybody listens", async || {
        while warm.try_recv().is_ok() {}
        publish("/test/warm".to_owned(), 1).await?;
        let all = async {
            for _ in 0..count / 2 {
                warm.recv().await;
            }
        };
        Ok(tokio::time::timeout(Duration::from_secs(1), all).await.ok())
    })
    .await?;
    let before = resident(&daemon)?;
    for n in 0..events {
        publish(format!("/test/n{n}"), 1024).await?;
    }
    let all = async {
        while let Some(done) = reading.join_next().await {
            done??;
        }
        Ok::<_, anyhow::Error>(())
    };
    tokio::time::timeout(Duration::from_secs(120), all).await??;
    client.version().await?;
    if daemon.subject() == Subject::Lighter {
        // Events are shared by those who wait for them: a few bytes each besides the windows.
        let grown = resident(&daemon)?.saturating_sub(before) >> 20;
        assert!(grown < 256, "{grown} MiB for {count} subscribers");
    }
    drop(asleep);
    daemon.finish().await
}

#[tokio::test]
async fn a_message_beyond_the_limit_is_refused_and_the_connection_lives() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let container = svc::containers::v1::Container {
        id: "large".to_owned(),
        runtime: Some(svc::containers::v1::container::Runtime {
            name: "io.containerd.runc.v2".to_owned(),
            options: None,
        }),
        spec: Some(Any {
            type_url: "t".to_owned(),
            value: vec![b' '; 17 << 20],
        }),
        ..Default::default()
    };
    let request = svc::containers::v1::CreateContainerRequest {
        container: Some(container),
    };
    // The harness's own limit is off for this one.
    let mut containers = client.containers().max_encoding_message_size(64 << 20);
    let refused = containers.create(request).await.expect_err("too large");
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    let (requests, outgoing) = mpsc::channel(2);
    let write = content::WriteContentRequest {
        action: content::WriteAction::Write.into(),
        r#ref: "large".to_owned(),
        data: Bytes::from(vec![0; 17 << 20]),
        ..Default::default()
    };
    requests.send(write).await?;
    let mut service = client.content().max_encoding_message_size(64 << 20);
    let refused = match service.write(ReceiverStream::new(outgoing)).await {
        Ok(answer) => answer.into_inner().message().await.map(drop),
        Err(status) => Err(status),
    };
    let refused = refused.expect_err("too large");
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    client.version().await?;
    assert_eq!(statuses(&client).await?, 0);
    let all = svc::containers::v1::ListContainersRequest { filters: vec![] };
    let found = client.containers().list(all).await?.into_inner();
    assert!(found.containers.is_empty());
    daemon.finish().await
}

#[tokio::test]
async fn malformed_digests_filters_and_masks_are_named() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let check = |what: &str, status: Status| {
        assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status}");
        assert!(!status.message().is_empty(), "{what}");
    };
    let upper = format!("sha256:{}", "A".repeat(64));
    for bad in [
        "",
        "sha256",
        "sha256:",
        "sha256:xyz",
        "md5:",
        &upper,
        "sha256:../../etc/passwd",
    ] {
        let digest = || bad.to_owned();
        let mut content = client.content();
        let info = content
            .info(content::InfoRequest { digest: digest() })
            .await;
        check(bad, info.expect_err("info"));
        let delete = content::DeleteContentRequest { digest: digest() };
        check(bad, content.delete(delete).await.expect_err("delete"));
        let read = content::ReadContentRequest {
            digest: digest(),
            ..Default::default()
        };
        let read = match content.read(read).await {
            Ok(stream) => stream.into_inner().message().await.map(drop),
            Err(status) => Err(status),
        };
        check(bad, read.expect_err("read"));
    }
    for bad in ["id==", "=", "id=x", "labels.\"x", "a==b,", "id~=|x"] {
        let filters = || vec![bad.to_owned()];
        let list = svc::containers::v1::ListContainersRequest { filters: filters() };
        check(
            bad,
            client
                .containers()
                .list(list)
                .await
                .expect_err("containers"),
        );
        let list = svc::images::v1::ListImagesRequest { filters: filters() };
        check(bad, client.images().list(list).await.expect_err("images"));
        let list = svc::leases::v1::ListRequest { filters: filters() };
        check(bad, client.leases().list(list).await.expect_err("leases"));
        let list = content::ListStatusesRequest { filters: filters() };
        check(
            bad,
            client
                .content()
                .list_statuses(list)
                .await
                .expect_err("statuses"),
        );
        let list = svc::introspection::v1::PluginsRequest { filters: filters() };
        check(
            bad,
            client
                .introspection()
                .plugins(list)
                .await
                .expect_err("plugins"),
        );
    }
    let digest = image::digest(b"x");
    client
        .write_blob("x", &digest, b"x", HashMap::new())
        .await?;
    for bad in ["size", "digest", "nosuch", ""] {
        let update = content::UpdateRequest {
            info: Some(content::Info {
                digest: digest.clone(),
                ..Default::default()
            }),
            update_mask: Some(FieldMask {
                paths: vec![bad.to_owned()],
            }),
        };
        check(
            bad,
            client.content().update(update).await.expect_err("mask"),
        );
    }
    daemon.finish().await
}

#[tokio::test]
async fn a_stream_that_is_cut_off_leaves_its_ingest_and_no_lock() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let blob: Vec<u8> = (0..4 << 20).map(|n: u32| n.to_le_bytes()[1]).collect();
    let digest = image::digest(&blob);
    client
        .write_blob("whole", &digest, &blob, HashMap::new())
        .await?;
    for _ in 0..20 {
        let read = content::ReadContentRequest {
            digest: digest.clone(),
            ..Default::default()
        };
        let mut stream = client.content().read(read).await?.into_inner();
        let first = stream.next().await.expect("a message")?;
        assert!(!first.data.is_empty());
    }
    let Write {
        requests,
        mut answers,
    } = begin(&client, "cut", b"half of ").await?;
    // A length that was promised and is not kept is no commit.
    drop(requests);
    while let Ok(Some(_)) = answers.message().await {}
    let next = eventually("the lock is free", async || {
        let (requests, outgoing) = mpsc::channel(2);
        let stat = content::WriteContentRequest {
            action: content::WriteAction::Stat.into(),
            r#ref: "cut".to_owned(),
            ..Default::default()
        };
        requests.send(stat).await?;
        let answer = client.content().write(ReceiverStream::new(outgoing)).await;
        let Ok(answer) = answer else { return Ok(None) };
        let mut answers = answer.into_inner();
        Ok(answers.message().await.ok().flatten().map(|m| m.offset))
    })
    .await?;
    assert_eq!(next, 8, "what was written is kept");
    for _ in 0..50 {
        let subscribe = svc::events::v1::SubscribeRequest { filters: vec![] };
        // containerd does not answer before the first event.
        let call = async { client.events().subscribe(subscribe).await.map(drop) };
        let _cut = tokio::time::timeout(Duration::from_millis(20), call).await;
    }
    client.version().await?;
    daemon.finish().await
}
