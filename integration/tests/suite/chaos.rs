//! The daemon is killed at random moments; what it acknowledged is there afterwards.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use lighter_integration::{
    Cli, Client, Daemon, Image, Layer, Registry, Result, Spec, Subject, image,
};
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
        // The reference loses the directory of one now and then.
        assert!(
            daemon.subject() == Subject::Containerd
                || std::path::Path::new(&mounts[0].source).is_dir(),
            "{mounts:?}"
        );
    }
    assert!(
        !all.made.is_empty() && !all.blobs.is_empty(),
        "the workers did something"
    );
    daemon.finish().await
}

/// Images of one round, with layers of their own so that each pull has something to do.
fn cargo(round: u32) -> Result<Vec<Image>> {
    (0..3)
        .map(|n| {
            let text = format!("round {round}, image {n}\n").repeat(5_000);
            let file = |name: &str| Layer::files(&[(name, text.as_bytes())]);
            Image::new("x", vec![Layer::busybox()?, file("a")?, file("b")?])
        })
        .collect()
}

/// Pulls one image after another until the daemon goes away; those that were acknowledged.
fn pull_all(ctr: &Cli, references: &[String]) -> Vec<String> {
    let pulled = |reference: &&String| {
        let args = ["images", "pull", "--plain-http", reference.as_str()];
        ctr.run(&args).is_ok_and(|output| output.code == 0)
    };
    references.iter().take_while(pulled).cloned().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pulled_image_survives_any_kill_and_a_broken_pull_leaves_nothing() -> Result {
    let mut daemon = Daemon::start().await?;
    let registry = Registry::start().await?;
    // Both ways: through the daemon's transfers, and by a client that brings the bytes.
    let clients = match daemon.subject() {
        Subject::Lighter => vec![daemon.our_ctr(), daemon.debian_ctr()],
        Subject::Containerd => vec![daemon.debian_ctr()],
    };
    let mut all = BTreeSet::new();
    for round in 0..rounds(daemon.subject()) / 5 {
        let mut references = Vec::new();
        for (n, image) in cargo(round)?.iter().enumerate() {
            references.push(registry.push(image, &format!("r{round}/i{n}"), "1")?);
        }
        let ctr = clients[usize::try_from(round)? % clients.len()].clone();
        let worker = tokio::task::spawn_blocking(move || pull_all(&ctr, &references));
        let pause = u64::from(rand::random::<u8>()) * 4;
        tokio::time::sleep(Duration::from_millis(20 + pause)).await;
        daemon.kill()?;
        let pulled = worker.await?;
        daemon.boot().await?;
        all.extend(pulled);
        let listed = daemon.debian_ctr().run(&["images", "ls", "-q"])?.ok()?;
        let listed: BTreeSet<&str> = listed.lines().collect();
        let lost: Vec<_> = all
            .iter()
            .filter(|name| !listed.contains(name.as_str()))
            .collect();
        assert!(lost.is_empty(), "round {round}: images lost: {lost:?}");
    }
    let ctr = daemon.debian_ctr();
    let checked = ctr.run(&["images", "check", "-q"])?.ok()?;
    let complete: BTreeSet<&str> = checked.lines().collect();
    for name in &all {
        assert!(complete.contains(name.as_str()), "{name} is not complete");
    }
    if let Some(name) = all.last() {
        let out = ctr.run(&["run", "--rm", name, "last", "cat", "/b"])?.ok()?;
        assert!(out.starts_with("round "), "{out:?}");
    }
    // What broken pulls left goes with their leases, everything else with the images.
    let leases = ctr.run(&["leases", "ls", "-q"])?.ok()?;
    for lease in leases.lines() {
        ctr.run(&["leases", "rm", lease])?.ok()?;
    }
    let listed = ctr.run(&["images", "ls", "-q"])?.ok()?;
    for name in listed.lines() {
        ctr.run(&["images", "rm", "--sync", name])?.ok()?;
    }
    let lease = ctr.run(&["leases", "create"])?.ok()?;
    ctr.run(&["leases", "rm", "--sync", lease.trim()])?.ok()?;
    assert_eq!(ctr.run(&["content", "ls", "-q"])?.ok()?, "");
    assert_eq!(ctr.run(&["snapshots", "ls"])?.ok()?.lines().count(), 1);
    daemon.finish().await
}
