//! A stock Docker Engine (Debian's docker.io) on a daemon, in a network namespace of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Daemon, Result, eventually};

const DOCKERD: &str = "/usr/sbin/dockerd";
/// Longest a Docker command may take before it is killed.
const LIMIT_SECONDS: &str = "30";

/// A `dockerd` and the client pointed at it.
#[derive(Debug)]
pub struct Engine {
    child: Child,
    dir: PathBuf,
}

impl Engine {
    /// Whether this machine has one.
    #[must_use]
    pub fn is_installed() -> bool {
        Path::new(DOCKERD).exists()
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Starts one on `daemon`.
    ///
    /// # Errors
    /// When it does not answer in time; its log is part of the text.
    pub async fn start(daemon: &Daemon) -> Result<Self> {
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
    ///
    /// # Errors
    /// When the command cannot be started.
    pub fn docker(&self, args: &[&str]) -> Result<(i32, String)> {
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
