//! What a process may do: capabilities, keyrings, system call filters.

use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::OwnedFd;

use super::{check, owned};

/// Starts a session keyring called `name` and, with `searchable`, lets its owner search it.
pub(crate) fn join_session_keyring(name: &CStr) -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;
    const KEYCTL_SETPERM: c_int = 5;
    const KEYCTL_DESCRIBE: c_int = 6;
    const OWNER_SEARCH: u32 = 0x0008_0000;
    // SAFETY: `name` is a C string.
    let key = check(unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr())
    })?;
    let mut text = [0_u8; 512];
    // SAFETY: the kernel writes at most `text.len()` bytes.
    let length = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_DESCRIBE,
            key,
            text.as_mut_ptr(),
            text.len(),
        )
    };
    let Ok(length @ 1..=512) = usize::try_from(length) else {
        return Ok(());
    };
    let permissions = std::str::from_utf8(&text[..length - 1])
        .ok()
        .and_then(|text| text.split(';').nth(3))
        .and_then(|bits| u32::from_str_radix(bits, 16).ok());
    if let Some(bits) = permissions {
        // SAFETY: only integers are passed.
        check(unsafe {
            libc::syscall(libc::SYS_keyctl, KEYCTL_SETPERM, key, bits | OWNER_SEARCH)
        })?;
    }
    Ok(())
}

/// Capability sets as bit masks, bit n = capability n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CapSets {
    pub(crate) effective: u64,
    pub(crate) permitted: u64,
    pub(crate) inheritable: u64,
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

const CAP_VERSION_3: u32 = 0x2008_0522;

/// Sets the calling thread's capabilities.
pub(crate) fn capset(sets: CapSets) -> io::Result<()> {
    let header = CapHeader {
        version: CAP_VERSION_3,
        pid: 0,
    };
    let low = |mask: u64| u32::try_from(mask & 0xffff_ffff).expect("masked to 32 bits");
    let high = |mask: u64| u32::try_from(mask >> 32).expect("shifted to 32 bits");
    let data = [
        low(sets.effective),
        low(sets.permitted),
        low(sets.inheritable),
        high(sets.effective),
        high(sets.permitted),
        high(sets.inheritable),
    ];
    // SAFETY: version 3 takes a header and two data records of three words each, as laid out here.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) }).map(drop)
}

/// The calling thread's capabilities.
pub(crate) fn capget() -> io::Result<CapSets> {
    let header = CapHeader {
        version: CAP_VERSION_3,
        pid: 0,
    };
    let mut data = [0_u32; 6];
    // SAFETY: version 3 writes two records of three words each.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw const header, data.as_mut_ptr()) })?;
    let join = |low: u32, high: u32| u64::from(low) | (u64::from(high) << 32);
    Ok(CapSets {
        effective: join(data[0], data[3]),
        permitted: join(data[1], data[4]),
        inheritable: join(data[2], data[5]),
    })
}

/// `prctl(2)` with integer arguments only.
pub(crate) fn prctl(option: c_int, arg2: u64, arg3: u64) -> io::Result<i32> {
    // SAFETY: callers pass options whose arguments are integers.
    let result = check(unsafe { libc::syscall(libc::SYS_prctl, option, arg2, arg3, 0, 0) })?;
    Ok(i32::try_from(result).expect("prctl answers fit in an int"))
}

/// Installs a compiled BPF filter (an array of 8-byte `sock_filter`). Returns the listener if `flags` ask for one.
pub(crate) fn seccomp_load(program: &[u8], flags: u64) -> io::Result<Option<OwnedFd>> {
    const SECCOMP_SET_MODE_FILTER: c_int = 1;
    let length =
        u16::try_from(program.len() / 8).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let filters: Vec<libc::sock_filter> = program
        .chunks_exact(8)
        .map(|raw| libc::sock_filter {
            code: u16::from_ne_bytes([raw[0], raw[1]]),
            jt: raw[2],
            jf: raw[3],
            k: u32::from_ne_bytes([raw[4], raw[5], raw[6], raw[7]]),
        })
        .collect();
    let program = libc::sock_fprog {
        len: length,
        filter: filters.as_ptr().cast_mut(),
    };
    // SAFETY: `program` points to `length` instructions that live through the call; the kernel only reads them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    if flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER != 0 {
        return owned(result).map(Some);
    }
    check(result).map(|_| None)
}
