//! Processes: born, in namespaces, and become a program.

use std::ffi::{CStr, CString, c_char};
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::ptr;

use super::check;

/// New time namespace; `libc` has it as a flag of unshare(2) only.
pub(crate) const CLONE_NEWTIME: i32 = 0x80;
/// The child is born in a cgroup (Linux 5.7).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// Caught signals are back to their defaults in the child (Linux 5.5).
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;

/// Which side of [`clone3`] the caller is.
pub(crate) enum Fork {
    /// The new process.
    Child,
    /// The process that called: the new one's id and a descriptor for it.
    Parent { pid: i32, pidfd: OwnedFd },
}

/// What [`clone3`] is asked for.
pub(crate) struct CloneRequest<'a> {
    /// `CLONE_NEW*` bits.
    pub(crate) namespaces: u64,
    /// Makes the child a sibling (`CLONE_PARENT`).
    pub(crate) sibling: bool,
    /// Cgroup v2 directory the child is born in.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
}

/// Forks with new namespaces. Must be called while this process has one thread: the child goes on running Rust code
/// that allocates, so no other thread may hold a lock at this moment.
pub(crate) fn clone3(request: &CloneRequest<'_>) -> io::Result<Fork> {
    let mut pidfd: RawFd = -1;
    // SAFETY: all-zero is a valid clone_args: a plain fork.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    // No handler of ours runs in the copy, not even before it has closed what it shares with us.
    args.flags =
        request.namespaces | u64::from(libc::CLONE_PIDFD.cast_unsigned()) | CLONE_CLEAR_SIGHAND;
    args.pidfd = (&raw mut pidfd) as u64;
    if request.sibling {
        args.flags |= u64::from(libc::CLONE_PARENT.cast_unsigned());
    } else {
        args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    }
    if let Some(cgroup) = request.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::try_from(cgroup.as_raw_fd()).expect("descriptors are not negative");
    }
    // SAFETY: without CLONE_VM this is fork: the child has its own copy of memory, and the caller vouches for there
    // being one thread. `args` and `pidfd` outlive the call.
    let pid = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const args,
            size_of::<libc::clone_args>(),
        )
    })?;
    if pid == 0 {
        return Ok(Fork::Child);
    }
    let pid = i32::try_from(pid).expect("process ids fit in an int");
    // SAFETY: with CLONE_PIDFD the kernel stored a fresh descriptor here.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Fork::Parent { pid, pidfd })
}

/// Ends the calling process at once: no destructor, no exit handler. The way out of a forked child.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no precondition.
    unsafe { libc::_exit(code) }
}

/// Joins the namespace(s) behind `fd`; with a pidfd `kinds` may have several `CLONE_NEW*` bits.
pub(crate) fn setns(fd: BorrowedFd<'_>, kinds: i32) -> io::Result<()> {
    // SAFETY: only integers are passed.
    check(unsafe { libc::syscall(libc::SYS_setns, fd.as_raw_fd(), kinds) }).map(drop)
}

/// `unshare(2)` for namespaces.
pub(crate) fn unshare(kinds: i32) -> io::Result<()> {
    // SAFETY: only an integer is passed; none of the namespace bits touches memory.
    check(unsafe { libc::syscall(libc::SYS_unshare, kinds) }).map(drop)
}

/// Sets the execution domain (personality(2)).
pub(crate) fn set_personality(persona: u64) -> io::Result<()> {
    // SAFETY: only an integer is passed.
    check(unsafe { libc::syscall(libc::SYS_personality, persona) }).map(drop)
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([ptr::null()])
        .collect()
}

/// Replaces this process's image by the file at `path`. Returns only on failure.
pub(crate) fn execve(path: &CStr, arguments: &[CString], environment: &[CString]) -> io::Error {
    let (argv, envp) = (pointers(arguments), pointers(environment));
    // SAFETY: both arrays end with a null pointer and outlive the call.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    io::Error::last_os_error()
}

/// Replaces this process's image by an open file. Returns only on failure.
pub(crate) fn fexecve(
    file: BorrowedFd<'_>,
    arguments: &[CString],
    environment: &[CString],
) -> io::Error {
    let (argv, envp) = (pointers(arguments), pointers(environment));
    // SAFETY: both arrays end with a null pointer and outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            file.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}
