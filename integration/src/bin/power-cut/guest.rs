//! Inside the machine: compares what is there with what was acknowledged, then works until the power is gone.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use lighter_integration::{Blob, Client, Image, Layer, Result, Spec, built, image};
use lighter_proto::any;
use lighter_proto::containerd::services as svc;
use nix::mount::MsFlags;

use crate::fact::{Fact, Kind, Known};

/// Half minutes that the daemon may take to start: emulated, on a machine that does other things as well.
const START_WAITS: u32 = 4;
const DATA: &str = "/data";
const SOCKET: &str = "/run/lighter.sock";
const NAMESPACE: &str = "power";
/// Bytes of a worker's blob, at least: more than a page, so that a cut can tear it.
const BLOB_BYTES: usize = 20_000;
const WORKERS: u32 = 3;

/// The serial line. Shared by the workers: a line is written whole.
#[derive(Debug, Clone)]
struct Line(Arc<Mutex<File>>);

impl Line {
    fn say(&self, fact: &Fact) {
        let mut line = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody listens: then nobody counts on it either.
        let _ = line.write_all(format!("\n{fact}\n").as_bytes());
    }
}

pub(crate) fn run() -> Result<()> {
    let line = File::options().write(true).open("/dev/ttyS1")?;
    let line = Line(Arc::new(Mutex::new(line)));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let done = runtime.block_on(live(&line));
    if let Err(error) = &done {
        line.say(&Fact::Wrong(format!("{error:#}")));
    }
    done
}

async fn live(line: &Line) -> Result<()> {
    let mut text = Vec::new();
    File::open("/dev/vdc")?.read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let mut known = Known::default();
    text.lines()
        .filter_map(Fact::read)
        .for_each(|fact| known.learn(&fact));

    std::fs::create_dir_all(DATA)?;
    nix::mount::mount(
        Some("/dev/vdb"),
        DATA,
        Some("ext4"),
        MsFlags::empty(),
        None::<&str>,
    )
    .context("mount the data disk")?;
    let config = format!(
        "version = 2\nroot = '{DATA}/root'\nstate = '/run/lighter'\ndisabled_plugins = ['io.containerd.grpc.v1.cri']\n\
         [grpc]\naddress = '{SOCKET}'\n[debug]\nlevel = 'warn'\n"
    );
    std::fs::write("/run/config.toml", config)?;
    let log = File::create("/run/lighterd.log")?;
    let _daemon = Command::new(built("lighterd"))
        .args(["--config", "/run/config.toml"])
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    let mut waits = START_WAITS;
    let client = loop {
        let up = lighter_integration::eventually("the daemon starts after the cut", async || {
            let Ok(client) = Client::connect(Path::new(SOCKET), NAMESPACE).await else {
                return Ok(None);
            };
            Ok(client.version().await.is_ok().then_some(client))
        });
        match up.await {
            Ok(client) => break client,
            Err(_) if waits > 1 => waits -= 1,
            Err(error) => {
                let log = std::fs::read_to_string("/run/lighterd.log").unwrap_or_default();
                let tail: Vec<_> = log.lines().rev().take(5).collect();
                anyhow::bail!("{error}: {tail:?}");
            }
        }
    };
    let wrong = compare(&client, &known).await?;
    anyhow::ensure!(
        wrong.is_empty(),
        "{} wrong: {:?}",
        wrong.len(),
        &wrong[..wrong.len().min(5)]
    );
    line.say(&Fact::Compared(known.there.len() + known.gone.len()));
    work(&client, line).await
}

/// Everything that is not as acknowledged.
async fn compare(client: &Client, known: &Known) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let containers = containers(client).await?;
    for ((kind, name), digest) in &known.there {
        let found = match kind {
            Kind::Container => containers.get(name).cloned().context("is lost"),
            Kind::Blob => blob(client, name).await,
            Kind::Image => image_target(client, name).await,
            Kind::Active => active(client, name).await,
            Kind::Unpacked => unpacked(client, name).await,
        };
        match found {
            Ok(found) if found == *digest => {}
            Ok(found) => wrong.push(format!("{kind:?} {name}: {found} instead of {digest}")),
            Err(error) => wrong.push(format!("{kind:?} {name}: {error:#}")),
        }
    }
    for (kind, name) in &known.gone {
        if *kind == Kind::Container && containers.contains_key(name) {
            wrong.push(format!("{kind:?} {name}: was removed and is back"));
        }
    }
    Ok(wrong)
}

async fn containers(client: &Client) -> Result<BTreeMap<String, String>> {
    let list = svc::containers::v1::ListContainersRequest { filters: vec![] };
    let listed = client
        .containers()
        .list(list)
        .await?
        .into_inner()
        .containers;
    let digest = |spec: Option<prost_types::Any>| image::digest(&spec.unwrap_or_default().value);
    Ok(listed
        .into_iter()
        .map(|found| (found.id, digest(found.spec)))
        .collect())
}

async fn blob(client: &Client, digest: &str) -> Result<String> {
    Ok(image::digest(&client.read_blob(digest).await?))
}

