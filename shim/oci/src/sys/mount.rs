//! Mounts: what rustix has no call for.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use super::check;

/// Bits for [`mount_setattr`] (linux/mount.h).
pub(crate) mod attr {
    pub(crate) const RDONLY: u64 = 0x1;
    pub(crate) const NOSUID: u64 = 0x2;
    pub(crate) const NODEV: u64 = 0x4;
    pub(crate) const NOEXEC: u64 = 0x8;
    pub(crate) const ATIME: u64 = 0x70;
    pub(crate) const RELATIME: u64 = 0;
    pub(crate) const NOATIME: u64 = 0x10;
    pub(crate) const STRICTATIME: u64 = 0x20;
    pub(crate) const NODIRATIME: u64 = 0x80;
    pub(crate) const IDMAP: u64 = 0x10_0000;
    pub(crate) const NOSYMFOLLOW: u64 = 0x20_0000;
}

#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Changes for [`mount_setattr`].
#[derive(Default)]
pub(crate) struct AttrChange<'a> {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE` or 0.
    pub(crate) propagation: u64,
    pub(crate) idmap: Option<BorrowedFd<'a>>,
    pub(crate) recursive: bool,
}

/// `mount_setattr(2)` on the mount that `mount` is the root of.
pub(crate) fn mount_setattr(mount: BorrowedFd<'_>, change: &AttrChange<'_>) -> io::Result<()> {
    let mut args = MountAttr {
        set: change.set,
        clear: change.clear,
        propagation: change.propagation,
        userns_fd: 0,
    };
    if let Some(idmap) = change.idmap {
        args.set |= attr::IDMAP;
        args.userns_fd = u64::try_from(idmap.as_raw_fd()).expect("descriptors are not negative");
    }
    let flags = libc::AT_EMPTY_PATH
        | if change.recursive {
            libc::AT_RECURSIVE
        } else {
            0
        };
    // SAFETY: `args` has the layout and size the kernel is told, and the path is a C string.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const args,
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}
