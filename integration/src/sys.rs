//! The one system call of the kernel-floor program that no crate makes.
#![allow(unsafe_code, reason = "clone3 has no safe wrapper")]

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};

/// Which side of [`clone3`] the caller is.
pub(crate) enum Fork {
    /// The new process.
    Child,
    /// The caller; the descriptor becomes readable when the child ends.
    Parent(OwnedFd),
}

/// Forks with new namespaces (`CLONE_NEW*` bits). Only for a process of one thread.
///
/// # Errors
/// What the system said, or that there are other threads.
pub(crate) fn clone3(namespaces: i32) -> io::Result<Fork> {
    let threads = std::os::unix::fs::MetadataExt::nlink(&std::fs::metadata("/proc/self/task")?) - 2;
    if threads != 1 {
        return Err(io::Error::other("clone of a process with several threads"));
    }
    let mut pidfd: RawFd = -1;
    // SAFETY: all-zero is a valid clone_args: a plain fork.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags =
        u64::from(namespaces.cast_unsigned()) | u64::from(libc::CLONE_PIDFD.cast_unsigned());
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    // SAFETY: without CLONE_VM this is fork, and this process has one thread (checked above);
    // `args` and `pidfd` outlive the call.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const args,
            size_of::<libc::clone_args>(),
        )
    };
    match pid {
        0 => Ok(Fork::Child),
        // SAFETY: with CLONE_PIDFD the kernel has stored a fresh descriptor here.
        pid if pid > 0 => Ok(Fork::Parent(unsafe { OwnedFd::from_raw_fd(pidfd) })),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ends a forked child at once.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}
