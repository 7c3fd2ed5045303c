//! Stores in a temporary directory, images made by hand, clients of streams.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use lighter_proto::any;
use lighter_proto::containerd::types;
use lighter_proto::containerd::types::transfer as wire;
use lighter_proto::errdefs::{ErrorKind, WireError, render};
use lighter_snapshotter::Mount;
use lighter_snapshotter::Native;
use lighter_store::content::Local;
use lighter_store::events::Exchange;
use lighter_store::filter::Filter;
use lighter_store::metadata::{Content, Image, Lease, SharingPolicy};
use prost_types::Any;
use tempfile::TempDir;

use crate::image::{Applied, Applier, Descriptor, media};
use crate::streaming::Connection;
use crate::transfer::*;

/// Decompresses and hashes, and writes nothing.
#[derive(Debug)]
struct Hashing {
    content: Content,
    applied: Arc<AtomicUsize>,
}

#[async_trait]
impl Applier for Hashing {
    async fn apply(
        &self,
        scope: &Scope,
        layer: &Descriptor,
        _mounts: &[Mount],
    ) -> Result<Applied, WireError> {
        self.applied.fetch_add(1, Ordering::SeqCst);
        let failed =
            |error: &dyn std::error::Error| WireError::new(ErrorKind::Unknown, render(error));
        let bytes = self
            .content
            .read(scope, &layer.digest, 1 << 20)
            .await
            .map_err(|e| failed(&e))?;
        let mut plain = Vec::new();
        if bytes.starts_with(&[0x1f, 0x8b]) {
            let mut decoder = flate2::read::GzDecoder::new(bytes.as_ref());
            decoder.read_to_end(&mut plain).map_err(|e| failed(&e))?;
        } else {
            plain.extend_from_slice(&bytes);
        }
        Ok(Applied {
            diff_id: Digest::of(&plain),
            size_bytes: plain.len() as u64,
            leans_on: crate::diff::LeansOn::default(),
        })
    }
}

use lighter_store::Digest;

pub(super) struct Bench {
    pub(super) db: Db,
    pub(super) transfer: Transfer,
    pub(super) scope: Scope,
    pub(super) quiet: Tracker,
    pub(super) applied: Arc<AtomicUsize>,
    pub(super) tasks: TaskTracker,
    streams: Streams,
    _dir: TempDir,
}

impl Bench {
    pub(super) async fn new() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let root = dir.path().to_owned();
        let open = move || {
            let kv = lighter_kv::Db::in_memory().expect("kv");
            let native =
                Native::open(kv.clone(), b"native/", &root.join("native")).expect("native");
            let content = Local::open(&root.join("content")).expect("content");
            let snapshotters: BTreeMap<String, Arc<dyn lighter_snapshotter::Snapshotter>> =
                BTreeMap::from([("native".to_owned(), Arc::new(native) as _)]);
            Db::open(
                kv,
                Arc::new(content),
                snapshotters,
                Exchange::new(),
                SharingPolicy::Shared,
            )
            .expect("db")
        };
        let db = tokio::task::spawn_blocking(open).await.expect("opened");
        let applied = Arc::new(AtomicUsize::new(0));
        let applier = Hashing {
            content: db.content(),
            applied: Arc::clone(&applied),
        };
        let snapshotters = Snapshotters {
            appliers: BTreeMap::from([("native".to_owned(), Arc::new(applier) as _)]),
        };
        let config = Config {
            unpack: vec![UnpackSupport {
                platform: Platform::host(),
                snapshotter: "native".to_owned(),
            }],
            ..Config::default()
        };
        let streams = Streams::new();
        let tasks = TaskTracker::new();
        let registry = Registry::new(crate::registry::Config::default());
        let transfer = Transfer::new(
            db.clone(),
            registry,
            snapshotters,
            streams.clone(),
            config,
            tasks.clone(),
        );
        Self {
            db,
            transfer,
            scope: Scope::new(Namespace::new("test").expect("valid")),
            quiet: Tracker::default(),
            applied,
            tasks,
            streams,
            _dir: dir,
        }
    }

    pub(super) fn leases(&self) -> Vec<Lease> {
        self.db
            .leases()
            .list(&self.scope, &Filter::default())
            .expect("list")
    }

    pub(super) fn images(&self) -> Vec<Image> {
        self.db
            .images()
            .list(&self.scope, &Filter::default())
            .expect("list")
    }

    pub(super) fn client(&self, id: &str) -> Client {
        Client(self.streams.register(&self.scope, id).expect("new"))
    }

    pub(super) async fn transfer(
        &self,
        source: Any,
        destination: Any,
        progress: Option<&str>,
    ) -> Result<(), Error> {
        let namespace = &self.scope.namespace;
        let source = self.transfer.source(namespace, &source)?;
        let destination = self.transfer.destination(namespace, &destination)?;
        let watcher = progress
            .map(|id| self.transfer.stream(namespace, id))
            .transpose()?;
        self.transfer
            .transfer(&self.scope, source, destination, watcher)
            .await
    }

    pub(super) async fn export(&self, name: &str) -> Vec<u8> {
        let mut client = self.client("export");
        let destination = any::pack(&wire::ImageExportStream {
            stream: "export".into(),
            ..Default::default()
        });
        let (done, bytes) = tokio::join!(
            self.transfer(store(name, false), destination, None),
            client.receive_all()
        );
        done.expect("exported");
        bytes
    }

    pub(super) async fn import(&self, tar: Vec<u8>, destination: Any) -> Result<(), Error> {
        let client = self.client("import");
        let source = any::pack(&wire::ImageImportStream {
            stream: "import".into(),
            ..Default::default()
        });
        let (done, ()) = tokio::join!(
            self.transfer(source, destination, None),
            client.send_all(tar)
        );
        done
    }
}

