//! What the kernel alone needs for the life of a container.
//!
//! One life: directories of an overlay, cgroups in every hierarchy, a process in namespaces of its
//! own, the overlay, `/proc`, `/dev` with its devices, `/sys`, masks and read-only paths,
//! `pivot_root`, the program, its end, and everything removed again. No daemon, no shim, no
//! configuration, nothing durable, no checks: what a runtime adds to this is its own doing.
//!
//! The steps are those of [`Spec::new`](crate::Spec::new), which the benchmarks run.

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::CloneFlags;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::wait::{Id, WaitPidFlag, waitid};

use crate::sys::{self, Fork};

/// Devices that every container has: name, major, minor.
const DEVICES: [(&str, u64, u64); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];
const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];
const MASKED_FILES: [&str; 2] = ["proc/kcore", "proc/keys"];
const MASKED_DIRS: [&str; 2] = ["proc/acpi", "sys/firmware"];
const READ_ONLY: [&str; 4] = ["proc/bus", "proc/fs", "proc/irq", "proc/sys"];

/// A cgroup hierarchy and, for cpusets, what a new group must be given.
#[derive(Debug)]
struct Hierarchy {
    mount: PathBuf,
    cpuset: Option<(String, String)>,
    devices: bool,
}

/// A place to live in, removed when dropped.
#[derive(Debug)]
pub struct Floor {
    dir: PathBuf,
    name: String,
    hierarchies: Vec<Hierarchy>,
    lives: u64,
}

