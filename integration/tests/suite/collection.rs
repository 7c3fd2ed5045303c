//! A collection beside requests: it holds none of them up, and takes nothing that one of them uses.
//!
//! `LIGHTER_FULL=1` runs with the numbers that the daemon is made for: 100,000 blobs and 20,000
//! snapshots, of which half goes, on an ext4 in memory: a machine's disk may answer nobody for half
//! a second while files are removed (one mounted with `discard` does), whoever removes them.
//! Without it the numbers are small enough for every run.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use lighter_integration::{Client, Daemon, Options, Result, Subject, image};
use lighter_proto::containerd::services as svc;
use svc::leases::v1 as leases;
use svc::snapshots::v1 as snapshots;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

/// Longest that a collection may add to a request.
const MOST: Duration = Duration::from_millis(50);
/// What other tests, which share the machine, may add in a run of small numbers.
const NOISE: Duration = Duration::from_millis(500);
/// Requests at a time while objects are made.
const WRITERS: usize = 32;
/// How long requests are timed without a collection, and after one.
const STRETCH: Duration = Duration::from_secs(1);
/// Objects without a reference that are taken up again while they are collected.
const REVIVED: usize = 500;
const SNAPSHOTTER: &str = "overlayfs";

struct Size {
    blobs: usize,
    snapshots: usize,
    allowed: Duration,
    /// Of the file system that the daemon gets, in MiB.
    disk: Option<u64>,
}

impl Size {
    fn of_run() -> Self {
        match std::env::var_os("LIGHTER_FULL") {
            Some(_) => Self {
                blobs: 100_000,
                snapshots: 20_000,
                allowed: MOST,
                disk: Some(4096),
            },
            None => Self {
                blobs: 600,
                snapshots: 120,
                allowed: MOST + NOISE,
                disk: None,
            },
        }
    }
}

/// The lease of object `n`: every other one is waste.
fn owner(n: usize) -> &'static str {
    if n.is_multiple_of(2) { "kept" } else { "waste" }
}

fn text(n: usize) -> Vec<u8> {
    format!("blob {n}").into_bytes()
}

fn name(n: usize) -> String {
    format!("layer-{n}")
}

async fn lease(client: &Client, id: &str) -> Result {
    let request = leases::CreateRequest {
        id: id.to_owned(),
        labels: HashMap::new(),
    };
    client.leases().create(request).await?;
    Ok(())
}

async fn write(client: &Client, n: usize) -> Result<(), Status> {
    let data = text(n);
    let reference = format!("write-{n}");
    client
        .write_blob(&reference, &image::digest(&data), &data, HashMap::new())
        .await
}

async fn prepare(client: &Client, key: &str, parent: &str) -> Result<(), Status> {
    let request = snapshots::PrepareSnapshotRequest {
        snapshotter: SNAPSHOTTER.to_owned(),
        key: key.to_owned(),
        parent: parent.to_owned(),
        labels: HashMap::new(),
    };
    client.snapshots().prepare(request).await.map(drop)
}

async fn commit(client: &Client, n: usize) -> Result<(), Status> {
    let key = format!("making-{n}");
    prepare(client, &key, "").await?;
    let request = snapshots::CommitSnapshotRequest {
        snapshotter: SNAPSHOTTER.to_owned(),
        name: name(n),
        key,
        ..Default::default()
    };
    client.snapshots().commit(request).await.map(drop)
}

async fn remove(client: &Client, key: &str) -> Result<(), Status> {
    let request = snapshots::RemoveSnapshotRequest {
        snapshotter: SNAPSHOTTER.to_owned(),
        key: key.to_owned(),
    };
    client.snapshots().remove(request).await.map(drop)
}

async fn stat(client: &Client, key: &str) -> Result<(), Status> {
    let request = snapshots::StatSnapshotRequest {
        snapshotter: SNAPSHOTTER.to_owned(),
        key: key.to_owned(),
    };
    client.snapshots().stat(request).await.map(drop)
}

/// Blobs and snapshots, every other one under the lease that will end.
async fn fill(daemon: &Daemon, size: &Size) -> Result {
    let mut writers = JoinSet::new();
    let (blobs, layers) = (size.blobs, size.snapshots);
    for first in 0..WRITERS {
        let client = daemon.client().await?;
        writers.spawn(async move {
            for n in (first..blobs).step_by(WRITERS) {
                write(&client.under_lease(owner(n)), n).await?;
            }
            for n in (first..layers).step_by(WRITERS) {
                commit(&client.under_lease(owner(n)), n).await?;
            }
            Ok::<_, Status>(())
        });
    }
    while let Some(done) = writers.join_next().await {
        done??;
    }
    Ok(())
}

/// The longest that each kind of request took.
type Longest = HashMap<&'static str, Duration>;

