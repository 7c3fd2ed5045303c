//! The system calls that need `unsafe`: everything else in this crate is safe Rust on top of them and of `rustix`.
//!
//! Functions take borrowed descriptors and typed values and return owned descriptors and `io::Error`; no raw
//! descriptor leaves this folder except through [`renumber_stdio`] and [`keep_only`], whose job is descriptor numbers.
//! One file per part of the kernel; all of them stand under the one permission given here.
#![allow(
    unsafe_code,
    reason = "raw system calls that neither std nor rustix offers"
)]

mod bpf;
mod descriptors;
mod limits;
mod mount;
mod network;
mod process;
mod security;
mod signals;
mod terminal;

use std::ffi::c_long;
use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};

pub(crate) use self::bpf::{bpf_device_filter, bpf_device_filters, bpf_load_device_filter};
pub(crate) use self::descriptors::{
    cloexec_from, inherit_from_three, inherited, keep_only, renumber_stdio,
};
pub(crate) use self::limits::{SchedAttr, ioprio_set, sched_setattr, set_mempolicy, set_rlimit};
pub(crate) use self::mount::{AttrChange, attr, mount_setattr};
pub(crate) use self::network::{loopback_up, set_domain_name};
pub(crate) use self::process::{
    CLONE_NEWTIME, CloneRequest, Fork, clone3, execve, exit_now, fexecve, set_personality, setns,
    unshare,
};
pub(crate) use self::security::{
    CapSets, capget, capset, join_session_keyring, prctl, seccomp_load,
};
pub(crate) use self::signals::{ignored_signals, realtime_signal, reset_signals, signal_fd};
pub(crate) use self::terminal::{
    is_terminal, open_terminal_peer, set_controlling_terminal, set_terminal_mode,
    set_terminal_size, terminal_mode, terminal_size,
};

fn check(result: c_long) -> io::Result<c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn owned(result: c_long) -> io::Result<OwnedFd> {
    let raw = RawFd::try_from(check(result)?).expect("descriptors fit in an int");
    // SAFETY: the kernel has just returned this descriptor to us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}
