//! Making a container from images.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{UnmountFlags, mount_bind_recursive, unmount};
use rustix::process::{Pid, PidfdFlags};

use super::{Choices, DESCRIPTORS, MASK, external_mounts, joined};
use crate::cgroup::Group;
use crate::directory::{Directory, check_id};
use crate::error::{Context, Error, Result};
use crate::init_process::process_stat;
use crate::namespaces::Namespaces;
use crate::record::Record;
use crate::request::Created;
use crate::runtime::Runtime;
use crate::spec::Spec;
use crate::time::rfc3339;

/// The root filesystem, mounted where CRIU wants a mount point of its own; unmounted when dropped.
struct CriuRoot(PathBuf);

impl CriuRoot {
    fn mount(rootfs: &Path, place: PathBuf) -> Result<Self> {
        fs::create_dir(&place).context(|| format!("mkdir {}", place.display()))?;
        mount_bind_recursive(rootfs, &place).context(|| format!("bind {}", place.display()))?;
        Ok(Self(place))
    }
}

impl Drop for CriuRoot {
    fn drop(&mut self) {
        unmount(&self.0, UnmountFlags::DETACH).ok();
        fs::remove_dir(&self.0).ok();
    }
}

/// Removes what was made when restoring fails.
struct Undo<'a> {
    directory: &'a Directory,
    group: Option<Group>,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if let Some(group) = &self.group {
            group.kill_all().ok();
            group.remove().ok();
        }
        self.directory.remove().ok();
    }
}

/// Makes a running container from images. Its init becomes a child of the nearest subreaper.
pub(super) fn restore(
    runtime: &Runtime,
    id: &str,
    bundle: &Path,
    spec: &Spec,
    choices: &Choices,
) -> Result<Created> {
    check_id(id)?;
    spec.validate()?;
    let linux = spec.linux.as_ref().expect("validated");
    let namespaces = Namespaces::plan(linux)?;
    let rootfs = bundle.join(&spec.root.as_ref().expect("validated").path);
    let rootfs =
        fs::canonicalize(&rootfs).context(|| format!("invalid rootfs: {}", rootfs.display()))?;
    fs::create_dir_all(&choices.work).context(|| format!("mkdir {}", choices.work.display()))?;
    let directory = Directory::make(&runtime.options.root, id)?;
    directory.lock()?;
    let mut undo = Undo {
        directory: &directory,
        group: None,
    };
    if let Some(host) = &runtime.host {
        let group = Group::plan(host, &linux.cgroups_path, id)?;
        undo.group = Some(group.clone());
        group.create(linux.resources.as_ref(), true)?;
    }
    let pid_file = directory.path.join("criu.pid");
    let group = undo.group.as_ref();
    run_criu(&directory, bundle, spec, &rootfs, choices, group, &pid_file)?;
    let pid: i32 = fs::read_to_string(&pid_file)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .ok_or_else(|| Error::State("criu told no process id".into()))?;
    fs::remove_file(&pid_file).ok();
    if let Some(group) = &undo.group {
        group.add(pid)?;
    }
    let stat = process_stat(pid).ok_or(Error::NotRunning)?;
    let pidfd = rustix::process::pidfd_open(
        Pid::from_raw(pid).ok_or(Error::NotRunning)?,
        PidfdFlags::empty(),
    )
    .context(|| "pidfd_open")?;
    let seccomp = linux
        .seccomp
        .as_ref()
        .map(|profile| runtime.seccomp_program(profile))
        .transpose()?;
    let joined = namespaces
        .joined
        .iter()
        .fold(0, |bits, (flag, _, _)| bits | flag);
    directory.write(&Record {
        version: Record::VERSION,
        id: id.to_owned(),
        oci_version: spec.oci_version.clone(),
        bundle: bundle.to_owned(),
        rootfs,
        pid,
        pid_start: stat.start,
        created: rfc3339(SystemTime::now()),
        owner: rustix::process::geteuid().as_raw(),
        annotations: spec.annotations.clone(),
        group: undo.group.clone(),
        systemd_unit: None,
        resctrl: None,
        namespaces: namespaces.new | joined,
        setgroups_allowed: true,
        chrooted: false,
        hooks: spec.hooks.clone(),
        seccomp,
        personality: linux.personality.clone(),
        memory_policy: linux.memory_policy.clone(),
    })?;
    std::mem::forget(undo);
    Ok(Created {
        pid,
        pidfd,
        console: None,
    })
}

fn run_criu(
    directory: &Directory,
    bundle: &Path,
    spec: &Spec,
    rootfs: &Path,
    choices: &Choices,
    group: Option<&Group>,
    pid_file: &Path,
) -> Result<()> {
    let linux = spec.linux.as_ref().expect("validated");
    let root = CriuRoot::mount(rootfs, directory.path.join("criu-root"))?;
    let log = "restore.log";
    let mut command = choices.command("restore", log);
    command
        .args(["--restore-detached", "--root"])
        .arg(&root.0)
        .arg("--pidfile")
        .arg(pid_file);
    // Otherwise all but init would be where they were written, in the group of another container.
    for place in group.map(Group::criu_roots).unwrap_or_default() {
        command.arg("--cgroup-root").arg(place);
    }
    for (place, source) in external_mounts(spec, bundle)? {
        command
            .arg("--external")
            .arg(format!("mnt[{}]:{}", place.display(), source.display()));
    }
    if !linux.masked_paths.is_empty() {
        command.arg("--external").arg(format!("mnt[{MASK}]:{MASK}"));
    }
    inherit_streams(&mut command, &choices.images)?;
    // Open until CRIU has ended, and not closed for it: it finds them by their numbers.
    let mut inherited = Vec::new();
    for namespace in joined(linux) {
        let opened = rustix::fs::open(namespace.path, OFlags::RDONLY, Mode::empty());
        let opened = opened.context(|| format!("open {}", namespace.path))?;
        command
            .arg("--inherit-fd")
            .arg(format!("fd[{}]:{}", opened.as_raw_fd(), namespace.label));
        inherited.push(opened);
    }
    choices.run(command, "restore", log)?;
    drop(inherited);
    drop(root);
    Ok(())
}

/// Pipes that init had as streams become the streams of this process.
fn inherit_streams(command: &mut std::process::Command, images: &Path) -> Result<()> {
    let path = images.join(DESCRIPTORS);
    let text = fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
    let descriptors: Vec<String> = serde_json::from_str(&text)
        .map_err(|error| Error::Spec(format!("{}: {error}", path.display())))?;
    command.stdin(std::process::Stdio::inherit());
    command.stdout(std::process::Stdio::inherit());
    command.stderr(std::process::Stdio::inherit());
    for (number, link) in descriptors.iter().take(3).enumerate() {
        if link.starts_with("pipe:") || link.starts_with("socket:") {
            command
                .arg("--inherit-fd")
                .arg(format!("fd[{number}]:{link}"));
        }
    }
    // CRIU must not be stopped by a terminal's signals meant for us.
    command.process_group(0);
    Ok(())
}