async fn image_target(client: &Client, name: &str) -> Result<String> {
    let get = svc::images::v1::GetImageRequest {
        name: name.to_owned(),
    };
    let found = client.images().get(get).await?.into_inner().image;
    let target = found
        .and_then(|image| image.target)
        .unwrap_or_default()
        .digest;
    // What it refers to is there as well.
    anyhow::ensure!(
        blob(client, &target).await? == target,
        "its manifest is damaged"
    );
    Ok(target)
}

async fn active(client: &Client, key: &str) -> Result<String> {
    let mounts = svc::snapshots::v1::MountsRequest {
        snapshotter: "overlayfs".into(),
        key: key.to_owned(),
    };
    let mounts = client.snapshots().mounts(mounts).await?.into_inner().mounts;
    let source = &mounts.first().context("has no mount")?.source;
    anyhow::ensure!(Path::new(source).is_dir(), "its directory {source} is lost");
    Ok("-".into())
}

/// The digest of the one file of an unpacked snapshot, through a view.
async fn unpacked(client: &Client, name: &str) -> Result<String> {
    use svc::snapshots::v1::{RemoveSnapshotRequest, ViewSnapshotRequest};
    let snapshotter = || "overlayfs".to_owned();
    let key = format!("view-{name}");
    let view = ViewSnapshotRequest {
        snapshotter: snapshotter(),
        key: key.clone(),
        parent: name.to_owned(),
        labels: HashMap::new(),
    };
    let mounts = client.snapshots().view(view).await?.into_inner().mounts;
    let source = &mounts.first().context("has no mount")?.source;
    let data = std::fs::read(Path::new(source).join("file")).context("read its file");
    let remove = RemoveSnapshotRequest {
        snapshotter: snapshotter(),
        key,
    };
    client.snapshots().remove(remove).await?;
    Ok(image::digest(&data?))
}

async fn work(client: &Client, line: &Line) -> Result<()> {
    let mut workers = tokio::task::JoinSet::new();
    for worker in 0..WORKERS {
        let (client, line) = (client.clone(), line.clone());
        workers.spawn(async move {
            for n in 0_u32.. {
                let id = format!("{:x}-{worker}-{n}", rand::random::<u32>());
                step(&client, &line, &id, n).await?;
            }
            Ok::<_, anyhow::Error>(())
        });
    }
    while let Some(ended) = workers.join_next().await {
        ended??;
    }
    tokio::time::sleep(Duration::MAX).await;
    Ok(())
}

/// One of everything, each said when it was acknowledged.
async fn step(client: &Client, line: &Line, id: &str, n: u32) -> Result<()> {
    let mut data = vec![0; BLOB_BYTES];
    rand::fill(&mut data[..]);
    let root = || HashMap::from([("containerd.io/gc.root".to_owned(), "test".to_owned())]);
    let digest = image::digest(&data);
    client
        .write_blob(&format!("blob-{id}"), &digest, &data, root())
        .await?;
    line.say(&Fact::Made(Kind::Blob, digest.clone(), digest.clone()));

    let prepare = svc::snapshots::v1::PrepareSnapshotRequest {
        snapshotter: "overlayfs".into(),
        key: id.to_owned(),
        parent: String::new(),
        labels: root(),
    };
    client.snapshots().prepare(prepare).await?;
    line.say(&Fact::Made(Kind::Active, id.to_owned(), "-".into()));

    let spec = any::pack_json(any::SPEC, &Spec::new(NAMESPACE, id, &["true"]).0)?;
    let digest = image::digest(&spec.value);
    let record = svc::containers::v1::Container {
        id: id.to_owned(),
        runtime: Some(svc::containers::v1::container::Runtime {
            name: "io.containerd.runc.v2".into(),
            options: None,
        }),
        spec: Some(spec),
        snapshotter: "overlayfs".into(),
        snapshot_key: id.to_owned(),
        ..Default::default()
    };
    let create = svc::containers::v1::CreateContainerRequest {
        container: Some(record),
    };
    client.containers().create(create).await?;
    line.say(&Fact::Made(Kind::Container, id.to_owned(), digest));
    if n % 2 == 1 {
        line.say(&Fact::Removing(Kind::Container, id.to_owned()));
        let delete = svc::containers::v1::DeleteContainerRequest { id: id.to_owned() };
        client.containers().delete(delete).await?;
        line.say(&Fact::Removed(Kind::Container, id.to_owned()));
    }
    if n.is_multiple_of(3) {
        let layer = Layer::files(&[("file", &data)])?;
        let made = Image::new(&format!("docker.io/test/{id}:latest"), vec![layer])?;
        client.store(&made).await?;
        let Blob { digest, .. } = &made.manifest;
        line.say(&Fact::Made(Kind::Image, made.name.clone(), digest.clone()));
        let top = client.unpack(&made, "overlayfs").await?;
        line.say(&Fact::Made(Kind::Unpacked, top, image::digest(&data)));
    }
    Ok(())
}
