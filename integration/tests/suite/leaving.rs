//! Clients that go away in the middle of Apply, Diff, Transfer and Stream: nothing stays mounted, locked, leased
//! or under way, and the same can be asked for again at once.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use lighter_integration::{Client, Daemon, Image, Layer, Result, Subject, bind, eventually};
use lighter_proto::any;
use lighter_proto::containerd::services::content::v1 as content;
use lighter_proto::containerd::services::diff::v1 as diff;
use lighter_proto::containerd::services::leases::v1 as leases;
use lighter_proto::containerd::services::snapshots::v1 as snapshots;
use lighter_proto::containerd::services::transfer::v1::TransferRequest;
use lighter_proto::containerd::types;
use lighter_proto::containerd::types::transfer as wire;
use prost_types::Any;
use tonic::Code;

use crate::observed::get;

/// When clients go, after they asked.
const MOMENTS: [Duration; 4] = [
    Duration::from_millis(1),
    Duration::from_millis(8),
    Duration::from_millis(30),
    Duration::from_millis(90),
];

/// Bytes that take a while to read, write and compress.
fn bulk() -> Vec<u8> {
    let mut state = 1_u32;
    (0..24 << 20)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_le_bytes()[3] & 63
        })
        .collect()
}

/// Waits until the daemon is done with every call of `method`, and nobody holds a lease or an ingest.
async fn settled(daemon: &Daemon, client: &Client, method: &str) -> Result {
    if daemon.subject() == Subject::Lighter {
        let socket = daemon.dir().join("state/debug.sock");
        eventually("the call is given up", async || {
            let page = get(UnixStream::connect(&socket)?, "/debug/tasks")?;
            Ok((!page.contains(method)).then_some(()))
        })
        .await?;
    }
    eventually("no lease is left", async || {
        let all = leases::ListRequest { filters: vec![] };
        let left = client.leases().list(all).await?.into_inner().leases;
        Ok(left.is_empty().then_some(()))
    })
    .await
}

/// Waits until nothing is mounted but what was `before`.
async fn unmounted(daemon: &Daemon, before: usize) -> Result {
    eventually("nothing is mounted any more", async || {
        Ok((daemon.mounts() == before).then_some(()))
    })
    .await
}

async fn ingests(client: &Client) -> Result<Vec<content::Status>> {
    let all = content::ListStatusesRequest { filters: vec![] };
    Ok(client
        .content()
        .list_statuses(all)
        .await?
        .into_inner()
        .statuses)
}

async fn prepare(client: &Client, key: &str) -> Result<Vec<types::Mount>> {
    let request = snapshots::PrepareSnapshotRequest {
        snapshotter: "overlayfs".to_owned(),
        key: key.to_owned(),
        parent: String::new(),
        labels: [("containerd.io/gc.root".to_owned(), "t".to_owned())].into(),
    };
    let prepared = client.snapshots().prepare(request).await?;
    Ok(prepared.into_inner().mounts)
}

async fn remove(client: &Client, key: &str) -> Result {
    let request = snapshots::RemoveSnapshotRequest {
        snapshotter: "overlayfs".to_owned(),
        key: key.to_owned(),
    };
    client.snapshots().remove(request).await?;
    Ok(())
}

#[tokio::test]
async fn in_the_middle_of_an_apply() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let layer = Layer::files(&[("bulk", bulk().as_slice())])?;
    let labels = [("containerd.io/gc.root".to_owned(), "t".to_owned())].into();
    client
        .write_blob("l", &layer.blob.digest, &layer.blob.data, labels)
        .await?;
    let mounted = daemon.mounts();
    for (round, moment) in MOMENTS.into_iter().enumerate() {
        // A connection of its own, which ends with the call.
        let leaver = daemon.client().await?;
        let key = format!("apply-{round}");
        let request = diff::ApplyRequest {
            diff: Some(layer.blob.to_wire()?),
            mounts: prepare(&client, &key).await?,
            ..Default::default()
        };
        let mut differ = leaver.diff();
        let _left = tokio::time::timeout(moment, differ.apply(request)).await;
        drop((differ, leaver));
        settled(&daemon, &client, "Diff/Apply").await?;
        unmounted(&daemon, mounted).await?;
        remove(&client, &key).await?;
    }
    let request = diff::ApplyRequest {
        diff: Some(layer.blob.to_wire()?),
        mounts: prepare(&client, "again").await?,
        ..Default::default()
    };
    let applied = client.diff().apply(request).await?.into_inner().applied;
    assert_eq!(applied.unwrap_or_default().digest, layer.diff_id);
    daemon.finish().await
}

