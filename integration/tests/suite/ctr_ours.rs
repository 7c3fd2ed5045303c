//! Our own `ctr`, on both daemons where both can.

use lighter_integration::{Cli, Daemon, Image, Registry, Result, Subject};

const NAME: &str = "docker.io/test/busybox:latest";

/// A daemon with a busybox image imported by our client.
async fn with_image() -> Result<(Daemon, Cli)> {
    let daemon = Daemon::start().await?;
    let ctr = daemon.our_ctr();
    let file = daemon.dir().join("busybox.tar");
    std::fs::write(&file, Image::busybox(NAME)?.oci_archive()?)?;
    let file = file.to_str().expect("UTF-8");
    // containerd 1.6 has no transfer service.
    let import: &[&str] = match daemon.subject() {
        Subject::Lighter => &["images", "import", file],
        Subject::Containerd => &["images", "import", "--local", file],
    };
    ctr.run(import)?.ok()?;
    Ok((daemon, ctr))
}

#[tokio::test]
async fn run_prints_takes_input_and_tells_the_exit_code() -> Result {
    let (daemon, ctr) = with_image().await?;
    let out = ctr
        .run(&["run", "--rm", NAME, "one", "echo", "ahoy"])?
        .ok()?;
    assert_eq!(out, "ahoy\n");
    let out = ctr
        .run_with(&["run", "--rm", "-i", NAME, "two", "cat"], b"to the end")?
        .ok()?;
    assert_eq!(out, "to the end");
    let code = ctr
        .run(&["run", "--rm", NAME, "three", "sh", "-c", "exit 42"])?
        .code;
    assert_eq!(code, 42);
    let flags = [
        "run",
        "--rm",
        "--env",
        "A=b",
        "--cwd",
        "/tmp",
        "--user",
        "1000:1000",
        "--read-only",
        "--hostname",
        "ship",
        "--memory-limit",
        "67108864",
        "--cpus",
        "0.5",
        NAME,
        "four",
        "sh",
        "-c",
        "echo $A $(pwd) $(id -u):$(id -g) $(hostname); touch /x 2>/dev/null || echo ro",
    ];
    assert_eq!(ctr.run(&flags)?.ok()?, "b /tmp 1000:1000 ship\nro\n");
    std::fs::write(daemon.dir().join("shared"), "from the host")?;
    let mount = format!(
        "type=bind,src={},dst=/mnt,options=rbind:ro",
        daemon.dir().display()
    );
    let out = ctr
        .run(&[
            "run",
            "--rm",
            "--mount",
            &mount,
            NAME,
            "five",
            "cat",
            "/mnt/shared",
        ])?
        .ok()?;
    assert_eq!(out, "from the host");
    let listed = ctr.run(&["containers", "ls", "-q"])?.ok()?;
    assert_eq!(listed, "", "--rm left nothing");
    daemon.finish().await
}

#[tokio::test]
async fn a_detached_task_lives_until_it_is_ended() -> Result {
    let (daemon, ctr) = with_image().await?;
    ctr.run(&["run", "-d", NAME, "web", "sleep", "1000"])?
        .ok()?;
    assert!(ctr.run(&["tasks", "ls"])?.ok()?.contains("RUNNING"));
    let out = ctr
        .run(&["tasks", "exec", "--exec-id", "e", "web", "echo", "inside"])?
        .ok()?;
    assert_eq!(out, "inside\n");
    assert_eq!(ctr.run(&["tasks", "ps", "web"])?.ok()?.lines().count(), 2);
    assert!(
        ctr.run(&["tasks", "metrics", "web"])?
            .ok()?
            .contains("memory")
    );
    ctr.run(&["tasks", "pause", "web"])?.ok()?;
    assert!(ctr.run(&["tasks", "ls"])?.ok()?.contains("PAUSED"));
    ctr.run(&["tasks", "resume", "web"])?.ok()?;
    ctr.run(&["tasks", "kill", "--signal", "SIGKILL", "web"])?
        .ok()?;
    lighter_integration::eventually("it stops", async || {
        Ok(ctr
            .run(&["tasks", "ls"])?
            .ok()?
            .contains("STOPPED")
            .then_some(()))
    })
    .await?;
    ctr.run(&["tasks", "rm", "web"])?;
    ctr.run(&["containers", "rm", "web"])?.ok()?;
    daemon.finish().await
}

