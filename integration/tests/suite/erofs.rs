//! The erofs snapshotter: layers as images that the kernel stacks.

use std::path::Path;
use std::process::Command;

use lighter_integration::{Blob, Client, Daemon, Image, Layer, Options, Result, Spec, Subject};
use lighter_proto::containerd::services as svc;
use svc::snapshots::v1 as snapshots;
use tonic::Code;

const RUNTIME: &str = "io.containerd.runc.v2";

/// Whether this machine can mount and make such images.
pub(crate) fn knows_erofs() -> bool {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    known.contains("\terofs\n") && Command::new("mkfs.erofs").arg("--help").output().is_ok()
}

/// Everything a task needs of a snapshotter of images, through the API as Go's client uses it.
#[tokio::test]
async fn a_container_runs_on_stacked_images() -> Result {
    if Subject::of_run() == Subject::Containerd || !knows_erofs() {
        return Ok(());
    }
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let change = Layer::files(&[("etc/.wh.group", b""), ("etc/new", b"new")])?;
    let image = Image::new("docker.io/test/ship:1", vec![Layer::busybox()?, change])?;
    client.store(&image).await?;
    let top = client.unpack(&image, "erofs").await?;
    let spec = Spec::new(
        daemon.namespace(),
        "c",
        &["sh", "-c", "ls /etc; echo x > /etc/more"],
    );
    let container = client
        .create_on("c", &top, &spec, "erofs", RUNTIME, None)
        .await?;
    let log = daemon.dir().join("c.log");
    client.create_task(&container, Some(&log)).await?;
    client.start("c", "").await?;
    assert_eq!(client.wait("c", "").await?.status, 0);
    assert_eq!(std::fs::read_to_string(&log)?, "new\npasswd\n");
    client.destroy(&container).await?;
    daemon.finish().await
}

/// A layer that is an image already, of a directory with `files`.
fn image_layer(files: &[(&str, &str)], suffix: &str) -> Result<Layer> {
    let dir = tempfile::tempdir()?;
    let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
    for (name, text) in files {
        let path = tree.join(name);
        std::fs::create_dir_all(path.parent().unwrap_or(&tree))?;
        std::fs::write(path, text)?;
    }
    let made = Command::new("mkfs.erofs")
        .args(["--quiet", "-Enoinline_data"])
        .args([&image, &tree])
        .output()?;
    anyhow::ensure!(made.status.success(), "mkfs.erofs: {made:?}");
    let plain = std::fs::read(&image)?;
    let diff_id = lighter_integration::image::digest(&plain);
    let data = match suffix {
        "+zstd" => zstd::encode_all(&plain[..], 1)?,
        _ => plain,
    };
    let blob = Blob::new(&format!("application/vnd.erofs.layer.v1{suffix}"), data);
    Ok(Layer { blob, diff_id })
}

#[tokio::test]
async fn a_layer_that_is_an_image_is_taken_as_it_is() -> Result {
    if Subject::of_run() == Subject::Containerd || !knows_erofs() {
        return Ok(());
    }
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let layers = vec![
        Layer::busybox()?,
        image_layer(&[("etc/plain", "one")], "")?,
        image_layer(&[("etc/packed", "two")], "+zstd")?,
    ];
    let plain = layers[1].blob.data.clone();
    let image = Image::new("docker.io/test/image:1", layers)?;
    client.store(&image).await?;
    let top = client.unpack(&image, "erofs").await?;
    let root = daemon
        .dir()
        .join("root/io.containerd.snapshotter.v1.erofs/snapshots");
    let kept = std::fs::read_dir(&root)?.flatten().any(|snapshot| {
        std::fs::read(snapshot.path().join("layer.erofs")).is_ok_and(|image| image == plain)
    });
    assert!(kept, "the image itself is the snapshot's");
    let words = ["sh", "-c", "cat /etc/plain /etc/packed; ls /etc"];
    let spec = Spec::new(daemon.namespace(), "c", &words);
    let container = client
        .create_on("c", &top, &spec, "erofs", RUNTIME, None)
        .await?;
    let log = daemon.dir().join("c.log");
    client.create_task(&container, Some(&log)).await?;
    client.start("c", "").await?;
    assert_eq!(client.wait("c", "").await?.status, 0);
    assert_eq!(
        std::fs::read_to_string(&log)?,
        "onetwogroup\npacked\npasswd\nplain\n"
    );
    client.destroy(&container).await?;

    // A snapshotter of directories has no place for one, and says so.
    let refused = client.unpack(&image, "native").await;
    let refused = refused.expect_err("no place").to_string();
    assert!(refused.contains("only snapshotter erofs"), "{refused}");
    daemon.finish().await
}

