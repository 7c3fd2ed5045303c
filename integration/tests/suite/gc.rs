//! Collections of what is no record: streams, mount activations; and references with a condition.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use lighter_integration::{Client, Daemon, Image, Result, Spec, Subject, eventually};
use lighter_proto::containerd::services as svc;
use lighter_proto::containerd::types::Mount;
use lighter_proto::time::to_timestamp;
use prost_types::Any;
use svc::leases::v1 as leases;
use svc::snapshots::v1 as snapshots;
use tokio::sync::mpsc;
use tonic::{Code, Status, Streaming};

async fn lease(client: &Client, id: &str) -> Result {
    let request = leases::CreateRequest {
        id: id.to_owned(),
        labels: HashMap::new(),
    };
    client.leases().create(request).await?;
    Ok(())
}

async fn end_lease(client: &Client, id: &str) -> Result {
    let request = leases::DeleteRequest {
        id: id.to_owned(),
        sync: true,
    };
    client.leases().delete(request).await?;
    Ok(())
}

struct Stream {
    /// Kept open, so that the stream ends by the daemon's will alone.
    _requests: mpsc::Sender<Any>,
    answers: Streaming<Any>,
}

/// Whether a stream was refused because its id is in use; containerd gives that no code.
fn is_taken(opened: Result<Stream, Status>) -> bool {
    let Err(status) = opened else { return false };
    matches!(status.code(), Code::AlreadyExists | Code::Unknown)
        && status.message().contains("already exists")
}

async fn open(client: &Client, id: &str) -> Result<Stream, Status> {
    let (requests, answers) = client.open_stream(id).await?;
    Ok(Stream {
        _requests: requests,
        answers,
    })
}

#[tokio::test]
async fn a_stream_ends_with_its_lease_and_lives_without_one() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    if !client.is_recent().await? {
        return daemon.finish().await;
    }
    lease(&client, "l").await?;
    let mut leased = open(&client.under_lease("l"), "leased").await?;
    let free = open(&client, "free").await?;
    assert!(is_taken(open(&client, "free").await));
    client.collect().await?;
    assert!(is_taken(open(&client, "leased").await));
    end_lease(&client, "l").await?;
    let end = tokio::time::timeout(Duration::from_secs(10), leased.answers.message()).await;
    assert!(matches!(end, Ok(Ok(None) | Err(_))), "{end:?}");
    // The id is free again, the other stream is not.
    drop(open(&client, "leased").await?);
    assert!(is_taken(open(&client, "free").await));
    drop(free);
    if daemon.subject() == Subject::Containerd {
        // It keeps the id until somebody takes the stream and is done with it.
        return daemon.finish().await;
    }
    eventually("the stream is forgotten with its client", async || {
        Ok(open(&client, "free").await.ok())
    })
    .await?;
    daemon.finish().await
}

async fn activate(client: &Client, name: &str, labels: &[(&str, &str)]) -> Result<String, Status> {
    let request = svc::mounts::v1::ActivateRequest {
        name: name.to_owned(),
        mounts: vec![Mount {
            r#type: "tmpfs".to_owned(),
            source: "tmpfs".to_owned(),
            ..Default::default()
        }],
        labels: labels
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect(),
        temporary: true,
    };
    let info = client.mounts().activate(request).await?.into_inner().info;
    let info = info.expect("an activation");
    assert_eq!(info.active.len(), 1, "{info:?}");
    Ok(info.active[0].mount_point.clone())
}

fn is_mounted(point: &str) -> bool {
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("a table");
    table
        .lines()
        .any(|line| line.split(' ').nth(4) == Some(point))
}