#[tokio::test]
async fn pull_push_and_export_go_through_the_daemon() -> Result {
    let daemon = Daemon::start().await?;
    if daemon.subject() == Subject::Containerd {
        // 1.6 has no transfer service.
        return daemon.finish().await;
    }
    let registry = Registry::start().await?;
    let reference = registry.push(&Image::busybox(NAME)?, "library/ship", "1")?;
    let ctr = daemon.our_ctr();
    ctr.run(&["images", "pull", "--plain-http", &reference])?
        .ok()?;
    let out = ctr
        .run(&["run", "--rm", &reference, "p", "echo", "pulled"])?
        .ok()?;
    assert_eq!(out, "pulled\n");
    let copy = format!("{}/library/copy:2", registry.host());
    ctr.run(&["images", "tag", &reference, &copy])?.ok()?;
    ctr.run(&["images", "push", "--plain-http", &copy])?.ok()?;
    let file = daemon.dir().join("out.tar");
    ctr.run(&["images", "export", file.to_str().expect("UTF-8"), &copy])?
        .ok()?;
    assert!(std::fs::metadata(&file)?.len() > 100_000);
    let unknown = format!("{}/library/nosuch:1", registry.host());
    let pulled = ctr.run(&["images", "pull", "--plain-http", &unknown])?;
    assert!(
        pulled.code != 0 && pulled.stderr.contains("nosuch"),
        "{pulled:?}"
    );
    daemon.finish().await
}

#[tokio::test]
async fn errors_say_what_to_do() -> Result {
    let daemon = Daemon::start().await?;
    let lost = Cli::new("nowhere", daemon.dir().join("nosuch.sock"), "default");
    assert!(lost.run(&["version"]).is_err());
    let ctr = daemon.our_ctr();
    let ran = ctr.run(&["run", "--rm", "docker.io/test/nosuch:1", "x", "true"])?;
    assert!(ran.code != 0 && ran.stderr.contains("nosuch"), "{ran:?}");
    let usage = ctr.run(&["frobnicate"])?;
    assert_ne!(usage.code, 0);
    daemon.finish().await
}

#[tokio::test]
async fn pull_and_push_from_here_need_no_transfer_service() -> Result {
    // Debian's containerd 1.6 has none: this one passes there as well.
    let daemon = Daemon::start().await?;
    let ctr = daemon.our_ctr();
    let registry = Registry::start().await?;
    let image = Image::busybox("x")?;
    let reference = registry.push(&image, "library/local", "1")?;
    let host = registry.host();
    let out = ctr
        .run(&[
            "images",
            "pull",
            "--local",
            "--plain-http",
            "--print-chainid",
            &reference,
        ])?
        .ok()?;
    assert!(out.contains(&image.chain_id(1)), "{out}");
    let out = ctr.run(&["run", "--rm", &reference, "c", "echo", "here"])?;
    assert_eq!(out.ok()?, "here\n");
    let copy = format!("{host}/library/copy:2");
    let push = [
        "images",
        "push",
        "--local",
        "--plain-http",
        &copy,
        &reference,
    ];
    ctr.run(&push)?.ok()?;
    // What was pushed is what is fetched, object by object.
    let repository = format!("{host}/library/copy");
    let manifest = ctr
        .run(&["content", "fetch-object", "--plain-http", &repository, "2"])?
        .ok()?;
    let parsed: serde_json::Value = serde_json::from_str(&manifest)?;
    assert_eq!(parsed["config"]["digest"], image.config.digest);
    let config = ctr
        .run(&[
            "content",
            "fetch-blob",
            "--plain-http",
            &repository,
            &image.config.digest,
        ])?
        .ok()?;
    assert_eq!(config.as_bytes(), image.config.data);
    let pushed = ctr
        .run(&[
            "content",
            "push-object",
            "--plain-http",
            &format!("{host}/library/other:3"),
            &image.config.digest,
            "application/vnd.oci.image.config.v1+json",
        ])?
        .ok()?;
    assert!(pushed.contains(&image.config.digest), "{pushed}");
    let unknown = format!("{host}/library/nosuch:1");
    let out = ctr.run(&["images", "pull", "--local", "--plain-http", &unknown])?;
    assert!(
        out.code != 0 && out.stderr.contains("not found"),
        "{}",
        out.stderr
    );
    ctr.run(&["images", "rm", "--sync", &reference])?.ok()?;
    daemon.finish().await
}