impl Floor {
    /// Prepares what all lives share: the image, and knowledge of the cgroups.
    ///
    /// # Errors
    /// What the system says; Debian's `busybox-static` must be there.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let lower = dir.join("lower");
        for below in ["bin", "proc", "dev", "sys", "run", "etc"] {
            fs::create_dir_all(lower.join(below))?;
        }
        fs::copy("/bin/busybox", lower.join("bin/busybox"))?;
        symlink("busybox", lower.join("bin/true"))?;
        Ok(Self {
            dir: dir.to_owned(),
            name: format!("floor-{}", std::process::id()),
            hierarchies: hierarchies()?,
            lives: 0,
        })
    }

    /// One life. How long it took.
    ///
    /// # Errors
    /// What the system said, here or in the child.
    pub fn live(&mut self) -> io::Result<Duration> {
        self.lives += 1;
        let life = self.dir.join(self.lives.to_string());
        let begun = Instant::now();
        for below in ["", "upper", "work", "rootfs"] {
            fs::create_dir(life.join(below))?;
        }
        let groups = self.make_groups()?;
        let namespaces = CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWNET;
        let child = match sys::clone3(namespaces.bits())? {
            Fork::Parent(child) => child,
            Fork::Child => {
                let error = be_born(&self.dir.join("lower"), &life, &groups);
                let _ = writeln!(io::stderr(), "floor: {error}");
                sys::exit_now(1)
            }
        };
        let ended = await_end(&child);
        for group in &groups {
            fs::remove_dir(group)?;
        }
        for below in ["work/work", "work", "upper", "rootfs"] {
            let _ = fs::remove_dir(life.join(below));
        }
        // What the mounts made in the upper directory.
        fs::remove_dir_all(&life)?;
        ended?;
        Ok(begun.elapsed())
    }

    fn make_groups(&self) -> io::Result<Vec<PathBuf>> {
        let mut groups = Vec::with_capacity(self.hierarchies.len());
        for hierarchy in &self.hierarchies {
            let group = hierarchy.mount.join(&self.name);
            fs::create_dir(&group)?;
            if let Some((cpus, mems)) = &hierarchy.cpuset {
                fs::write(group.join("cpuset.cpus"), cpus)?;
                fs::write(group.join("cpuset.mems"), mems)?;
            }
            if hierarchy.devices {
                fs::write(group.join("devices.deny"), "a *:* rwm")?;
                for (_, major, minor) in DEVICES {
                    let rule = format!("c {major}:{minor} rwm");
                    fs::write(group.join("devices.allow"), rule)?;
                }
                for rule in ["c *:* m", "b *:* m", "c 136:* rwm", "c 5:2 rwm"] {
                    fs::write(group.join("devices.allow"), rule)?;
                }
            }
            groups.push(group);
        }
        Ok(groups)
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        for hierarchy in &self.hierarchies {
            let _ = fs::remove_dir(hierarchy.mount.join(&self.name));
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn hierarchies() -> io::Result<Vec<Hierarchy>> {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        return Ok(vec![Hierarchy {
            mount: root.to_owned(),
            cpuset: None,
            devices: false,
        }]);
    }
    let mut found = Vec::new();
    for line in fs::read_to_string("/proc/self/cgroup")?.lines() {
        let Some(names) = line.split(':').nth(1).filter(|names| !names.is_empty()) else {
            continue;
        };
        let mount = root.join(names.strip_prefix("name=").unwrap_or(names));
        if !mount.join("cgroup.procs").exists() {
            continue;
        }
        let read = |file: &str| fs::read_to_string(mount.join(file)).unwrap_or_default();
        let cpuset = names.split(',').any(|name| name == "cpuset");
        found.push(Hierarchy {
            cpuset: cpuset.then(|| (read("cpuset.cpus"), read("cpuset.mems"))),
            devices: names.split(',').any(|name| name == "devices"),
            mount,
        });
    }
    Ok(found)
}

fn await_end(child: &OwnedFd) -> io::Result<()> {
    let status = waitid(Id::PIDFd(child.as_fd()), WaitPidFlag::WEXITED)?;
    match status {
        nix::sys::wait::WaitStatus::Exited(_, 0) => Ok(()),
        other => Err(io::Error::other(format!("the container ended: {other:?}"))),
    }
}

/// The child's part; comes back only with a failure.
fn be_born(lower: &Path, life: &Path, groups: &[PathBuf]) -> io::Error {
    match build(lower, life, groups) {
        Ok(()) => {
            let program = c"/bin/true";
            match nix::unistd::execve(program, &[c"true"], &[c"PATH=/bin"]) {
                Ok(never) => match never {},
                Err(error) => error.into(),
            }
        }
        Err(error) => error,
    }
}

fn build(lower: &Path, life: &Path, groups: &[PathBuf]) -> io::Result<()> {
    for group in groups {
        // One thread that moves itself needs no lock of the whole machine: 20 µs instead of a grace
        // period of RCU, which is 15 ms when nobody else moved just before. Version 2 has no such file.
        let alone = group.join("tasks");
        let entry = if alone.exists() {
            alone
        } else {
            group.join("cgroup.procs")
        };
        fs::write(entry, "0")?;
    }
    nix::unistd::setsid()?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)?;
    let rootfs = life.join("rootfs");
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        life.join("upper").display(),
        life.join("work").display()
    );
    let overlay = Some(options.as_str());
    mount(
        Some("overlay"),
        &rootfs,
        Some("overlay"),
        MsFlags::empty(),
        overlay,
    )?;
    nix::unistd::chdir(&rootfs)?;
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    let dev = MsFlags::MS_NOSUID | MsFlags::MS_STRICTATIME;
    let tmpfs = Some("mode=755,size=65536k");
    mount(Some("proc"), "proc", Some("proc"), safe, none)?;
    mount(Some("tmpfs"), "dev", Some("tmpfs"), dev, tmpfs)?;
    nix::unistd::mkdir("dev/pts", Mode::from_bits_truncate(0o755))?;
    let pts = Some("newinstance,ptmxmode=0666,mode=0620,gid=5");
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("devpts"), "dev/pts", Some("devpts"), quiet, pts)?;
    mount(
        Some("sysfs"),
        "sys",
        Some("sysfs"),
        safe | MsFlags::MS_RDONLY,
        none,
    )?;
    mount(Some("tmpfs"), "run", Some("tmpfs"), dev, tmpfs)?;
    nix::sys::stat::umask(Mode::empty());
    let anyone = Mode::from_bits_truncate(0o666);
    for (name, major, minor) in DEVICES {
        let path = Path::new("dev").join(name);
        mknod(&path, SFlag::S_IFCHR, anyone, makedev(major, minor))?;
    }
    for (to, name) in LINKS {
        symlink(to, Path::new("dev").join(name))?;
    }
    nix::unistd::sethostname("floor")?;
    cover()?;
    nix::unistd::pivot_root(".", ".")?;
    mount(none, ".", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")?;
    Ok(())
}

/// Masks and read-only paths; what this kernel does not have is left out.
fn cover() -> io::Result<()> {
    let none: Option<&str> = None;
    let bind = MsFlags::MS_BIND;
    let again = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    for path in READ_ONLY {
        if Path::new(path).exists() {
            mount(Some(path), path, none, bind | MsFlags::MS_REC, none)?;
            let kept = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
            mount(none, path, none, again | kept, none)?;
        }
    }
    for path in MASKED_FILES {
        if Path::new(path).exists() {
            mount(Some("/dev/null"), path, none, bind, none)?;
        }
    }
    for path in MASKED_DIRS {
        if Path::new(path).exists() {
            mount(
                Some("tmpfs"),
                path,
                Some("tmpfs"),
                MsFlags::MS_RDONLY,
                Some("size=0k"),
            )?;
        }
    }
    Ok(())
}
