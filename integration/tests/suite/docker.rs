//! A stock Docker Engine (Debian's docker.io) on the daemon, in a network namespace of its own.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lighter_integration::{Daemon, Engine, Layer, Options, Result, Subject, built, eventually};

const IMAGE: &str = "docker.io/test/busybox:latest";

/// A daemon whose shim for Docker's runtime is ours, an engine on it, and an image in that.
async fn engine(flags: &[&str]) -> Result<Option<(Daemon, Engine, tempfile::TempDir)>> {
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
    let engine = Engine::start_with(&daemon, flags).await?;
    let layer = daemon.dir().join("layer.tar.gz");
    std::fs::write(&layer, Layer::busybox()?.blob.data)?;
    engine.ok(&["import", layer.to_str().expect("UTF-8"), IMAGE])?;
    Ok(Some((daemon, engine, shims)))
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_engine_runs_and_survives_kill_9_of_the_daemon() -> Result {
    let Some((mut daemon, engine, _shims)) = engine(&[]).await? else {
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
        .arg(format!("--net=/proc/{}/ns/net", engine.network()))
        .args(["busybox", "wget", "-qO-", "http://127.0.0.1:8080/"])
        .output()?;
    assert_eq!(String::from_utf8_lossy(&published.stdout), "page\n");
    engine.ok(&["rm", "-f", "web"])?;
    engine.ok(&["network", "rm", "net"]).map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_engine_makes_images_and_keeps_files() -> Result {
    let Some((daemon, engine, _shims)) = engine(&[]).await? else {
        return Ok(());
    };
    let dir = daemon.dir().join("files");
    std::fs::create_dir(&dir)?;
    copies_and_images(&engine, &dir)?;
    volumes(&engine)?;
    build(&engine, &dir)?;
    engine.stop().await?;
    daemon.finish().await
}

fn copies_and_images(engine: &Engine, dir: &Path) -> Result {
    let (file, back) = (dir.join("file"), dir.join("back"));
    let (file, back) = (file.to_str().expect("UTF-8"), back.to_str().expect("UTF-8"));
    std::fs::write(file, "copied")?;
    engine.ok(&["run", "-d", "--name", "box", IMAGE, "sleep", "1000"])?;
    engine.ok(&["cp", file, "box:/inside"])?;
    assert_eq!(engine.ok(&["exec", "box", "cat", "/inside"])?, "copied");
    engine.ok(&["cp", "box:/inside", back])?;
    assert_eq!(std::fs::read_to_string(back)?, "copied");
    assert!(engine.ok(&["diff", "box"])?.contains("A /inside"));
    engine.ok(&["commit", "box", "test/changed:1"])?;
    engine.ok(&["rm", "-f", "box"])?;
    let saved = dir.join("saved.tar");
    let saved = saved.to_str().expect("UTF-8");
    engine.ok(&["save", "-o", saved, "test/changed:1"])?;
    engine.ok(&["rmi", "test/changed:1"])?;
    engine.ok(&["load", "-i", saved])?;
    let run = ["run", "--rm", "test/changed:1", "cat", "/inside"];
    assert_eq!(engine.ok(&run)?, "copied");
    Ok(())
}

fn volumes(engine: &Engine) -> Result {
    engine.ok(&["volume", "create", "kept"])?;
    let with = |mount: &str, script: &str| {
        engine.docker(&["run", "--rm", "-v", mount, IMAGE, "sh", "-c", script])
    };
    assert_eq!(with("kept:/v", "echo data >/v/file")?.0, 0);
    let (code, text) = with("kept:/v:ro", "cat /v/file && touch /v/other")?;
    assert_ne!(code, 0, "{text}");
    assert!(
        text.contains("data") && text.contains("Read-only"),
        "{text}"
    );
    engine.ok(&["volume", "rm", "kept"]).map(drop)
}

fn build(engine: &Engine, dir: &Path) -> Result {
    let file = format!(
        "FROM {IMAGE} AS first\nARG WHAT=none\nRUN echo $WHAT >/made\n\
         FROM {IMAGE}\nCOPY --from=first /made /made\nUSER 1000\nWORKDIR /w\n\
         ENTRYPOINT [\"cat\"]\nCMD [\"/made\"]\n"
    );
    std::fs::write(dir.join("Dockerfile"), file)?;
    let context = dir.to_str().expect("UTF-8");
    engine.ok(&[
        "build",
        "-t",
        "test/built",
        "--build-arg",
        "WHAT=something",
        context,
    ])?;
    assert_eq!(engine.ok(&["run", "--rm", "test/built"])?, "something");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_services_find_each_other() -> Result {
    let Some((daemon, engine, _shims)) = engine(&[]).await? else {
        return Ok(());
    };
    compose(&daemon, &engine).await?;
    swarm(&engine).await?;
    engine.stop().await?;
    daemon.finish().await
}

async fn compose(daemon: &Daemon, engine: &Engine) -> Result {
    const PROGRAM: &str = "/usr/bin/docker-compose";
    if !Path::new(PROGRAM).exists() {
        eprintln!("skipped: no docker-compose; install it to test two services of one file");
        return Ok(());
    }
    let file = daemon.dir().join("compose.yml");
    let text = format!(
        "version: '3'\nservices:\n  web:\n    image: {IMAGE}\n    command: sh -c 'mkdir /www && \
         echo composed >/www/index.html && exec busybox httpd -f -p 80 -h /www'\n    volumes: \
         ['files:/data']\n  client:\n    image: {IMAGE}\n    command: sleep 1000\n    \
         depends_on: [web]\nvolumes:\n  files: {{}}\n"
    );
    std::fs::write(&file, text)?;
    let file = file.to_str().expect("UTF-8");
    let run = |args: &[&str]| {
        let all = [&["-p", "two", "-f", file], args].concat();
        let (code, text) = engine.client(PROGRAM, &all)?;
        anyhow::ensure!(code == 0, "docker-compose {args:?}: exit {code}: {text}");
        Ok(text)
    };
    run(&["up", "-d"])?;
    eventually("one service finds the other", async || {
        let fetch = ["wget", "-qO-", "http://web/"];
        let (code, text) = engine.docker(&[&["exec", "two_client_1"], &fetch[..]].concat())?;
        Ok((code == 0 && text == "composed").then_some(()))
    })
    .await?;
    run(&["down", "-v", "-t", "0"])?;
    assert_eq!(engine.ok(&["ps", "-aq"])?, "");
    Ok(())
}

async fn swarm(engine: &Engine) -> Result {
    let here = format!("--advertise-addr={}", Engine::UPLINK);
    let port = format!("--listen-addr={}", Engine::UPLINK);
    engine.ok(&["swarm", "init", &here, &port])?;
    let service = ["service", "create", "-d", "--name", "many"];
    engine.ok(&[&service[..], &["--replicas", "2", IMAGE, "sleep", "1000"]].concat())?;
    let replicas = async |want: &str| {
        eventually("all replicas run", async || {
            let list = engine.ok(&["service", "ls", "--format", "{{.Replicas}}"])?;
            Ok((list == want).then_some(()))
        })
        .await
    };
    replicas("2/2").await?;
    engine.ok(&["service", "scale", "-d", "many=3"])?;
    replicas("3/3").await?;
    let tasks = engine.ok(&["ps", "-q"])?;
    let first = tasks.lines().next().unwrap_or_default().to_owned();
    engine.ok(&["kill", &first])?;
    eventually("another runs in its place", async || {
        let running = engine.ok(&["ps", "-q"])?;
        Ok((running.lines().count() == 3 && !running.contains(&first)).then_some(()))
    })
    .await?;
    engine.ok(&["service", "rm", "many"])?;
    eventually("its containers are gone", async || {
        Ok(engine.ok(&["ps", "-aq"])?.is_empty().then_some(()))
    })
    .await?;
    engine.ok(&["swarm", "leave", "--force"]).map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_containers_outlive_the_engine_and_the_daemon() -> Result {
    let Some((mut daemon, mut engine, _shims)) = engine(&["--live-restore"]).await? else {
        return Ok(());
    };
    let script = "n=0; while :; do n=$((n+1)); echo line $n; sleep 0.1; done";
    engine.ok(&["run", "-d", "--name", "live", IMAGE, "sh", "-c", script])?;
    engine.ok(&["run", "-d", "--name", "dying", IMAGE, "sleep", "1000"])?;
    let pid = engine.ok(&["inspect", "-f", "{{.State.Pid}}", "live"])?;
    let dying = engine.ok(&["inspect", "-f", "{{.State.Pid}}", "dying"])?;

    engine.kill()?;
    engine.boot().await?;
    assert_eq!(
        engine.ok(&["inspect", "-f", "{{.State.Pid}}", "live"])?,
        pid
    );

    engine.kill()?;
    daemon.kill()?;
    // Nobody is there to see this one end; what is left of it says so.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(dying.parse()?),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    daemon.boot().await?;
    engine.boot().await?;
    assert_eq!(
        engine.ok(&["inspect", "-f", "{{.State.Pid}}", "live"])?,
        pid
    );
    assert_eq!(engine.ok(&["exec", "live", "echo", "here"])?, "here");
    assert_eq!(engine.state("dying")?, "exited 137 false");
    let before = engine.ok(&["logs", "live"])?.lines().count();
    eventually("its output is read again", async || {
        let now = engine.ok(&["logs", "live"])?.lines().count();
        Ok((now > before).then_some(()))
    })
    .await?;
    engine.ok(&["stop", "-t", "0", "live"])?;
    assert_eq!(engine.state("live")?, "exited 137 false");
    engine.ok(&["rm", "live", "dying"])?;
    engine.stop().await?;
    daemon.finish().await
}