/// Makes requests of several kinds, one after the other on each connection, until `stop`.
async fn probe(daemon: &Daemon, stop: &CancellationToken) -> Result<JoinSet<Result<Longest>>> {
    let mut probes = JoinSet::new();
    for kind in ["version", "container", "blob", "snapshot", "read"] {
        let (client, stop) = (daemon.client().await?.under_lease("probing"), stop.clone());
        probes.spawn(async move {
            let mut longest = Duration::ZERO;
            let mut n = 0_u64;
            while !stop.is_cancelled() {
                n += 1;
                let began = Instant::now();
                match kind {
                    "version" => drop(client.version().await?),
                    "container" => record(&client, n).await?,
                    "blob" => write(&client, usize::MAX / 2 + usize::try_from(n)?).await?,
                    "snapshot" => {
                        let key = format!("probe-{n}");
                        prepare(&client, &key, &name(0)).await?;
                        remove(&client, &key).await?;
                    }
                    _ => drop(client.read_blob(&image::digest(&text(0))).await?),
                }
                longest = longest.max(began.elapsed());
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            Ok(HashMap::from([(kind, longest)]))
        });
    }
    Ok(probes)
}

/// A container's record made and deleted.
async fn record(client: &Client, n: u64) -> Result {
    let id = format!("record-{n}");
    let container = svc::containers::v1::Container {
        id: id.clone(),
        runtime: Some(svc::containers::v1::container::Runtime {
            name: "io.containerd.runc.v2".to_owned(),
            options: None,
        }),
        spec: Some(prost_types::Any {
            type_url: "t".to_owned(),
            value: b"{}".to_vec(),
        }),
        ..Default::default()
    };
    let create = svc::containers::v1::CreateContainerRequest {
        container: Some(container),
    };
    client.containers().create(create).await?;
    let delete = svc::containers::v1::DeleteContainerRequest { id };
    client.containers().delete(delete).await?;
    Ok(())
}

async fn ended(mut probes: JoinSet<Result<Longest>>) -> Result<Longest> {
    let mut all = Longest::new();
    while let Some(longest) = probes.join_next().await {
        all.extend(longest??);
    }
    Ok(all)
}

/// Takes waste up again, while it is collected: what that was granted for must stay.
async fn revive(client: Client, size: &Size, half: &Notify) -> Result {
    lease(&client, "revived").await?;
    let client = client.under_lease("revived");
    let waste = |all: usize, n: usize| ((n * 2 + 1) % all) | 1;
    let count = REVIVED.min(size.snapshots / 4);
    let mut grown = Vec::new();
    for n in 0..count {
        if n == count / 2 {
            half.notify_one();
        }
        // Taken up where it still is, written again where it is gone.
        write(&client, waste(size.blobs, n)).await?;
        let (key, parent) = (format!("grown-{n}"), name(waste(size.snapshots, n)));
        match prepare(&client, &key, &parent).await {
            Ok(()) => grown.push((key, parent)),
            Err(status) => assert_eq!(status.code(), Code::NotFound, "{status}"),
        }
    }
    client.collect().await?;
    for n in 0..count {
        let data = text(waste(size.blobs, n));
        assert_eq!(client.read_blob(&image::digest(&data)).await?, data);
    }
    for (key, parent) in &grown {
        stat(&client, parent).await?;
        let request = snapshots::MountsRequest {
            snapshotter: SNAPSHOTTER.to_owned(),
            key: key.clone(),
        };
        let mounts = client.snapshots().mounts(request).await?.into_inner();
        let options = &mounts.mounts[0].options;
        let lower = options.iter().find_map(|o| o.strip_prefix("lowerdir="));
        let lower = lower.ok_or_else(|| anyhow::anyhow!("no parent in {options:?}"))?;
        assert!(std::path::Path::new(lower).is_dir(), "{lower}");
    }
    Ok(())
}

/// Only ours: containerd holds its writers for as long as a collection marks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collection_holds_up_no_request_and_takes_nothing_in_use() -> Result {
    if Subject::of_run() != Subject::Lighter {
        return Ok(());
    }
    let size = Size::of_run();
    let options = Options {
        root_ext4_mib: size.disk,
        log_level: Some("info"),
        ..Options::default()
    };
    let daemon = Daemon::start_with(Subject::Lighter, &options).await?;
    let client = daemon.client().await?;
    for id in ["kept", "waste", "probing"] {
        lease(&client, id).await?;
    }
    let began = Instant::now();
    fill(&daemon, &size).await?;
    let (blobs, snapshots) = (size.blobs, size.snapshots);
    println!(
        "{blobs} blobs, {snapshots} snapshots in {:?}",
        began.elapsed()
    );

    let stop = CancellationToken::new();
    let probes = probe(&daemon, &stop).await?;
    tokio::time::sleep(STRETCH).await;
    stop.cancel();
    let without = ended(probes).await?;

    let stop = CancellationToken::new();
    let probes = probe(&daemon, &stop).await?;
    // Some of it is taken up before the collection, some beside it, some after.
    let half = Notify::new();
    let collected = async {
        half.notified().await;
        let began = Instant::now();
        let request = leases::DeleteRequest {
            id: "waste".to_owned(),
            sync: true,
        };
        client.leases().delete(request).await?;
        println!("collected in {:?}", began.elapsed());
        Ok::<_, anyhow::Error>(())
    };
    tokio::try_join!(collected, revive(daemon.client().await?, &size, &half))?;
    tokio::time::sleep(STRETCH).await;
    stop.cancel();
    let during = ended(probes).await?;
    println!("longest without: {without:?}\nlongest beside: {during:?}");
    for (kind, longest) in during {
        let bound = without[kind] + size.allowed;
        assert!(longest <= bound, "{kind}: {longest:?}, bound {bound:?}");
    }

    for n in (0..blobs).step_by(blobs / 50 * 2) {
        client.read_blob(&image::digest(&text(n))).await?;
    }
    for n in (0..snapshots).step_by(2) {
        stat(&client, &name(n)).await?;
    }
    // Far from where the revivers were.
    let gone = image::digest(&text(blobs - 1));
    let lost = client.read_blob(&gone).await.expect_err("collected");
    assert_eq!(lost.code(), Code::NotFound, "{lost}");
    let lost = stat(&client, &name(snapshots - 1)).await;
    assert_eq!(lost.expect_err("collected").code(), Code::NotFound);
    daemon.finish().await
}
