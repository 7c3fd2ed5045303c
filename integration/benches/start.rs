//! The start path alone: against the kernel's floor, step by step, and OCI runtimes side by side.
//!
//! `BENCH=name` runs the rows whose name contains it; `ROUNDS=n` scales the work. Where programs are
//! missing (crun), their column is.

mod report;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use lighter_integration::{Daemon, Image, Options, Result, Spec, Subject, built};

use report::lean::Lean;
use report::life::{Life, STEPS};
use report::{Row, millis, rounds, say, wanted};

/// Set in the copy of this program that compares OCI runtimes.
const OCI_ONLY: &str = "LIGHTER_BENCH_OCI";

/// The program of the kernel's floor; it lives one life per line.
struct Floor {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Floor {
    fn start() -> Result<Self> {
        let mut child = Command::new(built("floor"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the floor program (cargo build -p lighter-integration --bins)")?;
        let lines = BufReader::new(child.stdout.take().context("stdout is piped")?);
        Ok(Self { child, lines })
    }

    /// Milliseconds of one life.
    fn live(&mut self) -> Result<f64> {
        let stdin = self.child.stdin.as_mut().context("stdin is piped")?;
        stdin.write_all(b"\n")?;
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        Ok(line.trim().parse::<f64>().context("the floor failed")? / 1e3)
    }

    fn end(mut self) -> Result {
        drop(self.child.stdin.take());
        ensure!(self.child.wait()?.success(), "the floor failed");
        Ok(())
    }
}

struct Contender {
    name: &'static str,
    daemon: Daemon,
    top: String,
}

impl Contender {
    async fn new(name: &'static str, subject: Subject) -> Result<Self> {
        let quiet = Options {
            log_level: Some("warn"),
            state_in_memory: true,
            ..Options::default()
        };
        let daemon = Daemon::start_with(subject, &quiet).await?;
        let client = daemon.client().await?;
        let image = Image::busybox("docker.io/test/busybox:latest")?;
        client.store(&image).await?;
        let top = client.unpack(&image, "overlayfs").await?;
        Ok(Self { name, daemon, top })
    }

    fn lean(&self) -> Result<Lean> {
        Lean::connect(&self.daemon.address(), self.daemon.namespace())
    }

    /// One life, with the milliseconds of every step.
    fn steps(&self, lean: &mut Lean, id: &str) -> Result<[f64; STEPS.len()]> {
        let life = Life {
            top: &self.top,
            namespace: self.daemon.namespace(),
            options: None,
        };
        life.live(lean, id)
    }
}

fn only_ours() -> bool {
    std::env::var_os("ONLY_OURS").is_some()
}

async fn daemons() -> Result {
    let mut all = Vec::new();
    if !only_ours() {
        all.push(Contender::new("containerd", Subject::Containerd).await?);
    }
    all.push(Contender::new("lighter", Subject::Lighter).await?);
    let names: Vec<_> = all.iter().map(|c| c.name).collect();
    let mut floor = Floor::start()?;
    let mut whole = Row::new("lifecycle of true", "ms", names.iter().copied());
    let mut above = Row::new(
        "lifecycle, multiple of the floor",
        "x",
        names.iter().copied(),
    );
    let mut ground = Row::new("the kernel's floor", "ms", ["floor"].into_iter());
    let mut rows: Vec<_> = STEPS
        .iter()
        .map(|step| Row::new(step, "ms", names.iter().copied()))
        .collect();
    let mut leans = all
        .iter()
        .map(Contender::lean)
        .collect::<Result<Vec<_>>>()?;
    for round in 0..rounds(40) {
        let low = floor.live()?;
        for (c, lean) in all.iter().zip(&mut leans) {
            let steps = c.steps(lean, &format!("s{round}"))?;
            let sum: f64 = steps.iter().sum();
            for (row, time) in rows.iter_mut().zip(steps) {
                row.add(c.name, time);
            }
            if round > 0 {
                whole.add(c.name, sum);
                above.add(c.name, sum / low);
            }
        }
        ground.add("floor", low);
    }
    floor.end()?;
    ground.print();
    whole.print();
    above.print();
    for row in &mut rows {
        row.print();
    }
    crowds(&all)?;
    for c in all {
        c.daemon.finish().await?;
    }
    Ok(())
}

/// Lives that are lived at a time by several, and by each of them.
const CROWD: usize = 8;
const EACH: usize = 5;

/// Lives per second when `CROWD` live them at a time: of the kernel's floor too, which is what two
/// processors can do at all.
fn crowds(all: &[Contender]) -> Result {
    // Where ours alone is looked at, nothing else is to run.
    let crowd = if only_ours() { 0 } else { CROWD };
    let floor = (crowd > 0).then_some("floor");
    let names = all.iter().map(|c| c.name).chain(floor);
    let mut row = Row::new("lifecycle of true, 8 at a time", "containers/s", names);
    let mut floors = (0..crowd)
        .map(|_| Floor::start())
        .collect::<Result<Vec<_>>>()?;
    for round in 0..rounds(10) {
        for c in all {
            let mut leans = (0..CROWD).map(|_| c.lean()).collect::<Result<Vec<_>>>()?;
            let rate = at_a_time(&mut leans, |name, lean| {
                c.steps(lean, &format!("m{round}-{name}")).map(|_| ())
            })?;
            row.add(c.name, rate);
        }
        if !floors.is_empty() {
            let rate = at_a_time(&mut floors, |_, floor| floor.live().map(|_| ()))?;
            row.add("floor", rate);
        }
    }
    floors.into_iter().try_for_each(Floor::end)?;
    row.print();
    Ok(())
}

/// Has every one of `who` live its lives, all at a time: how many a second.
fn at_a_time<W: Send>(who: &mut [W], live: impl Fn(&str, &mut W) -> Result + Sync) -> Result<f64> {
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let live = &live;
        let lives: Vec<_> = who
            .iter_mut()
            .enumerate()
            .map(|(worker, who)| {
                scope.spawn(move || (0..EACH).try_for_each(|n| live(&format!("{worker}-{n}"), who)))
            })
            .collect();
        lives
            .into_iter()
            .try_for_each(|lives| lives.join().expect("no worker panics"))
    })?;
    Ok((CROWD * EACH) as f64 / begun.elapsed().as_secs_f64())
}

/// A bundle that every runtime runs, and the runtimes.
struct Runtimes {
    dir: tempfile::TempDir,
    list: Vec<(&'static str, PathBuf)>,
}

impl Runtimes {
    fn find() -> Result<Self> {
        let list = [
            ("crun", PathBuf::from("/usr/bin/crun")),
            ("runc", PathBuf::from("/usr/sbin/runc")),
            ("lighter-oci", built("lighter-oci")),
        ];
        let dir = tempfile::Builder::new()
            .prefix("bench-oci-")
            .tempdir_in("/run")?;
        let root = dir.path().join("bundle/rootfs");
        for below in ["bin", "proc", "dev", "sys", "run", "etc"] {
            fs::create_dir_all(root.join(below))?;
        }
        fs::copy("/bin/busybox", root.join("bin/busybox"))?;
        std::os::unix::fs::symlink("busybox", root.join("bin/true"))?;
        let list = list.into_iter().filter(|(_, path)| path.exists()).collect();
        Ok(Self { dir, list })
    }

