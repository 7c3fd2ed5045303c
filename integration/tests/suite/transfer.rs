//! Transfers: pairs that there are and pairs that there are not, streams, the same archive again.

use lighter_integration::{Blob, Client, Daemon, Image, Options, Result, Subject, eventually};
use lighter_proto::any;
use lighter_proto::containerd::services::images::v1 as images;
use lighter_proto::containerd::services::snapshots::v1 as snapshots;
use lighter_proto::containerd::services::transfer::v1::{TransferOptions, TransferRequest};
use lighter_proto::containerd::types::transfer as types;
use prost::Name;
use prost_types::Any;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

pub(crate) async fn transfer(
    client: &Client,
    source: Any,
    destination: Any,
    progress: &str,
) -> Result<(), Status> {
    let request = TransferRequest {
        source: Some(source),
        destination: Some(destination),
        options: Some(TransferOptions {
            progress_stream: progress.to_owned(),
        }),
    };
    client.transfer().transfer(request).await.map(drop)
}

fn store(name: &str) -> Any {
    any::pack(&types::ImageStore {
        name: name.to_owned(),
        ..Default::default()
    })
}

/// The store, for images of an archive by the names that they have there.
fn named(unpacks: Vec<types::UnpackConfiguration>) -> Any {
    any::pack(&types::ImageStore {
        extra_references: vec![types::ImageReference {
            name: "import".to_owned(),
            is_prefix: true,
            allow_overwrite: true,
            ..Default::default()
        }],
        unpacks,
        ..Default::default()
    })
}

/// Opens a stream; what comes from the daemon, and where to send.
pub(crate) async fn open(
    client: &Client,
    id: &str,
) -> Result<(mpsc::Sender<Any>, tonic::Streaming<Any>), Status> {
    client.open_stream(id).await
}

/// Sends `bytes` as the window allows, and then the end of the data.
pub(crate) fn feed(
    data: mpsc::Sender<Any>,
    mut window: tonic::Streaming<Any>,
    bytes: Vec<u8>,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut left = &bytes[..];
        let mut granted = 0_usize;
        while !left.is_empty() {
            while granted == 0 {
                let Ok(Some(message)) = window.message().await else {
                    return;
                };
                let update: types::WindowUpdate = any::unpack(&message).expect("an update");
                granted += usize::try_from(update.update).unwrap_or_default();
            }
            let (now, later) = left.split_at(left.len().min(32 << 10).min(granted));
            granted -= now.len();
            let message = any::pack(&types::Data { data: now.to_vec() });
            if data.send(message).await.is_err() {
                return;
            }
            left = later;
        }
        // Dropping the answers as well would cut off what is under way.
        drop(data);
        while let Ok(Some(_)) = window.message().await {}
    })
}

/// Imports `archive` the way clients do; returns the events of its progress.
async fn import(client: &Client, archive: &[u8], round: u32, to: Any) -> Result<Vec<String>> {
    let (data_id, progress_id) = (format!("data-{round}"), format!("progress-{round}"));
    let (data, window) = open(client, &data_id).await?;
    let (_open, mut progress) = open(client, &progress_id).await?;
    let feeder = feed(data, window, archive.to_vec());
    let events = tokio::spawn(async move {
        let mut events = Vec::new();
        while let Ok(Some(message)) = progress.message().await {
            if let Ok(event) = any::unpack::<types::Progress>(&message) {
                events.push(event.event);
            }
        }
        events
    });
    let source = any::pack(&types::ImageImportStream {
        stream: data_id,
        ..Default::default()
    });
    transfer(client, source, to, &progress_id).await?;
    feeder.await?;
    Ok(tokio::time::timeout(std::time::Duration::from_secs(20), events).await??)
}

/// From stream to stream: clients try this way whether streams work.
#[tokio::test]
async fn what_an_import_brings_an_export_takes_unchanged() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    if !client.is_recent().await? {
        return daemon.finish().await;
    }
    for (round, length) in [0, 1, 200_000].into_iter().enumerate() {
        let (from, to) = (format!("from-{round}"), format!("to-{round}"));
        let (data, window) = open(&client, &from).await?;
        let (grant, mut back) = open(&client, &to).await?;
        let sent: Vec<u8> = (0..length).map(|n: u32| n.to_le_bytes()[0]).collect();
        let feeder = feed(data, window, sent.clone());
        let taker = tokio::spawn(async move {
            let mut got = Vec::new();
            let window = any::pack(&types::WindowUpdate { update: 1 << 20 });
            let _ = grant.send(window).await;
            while let Ok(Some(message)) = back.message().await {
                if let Ok(data) = any::unpack::<types::Data>(&message) {
                    got.extend(data.data);
                }
            }
            got
        });
        let source = any::pack(&types::ImageImportStream {
            stream: from,
            ..Default::default()
        });
        let destination = any::pack(&types::ImageExportStream {
            stream: to,
            ..Default::default()
        });
        transfer(&client, source, destination, "").await?;
        assert!(taker.await? == sent, "{length} bytes came back changed");
        feeder.await?;
    }
    daemon.finish().await
}

