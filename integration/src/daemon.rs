//! A daemon of the subject's, in a temporary root of its own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Cli, Client, Result, Subject, eventually, leftovers, subject};

/// Collections run when a test asks for one, so that what it is about to refer to stays until then.
const GC_WHEN_ASKED: &str = "[plugins.'io.containerd.gc.v1.scheduler']\nstartup_delay = '1h'\n\
                             mutation_threshold = 1000000000\n";

/// Time enough to refer to what shall stay.
const GC_BY_ITSELF: &str = "[plugins.'io.containerd.gc.v1.scheduler']\nstartup_delay = '3s'\n";

/// The plugin that is off unless asked for: it takes a port and watches directories.
const CRI: &str = "io.containerd.grpc.v1.cri";

/// What differs from a plain daemon.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Configuration appended to the generated file (version 2).
    pub config: String,
    /// Configuration before the first table: keys of the file itself.
    pub head: String,
    /// Level of the daemon's log; `debug` when none is given.
    pub log_level: Option<&'static str>,
    /// Size of a filesystem of its own for the daemon's root, in MiB.
    pub root_mib: Option<u32>,
    /// Size of an ext4 of its own for the daemon's root, in MiB, with its blocks in memory: what is
    /// measured there is the daemon, not the machine's disk.
    pub root_ext4_mib: Option<u64>,
    /// Whether the state directory is in memory, as `/run` is on a system that was booted.
    pub state_in_memory: bool,
    /// Folder before all others in the daemon's `PATH`: shims are found there first.
    pub path: Option<PathBuf>,
    /// Whether CRI is served.
    pub cri: bool,
    /// Whether collections run by themselves from three seconds on, as they do outside of tests.
    pub collects: bool,
    /// Plugins turned off besides CRI.
    pub disabled: Vec<&'static str>,
    /// Variables of the daemon's environment.
    pub env: Vec<(&'static str, PathBuf)>,
    /// Folder of the daemon's program and its shim, in place of this build's.
    pub bin_dir: Option<PathBuf>,
}

/// Directories of a daemon that may be file systems of their own.
const OWN_MOUNTS: [&str; 3] = ["root", "state", "blocks"];

/// `blocks` gets the file that the file system is in.
fn mount_ext4(at: &Path, blocks: &Path, mib: u64) -> Result<()> {
    mount_tmpfs(blocks, &format!("size={}m", mib + 1))?;
    fs::create_dir(at)?;
    let disk = blocks.join("disk");
    File::create(&disk)?.set_len(mib << 20)?;
    let run = |program: &str, args: &[&str], last: &[&Path]| {
        let output = Command::new(program).args(args).args(last).output()?;
        anyhow::ensure!(output.status.success(), "{program}: {output:?}");
        Ok(())
    };
    // An inode for each block: tests have many small files.
    let now = "lazy_itable_init=0,lazy_journal_init=0";
    run(
        "mkfs.ext4",
        &["-q", "-F", "-i", "4096", "-E", now],
        &[&disk],
    )?;
    run("mount", &["-o", "loop"], &[&disk, at])
}

fn mount_tmpfs(at: &Path, data: &str) -> Result<()> {
    fs::create_dir(at)?;
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some(data))
        .with_context(|| format!("mount a tmpfs on {}", at.display()))
}

/// A running daemon and everything that belongs to it.
#[derive(Debug)]
pub struct Daemon {
    subject: Subject,
    dir: PathBuf,
    namespace: String,
    child: Option<Child>,
    path: Option<PathBuf>,
    env: Vec<(&'static str, PathBuf)>,
    bin_dir: Option<PathBuf>,
    starts: u32,
}

impl Daemon {
    /// Starts the run's subject.
    ///
    /// # Errors
    /// When it does not answer in time; its log is part of the text.
    pub async fn start() -> Result<Self> {
        Self::start_with(Subject::of_run(), &Options::default()).await
    }

