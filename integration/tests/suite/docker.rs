//! A stock Docker Engine (Debian's docker.io) on the daemon, in a network namespace of its own.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lighter_integration::{Daemon, Layer, Options, Result, Subject, built, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const DOCKERD: &str = "/usr/sbin/dockerd";
const IMAGE: &str = "docker.io/test/busybox:latest";
/// Longest a Docker command may take before it is killed.
const LIMIT_SECONDS: &str = "30";

/// A `dockerd` and the client pointed at it.
struct Engine {
    child: Child,
    dir: PathBuf,
}

impl Engine {
    async fn start(daemon: &Daemon) -> Result<Self> {
        let dir = daemon.dir().join("engine");
        std::fs::create_dir(&dir)?;
        let log = std::fs::File::create(dir.join("log"))?;
        // Bridges and packet filters end with the network namespace, which ends with the engine.
        let child = Command::new("unshare")
            .args(["--net", "sh", "-c", "ip link set lo up && exec \"$@\"", "-"])
            .arg(DOCKERD)
            .arg("--containerd")
            .arg(daemon.address())
            .arg("--data-root")
            .arg(dir.join("data"))
            .arg("--exec-root")
            .arg(dir.join("exec"))
            .arg("--pidfile")
            .arg(dir.join("pid"))
            .arg("--host")
            .arg(format!("unix://{}", dir.join("sock").display()))
            .arg("--cgroup-parent")
            .arg(format!("/{}", daemon.namespace()))
            .args(["--bip", "10.214.0.1/24"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let engine = Self { child, dir };
        let up = eventually("dockerd answers", async || {
            Ok((engine.docker(&["version"])?.0 == 0).then_some(()))
        })
        .await;
        if let Err(error) = up {
            let log = std::fs::read_to_string(engine.dir.join("log")).unwrap_or_default();
            anyhow::bail!("{error}\n{log}");
        }
        Ok(engine)
    }

    /// Exit code and all output of a Docker command.
    fn docker(&self, args: &[&str]) -> Result<(i32, String)> {
        let output = Command::new("timeout")
            .args(["--signal=KILL", LIMIT_SECONDS, "/usr/bin/docker", "--host"])
            .arg(format!("unix://{}", self.dir.join("sock").display()))
            .args(args)
            .stdin(Stdio::null())
            .output()?;
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        Ok((output.status.code().unwrap_or(-1), text.trim().to_owned()))
    }

    /// Output of a Docker command that must succeed.
    fn ok(&self, args: &[&str]) -> Result<String> {
        let (code, text) = self.docker(args)?;
        anyhow::ensure!(code == 0, "docker {args:?}: exit {code}: {text}");
        Ok(text)
    }

    fn state(&self, name: &str) -> Result<String> {
        let format = "{{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}}";
        self.ok(&["inspect", "-f", format, name])
    }

    /// Stops the engine, and takes away the mounts that it leaves by design.
    async fn stop(mut self) -> Result {
        kill(
            Pid::from_raw(i32::try_from(self.child.id())?),
            Signal::SIGTERM,
        )?;
        eventually("dockerd ends", async || Ok(self.child.try_wait()?)).await?;
        for entry in std::fs::read_dir(self.dir.join("exec/netns"))
            .into_iter()
            .flatten()
        {
            let _ = nix::mount::umount(&entry?.path());
        }
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A daemon whose shim for Docker's runtime is ours, an engine on it, and an image in that.
async fn engine() -> Result<Option<(Daemon, Engine, tempfile::TempDir)>> {
    if !Path::new(DOCKERD).exists() {
        eprintln!("skipped: no {DOCKERD}; install docker.io to test the Docker Engine");
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
    assert_eq!(engine.state("hog")?, "exited 137 true");
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
        .arg(format!("--net=/proc/{}/ns/net", engine.child.id()))
        .args(["busybox", "wget", "-qO-", "http://127.0.0.1:8080/"])
        .output()?;
    assert_eq!(String::from_utf8_lossy(&published.stdout), "page\n");
    engine.ok(&["rm", "-f", "web"])?;
    engine.ok(&["network", "rm", "net"]).map(drop)
}