#[tokio::test]
async fn the_same_archive_is_imported_again_and_again() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    if !client.is_recent().await? {
        return daemon.finish().await;
    }
    let image = Image::busybox("docker.io/test/again:1")?;
    let archive = image.oci_archive()?;
    let get = images::GetImageRequest {
        name: image.name.clone(),
    };
    for round in 0..4 {
        let events = import(&client, &archive, round, named(vec![])).await?;
        assert!(!events.is_empty(), "round {round} tells of its progress");
        let found = client.images().get(get.clone()).await?.into_inner().image;
        let target = found.and_then(|image| image.target).unwrap_or_default();
        assert_eq!(target.digest, image.manifest.digest);
        assert_eq!(client.read_blob(&target.digest).await?, image.manifest.data);
        if round == 1 {
            // The record goes, the blobs wait for a collection.
            let delete = images::DeleteImageRequest {
                name: image.name.clone(),
                sync: false,
                target: None,
            };
            client.images().delete(delete).await?;
        }
        if round == 2 {
            client.collect().await?;
        }
    }
    daemon.finish().await
}

/// GHSA-5j5w-g665-5m35: a document that is a manifest to one reader and an index to another was read
/// as whichever its label said. GHSA-259w-8hf6-59c2: JSON of an archive was read without bounds.
#[tokio::test]
async fn archives_that_say_two_things_or_too_much_are_refused() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    if !client.is_recent().await? {
        return daemon.finish().await;
    }
    let image = Image::busybox("docker.io/test/two:1")?;
    let manifest: Value = serde_json::from_slice(&image.manifest.data)?;
    let ambiguous = |key: &str, value: Value| -> Result<Vec<u8>> {
        let mut document = manifest.clone();
        document[key] = value;
        let mut image = image.clone();
        let kind = image.manifest.media_type.clone();
        image.manifest = Blob::new(&kind, serde_json::to_vec(&document)?);
        image.oci_archive()
    };
    let index = "application/vnd.oci.image.index.v1+json";
    let unpack = types::UnpackConfiguration {
        snapshotter: "overlayfs".to_owned(),
        ..Default::default()
    };
    let mut bomb = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(21 << 20);
    let blank = vec![b' '; 21 << 20];
    bomb.append_data(&mut header, "manifest.json", &blank[..])?;
    let both = ambiguous("manifests", json!([image.manifest.descriptor()]))?;
    let mislabelled = ambiguous("mediaType", json!(index))?;
    for (round, archive, why) in [
        (0, both, "expected manifest but found index"),
        (1, mislabelled, "expected manifest but found index"),
        (2, bomb.into_inner()?, "larger than"),
    ] {
        let to = named(vec![unpack.clone()]);
        let refused = import(&client, &archive, round, to).await.unwrap_err();
        assert!(refused.to_string().contains(why), "{refused}");
    }
    let listed = client
        .images()
        .list(images::ListImagesRequest::default())
        .await?;
    assert!(
        listed.into_inner().images.is_empty(),
        "no image is recorded"
    );
    daemon.finish().await
}

#[tokio::test]
async fn a_pair_that_makes_no_sense_is_named() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    if !client.is_recent().await? {
        return daemon.finish().await;
    }
    let registry = any::pack(&types::OciRegistry {
        reference: "localhost:1/a:1".to_owned(),
        ..Default::default()
    });
    let status = transfer(&client, registry.clone(), registry, "").await;
    let status = status.expect_err("no such pair");
    assert_eq!(status.code(), Code::Unimplemented, "{status}");
    assert!(status.message().contains("not implemented"), "{status}");
    let import = any::pack(&types::ImageImportStream {
        stream: "nosuch".to_owned(),
        ..Default::default()
    });
    let status = transfer(&client, import, store("x"), "")
        .await
        .expect_err("no such stream");
    assert_eq!(status.code(), Code::NotFound, "{status}");
    let unknown = Any {
        type_url: "example.com/no.such.Type".to_owned(),
        value: vec![],
    };
    let status = transfer(&client, store("x"), unknown, "").await;
    status.expect_err("no such destination");
    let status = transfer(&client, store("nosuch:1"), store("other:1"), "").await;
    assert_eq!(status.expect_err("no such image").code(), Code::NotFound);
    assert_eq!(
        types::ImageStore::full_name(),
        "containerd.types.transfer.ImageStore"
    );
    eventually("nothing is left", async || {
        let leases =
            lighter_proto::containerd::services::leases::v1::ListRequest { filters: vec![] };
        let left = client.leases().list(leases).await?.into_inner().leases;
        Ok(left.is_empty().then_some(()))
    })
    .await?;
    daemon.finish().await
}

#[tokio::test]
async fn the_configuration_says_what_may_be_unpacked() -> Result {
    let platform = match std::env::consts::ARCH {
        "x86_64" => "linux/amd64",
        _ => "linux/arm64",
    };
    let options = Options {
        config: format!(
            "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = \
             '{platform}'\nsnapshotter = 'native'\ndiffer = 'walking'\n"
        ),
        ..Options::default()
    };
    let daemon = Daemon::start_with(Subject::of_run(), &options).await?;
    let client = daemon.client().await?;
    if !client.is_recent().await? {
        return daemon.finish().await;
    }
    let image = Image::busybox("docker.io/test/unpacked:1")?;
    let (os, architecture) = platform.split_once('/').unwrap_or_default();
    // The second wish is none that the configuration offers: it is left out.
    let unpacks = ["native", "overlayfs"].map(|snapshotter| types::UnpackConfiguration {
        platform: Some(lighter_proto::containerd::types::Platform {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            ..Default::default()
        }),
        snapshotter: snapshotter.to_owned(),
    });
    import(&client, &image.oci_archive()?, 0, named(unpacks.to_vec())).await?;
    let chain = image.chain_id(image.layers.len());
    for (snapshotter, unpacked) in [("native", true), ("overlayfs", false)] {
        let stat = snapshots::StatSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: chain.clone(),
        };
        let found = client.snapshots().stat(stat).await;
        assert_eq!(found.is_ok(), unpacked, "{snapshotter}: {found:?}");
    }
    daemon.finish().await
}