pub(super) struct Client(Connection);

impl Client {
    pub(super) async fn events(&mut self) -> Vec<wire::Progress> {
        let mut events = Vec::new();
        while let Some(message) = self.0.outbound.recv().await {
            events.push(any::unpack(&message).expect("progress"));
        }
        events
    }

    async fn receive_all(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        let mut granted = 0;
        loop {
            if granted <= all.len() {
                granted += 65536;
                let grant = any::pack(&wire::WindowUpdate { update: 65536 });
                let _ = self.0.inbound.send(grant).await;
            }
            let Some(message) = self.0.outbound.recv().await else {
                return all;
            };
            let data: wire::Data = any::unpack(&message).expect("data");
            all.extend_from_slice(&data.data);
        }
    }

    async fn send_all(self, bytes: Vec<u8>) {
        let Connection {
            inbound,
            mut outbound,
            registration,
        } = self.0;
        let send = async move {
            for piece in bytes.chunks(30_000) {
                let data = wire::Data {
                    data: piece.to_vec(),
                };
                if inbound.send(any::pack(&data)).await.is_err() {
                    break;
                }
            }
        };
        let drain = async { while outbound.recv().await.is_some() {} };
        tokio::join!(send, drain);
        drop(registration);
    }
}

pub(super) fn registry(reference: &str) -> Any {
    any::pack(&wire::OciRegistry {
        reference: reference.to_owned(),
        resolver: None,
    })
}

fn unpack_host() -> wire::UnpackConfiguration {
    wire::UnpackConfiguration {
        platform: Some(types::Platform::from(Platform::host())),
        snapshotter: "native".into(),
    }
}

pub(super) fn store(name: &str, unpack: bool) -> Any {
    any::pack(&wire::ImageStore {
        name: name.to_owned(),
        unpacks: if unpack {
            vec![unpack_host()]
        } else {
            Vec::new()
        },
        ..Default::default()
    })
}

/// For this host alone.
pub(super) fn store_here(name: &str, unpack: bool) -> Any {
    any::pack(&wire::ImageStore {
        name: name.to_owned(),
        platforms: vec![types::Platform::from(Platform::host())],
        unpacks: if unpack {
            vec![unpack_host()]
        } else {
            Vec::new()
        },
        ..Default::default()
    })
}

pub(super) fn prefixed(prefix: &str, allow_overwrite: bool) -> Any {
    any::pack(&wire::ImageStore {
        extra_references: vec![wire::ImageReference {
            name: prefix.to_owned(),
            is_prefix: true,
            allow_overwrite,
            ..Default::default()
        }],
        unpacks: vec![unpack_host()],
        ..Default::default()
    })
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("compresses");
    encoder.finish().expect("compresses")
}

pub(super) fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = ::tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = ::tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, name, *bytes)
            .expect("appends");
    }
    builder.into_inner().expect("ends")
}

