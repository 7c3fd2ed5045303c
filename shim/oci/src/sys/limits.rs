//! How much a process gets: scheduling, input and output, resource limits, memory policy.

use std::ffi::{c_int, c_void};
use std::io;
use std::ptr;

use super::check;

/// `sched_attr` of sched_setattr(2), first version.
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct SchedAttr {
    pub(crate) size: u32,
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
}

/// `sched_setattr(2)` on the calling thread.
pub(crate) fn sched_setattr(attributes: &mut SchedAttr) -> io::Result<()> {
    attributes.size = u32::try_from(size_of::<SchedAttr>()).expect("48 bytes");
    // SAFETY: the structure states its own size.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const *attributes, 0) }).map(drop)
}

/// `ioprio_set(2)` on process `pid` (0 = the caller).
pub(crate) fn ioprio_set(pid: i32, value: i32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: c_int = 1;
    // SAFETY: only integers are passed.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, value) }).map(drop)
}

/// Sets both values of a resource limit of process `pid` (0 = the caller).
pub(crate) fn set_rlimit(pid: i32, resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: `limit` lives through the call; no old value is asked for.
    check(unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            pid,
            resource,
            &raw const limit,
            ptr::null_mut::<c_void>(),
        )
    })
    .map(drop)
}

/// Sets the memory policy of the caller (set_mempolicy(2)); no nodes is an empty mask.
pub(crate) fn set_mempolicy(mode: i32, nodes: &[u64]) -> io::Result<()> {
    let bits = nodes.len() * 64;
    // The kernel takes one bit less than it is told.
    let told = if nodes.is_empty() { 0 } else { bits + 1 };
    let mask = if nodes.is_empty() {
        ptr::null()
    } else {
        nodes.as_ptr()
    };
    // SAFETY: `mask` is null or points to `bits` bits.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, told) }).map(drop)
}
