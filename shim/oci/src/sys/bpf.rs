//! Device filters of cgroup v2.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use super::{check, owned};

/// Loads a device filter (`BPF_PROG_TYPE_CGROUP_DEVICE`): 8-byte eBPF instructions.
pub(crate) fn bpf_load_device_filter(program: &[u64]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: c_int = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    #[repr(C)]
    #[derive(Default)]
    struct Attr {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buffer: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
    }
    let mut attr = Attr {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len())
            .map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..Attr::default()
    };
    attr.name[..10].copy_from_slice(b"lighter_de");
    // SAFETY: the attribute block states its size; the program and licence outlive the call and are only read.
    owned(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const attr,
            size_of::<Attr>(),
        )
    })
}

const BPF_CGROUP_DEVICE: u32 = 6;

/// Attaches (or, with `attach` false, detaches) a device filter to a cgroup v2 directory.
pub(crate) fn bpf_device_filter(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    attach: bool,
) -> io::Result<()> {
    const BPF_PROG_ATTACH: c_int = 8;
    const BPF_PROG_DETACH: c_int = 9;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let flags = if attach { BPF_F_ALLOW_MULTI } else { 0 };
    let attr: [u32; 5] = [
        cgroup.as_raw_fd().cast_unsigned(),
        program.as_raw_fd().cast_unsigned(),
        BPF_CGROUP_DEVICE,
        flags,
        0,
    ];
    let command = if attach {
        BPF_PROG_ATTACH
    } else {
        BPF_PROG_DETACH
    };
    // SAFETY: the attribute block is target fd, program fd, attach type, flags, replaced program.
    check(unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), size_of::<[u32; 5]>()) })
        .map(drop)
}

/// The device filters attached to a cgroup v2 directory (at most 64).
pub(crate) fn bpf_device_filters(cgroup: BorrowedFd<'_>) -> io::Result<Vec<OwnedFd>> {
    const BPF_PROG_QUERY: c_int = 16;
    const BPF_PROG_GET_FD_BY_ID: c_int = 13;
    #[repr(C)]
    struct Query {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        padding: u32,
    }
    let mut ids = [0_u32; 64];
    let mut query = Query {
        target: cgroup.as_raw_fd().cast_unsigned(),
        attach_type: BPF_CGROUP_DEVICE,
        query_flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: 64,
        padding: 0,
    };
    // SAFETY: the kernel writes at most `count` ids and the fields of `query`.
    check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_QUERY,
            &raw mut query,
            size_of::<Query>(),
        )
    })?;
    let count = usize::try_from(query.count).unwrap_or(0).min(ids.len());
    ids[..count]
        .iter()
        .map(|id| {
            let attr: [u32; 3] = [*id, 0, 0];
            // SAFETY: the attribute block is an id followed by two unused words.
            owned(unsafe {
                libc::syscall(
                    libc::SYS_bpf,
                    BPF_PROG_GET_FD_BY_ID,
                    attr.as_ptr(),
                    size_of::<[u32; 3]>(),
                )
            })
        })
        .collect()
}
