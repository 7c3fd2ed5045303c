//! User namespaces that exist only to carry an id mapping for `mount_setattr(MOUNT_ATTR_IDMAP)`.

use std::fs;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};

use crate::error::{Context, Result};
use crate::spec::linux::IdMapping;
use crate::sys::{self, CloneRequest, Fork};

/// Lines for uid_map or gid_map.
pub(crate) fn map_text(mappings: &[IdMapping]) -> String {
    mappings
        .iter()
        .map(|map| format!("{} {} {}\n", map.container_id, map.host_id, map.size))
        .collect()
}

/// A user namespace with these mappings. Needs to be privileged over the host's ids.
pub(crate) fn user_namespace(uids: &[IdMapping], gids: &[IdMapping]) -> Result<OwnedFd> {
    let request = CloneRequest {
        namespaces: libc::CLONE_NEWUSER.cast_unsigned().into(),
        sibling: false,
        cgroup: None,
    };
    let (pid, pidfd) = match sys::clone3(&request)
        .context(|| "clone a user namespace for id mappings")?
    {
        Fork::Child => loop {
            // Holds the namespace until the parent has opened it and kills us.
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
                .ok();
            rustix::event::pause();
        },
        Fork::Parent { pid, pidfd } => (pid, pidfd),
    };
    let made = (|| {
        fs::write(format!("/proc/{pid}/uid_map"), map_text(uids))
            .context(|| "write uid_map of an idmapped mount")?;
        fs::write(format!("/proc/{pid}/gid_map"), map_text(gids))
            .context(|| "write gid_map of an idmapped mount")?;
        rustix::fs::open(
            format!("/proc/{pid}/ns/user"),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .context(|| "open the user namespace of an idmapped mount")
    })();
    rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL).ok();
    rustix::process::waitid(
        rustix::process::WaitId::PidFd(std::os::fd::AsFd::as_fd(&pidfd)),
        rustix::process::WaitIdOptions::EXITED,
    )
    .ok();
    made
}
