//! Mounting a container's root file system, with the snapshotter's library.
//!
//! Ordinary mounts are a few system calls and are made at once. What needs a helper process or may
//! take its time (loop devices, id maps, FUSE helpers, layers beyond one page of options) is made by
//! a [worker], so that the shim never waits and never runs a child behind its reaper's
//! back.

use std::os::fd::OwnedFd;
use std::path::Path;

use lighter_proto::containerd::types;
use lighter_snapshotter::mount::Mount;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use rustix::fs::{Mode, OFlags};

use crate::error::{Error, Result};
use crate::reaper::Reaper;
use crate::worker::{self, Answer, Failure, Fault};

/// Mounts in one request.
const MAX_MOUNTS: usize = 512;
/// Mounts stacked on one directory that an unmount takes away.
const MAX_STACKED: usize = 1024;
/// Options below this many bytes fit mount(2)'s one page.
const MAX_PLAIN_BYTES: usize = 3500;

/// Whether a mount is a matter of system calls on this thread.
fn is_plain(mount: &Mount) -> bool {
    let special = |word: &String| {
        word == "loop" || word.starts_with("uidmap=") || word.starts_with("gidmap=")
    };
    !mount.fstype.contains("fuse")
        && !mount.options.iter().any(special)
        && mount
            .options
            .iter()
            .map(|word| word.len() + 1)
            .sum::<usize>()
            < MAX_PLAIN_BYTES
}

/// Mounts all of `mounts` onto `rootfs`, in order. After a failure nothing stays mounted.
///
/// # Errors
/// `InvalidArgument` for a malformed list, else what the system said.
pub(crate) async fn mount_all(
    reaper: &Reaper,
    mounts: &[types::Mount],
    rootfs: &Path,
) -> Result<()> {
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
    let mounts: Vec<Mount> = mounts.iter().cloned().map(Mount::from).collect();
    let failed = |text: String| Error::Runtime(format!("failed to mount rootfs component: {text}"));
    if mounts.iter().all(is_plain) {
        return lighter_snapshotter::mount::mount_all(&mounts, rootfs)
            .map_err(|error| failed(lighter_proto::errdefs::render(&error)));
    }
    let made = worker::call(reaper, || {
        lighter_snapshotter::mount::mount_all(&mounts, rootfs).map_err(|error| Failure {
            fault: Fault::Other,
            text: lighter_proto::errdefs::render(&error),
        })?;
        Ok(Answer::default())
    });
    made.await?
        .map(|_| ())
        .map_err(|failure| failed(failure.text))
}

/// Unmounts everything at and below `rootfs`. Nothing mounted is success.
pub(crate) fn unmount(rootfs: &Path) {
    for _ in 0..MAX_STACKED {
        match umount2(rootfs, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINTR) => {}
            Err(Errno::EBUSY) => {
                // Something below is mounted, or still used by a process that is being killed.
                let flags = MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH;
                if let Err(error) = umount2(rootfs, flags) {
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

/// Whether the uppermost file system at `rootfs` lies on a loop device: its file may be copied or mounted anew as soon
/// as the container is gone, so it must be complete by then.
pub(crate) fn is_on_loop(rootfs: &Path) -> bool {
    /// Spec: Linux, Documentation/admin-guide/devices.txt
    const LOOP_MAJOR: u32 = 7;
    rustix::fs::lstat(rootfs).is_ok_and(|found| rustix::fs::major(found.st_dev) == LOOP_MAJOR)
}

/// [`unmount`] in a worker, as it may take its time.
pub(crate) async fn unmount_apart(reaper: &Reaper, rootfs: &Path) {
    let done = worker::call(reaper, || {
        unmount(rootfs);
        Ok(Answer::default())
    });
    if let Err(error) = done.await {
        tracing::warn!(%error, path = %rootfs.display(), "cannot unmount");
    }
}

/// Takes everything off `rootfs`, for everybody to see. What the file systems do when their last mount goes is done when
/// what is returned is dropped: an overlay has all of the file system below it written to disk.
pub(crate) fn detach(rootfs: &Path) -> Vec<OwnedFd> {
    let mut ending = Vec::new();
    let opened = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for _ in 0..MAX_STACKED {
        // Keeps the uppermost mount.
        ending.extend(rustix::fs::open(rootfs, opened, Mode::empty()));
        match umount2(rootfs, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH) {
            Ok(()) | Err(Errno::EINTR) => {}
            Err(error) => {
                if !matches!(error, Errno::EINVAL | Errno::ENOENT) {
                    tracing::warn!(%error, path = %rootfs.display(), "cannot unmount");
                }
                // What was opened last is no mount.
                ending.pop();
                break;
            }
        }
    }
    ending
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(fstype: &str, options: &[&str]) -> Mount {
        Mount {
            fstype: fstype.to_owned(),
            options: options.iter().map(ToString::to_string).collect(),
            ..Mount::default()
        }
    }

    #[test]
    fn what_takes_more_than_system_calls_is_told_apart() {
        assert!(is_plain(&mount(
            "overlay",
            &["lowerdir=/a:/b", "upperdir=/u", "workdir=/w"]
        )));
        assert!(is_plain(&mount("bind", &["rbind", "ro"])));
        assert!(!is_plain(&mount("ext4", &["loop"])));
        assert!(!is_plain(&mount("overlay", &["uidmap=0:1000:10"])));
        assert!(!is_plain(&mount("fuse3.x", &[])));
        assert!(!is_plain(&mount("overlay", &[&"x".repeat(4096)])));
    }

    #[test]
    fn unmounting_what_is_not_mounted_is_quiet() {
        unmount(Path::new("/nonexistent/rootfs"));
    }
}
