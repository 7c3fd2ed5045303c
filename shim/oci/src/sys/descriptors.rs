//! Descriptors by their numbers: which of them a program is given.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};

use super::check;

/// Puts `fds` at 0, 1 and 2, without close-on-exec. They must not themselves be 0, 1 or 2 in another order.
pub(crate) fn renumber_stdio(fds: [BorrowedFd<'_>; 3]) -> io::Result<()> {
    // Copies above 2 first, so that no target overwrites a later source.
    let mut high = [-1; 3];
    for (slot, fd) in high.iter_mut().zip(fds) {
        // SAFETY: only integers are passed.
        let copy = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) }.into())?;
        *slot = RawFd::try_from(copy).expect("descriptors fit in an int");
    }
    for (target, fd) in (0..).zip(high) {
        // SAFETY: only integers are passed; 0, 1 and 2 are not owned by any Rust value here.
        check(unsafe { libc::dup2(fd, target) }.into())?;
        // SAFETY: the copy made above belongs to this function.
        unsafe { libc::close(fd) };
    }
    Ok(())
}

/// Closes every descriptor above 2 except `kept`. Only for a forked child that will exec or `_exit`: values that own
/// the closed descriptors must never be dropped.
pub(crate) fn keep_only(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut numbers: Vec<u32> = kept
        .iter()
        .map(|fd| fd.as_raw_fd().cast_unsigned())
        .filter(|fd| *fd > 2)
        .collect();
    numbers.sort_unstable();
    let mut first = 3;
    for number in numbers {
        if number > first {
            close_range(first, number - 1, 0)?;
        }
        first = first.max(number + 1);
    }
    close_range(first, u32::MAX, 0)
}

/// Marks every descriptor from `first` on close-on-exec.
pub(crate) fn cloexec_from(first: u32) -> io::Result<()> {
    close_range(first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC)
}

fn close_range(first: u32, last: u32, flags: u32) -> io::Result<()> {
    // SAFETY: callers only do this in a process that is about to exec, or with CLOEXEC, which closes nothing now.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) }).map(drop)
}

/// Clears close-on-exec on descriptors `3 .. 3 + count`.
pub(crate) fn inherit_from_three(count: u32) -> io::Result<()> {
    for number in 3..3 + count {
        // SAFETY: only integers are passed; a number that is not open fails with EBADF.
        check(unsafe { libc::fcntl(number.cast_signed(), libc::F_SETFD, 0) }.into())?;
    }
    Ok(())
}

/// A borrowed view of a descriptor this process was started with (`--preserve-fds`), if it is open.
pub(crate) fn inherited(number: u32) -> io::Result<BorrowedFd<'static>> {
    let raw = number.cast_signed();
    // SAFETY: only integers are passed.
    check(unsafe { libc::fcntl(raw, libc::F_GETFD) }.into())?;
    // SAFETY: it is open (checked above) and was inherited: no Rust value owns or closes it.
    Ok(unsafe { BorrowedFd::borrow_raw(raw) })
}
