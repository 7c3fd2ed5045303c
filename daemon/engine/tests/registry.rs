//! Pull and push against Debian's `docker-registry`, with and without passwords, through real
//! stores and the real differ. Skipped with a message where that program is not installed.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use lighter_engine::differ::{Differs, LocalDiffer};
use lighter_engine::image::children::Layers;
use lighter_engine::image::{
    Applier, Descriptor, Matcher, Platform, Snapshotters, Tracker, chain_ids, media,
};
use lighter_engine::registry::{
    self, Access, Credential, OneHost, Registry, Secret, SessionOptions,
};
use lighter_engine::streaming::Streams;
use lighter_engine::transfer::{
    Config, Destination, Pull, RegistryEnd, Select, Source, StoreEnd, Transfer, UnpackRequest,
};
use lighter_proto::errdefs::{Classify, ErrorKind, render};
use lighter_snapshotter::{Native, Snapshotter};
use lighter_store::content::Local;
use lighter_store::events::Exchange;
use lighter_store::metadata::{Db, Image, SharingPolicy};
use lighter_store::{Digest, Labels, Namespace, Scope};
use tokio_util::task::TaskTracker;

/// `user` / `secret`, as htpasswd writes it.
const HTPASSWD: &str = "user:$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n";

struct Server {
    child: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `None` where the registry is not installed.
fn serve(dir: &Path, password: bool) -> Option<Server> {
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.local_addr().expect("bound").port()
    };
    let address = format!("127.0.0.1:{port}");
    std::fs::create_dir_all(dir).expect("mkdir");
    let shown = dir.display();
    let mut config = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {shown}/data}}}}\nhttp: {{addr: \"{address}\"}}\n"
    );
    if password {
        std::fs::write(dir.join("htpasswd"), HTPASSWD).expect("write");
        config.push_str(&format!(
            "auth: {{htpasswd: {{realm: here, path: {shown}/htpasswd}}}}\n"
        ));
    }
    let file = dir.join("config.yml");
    std::fs::write(&file, config).expect("write");
    let child = Command::new("docker-registry")
        .arg("serve")
        .arg(&file)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(child) = child else {
        eprintln!("skipped: install docker-registry to run this test");
        return None;
    };
    let server = Server { child, address };
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::net::TcpStream::connect(&server.address).is_err() {
        assert!(Instant::now() < deadline, "the registry does not come up");
        std::thread::sleep(Duration::from_millis(20));
    }
    Some(server)
}

struct Daemon {
    db: Db,
    transfer: Transfer,
    scope: Scope,
}

async fn daemon(dir: &Path) -> Daemon {
    let dir = dir.to_owned();
    let open = move || {
        let kv = lighter_kv::Db::in_memory().expect("kv");
        let native = Native::open(kv.clone(), b"native/", &dir.join("native")).expect("native");
        let content = Local::open(&dir.join("content")).expect("content");
        let snapshotters: BTreeMap<String, Arc<dyn Snapshotter>> =
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
    let differ = LocalDiffer {
        content: db.content(),
        processors: Arc::from([]),
        limits: Default::default(),
        sync_fs: false,
        temp_dir: std::env::temp_dir(),
    };
    let applier: Arc<dyn Applier> = Arc::new(Differs::new(vec![Arc::new(differ)]));
    let transfer = Transfer::new(
        db.clone(),
        Registry::new(registry::Config::default()),
        Snapshotters {
            appliers: BTreeMap::from([("native".to_owned(), applier)]),
        },
        Streams::new(),
        Config::default(),
        TaskTracker::new(),
    );
    Daemon {
        db,
        transfer,
        scope: Scope::new(Namespace::new("test").expect("valid")),
    }
}

fn layer(n: u8) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    // Incompressible and larger than one write, the second larger than one ranged request.
    let bytes: Vec<u8> = (0..u32::from(n) * 20_000_000)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0])
        .collect();
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o640);
    builder
        .append_data(&mut header, format!("dir/file-{n}"), bytes.as_slice())
        .expect("appends");
    builder.into_inner().expect("ends")
}

impl Daemon {
    async fn put(&self, media_type: &str, bytes: &[u8]) -> Descriptor {
        let descriptor = Descriptor::of(media_type, bytes);
        let (content, digest) = (self.db.content(), descriptor.digest.clone());
        let reference = digest.to_string();
        let size = bytes.len() as u64;
        let mut writer = content
            .writer(&self.scope, &reference, size, Some(&digest))
            .await
            .expect("new");
        writer.write(bytes.to_vec().into()).await.expect("written");
        writer
            .commit(size, Some(&digest), Labels::new())
            .await
            .expect("committed");
        descriptor
    }

