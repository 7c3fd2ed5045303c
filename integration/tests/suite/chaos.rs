//! The daemon is killed at random moments; what it acknowledged is there afterwards.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use lighter_integration::{Client, Daemon, Result, Spec, Subject, image};
use lighter_proto::any;
use lighter_proto::containerd::services as svc;

/// Kills in one run: many for ours, a few to show that the test is right on the reference.
fn rounds(subject: Subject) -> u32 {
    match subject {
        Subject::Lighter => 50,
        Subject::Containerd => 5,
    }
}

/// What a worker was told stands, and what it was told is gone.
#[derive(Debug, Default)]
struct Acknowledged {
    made: BTreeSet<String>,
    removed: BTreeSet<String>,
    blobs: BTreeSet<String>,
}

/// Makes and removes containers with snapshots, and blobs, until the daemon goes away.
async fn work(client: Client, round: u32, worker: u32) -> Acknowledged {
    let mut known = Acknowledged::default();
    for n in 0.. {
        let id = format!("r{round}-w{worker}-{n}");
        let data = vec![u8::try_from(n % 256).unwrap_or(0); 10_000 + n];
        let blob = [id.as_bytes(), &data].concat();
        let digest = image::digest(&blob);
        let labels = HashMap::from([("containerd.io/gc.root".to_owned(), "test".to_owned())]);
        if client
            .write_blob(&id, &digest, &blob, labels)
            .await
            .is_err()
        {
            break;
        }
        known.blobs.insert(digest);
        let prepare = svc::snapshots::v1::PrepareSnapshotRequest {
            snapshotter: "overlayfs".into(),
            key: id.clone(),
            parent: String::new(),
            labels: HashMap::new(),
        };
        if client.snapshots().prepare(prepare).await.is_err() {
            break;
        }
        let record = svc::containers::v1::Container {
            id: id.clone(),
            runtime: Some(svc::containers::v1::container::Runtime {
                name: "io.containerd.runc.v2".into(),
                options: None,
            }),
            spec: any::pack_json(any::SPEC, &Spec::new("x", &id, &["true"]).0).ok(),
            snapshotter: "overlayfs".into(),
            snapshot_key: id.clone(),
            ..Default::default()
        };
        let create = svc::containers::v1::CreateContainerRequest {
            container: Some(record),
        };
        if client.containers().create(create).await.is_err() {
            break;
        }
        known.made.insert(id.clone());
        if n % 2 == 1 {
            let delete = svc::containers::v1::DeleteContainerRequest { id: id.clone() };
            // From here on either is right until the answer comes.
            known.made.remove(&id);
            if client.containers().delete(delete).await.is_err() {
                break;
            }
            known.removed.insert(id);
        }
    }
    known
}

#[tokio::test]
async fn what_was_acknowledged_survives_any_kill() -> Result {
    let mut daemon = Daemon::start().await?;
    let mut all = Acknowledged::default();
    for round in 0..rounds(daemon.subject()) {
        let client = daemon.client().await?;
        let workers: Vec<_> = (0..3)
            .map(|worker| tokio::spawn(work(client.clone(), round, worker)))
            .collect();
        tokio::time::sleep(Duration::from_millis(20 + u64::from(rand::random::<u8>()))).await;
        daemon.kill()?;
        for worker in workers {
            let known = worker.await?;
            all.made.extend(known.made);
            all.removed.extend(known.removed);
            all.blobs.extend(known.blobs);
        }
        daemon.boot().await?;
        let client = daemon.client().await?;
        let list = svc::containers::v1::ListContainersRequest { filters: vec![] };
        let listed: BTreeSet<String> = client
            .containers()
            .list(list)
            .await?
            .into_inner()
            .containers
            .into_iter()
            .map(|c| c.id)
            .collect();
        let lost: Vec<_> = all.made.difference(&listed).collect();
        assert!(lost.is_empty(), "round {round}: containers lost: {lost:?}");
        let risen: Vec<_> = all.removed.intersection(&listed).collect();
        assert!(
            risen.is_empty(),
            "round {round}: deleted containers are back: {risen:?}"
        );
    }
    let client = daemon.client().await?;
    for digest in &all.blobs {
        let data = client.read_blob(digest).await?;
        assert_eq!(&image::digest(&data), digest);
    }
    for id in &all.made {
        let mounts = svc::snapshots::v1::MountsRequest {
            snapshotter: "overlayfs".into(),
            key: id.clone(),
        };
        let mounts = client.snapshots().mounts(mounts).await?.into_inner().mounts;
        assert!(
            std::path::Path::new(&mounts[0].source).is_dir(),
            "{mounts:?}"
        );
    }
    assert!(
        !all.made.is_empty() && !all.blobs.is_empty(),
        "the workers did something"
    );
    daemon.finish().await
}
