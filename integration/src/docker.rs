//! A stock Docker Engine (Debian's docker.io) on a daemon, in a network namespace of its own.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Daemon, Result, eventually};

const DOCKERD: &str = "/usr/sbin/dockerd";
/// Longest a Docker command may take before it is killed.
const LIMIT_SECONDS: &str = "30";

/// Makes the network that an engine lives in: bridges and packet filters end with it. The uplink is
/// what a swarm announces.
const NETWORK: &str = "ip link set lo up && ip link add uplink type bridge \
                       && ip address add 10.213.0.1/24 dev uplink && ip link set uplink up \
                       && echo ready && exec sleep infinity";

/// A `dockerd` and the client pointed at it.
#[derive(Debug)]
pub struct Engine {
    child: Option<Child>,
    network: Child,
    dir: PathBuf,
    args: Vec<OsString>,
}

impl Engine {
    /// Its address in its network, other than loopback.
    pub const UPLINK: &str = "10.213.0.1";

    /// Whether this machine has one.
    #[must_use]
    pub fn is_installed() -> bool {
        Path::new(DOCKERD).exists()
    }

    /// A process in its network, which lives as long as this.
    #[must_use]
    pub fn network(&self) -> u32 {
        self.network.id()
    }

    /// Starts one on `daemon`.
    ///
    /// # Errors
    /// When it does not answer in time; its log is part of the text.
    pub async fn start(daemon: &Daemon) -> Result<Self> {
        Self::start_with(daemon, &[]).await
    }

    /// Starts one on `daemon` with more flags.
    ///
    /// # Errors
    /// When it does not answer in time; its log is part of the text.
    pub async fn start_with(daemon: &Daemon, flags: &[&str]) -> Result<Self> {
        let dir = daemon.dir().join("engine");
        std::fs::create_dir(&dir)?;
        let mut network = Command::new("unshare")
            .args(["--net", "sh", "-c", NETWORK])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut said = String::new();
        let output = network.stdout.take().context("is piped")?;
        BufReader::new(output).read_line(&mut said)?;
        anyhow::ensure!(said == "ready\n", "no network for the engine");
        let mut args: Vec<OsString> = Vec::new();
        for (flag, value) in [
            ("--containerd", daemon.address()),
            ("--data-root", dir.join("data")),
            ("--exec-root", dir.join("exec")),
            ("--pidfile", dir.join("pid")),
        ] {
            args.extend([flag.into(), value.into()]);
        }
        args.extend([
            format!("--host=unix://{}", dir.join("sock").display()).into(),
            format!("--cgroup-parent=/{}", daemon.namespace()).into(),
            "--bip=10.214.0.1/24".into(),
        ]);
        args.extend(flags.iter().map(OsString::from));
        let mut engine = Self {
            child: None,
            network,
            dir,
            args,
        };
        engine.boot().await?;
        Ok(engine)
    }

    /// Starts the process again after [`Engine::kill`].
    ///
    /// # Errors
    /// When it does not answer in time; its log is part of the text.
    pub async fn boot(&mut self) -> Result {
        let log = std::fs::File::create(self.dir.join("log"))?;
        let child = Command::new("nsenter")
            .arg(format!("--net=/proc/{}/ns/net", self.network.id()))
            .arg(DOCKERD)
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.child = Some(child);
        let up = eventually("dockerd answers", async || {
            Ok((self.docker(&["version"])?.0 == 0).then_some(()))
        })
        .await;
        if let Err(error) = up {
            let log = std::fs::read_to_string(self.dir.join("log")).unwrap_or_default();
            anyhow::bail!("{error}\n{log}");
        }
        Ok(())
    }

    /// Ends the process without a word to it.
    ///
    /// # Errors
    /// When it is not running.
    pub fn kill(&mut self) -> Result {
        let mut child = self.child.take().context("the engine is running")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Exit code and all output of a program that finds the engine in its environment.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn client(&self, program: &str, args: &[&str]) -> Result<(i32, String)> {
        let output = Command::new("timeout")
            .args(["--signal=KILL", LIMIT_SECONDS, program])
            .args(args)
            .env(
                "DOCKER_HOST",
                format!("unix://{}", self.dir.join("sock").display()),
            )
            .stdin(Stdio::null())
            .output()?;
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        Ok((output.status.code().unwrap_or(-1), text.trim().to_owned()))
    }

    /// Exit code and all output of a Docker command.
    ///
    /// # Errors
    /// When the command cannot be started.
    pub fn docker(&self, args: &[&str]) -> Result<(i32, String)> {
        self.client("/usr/bin/docker", args)
    }

    /// Output of a Docker command that must succeed.
    ///
    /// # Errors
    /// With what it said, when it fails.
    pub fn ok(&self, args: &[&str]) -> Result<String> {
        let (code, text) = self.docker(args)?;
        anyhow::ensure!(code == 0, "docker {args:?}: exit {code}: {text}");
        Ok(text)
    }

    /// Status, exit code and whether memory ran out.
    ///
    /// # Errors
    /// When there is no such container.
    pub fn state(&self, name: &str) -> Result<String> {
        let format = "{{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}}";
        self.ok(&["inspect", "-f", format, name])
    }

    /// Stops the engine, and takes away the mounts that it leaves by design.
    ///
    /// # Errors
    /// When it does not end in time.
    pub async fn stop(mut self) -> Result {
        let mut child = self.child.take().context("the engine is running")?;
        kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
        eventually("dockerd ends", async || Ok(child.try_wait()?)).await?;
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
        for child in self.child.iter_mut().chain([&mut self.network]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