    /// Starts `subject` with `options`.
    ///
    /// # Errors
    /// When it does not answer in time; its log is part of the text.
    pub async fn start_with(subject: Subject, options: &Options) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("lighter-it-")
            .tempdir()?
            .keep();
        let namespace = dir
            .file_name()
            .and_then(|n| n.to_str())
            .map(|n| n.replace("lighter-it-", "it-"))
            .context("a temporary name is UTF-8")?;
        let mut disabled = options.disabled.clone();
        if !options.cri {
            disabled.push(CRI);
        }
        let config = format!(
            "version = 2\n{head}\nroot = {root:?}\nstate = {state:?}\ndisabled_plugins = \
             {disabled:?}\n[grpc]\naddress = {sock:?}\n[debug]\nlevel = \
             {level:?}\n{gc}\n[plugins.'io.containerd.nri.v1.nri']\nsocket_path = \
             {nri:?}\n{extra}\n",
            nri = dir.join("nri").join("nri.sock"),
            root = dir.join("root"),
            state = dir.join("state"),
            sock = dir.join("c.sock"),
            gc = if options.collects {
                GC_BY_ITSELF
            } else {
                GC_WHEN_ASKED
            },
            head = options.head,
            extra = options.config,
            level = options.log_level.unwrap_or("debug"),
        );
        fs::write(dir.join("config.toml"), config)?;
        if let Some(size) = options.root_mib {
            mount_tmpfs(&dir.join("root"), &format!("size={size}m"))?;
        }
        if let Some(size) = options.root_ext4_mib {
            mount_ext4(&dir.join("root"), &dir.join("blocks"), size)?;
        }
        if options.state_in_memory {
            mount_tmpfs(&dir.join("state"), "mode=0755")?;
        }
        let mut daemon = Self {
            subject,
            dir,
            namespace,
            child: None,
            path: options.path.clone(),
            env: options.env.clone(),
            bin_dir: options.bin_dir.clone(),
            starts: 0,
        };
        daemon.boot().await?;
        Ok(daemon)
    }

