//! Stores of ours in a process of their own, under either daemon, as proxy plugins.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use lighter_integration::{
    Client, Daemon, Image, Layer, Options, Registry, Result, Subject, built, eventually,
};
use lighter_proto::containerd::services::diff::v1 as diff;
use lighter_proto::containerd::services::snapshots::v1 as snapshots;
use lighter_proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use lighter_proto::containerd::types;

use crate::erofs::knows_erofs;

/// `lighterd serve`, ended with the test.
struct Apart {
    dir: PathBuf,
    child: Option<Child>,
    what: Vec<&'static str>,
}

impl Apart {
    async fn start(what: &[&'static str]) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("lighter-apart-")
            .tempdir()?;
        let mut apart = Self {
            dir: dir.keep(),
            child: None,
            what: what.to_vec(),
        };
        apart.boot().await?;
        Ok(apart)
    }

    fn address(&self) -> PathBuf {
        self.dir.join("s.sock")
    }

    async fn boot(&mut self) -> Result {
        let child = Command::new(built("lighterd"))
            .arg("serve")
            .args(&self.what)
            .arg("--address")
            .arg(self.address())
            .arg("--root")
            .arg(self.dir.join("root"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(self.dir.join("log"))?)
            .spawn()?;
        self.child = Some(child);
        let address = self.address();
        eventually("the served store answers", async || {
            Ok(std::os::unix::net::UnixStream::connect(&address)
                .ok()
                .map(drop))
        })
        .await
    }

    fn kill(&mut self) -> Result {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        let _ended = self.kill();
        let _gone = std::fs::remove_dir_all(&self.dir);
    }
}

fn proxy(name: &str, kind: &str, address: &Path) -> String {
    format!("[proxy_plugins.{name}]\ntype = {kind:?}\naddress = {address:?}\n")
}

async fn start(config: String) -> Result<Daemon> {
    let options = Options {
        config,
        ..Options::default()
    };
    Daemon::start_with(Subject::of_run(), &options).await
}

#[tokio::test]
async fn a_container_runs_on_a_snapshotter_of_ours_behind_either_daemon() -> Result {
    let mut apart = Apart::start(&["--snapshotter", "overlayfs"]).await?;
    let daemon = start(proxy("apart", "snapshot", &apart.address())).await?;
    let client = daemon.client().await?;
    let change = Layer::files(&[("etc/.wh.group", b""), ("etc/new", b"new")])?;
    let image = Image::new("docker.io/test/ship:1", vec![Layer::busybox()?, change])?;
    client.store(&image).await?;
    let ctr = daemon.debian_ctr();
    let run = |id: &str, words: &[&str]| {
        let mut all = vec!["run", "--rm", "--snapshotter", "apart", &image.name, id];
        all.extend(words);
        ctr.run(&all)
    };
    let unpacked = client.unpack(&image, "apart").await?;
    assert!(unpacked.starts_with("sha256:"));
    assert_eq!(run("one", &["ls", "/etc"])?.ok()?, "new\npasswd\n");
    // A peer that dies harms only who asks for it, and is found again when it is back.
    apart.kill()?;
    let lost = run("two", &["true"])?;
    assert_ne!(lost.code, 0, "{lost:?}");
    let mut own = client.snapshots();
    let on_own = snapshots::PrepareSnapshotRequest {
        snapshotter: "native".into(),
        key: "k".into(),
        ..Default::default()
    };
    own.prepare(on_own).await?;
    apart.boot().await?;
    let back = eventually("the peer is found again", async || {
        let ran = run("three", &["ls", "/etc"])?;
        Ok((ran.code == 0).then_some(ran.stdout))
    });
    assert_eq!(back.await?, "new\npasswd\n");
    daemon.finish().await
}

#[tokio::test]
async fn blobs_are_kept_in_a_content_store_of_ours_behind_the_daemon() -> Result {
    let mut apart = Apart::start(&["--content"]).await?;
    let imported = tempfile::NamedTempFile::new()?;
    std::fs::write(
        imported.path(),
        "version = 2\ndisabled_plugins = ['io.containerd.content.v1.content']\n",
    )?;
    let config = format!(
        "{}[plugins.'io.containerd.metadata.v1.bolt']\ncontent_sharing_policy = 'shared'\n",
        proxy("away", "content", &apart.address())
    );
    let daemon = start_importing(imported.path(), config).await?;
    let client = daemon.client().await?;
    let image = Image::busybox("docker.io/test/ship:1")?;
    client.store(&image).await?;
    let blob = &image.layers[0].blob;
    let there = apart
        .dir
        .join("root/io.containerd.content.v1.content/blobs/sha256")
        .join(blob.digest.trim_start_matches("sha256:"));
    assert_eq!(std::fs::read(there)?, blob.data);
    assert_eq!(client.read_blob(&blob.digest).await?, blob.data);
    let ctr = daemon.debian_ctr();
    client.unpack(&image, "overlayfs").await?;
    let out = ctr.run(&["run", "--rm", &image.name, "one", "echo", "far away"])?;
    assert_eq!(out.ok()?, "far away\n");
    apart.kill()?;
    let lost = client.read_blob(&blob.digest).await.expect_err("lost");
    assert_eq!(lost.code(), tonic::Code::Unavailable, "{lost}");
    apart.boot().await?;
    let back = eventually("the peer is found again", async || {
        Ok(client.read_blob(&blob.digest).await.ok())
    });
    assert_eq!(back.await?, blob.data);
    daemon.finish().await
}

async fn start_importing(file: &Path, config: String) -> Result<Daemon> {
    // A key of the whole file goes before the first table, so it comes by import.
    let options = Options {
        config,
        head: format!("imports = [{file:?}]\n"),
        ..Options::default()
    };
    Daemon::start_with(Subject::of_run(), &options).await
}

#[tokio::test]
async fn a_whole_daemon_is_the_backend_of_another() -> Result {
    if Subject::of_run() == Subject::Containerd {
        // Only ours keeps what a proxy put there from its own collections.
        return Ok(());
    }
    let backend = Daemon::start().await?;
    let config = format!(
        "{}{}[plugins.'io.containerd.service.v1.diff-service']\ndefault = ['far', 'walking']\n",
        proxy("native2", "snapshot", &backend.address()),
        proxy("far", "diff", &backend.address()),
    );
    let daemon = start(config).await?;
    let client = daemon.client().await?;
    // The name of a proxied snapshotter is what the peer is asked for.
    let unknown = snapshots::PrepareSnapshotRequest {
        snapshotter: "native2".into(),
        key: "k".into(),
        ..Default::default()
    };
    let refused = client
        .snapshots()
        .prepare(unknown)
        .await
        .expect_err("unknown there");
    assert!(refused.message().contains("native2"), "{refused}");
    // The peer's differ knows no blob of ours: its refusal is the answer.
    let there = Client::connect(&backend.address(), daemon.namespace()).await?;
    let image = Image::busybox("docker.io/test/ship:1")?;
    there.store(&image).await?;
    let blob = &image.layers[0].blob;
    let target = tempfile::tempdir()?;
    let request = diff::ApplyRequest {
        diff: Some(types::Descriptor {
            media_type: blob.media_type.clone(),
            digest: blob.digest.clone(),
            size: i64::try_from(blob.data.len())?,
            ..Default::default()
        }),
        mounts: vec![types::Mount {
            r#type: "bind".into(),
            source: target.path().display().to_string(),
            options: vec!["rbind".into(), "rw".into()],
            ..Default::default()
        }],
        ..Default::default()
    };
    let applied = client.diff().apply(request.clone()).await?.into_inner();
    assert_eq!(
        applied.applied.expect("applied").digest,
        image.layers[0].diff_id
    );
    assert!(target.path().join("bin/busybox").exists());
    backend.finish().await?;
    let lost = client
        .diff()
        .apply(request)
        .await
        .expect_err("the peer is gone");
    assert_eq!(lost.code(), tonic::Code::Unavailable, "{lost}");
    daemon.finish().await
}

#[tokio::test]
async fn a_served_snapshotter_speaks_for_itself() -> Result {
    let apart = Apart::start(&["--snapshotter", "native"]).await?;
    let client = Client::connect(&apart.address(), "any").await?;
    let mut served = SnapshotsClient::new(client.channel());
    let request = snapshots::PrepareSnapshotRequest {
        snapshotter: "whatever".into(),
        key: "k".into(),
        ..Default::default()
    };
    let mounts = served.prepare(request).await?.into_inner().mounts;
    assert_eq!(mounts[0].r#type, "bind");
    let none = Command::new(built("lighterd")).arg("serve").output()?;
    assert!(!none.status.success());
    assert!(String::from_utf8_lossy(&none.stderr).contains("nothing to serve"));
    Ok(())
}

/// Layers that need to know what is below them, pulled by the daemon itself.
#[tokio::test]
async fn layers_that_lean_on_those_below_unpack_as_if_one_after_the_other() -> Result {
    if Subject::of_run() == Subject::Containerd {
        // 1.6 has no transfer service.
        return Ok(());
    }
    let scratch = tempfile::NamedTempFile::new()?;
    make_scratch(scratch.path())?;
    let daemon = start(format!(
        "[plugins.'io.containerd.snapshotter.v1.blockfile']\nscratch_file = {:?}\n",
        scratch.path()
    ))
    .await?;
    let registry = Registry::start().await?;
    let layers = vec![
        Layer::busybox()?,
        // Only implies `tmp/`, whose mode is below.
        Layer::files(&[("tmp/x", b"x"), ("var/lib/old", b"old")])?,
        // Deletes what is there, and in a directory of its own what is not.
        Layer::files(&[
            ("etc/.wh.group", b""),
            ("fresh/.wh.nothing", b""),
            ("fresh/f", b"f"),
        ])?,
        Layer::files(&[("var/.wh..wh..opq", b""), ("var/new", b"new")])?,
    ];
    let reference = registry.push(&Image::new("x", layers)?, "library/lean", "1")?;
    let ctr = daemon.our_ctr();
    let script = "stat -c %a /tmp; ls /etc /fresh /tmp /var";
    let expected = "1777\n/etc:\npasswd\n\n/fresh:\nf\n\n/tmp:\nx\n\n/var:\nnew\n";
    for snapshotter in ["overlayfs", "native", "erofs", "blockfile"] {
        if snapshotter == "erofs" && !knows_erofs() {
            eprintln!("skipped: the kernel has no EROFS, or mkfs.erofs is missing");
            continue;
        }
        ctr.run(&[
            "images",
            "pull",
            "--plain-http",
            "--snapshotter",
            snapshotter,
            &reference,
        ])?
        .ok()?;
        let ran = ctr.run(&[
            "run",
            "--rm",
            "--snapshotter",
            snapshotter,
            &reference,
            "p",
            "sh",
            "-c",
            script,
        ])?;
        let listed = ran.ok()?.replace("lost+found\n", "");
        assert_eq!(listed, expected, "{snapshotter}");
    }
    daemon.finish().await
}

fn make_scratch(path: &Path) -> Result {
    std::fs::File::create(path)?.set_len(32 << 20)?;
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F"])
        .arg(path)
        .status()?;
    anyhow::ensure!(made.success(), "mkfs.ext4 fails");
    Ok(())
}
