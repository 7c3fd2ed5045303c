//! Signals: ignored, reset, read from a descriptor.

use std::ffi::c_void;
use std::io;
use std::os::fd::OwnedFd;
use std::ptr;

use rustix::process::Signal;

use super::{check, owned};

/// Signals that this process ignores, as bits. Asked once: who forks many has asked for all of them.
pub(crate) fn ignored_signals() -> u64 {
    static IGNORED: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *IGNORED.get_or_init(|| {
        (1..=64).fold(0, |bits, signal| {
            // SAFETY: all-zero is a valid sigaction.
            let mut found: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: nothing is set, and `found` outlives the call; numbers that are no signals fail harmlessly.
            let asked = unsafe { libc::sigaction(signal, ptr::null(), &raw mut found) };
            let ignored = asked == 0 && found.sa_sigaction == libc::SIG_IGN;
            bits | u64::from(ignored) << (signal - 1)
        })
    })
}

/// Every signal back to its default action, none blocked. For a child of [`clone3`](super::clone3), which has no
/// handlers any more.
pub(crate) fn reset_signals() {
    // Whatever was found when somebody asked: these two change hands.
    let always = 1 << (libc::SIGCHLD - 1) | 1 << (libc::SIGPIPE - 1);
    let ignored = ignored_signals() | always;
    for signal in (1..=64).filter(|signal| ignored & (1 << (signal - 1)) != 0) {
        // SAFETY: SIG_DFL is a valid disposition.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let empty: u64 = 0;
    // SAFETY: the kernel's signal set is 8 bytes; no old set is asked for.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const empty,
            ptr::null_mut::<c_void>(),
            size_of::<u64>(),
        )
    };
}

/// Blocks `signals` and returns a descriptor that reports them.
pub(crate) fn signal_fd(signals: &[i32]) -> io::Result<OwnedFd> {
    let mask = signals
        .iter()
        .fold(0_u64, |mask, signal| mask | (1 << (signal - 1)));
    // SAFETY: the kernel's signal set is 8 bytes; no old set is asked for.
    check(unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_BLOCK,
            &raw const mask,
            ptr::null_mut::<c_void>(),
            size_of::<u64>(),
        )
    })?;
    // SAFETY: as above; -1 asks for a new descriptor.
    owned(unsafe {
        libc::syscall(
            libc::SYS_signalfd4,
            -1,
            &raw const mask,
            size_of::<u64>(),
            libc::SFD_CLOEXEC,
        )
    })
}

/// A real-time signal by number.
pub(crate) fn realtime_signal(number: i32) -> Option<Signal> {
    if !(libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(&number) {
        return None;
    }
    // SAFETY: real-time signals that libc does not keep for itself may be sent by anybody.
    Some(unsafe { Signal::from_raw_unchecked(number) })
}
