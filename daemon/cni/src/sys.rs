//! The raw system calls of this crate: what safe wrappers do not offer.
//!
//! A multi-threaded process cannot enter a user namespace, so a network namespace owned by one is
//! made by a short-lived forked child, which the caller then pins through `/proc`.
#![allow(unsafe_code, reason = "fork without exec has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pipe2, read};
use tokio::io::unix::AsyncFd;

/// Readiness of a descriptor that nothing else closes.
///
/// # Errors
/// When the descriptor cannot be polled.
pub(crate) fn pollable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the value owns an open descriptor, which stays the same until it is dropped.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// In place of a descriptor: a user namespace of its own, and nothing in it.
const NEW_USERNS: i32 = -1;

/// A child that sits in namespaces of its own until dropped.
#[derive(Debug)]
pub struct NamespaceHolder {
    pid: Pid,
}

impl NamespaceHolder {
    /// Forks a child that enters the user namespace `userns` and makes a network namespace in it.
    ///
    /// # Errors
    /// The child's failure, by errno.
    pub fn net_in_userns(userns: BorrowedFd<'_>) -> io::Result<Self> {
        Self::hold(userns.as_raw_fd())
    }

    /// Forks a child that makes a user namespace, which has no mappings yet.
    ///
    /// # Errors
    /// The child's failure, by errno.
    pub fn user() -> io::Result<Self> {
        Self::hold(NEW_USERNS)
    }

    fn hold(userns: i32) -> io::Result<Self> {
        let (reader, writer) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let report = writer.as_raw_fd();
        // SAFETY: the child calls only async-signal-safe functions, on plain integers that were
        // computed before the fork, and never returns.
        match unsafe { fork() }? {
            ForkResult::Child => child(userns, report),
            ForkResult::Parent { child } => {
                let holder = Self { pid: child };
                drop(writer);
                match report_of(&reader)? {
                    0 => Ok(holder),
                    errno => Err(io::Error::from_raw_os_error(errno)),
                }
            }
        }
    }

    /// A file of the child's in `/proc`, valid while `self` lives.
    #[must_use]
    pub fn path(&self, name: &str) -> String {
        format!("/proc/{}/{name}", self.pid)
    }

    /// The child's network namespace, valid while `self` lives.
    #[must_use]
    pub fn net_path(&self) -> String {
        format!("/proc/{}/ns/net", self.pid)
    }
}

impl Drop for NamespaceHolder {
    fn drop(&mut self) {
        // Both fail only when the child is gone already, which is what is wanted.
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

/// Reads the errno that the child reported; a child that died silently is an I/O error.
fn report_of(reader: &OwnedFd) -> io::Result<i32> {
    let mut word = [0_u8; 4];
    let mut filled = 0;
    while filled < word.len() {
        match read(reader, &mut word[filled..]) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            Ok(count) => filled += count,
            Err(nix::errno::Errno::EINTR) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Ok(i32::from_ne_bytes(word))
}

/// The forked child: enters, unshares, reports, and waits to be killed.
fn child(userns: i32, report: i32) -> ! {
    // SAFETY: prctl, setns, unshare, write, pause and _exit are async-signal-safe system calls;
    // the descriptors are open in this copy of the process, the buffer lives on this stack.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let failed = if userns == NEW_USERNS {
            libc::unshare(libc::CLONE_NEWUSER) != 0
        } else {
            libc::setns(userns, libc::CLONE_NEWUSER) != 0 || libc::unshare(libc::CLONE_NEWNET) != 0
        };
        let errno = if failed { *libc::__errno_location() } else { 0 };
        let word = errno.to_ne_bytes();
        libc::write(report, word.as_ptr().cast(), word.len());
        if !failed {
            loop {
                libc::pause();
            }
        }
        libc::_exit(1)
    }
}