    fn run(&self, program: &Path, arguments: &[&str]) -> Result {
        let output = Command::new(program)
            .arg("--root")
            .arg(self.dir.path().join("state"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(self.dir.path().join("err"))?)
            .status()?;
        if !output.success() {
            let text = fs::read_to_string(self.dir.path().join("err"))?;
            bail!("{} {arguments:?}: {text}", program.display());
        }
        Ok(())
    }

    /// Milliseconds of create, start and delete; the wait between the last two is not counted.
    fn live(&self, program: &Path, id: &str) -> Result<f64> {
        let bundle = self.dir.path().join("bundle");
        let spec = Spec::new("bench-oci", id, &["true"]);
        fs::write(bundle.join("config.json"), serde_json::to_vec(&spec.0)?)?;
        let pid_file = self.dir.path().join("pid");
        let (bundle, pid_path) = (bundle.display().to_string(), pid_file.display().to_string());
        let begun = Instant::now();
        self.run(
            program,
            &["create", "--bundle", &bundle, "--pid-file", &pid_path, id],
        )?;
        let mut time = millis(begun);
        let pid = fs::read_to_string(&pid_file)?.trim().parse()?;
        let pid = rustix::process::Pid::from_raw(pid).context("a pid")?;
        let process = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        let begun = Instant::now();
        self.run(program, &["start", id])?;
        time += millis(begun);
        let mut ended = [nix::poll::PollFd::new(
            process.as_fd(),
            nix::poll::PollFlags::POLLIN,
        )];
        ensure!(
            nix::poll::poll(&mut ended, 10_000_u16)? == 1,
            "the container does not end"
        );
        let begun = Instant::now();
        self.run(program, &["delete", id])?;
        Ok(time + millis(begun))
    }
}

fn oci() -> Result {
    // crun takes no hybrid of both cgroup versions: nobody gets to see the second.
    let unified = Path::new("/sys/fs/cgroup/unified");
    if unified.join("cgroup.procs").exists() {
        nix::mount::umount2(unified, nix::mount::MntFlags::MNT_DETACH)?;
    }
    let runtimes = Runtimes::find()?;
    let mut row = Row::new(
        "OCI create+start+delete",
        "ms",
        runtimes.list.iter().map(|(name, _)| *name),
    );
    for round in 0..rounds(20) {
        for (name, program) in &runtimes.list {
            let id = format!("bench-{}-{name}-{round}", std::process::id());
            row.add(name, runtimes.live(program, &id)?);
        }
    }
    row.print();
    lighter_integration::remove_cgroup_parents("bench-oci");
    Ok(())
}

fn main() -> Result {
    report::as_booted()?;
    if std::env::var_os(OCI_ONLY).is_some() {
        return oci();
    }
    if wanted("lifecycle") || wanted("steps") {
        tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()?
            .block_on(daemons())?;
    }
    if wanted("OCI") {
        let status = Command::new("unshare")
            .arg("--mount")
            .arg(std::env::current_exe()?)
            .env(OCI_ONLY, "1")
            .status()?;
        if !status.success() {
            say("OCI runtimes: not compared");
        }
    }
    Ok(())
}