#[tokio::test]
async fn in_the_middle_of_a_diff() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let (lower, upper) = (tempfile::tempdir()?, tempfile::tempdir()?);
    std::fs::write(upper.path().join("bulk"), bulk())?;
    let mounted = daemon.mounts();
    let request = diff::DiffRequest {
        left: vec![bind(lower.path())],
        right: vec![bind(upper.path())],
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
        r#ref: "mine".to_owned(),
        ..Default::default()
    };
    for moment in MOMENTS {
        let leaver = daemon.client().await?;
        let mut differ = leaver.diff();
        let _left = tokio::time::timeout(moment, differ.diff(request.clone())).await;
        drop((differ, leaver));
        settled(&daemon, &client, "Diff/Diff").await?;
        unmounted(&daemon, mounted).await?;
        if daemon.subject() == Subject::Lighter {
            eventually("no ingest is left", async || {
                Ok(ingests(&client).await?.is_empty().then_some(()))
            })
            .await?;
        }
    }
    // What was cut off last may hold the name a moment longer.
    let made = eventually("the name is free", async || {
        match client.diff().diff(request.clone()).await {
            Ok(made) => Ok(Some(made.into_inner().diff)),
            Err(status) if status.code() == Code::Unavailable => Ok(None),
            Err(status) => Err(status.into()),
        }
    })
    .await?;
    assert!(made.is_some_and(|layer| layer.size > 1 << 20));
    daemon.finish().await
}

/// An image of the daemon's own, as one end of a transfer.
fn store(name: &str) -> Any {
    any::pack(&wire::ImageStore {
        name: name.to_owned(),
        ..Default::default()
    })
}

fn ask(source: Any, destination: Any) -> TransferRequest {
    TransferRequest {
        source: Some(source),
        destination: Some(destination),
        options: None,
    }
}

#[tokio::test]
async fn in_the_middle_of_an_import() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    if !client.is_recent().await? {
        return daemon.finish().await;
    }
    let image = Image::busybox("docker.io/test/leaving:1")?;
    let archive = image.oci_archive()?;
    for (round, whole_connection) in [true, false].into_iter().enumerate() {
        let leaver = daemon.client().await?;
        let id = format!("import-{round}");
        let (data, window) = leaver.open_stream(&id).await?;
        let source = any::pack(&wire::ImageImportStream {
            stream: id,
            ..Default::default()
        });
        let store = store(&image.name);
        let mut transfers = leaver.transfer();
        let call = tokio::spawn(async move { transfers.transfer(ask(source, store)).await });
        let half = archive[..archive.len() / 2].chunks(32 << 10).take(2);
        for piece in half {
            let message = wire::Data {
                data: piece.to_vec(),
            };
            data.send(any::pack(&message)).await?;
        }
        if whole_connection {
            call.abort();
            let _cut = call.await;
            drop((data, window, leaver));
        } else {
            // The data ends too early, and the caller hears of it.
            drop((data, window));
            let told = call.await?.expect_err("half an archive is none");
            assert_ne!(told.code(), Code::Internal, "{told}");
        }
        settled(&daemon, &client, "Transfer/Transfer").await?;
        settled(&daemon, &client, "Streaming/Stream").await?;
        let locked = ingests(&client).await?;
        for ingest in locked {
            let abort = content::AbortRequest {
                r#ref: ingest.r#ref,
            };
            client.content().abort(abort).await?;
        }
    }
    daemon.finish().await
}

#[tokio::test]
async fn in_the_middle_of_an_export() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    if !client.is_recent().await? {
        return daemon.finish().await;
    }
    let image = Image::busybox("docker.io/test/leaving:1")?;
    client.store(&image).await?;
    for (round, abort) in [true, false].into_iter().enumerate() {
        let leaver = daemon.client().await?;
        let id = format!("export-{round}");
        let (grants, mut data) = leaver.open_stream(&id).await?;
        let source = store(&image.name);
        let destination = any::pack(&wire::ImageExportStream {
            stream: id,
            ..Default::default()
        });
        let mut transfers = leaver.transfer();
        let call = tokio::spawn(async move { transfers.transfer(ask(source, destination)).await });
        let window = any::pack(&wire::WindowUpdate { update: 32 << 10 });
        grants.send(window).await?;
        data.message().await?.expect("the archive begins");
        if abort {
            call.abort();
            let _cut = call.await;
            drop((grants, data, leaver));
        } else {
            // Nobody reads any more: the call ends by itself.
            drop((grants, data));
            let told = tokio::time::timeout(Duration::from_secs(20), call).await??;
            told.expect_err("half an archive is none");
        }
        settled(&daemon, &client, "Transfer/Transfer").await?;
        settled(&daemon, &client, "Streaming/Stream").await?;
    }
    daemon.finish().await
}

#[tokio::test]
async fn with_a_stream_that_nobody_took() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    if !client.is_recent().await? {
        return daemon.finish().await;
    }
    let (held, answers) = client.open_stream("mine").await?;
    let taken = client
        .open_stream("mine")
        .await
        .expect_err("the id is taken");
    assert_eq!(taken.code(), Code::AlreadyExists, "{taken}");
    drop((held, answers));
    eventually("the id is free again", async || {
        Ok(client.open_stream("mine").await.ok())
    })
    .await?;
    settled(&daemon, &client, "Streaming/Stream").await?;
    let source = any::pack(&wire::ImageImportStream {
        stream: "mine".to_owned(),
        ..Default::default()
    });
    let store = store("x");
    let gone = client.transfer().transfer(ask(source, store)).await;
    assert_eq!(gone.expect_err("it is closed").code(), Code::NotFound);
    daemon.finish().await
}
