//! The raw system calls of this crate: what safe wrappers do not offer.
#![allow(
    unsafe_code,
    reason = "handing a descriptor to a child has no safe wrapper"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use tokio::process::Command;

/// Lets a command inherit `fd` as number `number`.
///
/// # Errors
/// When the descriptor cannot be duplicated.
pub(crate) fn pass_fd(command: &mut Command, fd: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    // Above every number that is asked for, so that the copy below clears its close-on-exec flag.
    let high = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(number + 1))?;
    // SAFETY: fcntl just made this descriptor and nothing else owns it.
    let high = unsafe { OwnedFd::from_raw_fd(high) };
    let place = move || {
        // SAFETY: dup2 is async-signal-safe, and takes plain numbers; the first one is open as
        // long as the closure owns it.
        if unsafe { libc::dup2(high.as_raw_fd(), number) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: the closure calls nothing but dup2 and reads errno, and allocates nothing.
    unsafe { command.pre_exec(place) };
    Ok(())
}
