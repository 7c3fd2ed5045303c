//! Mounting a container's root file system.
//!
//! Mounts come as the snapshotter made them: type, source, options, and a target below `rootfs`.
//! Option names are those of mount(8); what is no flag goes to the file system as data.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use lighter_proto::containerd::types::Mount;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::error::{Error, Result};

/// Mounts in one request.
const MAX_MOUNTS: usize = 512;
/// Mounts stacked on one directory that an unmount takes away.
const MAX_STACKED: usize = 1024;
/// What mount(2) takes as data, the closing NUL included.
const MAX_DATA_BYTES: usize = 4096;

/// Flag options: name, whether it sets or clears, flag.
const FLAGS: [(&str, bool, MsFlags); 29] = [
    ("async", false, MsFlags::MS_SYNCHRONOUS),
    ("atime", false, MsFlags::MS_NOATIME),
    ("bind", true, MsFlags::MS_BIND),
    ("defaults", true, MsFlags::empty()),
    ("dev", false, MsFlags::MS_NODEV),
    ("diratime", false, MsFlags::MS_NODIRATIME),
    ("dirsync", true, MsFlags::MS_DIRSYNC),
    ("exec", false, MsFlags::MS_NOEXEC),
    ("iversion", true, MsFlags::MS_I_VERSION),
    ("mand", true, MsFlags::MS_MANDLOCK),
    ("noatime", true, MsFlags::MS_NOATIME),
    ("nodev", true, MsFlags::MS_NODEV),
    ("nodiratime", true, MsFlags::MS_NODIRATIME),
    ("noexec", true, MsFlags::MS_NOEXEC),
    ("noiversion", false, MsFlags::MS_I_VERSION),
    ("nomand", false, MsFlags::MS_MANDLOCK),
    ("norelatime", false, MsFlags::MS_RELATIME),
    ("nostrictatime", false, MsFlags::MS_STRICTATIME),
    ("nosuid", true, MsFlags::MS_NOSUID),
    ("rbind", true, MsFlags::MS_BIND.union(MsFlags::MS_REC)),
    ("relatime", true, MsFlags::MS_RELATIME),
    ("remount", true, MsFlags::MS_REMOUNT),
    ("ro", true, MsFlags::MS_RDONLY),
    ("rw", false, MsFlags::MS_RDONLY),
    ("strictatime", true, MsFlags::MS_STRICTATIME),
    ("suid", false, MsFlags::MS_NOSUID),
    ("sync", true, MsFlags::MS_SYNCHRONOUS),
    ("silent", true, MsFlags::MS_SILENT),
    ("loud", false, MsFlags::MS_SILENT),
];

/// Options that change how mounts spread, applied after the mount.
const PROPAGATION: [(&str, MsFlags); 8] = [
    ("private", MsFlags::MS_PRIVATE),
    ("rprivate", MsFlags::MS_PRIVATE.union(MsFlags::MS_REC)),
    ("shared", MsFlags::MS_SHARED),
    ("rshared", MsFlags::MS_SHARED.union(MsFlags::MS_REC)),
    ("slave", MsFlags::MS_SLAVE),
    ("rslave", MsFlags::MS_SLAVE.union(MsFlags::MS_REC)),
    ("unbindable", MsFlags::MS_UNBINDABLE),
    ("runbindable", MsFlags::MS_UNBINDABLE.union(MsFlags::MS_REC)),
];

#[derive(Debug)]
struct Parsed {
    flags: MsFlags,
    propagation: Vec<MsFlags>,
    data: Vec<String>,
}

fn parse(options: &[String]) -> Result<Parsed> {
    let mut parsed = Parsed {
        flags: MsFlags::empty(),
        propagation: Vec::new(),
        data: Vec::new(),
    };
    for option in options {
        if let Some((_, set, flag)) = FLAGS.iter().find(|(name, ..)| name == option) {
            parsed.flags.set(*flag, *set);
        } else if let Some((_, flag)) = PROPAGATION.iter().find(|(name, _)| name == option) {
            parsed.propagation.push(*flag);
        } else if option == "loop" {
            return Err(Error::Unsupported(
                "mount option loop: attach the loop device before the task is created".to_owned(),
            ));
        } else if !option.starts_with("X-containerd.") && !option.is_empty() {
            parsed.data.push(option.clone());
        }
    }
    Ok(parsed)
}

/// Mounts all of `mounts` onto `rootfs`, in order. After a failure nothing stays mounted.
///
/// # Errors
/// `InvalidArgument` for a malformed list, `Io` for what the system refuses.
pub(crate) fn mount_all(mounts: &[Mount], rootfs: &Path) -> Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    if mounts.len() > MAX_MOUNTS {
        return Err(Error::InvalidArgument(format!(
            "more than {MAX_MOUNTS} rootfs mounts"
        )));
    }
    match std::fs::create_dir(rootfs) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(Error::io("create", rootfs)(error)),
    }
    for (done, mount) in mounts.iter().enumerate() {
        if let Err(error) = mount_one(mount, rootfs) {
            if done > 0 {
                unmount(rootfs);
            }
            return Err(error);
        }
    }
    Ok(())
}