pub(super) fn names_in(tar: &[u8]) -> Vec<String> {
    let mut archive = ::tar::Archive::new(tar);
    let entries = archive.entries().expect("a tar");
    entries
        .map(|entry| {
            entry
                .expect("an entry")
                .path()
                .expect("a path")
                .to_string_lossy()
                .trim_end_matches('/')
                .to_owned()
        })
        .collect()
}

/// An image for this host (and one for another system that nobody has).
#[derive(Clone)]
pub(super) struct TestImage {
    pub(super) blobs: BTreeMap<String, (String, Vec<u8>)>,
    pub(super) index: Descriptor,
    pub(super) manifest: Descriptor,
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
    pub(super) diff_ids: Vec<Digest>,
    plain: Vec<Vec<u8>>,
}

impl TestImage {
    pub(super) fn new(layers: usize) -> Self {
        let plain: Vec<Vec<u8>> = (0..layers)
            .map(|n| tar_of(&[(&format!("file-{n}"), format!("content {n}").as_bytes())]))
            .collect();
        let diff_ids = plain.iter().map(|p| Digest::of(p)).collect();
        let mut image = Self {
            blobs: BTreeMap::new(),
            index: Descriptor::of(media::OCI_INDEX, b""),
            manifest: Descriptor::of(media::OCI_MANIFEST, b""),
            config: Descriptor::of(media::OCI_CONFIG, b""),
            layers: Vec::new(),
            diff_ids,
            plain,
        };
        image.layers = image
            .plain
            .clone()
            .iter()
            .map(|p| image.put(media::OCI_LAYER_GZIP, &gzip(p)))
            .collect();
        image.finish();
        image
    }

    /// The configuration lies about its first layer.
    pub(super) fn spoil_diff_id(&mut self) {
        self.diff_ids[0] = Digest::of(b"another layer");
        self.finish();
    }

    fn put(&mut self, media_type: &str, bytes: &[u8]) -> Descriptor {
        let descriptor = Descriptor::of(media_type, bytes);
        let blob = (media_type.to_owned(), bytes.to_vec());
        self.blobs.insert(descriptor.digest.to_string(), blob);
        descriptor
    }

    pub(super) fn config_bytes(&self) -> Vec<u8> {
        let host = Platform::host();
        let ids: Vec<String> = self.diff_ids.iter().map(ToString::to_string).collect();
        serde_json::to_vec(&serde_json::json!({
            "os": host.os, "architecture": host.architecture,
            "rootfs": {"type": "layers", "diff_ids": ids},
        }))
        .expect("json")
    }

    fn finish(&mut self) {
        let config = self.config_bytes();
        self.config = self.put(media::OCI_CONFIG, &config);
        let layers: Vec<_> = self.layers.iter().map(Descriptor::to_wire).collect();
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": media::OCI_MANIFEST,
            "config": self.config.to_wire(), "layers": layers,
        });
        self.manifest = self.put(
            media::OCI_MANIFEST,
            &serde_json::to_vec(&manifest).expect("json"),
        );
        let mut here = self.manifest.clone();
        here.platform = Some(Platform::host());
        let mut elsewhere = Descriptor::of(media::OCI_MANIFEST, b"nobody has this");
        elsewhere.platform = Some(Platform::new("windows", "arm64", ""));
        let index = serde_json::json!({
            "schemaVersion": 2, "mediaType": media::OCI_INDEX,
            "manifests": [here.to_wire(), elsewhere.to_wire()],
        });
        self.index = self.put(media::OCI_INDEX, &serde_json::to_vec(&index).expect("json"));
    }

    /// As `docker save` of old writes it.
    pub(super) fn docker_save(&self, tags: &[&str]) -> Vec<u8> {
        let config = self.config_bytes();
        let config_name = format!("{}.json", Digest::of(&config).hex());
        let names: Vec<String> = (0..self.plain.len())
            .map(|n| format!("{n}/layer.tar"))
            .collect();
        let manifest =
            serde_json::json!([{"Config": config_name, "RepoTags": tags, "Layers": names}]);
        let manifest = serde_json::to_vec(&manifest).expect("json");
        let mut files: Vec<(&str, &[u8])> = vec![(&config_name, &config)];
        for (name, plain) in names.iter().zip(&self.plain) {
            files.push((name, plain));
        }
        files.push(("manifest.json", &manifest));
        tar_of(&files)
    }
}