#[tokio::test]
async fn a_mount_activation_goes_with_what_keeps_it() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    if !client.is_recent().await? {
        return daemon.finish().await;
    }
    let (_, top) = client.busybox().await?;
    let spec = Spec::new(daemon.namespace(), "keeper", &["true"]);
    let container = client.create("keeper", &top, &spec).await?;
    lease(&client, "l").await?;
    let leased = activate(&client.under_lease("l"), "leased", &[]).await?;
    if daemon.subject() == Subject::Lighter {
        let unheld = activate(&client.under_lease("none"), "unheld", &[]).await;
        assert_eq!(unheld.expect_err("no such lease").code(), Code::NotFound);
    }
    let bref = ("containerd.io/gc.bref.container", "keeper");
    let kept = activate(&client, "kept", &[bref]).await?;
    let free = activate(&client, "free", &[]).await?;
    client.collect().await?;
    assert!(is_mounted(&leased) && is_mounted(&kept));
    end_lease(&client, "l").await?;
    eventually("the leased activation is undone", async || {
        Ok((!is_mounted(&leased)).then_some(()))
    })
    .await?;
    assert!(is_mounted(&kept));
    let delete = svc::containers::v1::DeleteContainerRequest {
        id: container.id.clone(),
    };
    client.containers().delete(delete).await?;
    // Its snapshot goes with the same collection.
    client.collect().await?;
    eventually("the container's activation is undone", async || {
        Ok((!is_mounted(&kept)).then_some(()))
    })
    .await?;
    for name in ["leased", "kept"] {
        let request = svc::mounts::v1::InfoRequest { name: name.into() };
        let gone = client.mounts().info(request).await.expect_err("undone");
        assert_eq!(gone.code(), Code::NotFound, "{gone}");
    }
    assert!(!Path::new(&kept).exists());
    // Nobody was named to decide about this one: ours leaves it to its client, containerd takes it.
    assert_eq!(is_mounted(&free), daemon.subject() == Subject::Lighter);
    if daemon.subject() == Subject::Lighter {
        let name = "free".to_owned();
        let request = svc::mounts::v1::DeactivateRequest { name };
        client.mounts().deactivate(request).await?;
    }
    daemon.finish().await
}

/// Commits an empty snapshot `name` with `labels`.
async fn commit(client: &Client, name: &str, labels: HashMap<String, String>) -> Result {
    let snapshotter = || "overlayfs".to_owned();
    let key = format!("key-{name}");
    let prepare = snapshots::PrepareSnapshotRequest {
        snapshotter: snapshotter(),
        key: key.clone(),
        ..Default::default()
    };
    client.snapshots().prepare(prepare).await?;
    let commit = snapshots::CommitSnapshotRequest {
        snapshotter: snapshotter(),
        name: name.to_owned(),
        key,
        labels,
        ..Default::default()
    };
    client.snapshots().commit(commit).await?;
    Ok(())
}

#[tokio::test]
async fn a_condition_keeps_a_snapshot_that_was_used_lately() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    // containerd 1.6 knows no conditions.
    if !client.is_recent().await? {
        return daemon.finish().await;
    }
    let used = |ago: u64| {
        let at = to_timestamp(SystemTime::now() - Duration::from_secs(ago));
        let label = "containerd.io/gc.cond.value-usedat".to_owned();
        HashMap::from([(label, at.to_string())])
    };
    commit(&client, "fresh", used(60)).await?;
    commit(&client, "stale", used(3 * 3600)).await?;
    commit(&client, "silent", HashMap::new()).await?;
    let names = ["fresh", "stale", "silent"];
    let labels = names.iter().map(|name| {
        (
            format!("containerd.io/gc.cond.snapshot.overlayfs/{name}"),
            format!("usedat<2h|{name}"),
        )
    });
    let mut labels: HashMap<_, _> = labels.collect();
    // What the referrer says of its own use does not count.
    labels.extend(used(1));
    let image = Image::busybox("docker.io/test/conditional:1")?;
    client.store(&image).await?;
    let mut record = client
        .images()
        .get(svc::images::v1::GetImageRequest {
            name: image.name.clone(),
        })
        .await?
        .into_inner()
        .image
        .expect("an image");
    record.labels = labels;
    let update = svc::images::v1::UpdateImageRequest {
        image: Some(record),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["labels".to_owned()],
        }),
        ..Default::default()
    };
    client.images().update(update).await?;
    client.collect().await?;
    let mut found = Vec::new();
    for name in names {
        let stat = snapshots::StatSnapshotRequest {
            snapshotter: "overlayfs".to_owned(),
            key: name.to_owned(),
        };
        if client.snapshots().stat(stat).await.is_ok() {
            found.push(name);
        }
    }
    assert_eq!(found, ["fresh"]);
    daemon.finish().await
}