/// The directory a mount goes to: `target` below `rootfs`, links resolved inside it.
fn target(mount: &Mount, rootfs: &Path) -> Result<(PathBuf, Option<OwnedFd>)> {
    if mount.target.is_empty() || mount.target == "/" {
        return Ok((rootfs.to_owned(), None));
    }
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = rustix::fs::open(rootfs, flags | OFlags::DIRECTORY, Mode::empty())
        .map_err(|e| Error::io("open", rootfs)(e.into()))?;
    let found = rustix::fs::openat2(
        &root,
        &mount.target,
        flags,
        Mode::empty(),
        ResolveFlags::IN_ROOT,
    )
    .map_err(|e| Error::io("open mount target", rootfs.join(&mount.target))(e.into()))?;
    Ok((
        PathBuf::from(format!("/proc/self/fd/{}", found.as_raw_fd())),
        Some(found),
    ))
}

fn mount_one(mount: &Mount, rootfs: &Path) -> Result<()> {
    let parsed = parse(&mount.options)?;
    let (target, _keep) = target(mount, rootfs)?;
    let data = parsed.data.join(",");
    let failed = |errno: Errno| Error::Io {
        operation: "mount rootfs",
        path: PathBuf::from(format!(
            "{} (type {}, options {})",
            mount.source,
            mount.r#type,
            mount.options.join(",")
        )),
        source: errno.into(),
    };
    if data.len() >= MAX_DATA_BYTES {
        mount_from_common_dir(mount, &parsed, &target)?;
    } else {
        nix::mount::mount(
            Some(mount.source.as_str()),
            &target,
            Some(mount.r#type.as_str()),
            parsed.flags,
            (!data.is_empty()).then_some(data.as_str()),
        )
        .map_err(failed)?;
    }
    let none: Option<&str> = None;
    // A bind mount takes its other flags only in a second step.
    if parsed.flags.contains(MsFlags::MS_BIND)
        && parsed.flags.intersects(
            MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        )
    {
        nix::mount::mount(
            none,
            &target,
            none,
            parsed.flags | MsFlags::MS_REMOUNT,
            none,
        )
        .map_err(failed)?;
    }
    for flags in parsed.propagation {
        nix::mount::mount(none, &target, none, flags, none).map_err(failed)?;
    }
    Ok(())
}

/// Overlay options with too many layers for one page are shortened: paths become relative to the
/// directory they share. A thread with a working directory of its own makes the mount.
fn mount_from_common_dir(mount: &Mount, parsed: &Parsed, target: &Path) -> Result<()> {
    let too_long = || {
        Error::InvalidArgument(format!(
            "mount {}: options longer than {MAX_DATA_BYTES} bytes",
            mount.source
        ))
    };
    let layers = parsed
        .data
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="));
    let layers: Vec<&Path> = layers
        .ok_or_else(too_long)?
        .split(':')
        .map(Path::new)
        .collect();
    let mut common = layers[0].to_owned();
    while !layers.iter().all(|layer| layer.starts_with(&common)) {
        if !common.pop() {
            return Err(too_long());
        }
    }
    let relative: Vec<String> = layers
        .iter()
        .map(|layer| layer.strip_prefix(&common).map(|p| p.display().to_string()))
        .collect::<std::result::Result<_, _>>()
        .map_err(|_| too_long())?;
    let data: Vec<String> = parsed
        .data
        .iter()
        .map(|option| {
            if option.starts_with("lowerdir=") {
                format!("lowerdir={}", relative.join(":"))
            } else {
                option.clone()
            }
        })
        .collect();
    let data = data.join(",");
    if data.len() >= MAX_DATA_BYTES || relative.iter().any(String::is_empty) {
        return Err(too_long());
    }
    let flags = parsed.flags;
    let outcome = std::thread::scope(|scope| {
        scope
            .spawn(|| -> nix::Result<()> {
                nix::sched::unshare(CloneFlags::CLONE_FS)?;
                nix::unistd::chdir(&common)?;
                nix::mount::mount(
                    Some(mount.source.as_str()),
                    target,
                    Some(mount.r#type.as_str()),
                    flags,
                    Some(data.as_str()),
                )
            })
            .join()
    });
    match outcome {
        Ok(Ok(())) => Ok(()),
        Ok(Err(errno)) => Err(Error::io("mount rootfs", target)(errno.into())),
        Err(_) => Err(Error::Runtime("mounting thread panicked".to_owned())),
    }
}

/// Unmounts everything at and below `rootfs`. Nothing mounted is success.
pub(crate) fn unmount(rootfs: &Path) {
    for _ in 0..MAX_STACKED {
        match nix::mount::umount2(rootfs, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINTR) => {}
            Err(Errno::EBUSY) => {
                // Something below is mounted, or still used by a process that is being killed.
                let flags = MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH;
                if let Err(error) = nix::mount::umount2(rootfs, flags) {
                    tracing::warn!(%error, path = %rootfs.display(), "cannot unmount");
                    return;
                }
            }
            Err(Errno::EINVAL | Errno::ENOENT) => return,
            Err(error) => {
                tracing::warn!(%error, path = %rootfs.display(), "cannot unmount");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(list: &[&str]) -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn flags_propagation_and_data_are_told_apart() {
        let parsed = parse(&options(&[
            "rbind",
            "ro",
            "rprivate",
            "size=5",
            "X-containerd.x=1",
        ]))
        .unwrap();
        assert_eq!(
            parsed.flags,
            MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY
        );
        assert_eq!(parsed.propagation, [MsFlags::MS_PRIVATE | MsFlags::MS_REC]);
        assert_eq!(parsed.data, ["size=5"]);
        assert_eq!(
            parse(&options(&["ro", "rw"])).unwrap().flags,
            MsFlags::empty()
        );
    }

    #[test]
    fn unmounting_what_is_not_mounted_is_quiet() {
        unmount(Path::new("/nonexistent/rootfs"));
    }
}