    /// Starts the process again after [`Daemon::kill`] or [`Daemon::stop`].
    ///
    /// # Errors
    /// When it does not answer in time.
    pub async fn boot(&mut self) -> Result<()> {
        anyhow::ensure!(self.child.is_none(), "the daemon is running");
        self.starts += 1;
        let log = File::create(self.dir.join(format!("log.{}", self.starts)))?;
        let program = self.subject.daemon();
        let program = match (&self.bin_dir, program.file_name()) {
            (Some(dir), Some(name)) => dir.join(name),
            _ => program,
        };
        let mut command = Command::new(program);
        if let Some(first) = &self.path {
            let rest = std::env::var_os("PATH").unwrap_or_default();
            let all = std::iter::once(first.clone()).chain(std::env::split_paths(&rest));
            command.env("PATH", std::env::join_paths(all)?);
        }
        let child = command
            .arg("--config")
            .arg(self.config())
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", self.subject.daemon().display()))?;
        self.child = Some(child);
        let address = self.address();
        let ended = eventually("the daemon answers", async || {
            if let Some(child) = self.child.as_mut()
                && let Some(status) = child.try_wait()?
            {
                return Ok(Some(Some(status)));
            }
            let Ok(client) = Client::connect(&address, "default").await else {
                return Ok(None);
            };
            Ok(client.version().await.is_ok().then_some(None))
        })
        .await;
        let why = match ended {
            Ok(None) => return Ok(()),
            Ok(Some(status)) => status.to_string(),
            Err(error) => error.to_string(),
        };
        anyhow::bail!("the daemon did not come up: {why}\n{}", self.log())
    }

    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.dir.join("config.toml")
    }

    /// The newest log.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join(format!("log.{}", self.starts))).unwrap_or_default()
    }

    /// Socket of the daemon.
    #[must_use]
    pub fn address(&self) -> PathBuf {
        self.dir.join("c.sock")
    }

    /// Temporary directory of this daemon; tests may put files there.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Namespace of this test.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The subject.
    #[must_use]
    pub fn subject(&self) -> Subject {
        self.subject
    }

    /// Pid of the daemon.
    ///
    /// # Errors
    /// When it is not running.
    pub fn pid(&self) -> Result<i32> {
        let child = self.child.as_ref().context("the daemon is not running")?;
        Ok(i32::try_from(child.id())?)
    }

    /// Shims that wait to be used, and the process that keeps them.
    #[must_use]
    pub fn warm_shims(&self) -> Vec<i32> {
        leftovers::processes(&self.dir, &self.namespace)
            .into_iter()
            .filter(|(_, line)| leftovers::is_warm(line))
            .map(|(pid, _)| pid)
            .collect()
    }

    /// Everything that runs for this daemon, without itself and without shims that wait.
    #[must_use]
    pub fn process_ids(&self) -> Vec<i32> {
        let own = self.pid().unwrap_or_default();
        leftovers::processes(&self.dir, &self.namespace)
            .into_iter()
            .filter(|(pid, line)| *pid != own && !leftovers::is_warm(line))
            .map(|(pid, _)| pid)
            .collect()
    }

    /// How many those are.
    #[must_use]
    pub fn processes(&self) -> usize {
        self.process_ids().len()
    }

    /// Mounts below the daemon's directory.
    #[must_use]
    pub fn mounts(&self) -> usize {
        leftovers::mounts(&self.dir).len()
    }

    /// A client in this test's namespace.
    ///
    /// # Errors
    /// When the daemon does not accept.
    pub async fn client(&self) -> Result<Client> {
        Client::connect(&self.address(), &self.namespace).await
    }

    /// Debian's `ctr`.
    #[must_use]
    pub fn debian_ctr(&self) -> Cli {
        Cli::new("/usr/bin/ctr", self.address(), &self.namespace)
    }

    /// Our `ctr`.
    #[must_use]
    pub fn our_ctr(&self) -> Cli {
        Cli::new(subject::built("ctr"), self.address(), &self.namespace)
    }

    /// `kill -9`.
    ///
    /// # Errors
    /// When it is not running.
    pub fn kill(&mut self) -> Result<()> {
        let mut child = self.child.take().context("the daemon is not running")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// SIGTERM, and the time it may take.
    ///
    /// # Errors
    /// When it does not end by itself.
    pub async fn stop(&mut self) -> Result<()> {
        let mut child = self.child.take().context("the daemon is not running")?;
        kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
        let ended = eventually("the daemon ends", async || Ok(child.try_wait()?)).await;
        if ended.is_err() {
            child.kill()?;
            child.wait()?;
        }
        ended.map(drop)
    }

    /// Stops the daemon and asserts that nothing of the test is left on the machine.
    ///
    /// # Errors
    /// Lists what is left.
    pub async fn finish(mut self) -> Result<()> {
        // Shims and their mounts go a moment after the last delete was answered.
        let left = eventually("nothing is left", async || {
            let mut left = leftovers::find(&self.dir, &self.namespace);
            let own = self.child.as_ref().map(Child::id);
            let own_mounts = OWN_MOUNTS.map(|at| format!("mount {}", self.dir.join(at).display()));
            left.retain(|line| !own_mounts.contains(line));
            left.retain(|line| !(line.starts_with("process ") && leftovers::is_warm(line)));
            left.retain(|line| own.is_none_or(|pid| !line.starts_with(&format!("process {pid}:"))));
            Ok(left.is_empty().then_some(()))
        })
        .await;
        if left.is_err() {
            let log = self.log();
            let tail: Vec<_> = log.lines().rev().take(20).collect();
            let tail: Vec<_> = tail.into_iter().rev().collect();
            anyhow::bail!(
                "left over: {:#?}\nend of the log:\n{}",
                leftovers::find(&self.dir, &self.namespace),
                tail.join("\n")
            );
        }
        self.stop().await?;
        for own in OWN_MOUNTS.map(|at| self.dir.join(at)) {
            if leftovers::mounts(&own).contains(&own) {
                nix::mount::umount(&own)?;
            }
        }
        // Shims that waited to be used end by themselves.
        let gone = eventually("nothing is left", async || {
            let left = leftovers::find(&self.dir, &self.namespace);
            Ok(left.is_empty().then_some(()))
        });
        gone.await.map_err(|_| {
            let left = leftovers::find(&self.dir, &self.namespace);
            anyhow::anyhow!("left over after the daemon's end: {left:#?}")
        })
    }
}

impl Drop for Daemon {
    /// A test that failed must not disturb the next: everything of it is ended, then removed.
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        for _ in 0..50 {
            let left = leftovers::processes(&self.dir, &self.namespace);
            if left.is_empty() {
                break;
            }
            for (pid, _) in left {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        for point in leftovers::mounts(&self.dir) {
            let _ = nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH);
        }
        for group in leftovers::cgroups(&self.namespace) {
            let _ = fs::remove_dir(group);
        }
        leftovers::remove_cgroup_parents(&self.namespace);
        if std::env::var_os("LIGHTER_KEEP").is_none() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}