/// An ext4 filesystem that can seal files, mounted until it is dropped.
struct Sealing(tempfile::TempDir);

impl Sealing {
    fn make() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (disk, point) = (dir.path().join("disk"), dir.path().join("mnt"));
        std::fs::File::create(&disk)?.set_len(64 << 20)?;
        std::fs::create_dir(&point)?;
        let run = |program: &str, args: &[&str], last: &[&Path]| {
            let output = Command::new(program).args(args).args(last).output()?;
            anyhow::ensure!(output.status.success(), "{program}: {output:?}");
            Ok(())
        };
        let options = ["-q", "-F", "-b", "4096", "-O", "verity"];
        run("mkfs.ext4", &options, &[&disk])?;
        run("mount", &["-o", "loop"], &[&disk, &point])?;
        Ok(Self(dir))
    }

    fn root(&self) -> std::path::PathBuf {
        self.0.path().join("mnt/erofs")
    }
}

impl Drop for Sealing {
    fn drop(&mut self) {
        let point = self.0.path().join("mnt");
        let flags = nix::mount::MntFlags::MNT_DETACH;
        let _gone = nix::mount::umount2(&point, flags);
    }
}

async fn sealed_daemon(root: Option<&Path>) -> Result<Daemon> {
    let place = root.map(|root| format!("root_path = {root:?}\n"));
    let options = Options {
        config: format!(
            "[plugins.'io.containerd.snapshotter.v1.erofs']\nenable_fsverity = true\n{}",
            place.unwrap_or_default()
        ),
        ..Options::default()
    };
    Daemon::start_with(Subject::Lighter, &options).await
}

async fn erofs_error(client: &Client) -> Result<Option<String>> {
    let request = svc::introspection::v1::PluginsRequest {
        filters: vec!["type==io.containerd.snapshotter.v1,id==erofs".to_owned()],
    };
    let found = client.introspection().plugins(request).await?.into_inner();
    anyhow::ensure!(found.plugins.len() == 1, "{found:?}");
    let error = found.plugins.into_iter().next().and_then(|p| p.init_err);
    Ok(error.map(|status| status.message))
}

/// Images that the kernel checks on every read; without a filesystem for it, a refusal that says so.
#[tokio::test]
async fn images_are_sealed_or_it_is_said_why_not() -> Result {
    if Subject::of_run() == Subject::Containerd || !knows_erofs() {
        return Ok(());
    }
    if !Path::new("/sys/fs/ext4/features/verity").exists() {
        eprintln!("this kernel seals no files: only the refusal is tested");
        let daemon = sealed_daemon(None).await?;
        let client = daemon.client().await?;
        let why = erofs_error(&client).await?.unwrap_or_default();
        assert!(why.contains("fsverity is not supported on"), "{why}");
        let request = snapshots::PrepareSnapshotRequest {
            snapshotter: "erofs".to_owned(),
            key: "k".to_owned(),
            ..Default::default()
        };
        let refused = client.snapshots().prepare(request).await;
        let refused = refused.expect_err("not there");
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        return daemon.finish().await;
    }
    let sealing = Sealing::make()?;
    let daemon = sealed_daemon(Some(&sealing.root())).await?;
    let client = daemon.client().await?;
    assert_eq!(erofs_error(&client).await?, None);
    let layer = image_layer(&[("etc/plain", "one")], "")?;
    let image = Image::new("docker.io/test/image:1", vec![Layer::busybox()?, layer])?;
    client.store(&image).await?;
    client.unpack(&image, "erofs").await?;
    let mut images = 0;
    for snapshot in std::fs::read_dir(sealing.root().join("snapshots"))? {
        let path = snapshot?.path().join("layer.erofs");
        let file = std::fs::File::open(&path)?;
        let flags = rustix::fs::ioctl_getflags(&file)?;
        assert!(
            flags.bits() & FS_VERITY != 0,
            "{} is not sealed",
            path.display()
        );
        images += 1;
    }
    assert_eq!(images, 2);
    daemon.finish().await
}

/// `FS_VERITY_FL` of `linux/fs.h`.
const FS_VERITY: u32 = 0x0010_0000;
