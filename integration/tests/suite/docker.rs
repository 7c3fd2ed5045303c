//! A stock Docker Engine (Debian's docker.io) on the daemon, in a network namespace of its own.

use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::Duration;

use lighter_integration::{Daemon, Engine, Layer, Options, Result, Subject, built, eventually};

const IMAGE: &str = "docker.io/test/busybox:latest";

/// A daemon whose shim for Docker's runtime is ours, an engine on it, and an image in that.
async fn engine() -> Result<Option<(Daemon, Engine, tempfile::TempDir)>> {
    if !Engine::is_installed() {
        eprintln!("skipped: no dockerd; install docker.io to test the Docker Engine");
        return Ok(None);
    }
    let shims = tempfile::tempdir()?;
    if Subject::of_run() == Subject::Lighter {
        let ours = built("containerd-shim-lighter-v2");
        symlink(ours, shims.path().join("containerd-shim-runc-v2"))?;
    }
    let options = Options {
        path: Some(shims.path().to_owned()),
        ..Options::default()
    };
    let daemon = Daemon::start_with(Subject::of_run(), &options).await?;
    let engine = Engine::start(&daemon).await?;
    let layer = daemon.dir().join("layer.tar.gz");
    std::fs::write(&layer, Layer::busybox()?.blob.data)?;
    engine.ok(&["import", layer.to_str().expect("UTF-8"), IMAGE])?;
    Ok(Some((daemon, engine, shims)))
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_engine_runs_and_survives_kill_9_of_the_daemon() -> Result {
    let Some((mut daemon, engine, _shims)) = engine().await? else {
        return Ok(());
    };
    codes_and_texts(&engine)?;
    one_life(&engine)?;
    memory(&engine)?;
    names_and_ports(&engine).await?;

    let forever = "trap 'exit 3' TERM; while :; do sleep 0.1; done";
    engine.ok(&["run", "-d", "--name", "held", IMAGE, "sh", "-c", forever])?;
    daemon.kill()?;
    daemon.boot().await?;
    // The engine's connection may still be in its pause between two attempts.
    eventually("docker exec works again", async || {
        let (code, text) = engine.docker(&["exec", "held", "echo", "back"])?;
        Ok((code == 0 && text == "back").then_some(()))
    })
    .await?;
    assert!(engine.ok(&["ps"])?.contains("held"));
    // Its subscription to events is renewed apart from the connection.
    tokio::time::sleep(Duration::from_secs(1)).await;
    engine.ok(&["stop", "-t", "10", "held"])?;
    assert_eq!(engine.state("held")?, "exited 3 false");
    engine.ok(&["rm", "held"])?;

    engine.stop().await?;
    daemon.finish().await
}

fn codes_and_texts(engine: &Engine) -> Result {
    let run = |args: &[&str]| engine.docker(&[&["run", "--rm", IMAGE], args].concat());
    assert_eq!(run(&["echo", "ahoy"])?, (0, "ahoy".to_owned()));
    assert_eq!(run(&["sh", "-c", "exit 42"])?.0, 42);
    for (command, code, text) in [
        ("/etc", 126, "permission denied"),
        ("nosuch", 127, "executable file not found in $PATH"),
    ] {
        let (got, said) = run(&[command])?;
        assert_eq!(got, code, "{said}");
        // Once: what the runtime says on the container's stderr is not the container's output.
        assert_eq!(said.matches(text).count(), 1, "{said}");
    }
    Ok(())
}

fn one_life(engine: &Engine) -> Result {
    let script = "echo begun; trap 'exit 5' TERM; while :; do sleep 0.1; done";
    engine.ok(&["run", "-d", "--name", "life", IMAGE, "sh", "-c", script])?;
    assert_eq!(engine.docker(&["exec", "life", "sh", "-c", "exit 7"])?.0, 7);
    let (code, said) = engine.docker(&["exec", "life", "/nosuch"])?;
    assert_eq!(code, 126, "{said}");
    assert!(engine.ok(&["top", "life"])?.contains("sleep"));
    assert!(
        engine
            .ok(&["stats", "--no-stream", "life"])?
            .contains("life")
    );
    engine.ok(&["pause", "life"])?;
    assert_eq!(engine.state("life")?, "paused 0 false");
    engine.ok(&["unpause", "life"])?;
    engine.ok(&["restart", "-t", "10", "life"])?;
    assert_eq!(engine.state("life")?, "running 0 false");
    assert_eq!(engine.ok(&["logs", "life"])?, "begun\nbegun");
    engine.ok(&["stop", "-t", "10", "life"])?;
    assert_eq!(engine.state("life")?, "exited 5 false");
    engine.ok(&["start", "life"])?;
    engine.ok(&["kill", "life"])?;
    assert_eq!(engine.ok(&["wait", "life"])?, "137");
    engine.ok(&["rm", "life"]).map(drop)
}

fn memory(engine: &Engine) -> Result {
    let hog = "a=x; while :; do a=$a$a; done";
    let limits = ["--memory", "16m", "--memory-swap", "16m"];
    let (code, said) = engine.docker(
        &[
            &["run", "--name", "hog"],
            &limits[..],
            &[IMAGE, "sh", "-c", hog],
        ]
        .concat(),
    )?;
    assert_eq!(code, 137, "{said}");
    let state = engine.state("hog")?;
    // The reference's event may come after the exit, too late for the engine.
    let late = Subject::of_run() == Subject::Containerd && state == "exited 137 false";
    assert!(late || state == "exited 137 true", "{state}");
    engine.ok(&["rm", "hog"]).map(drop)
}

async fn names_and_ports(engine: &Engine) -> Result {
    engine.ok(&["network", "create", "net"])?;
    let serve = "mkdir /www && echo page >/www/index.html && busybox httpd -f -p 80 -h /www";
    let run = ["run", "-d", "--name", "web", "--network", "net"];
    engine.ok(&[
        &run[..],
        &["-p", "127.0.0.1:8080:80", IMAGE, "sh", "-c", serve],
    ]
    .concat())?;
    let fetch = ["run", "--rm", "--network", "net", IMAGE, "wget", "-qO-"];
    eventually("the name is found", async || {
        let (code, text) = engine.docker(&[&fetch[..], &["http://web/"]].concat())?;
        Ok((code == 0 && text == "page").then_some(()))
    })
    .await?;
    let published = Command::new("nsenter")
        .arg(format!("--net=/proc/{}/ns/net", engine.pid()))
        .args(["busybox", "wget", "-qO-", "http://127.0.0.1:8080/"])
        .output()?;
    assert_eq!(String::from_utf8_lossy(&published.stdout), "page\n");
    engine.ok(&["rm", "-f", "web"])?;
    engine.ok(&["network", "rm", "net"]).map(drop)
}
