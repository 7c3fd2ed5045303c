//! The unmodified `ctr` of Debian's containerd 1.6, command by command.

use lighter_integration::{Cli, Daemon, Image, Result};

const NAME: &str = "docker.io/test/busybox:latest";

/// A daemon with a busybox image imported by the client under test.
async fn with_image() -> Result<(Daemon, Cli)> {
    let daemon = Daemon::start().await?;
    let ctr = daemon.debian_ctr();
    let file = daemon.dir().join("busybox.tar");
    std::fs::write(&file, Image::busybox(NAME)?.oci_archive()?)?;
    ctr.run(&["images", "import", file.to_str().expect("UTF-8")])?
        .ok()?;
    Ok((daemon, ctr))
}

#[tokio::test]
async fn import_run_export() -> Result {
    let (daemon, ctr) = with_image().await?;
    let images = ctr.run(&["images", "ls", "-q"])?.ok()?;
    assert_eq!(images.trim(), NAME);
    let check = ctr.run(&["images", "check"])?.ok()?;
    assert!(
        check.contains("complete") && check.contains("true"),
        "{check}"
    );
    let out = ctr
        .run(&["run", "--rm", NAME, "one", "echo", "ahoy"])?
        .ok()?;
    assert_eq!(out, "ahoy\n");
    let failed = ctr.run(&["run", "--rm", NAME, "two", "sh", "-c", "exit 42"])?;
    assert_eq!(failed.code, 42, "{failed:?}");
    // This client does not pass on the end of its input.
    let count = ["run", "--rm", NAME, "three", "head", "-c", "13"];
    let out = ctr.run_with(&count, b"through stdin")?.ok()?;
    assert_eq!(out, "through stdin");
    let file = daemon.dir().join("out.tar");
    ctr.run(&["images", "export", file.to_str().expect("UTF-8"), NAME])?
        .ok()?;
    let mut names = Vec::new();
    for entry in tar::Archive::new(std::fs::File::open(&file)?).entries()? {
        names.push(entry?.path()?.to_string_lossy().into_owned());
    }
    assert!(
        names.iter().any(|n| n == "index.json") && names.iter().any(|n| n == "manifest.json"),
        "{names:?}"
    );
    ctr.run(&["images", "tag", NAME, "docker.io/test/again:1"])?
        .ok()?;
    ctr.run(&["images", "rm", "--sync", "docker.io/test/again:1", NAME])?
        .ok()?;
    assert_eq!(ctr.run(&["content", "ls", "-q"])?.ok()?, "");
    daemon.finish().await
}

#[tokio::test]
async fn a_detached_task_is_inspected_and_ended() -> Result {
    let (daemon, ctr) = with_image().await?;
    ctr.run(&["run", "-d", NAME, "web", "sleep", "1000"])?
        .ok()?;
    let tasks = ctr.run(&["tasks", "ls"])?.ok()?;
    assert!(
        tasks.contains("web") && tasks.contains("RUNNING"),
        "{tasks}"
    );
    let out = ctr
        .run(&["tasks", "exec", "--exec-id", "e", "web", "echo", "inside"])?
        .ok()?;
    assert_eq!(out, "inside\n");
    let code = ctr
        .run(&[
            "tasks",
            "exec",
            "--exec-id",
            "f",
            "web",
            "sh",
            "-c",
            "exit 6",
        ])?
        .code;
    assert_eq!(code, 6);
    let ps = ctr.run(&["tasks", "ps", "web"])?.ok()?;
    assert_eq!(ps.lines().count(), 2, "{ps}");
    let metrics = ctr.run(&["tasks", "metrics", "web"])?.ok()?;
    assert!(metrics.contains("memory"), "{metrics}");
    ctr.run(&["tasks", "pause", "web"])?.ok()?;
    assert!(ctr.run(&["tasks", "ls"])?.ok()?.contains("PAUSED"));
    ctr.run(&["tasks", "resume", "web"])?.ok()?;
    let info = ctr.run(&["containers", "info", "web"])?.ok()?;
    assert!(info.contains("\"ID\": \"web\""), "{info}");
    ctr.run(&["containers", "label", "web", "tier=front"])?
        .ok()?;
    assert!(
        ctr.run(&["containers", "ls", "labels.tier==front"])?
            .ok()?
            .contains("web")
    );
    let snapshots = ctr.run(&["snapshots", "ls"])?.ok()?;
    assert!(
        snapshots.contains("web") && snapshots.contains("Active"),
        "{snapshots}"
    );
    ctr.run(&["tasks", "kill", "-s", "SIGKILL", "web"])?.ok()?;
    lighter_integration::eventually("it stops", async || {
        Ok(ctr
            .run(&["tasks", "ls"])?
            .ok()?
            .contains("STOPPED")
            .then_some(()))
    })
    .await?;
    ctr.run(&["tasks", "rm", "web"])?.ok()?;
    ctr.run(&["containers", "rm", "web"])?.ok()?;
    assert_eq!(ctr.run(&["containers", "ls", "-q"])?.ok()?, "");
    daemon.finish().await
}

#[tokio::test]
async fn the_other_nouns_answer() -> Result {
    let (daemon, ctr) = with_image().await?;
    let plugins = ctr.run(&["plugins", "ls"])?.ok()?;
    for plugin in [
        "overlayfs",
        "native",
        "walking",
        "content",
        "bolt",
        "task",
        "images",
        "scheduler",
    ] {
        assert!(plugins.contains(plugin), "{plugin} in:\n{plugins}");
    }
    assert!(ctr.run(&["version"])?.ok()?.contains("Server:"));
    ctr.run(&["namespaces", "create", "second-ns", "a=b"])?
        .ok()?;
    assert!(ctr.run(&["namespaces", "ls"])?.ok()?.contains("second-ns"));
    ctr.run(&["namespaces", "rm", "second-ns"])?.ok()?;
    ctr.run(&["leases", "create", "--id", "l1", "a=b"])?.ok()?;
    assert!(ctr.run(&["leases", "ls"])?.ok()?.contains("l1"));
    ctr.run(&["leases", "rm", "--sync", "l1"])?.ok()?;
    let content = ctr.run(&["content", "ls", "-q"])?.ok()?;
    assert!(
        content.lines().count() >= 3,
        "layer, config, manifest: {content}"
    );
    for digest in content.lines() {
        ctr.run(&["content", "get", digest])?.ok()?;
    }
    ctr.run_with(&["content", "ingest", "ref"], b"hello")
        .and_then(lighter_integration::Output::ok)?;
    ctr.run(&["snapshots", "prepare", "work"])?.ok()?;
    ctr.run(&["snapshots", "commit", "done", "work"])?.ok()?;
    assert!(
        ctr.run(&["snapshots", "info", "done"])?
            .ok()?
            .contains("Committed")
    );
    assert!(ctr.run(&["snapshots", "tree"])?.ok()?.contains("done"));
    ctr.run(&["snapshots", "rm", "done"])?.ok()?;
    let mount = daemon.dir().join("mnt");
    std::fs::create_dir(&mount)?;
    let mount = mount.to_str().expect("UTF-8");
    ctr.run(&["images", "mount", NAME, mount])?.ok()?;
    assert!(std::path::Path::new(mount).join("bin/busybox").exists());
    ctr.run(&["images", "unmount", "--rm", mount])?.ok()?;
    daemon.finish().await
}