    /// An image of two layers, one gzip and one zstd, under `name`.
    async fn make_image(&self, name: &str) -> Vec<Digest> {
        let plain = [layer(1), layer(2)];
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain[0]).expect("compresses");
        let gzip = self
            .put(media::OCI_LAYER_GZIP, &gzip.finish().expect("compresses"))
            .await;
        let zstd = zstd::encode_all(plain[1].as_slice(), 1).expect("compresses");
        let zstd = self
            .put("application/vnd.oci.image.layer.v1.tar+zstd", &zstd)
            .await;
        let diff_ids: Vec<Digest> = plain.iter().map(|p| Digest::of(p)).collect();
        let ids: Vec<&str> = diff_ids.iter().map(Digest::as_str).collect();
        let host = Platform::host();
        let config = serde_json::json!({
            "os": host.os, "architecture": host.architecture,
            "rootfs": {"type": "layers", "diff_ids": ids},
        });
        let config = self
            .put(media::OCI_CONFIG, config.to_string().as_bytes())
            .await;
        let wire = |d: &Descriptor| serde_json::json!({"mediaType": d.media_type, "digest": d.digest.as_str(), "size": d.size_bytes});
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": media::OCI_MANIFEST,
            "config": wire(&config), "layers": [wire(&gzip), wire(&zstd)],
        });
        let manifest = self
            .put(media::OCI_MANIFEST, manifest.to_string().as_bytes())
            .await;
        let now = SystemTime::now();
        let image = Image {
            name: name.to_owned(),
            labels: Labels::new(),
            target: (&manifest).into(),
            created_at: now,
            updated_at: now,
        };
        self.db
            .images()
            .create(&self.scope, image, None)
            .await
            .expect("recorded");
        diff_ids
    }

    async fn push(&self, name: &str, session: SessionOptions) -> Result<(), String> {
        let from = StoreEnd {
            name: name.to_owned(),
            labels: Labels::new(),
            platforms: Vec::new(),
            select: Select {
                matcher: Matcher::all(),
                limit: 0,
                all_metadata: false,
            },
            extras: Vec::new(),
            unpacks: Vec::new(),
        };
        let to = RegistryEnd {
            reference: name.to_owned(),
            session: SessionOptions {
                access: Access::Push,
                ..session
            },
        };
        let done = self.transfer.transfer(
            &self.scope,
            Source::Store(from),
            Destination::Registry(to),
            None,
        );
        done.await.map_err(|error| render(&error))
    }

    async fn pull(
        &self,
        name: &str,
        session: SessionOptions,
    ) -> Result<Digest, (ErrorKind, String)> {
        let pull = Pull {
            reference: name.to_owned(),
            session,
            select: Select::host(),
            unpacks: vec![UnpackRequest {
                matcher: Matcher::host(),
                snapshotter: "native".to_owned(),
            }],
            layers: Layers::Keep,
            hint: false,
        };
        let pulled = self
            .transfer
            .pull(&self.scope, pull, &Tracker::default())
            .await;
        pulled
            .map(|p| p.target.digest)
            .map_err(|error| (error.kind(), render(&error)))
    }
}

fn password(password: &str) -> SessionOptions {
    SessionOptions {
        credentials: Arc::new(OneHost {
            host: None,
            credential: Credential::Basic {
                username: "user".to_owned(),
                password: Secret::new(password),
            },
        }),
        ..SessionOptions::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_goes_to_a_registry_and_comes_back_unpacked() {
    let dir = tempfile::tempdir().expect("tempdir");
    let Some(server) = serve(&dir.path().join("registry"), false) else {
        return;
    };
    let name = format!("{}/team/app:v1", server.address);
    let one = daemon(&dir.path().join("one")).await;
    let diff_ids = one.make_image(&name).await;
    one.push(&name, SessionOptions::default())
        .await
        .expect("pushed");
    one.push(&name, SessionOptions::default())
        .await
        .expect("pushed again");

    let two = daemon(&dir.path().join("two")).await;
    two.pull(&name, SessionOptions::default())
        .await
        .expect("pulled");
    let snapshots = two.db.snapshots("native").expect("known");
    let top = chain_ids(&diff_ids)[1].to_string();
    let mounts = snapshots
        .view(&two.scope, "look", Some(&top), Labels::new())
        .await
        .expect("a view");
    for (n, size) in [(1, 20_000_000), (2, 40_000_000)] {
        let file = Path::new(&mounts[0].source).join(format!("dir/file-{n}"));
        assert_eq!(std::fs::metadata(&file).expect("unpacked").len(), size);
    }
    let (kind, text) = two
        .pull(&name.replace(":v1", ":v2"), SessionOptions::default())
        .await
        .expect_err("no such tag");
    assert_eq!(kind, ErrorKind::NotFound);
    assert_eq!(
        text,
        format!(
            "failed to resolve image: {}/team/app:v2: not found",
            server.address
        )
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_are_asked_for_and_never_shown() {
    let dir = tempfile::tempdir().expect("tempdir");
    let Some(server) = serve(&dir.path().join("registry"), true) else {
        return;
    };
    let name = format!("{}/team/app:v1", server.address);
    let one = daemon(&dir.path().join("one")).await;
    one.make_image(&name).await;
    let error = one
        .push(&name, SessionOptions::default())
        .await
        .expect_err("no password");
    assert!(error.contains("no basic auth credentials"), "{error}");
    let error = one
        .push(&name, password("hunter2"))
        .await
        .expect_err("wrong password");
    assert!(
        error.contains("authorization failed") && !error.contains("hunter2"),
        "{error}"
    );
    one.push(&name, password("secret")).await.expect("pushed");
    let (_, text) = one
        .pull(&name, password("hunter2"))
        .await
        .expect_err("wrong password");
    assert!(
        text.starts_with("failed to resolve image: pull access denied"),
        "{text}"
    );
    one.pull(&name, password("secret")).await.expect("pulled");
}
