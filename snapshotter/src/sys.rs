//! The system calls that no safe wrapper covers: `mount_setattr`, loop devices, fs-verity, user
//! namespaces made for their id maps. Everything here takes borrowed descriptors and returns owned ones.

#![allow(
    unsafe_code,
    reason = "raw system calls without a safe wrapper live here"
)]

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Attributes of `mount_setattr(2)`.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct MountAttr<'a> {
    /// `MOUNT_ATTR_*` bits to set.
    pub(crate) set: u64,
    /// Propagation (`MS_PRIVATE`, …) or zero.
    pub(crate) propagation: u64,
    /// User namespace whose maps the mount takes.
    pub(crate) userns: Option<BorrowedFd<'a>>,
}

/// Changes the attributes of the mount behind `tree`, and of those below it when `recursive`.
pub(crate) fn mount_setattr(
    tree: BorrowedFd<'_>,
    recursive: bool,
    attr: MountAttr<'_>,
) -> io::Result<()> {
    let mut raw = libc::mount_attr {
        attr_set: attr.set,
        attr_clr: 0,
        propagation: attr.propagation,
        userns_fd: 0,
    };
    if let Some(userns) = attr.userns {
        raw.attr_set |= libc::MOUNT_ATTR_IDMAP;
        raw.userns_fd = u64::try_from(userns.as_raw_fd()).expect("a descriptor is not negative");
    }
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: `tree` is open for the call, the path is a NUL-terminated constant, and `raw` is a
    // valid `mount_attr` of the size given that outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(&raw),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Arguments of `LOOP_CONFIGURE`. Source: `linux/loop.h`, `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// Source: `linux/loop.h`, `struct loop_info64`.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// How a file is put behind a loop device.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LoopOptions {
    /// No writes reach the file.
    pub(crate) read_only: bool,
    /// The page cache of the file is bypassed.
    pub(crate) direct_io: bool,
}

/// The number of a loop device that was free a moment ago.
pub(crate) fn loop_get_free(control: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: `control` is open for the call; the request takes no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

/// Binds `file` to the free device `device`; it frees itself when its last user closes it.
pub(crate) fn loop_configure(
    device: BorrowedFd<'_>,
    file: BorrowedFd<'_>,
    options: LoopOptions,
    name: &[u8],
) -> io::Result<()> {
    let mut flags = LO_FLAGS_AUTOCLEAR;
    if options.read_only {
        flags |= LO_FLAGS_READ_ONLY;
    }
    if options.direct_io {
        flags |= LO_FLAGS_DIRECT_IO;
    }
    let mut file_name = [0; 64];
    let length = name.len().min(file_name.len() - 1);
    file_name[..length].copy_from_slice(&name[..length]);
    let config = LoopConfig {
        fd: u32::try_from(file.as_raw_fd()).expect("a descriptor is not negative"),
        block_size: 0,
        info: LoopInfo64 {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags,
            file_name,
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: both descriptors are open for the call and `config` is laid out as the kernel's
    // `struct loop_config` and outlives the call.
    let result = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            LOOP_CONFIGURE,
            std::ptr::from_ref(&config),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Source: `linux/sched.h`, `struct clone_args` (first version).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
}

/// A user namespace with these maps, in the form of `/proc/<pid>/uid_map`.
///
/// A child is made that does nothing but wait; it is gone when this returns.
pub(crate) fn user_namespace(uid_map: &str, gid_map: &str) -> io::Result<OwnedFd> {
    let (hold_read, hold_write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let mut pidfd: RawFd = -1;
    let args = CloneArgs {
        flags: u64::try_from(libc::CLONE_NEWUSER | libc::CLONE_PIDFD).expect("flags are positive"),
        pidfd: std::ptr::from_mut(&mut pidfd).expose_provenance() as u64,
        ..CloneArgs::default()
    };
    let read_end = hold_read.as_raw_fd();
    let write_end = hold_write.as_raw_fd();
    // SAFETY: without CLONE_VM the child has a copy of the address space and returns here with its
    // own stack; `args` is a valid `clone_args` of the size given.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            std::ptr::from_ref(&args),
            size_of::<CloneArgs>(),
        )
    };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        let mut byte = 0_u8;
        // SAFETY: only async-signal-safe calls between clone and exit: close, read, _exit. The
        // read returns at end of file, when the parent has closed its end or died.
        unsafe {
            libc::close(write_end);
            libc::read(read_end, std::ptr::from_mut(&mut byte).cast(), 1);
            libc::_exit(0);
        }
    }
    // SAFETY: the kernel stored a fresh descriptor in `pidfd` for the parent.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let made = write_maps(pid, uid_map, gid_map)
        .and_then(|()| Ok(fs::File::open(format!("/proc/{pid}/ns/user"))?.into()));
    drop(hold_write);
    wait_clone(pidfd.as_fd());
    made
}

fn write_maps(pid: libc::c_long, uid_map: &str, gid_map: &str) -> io::Result<()> {
    // One write each: the kernel takes a map whole or not at all.
    for (file, map) in [("uid_map", uid_map), ("gid_map", gid_map)] {
        fs::OpenOptions::new()
            .write(true)
            .open(format!("/proc/{pid}/{file}"))?
            .write_all(map.as_bytes())?;
    }
    Ok(())
}

/// Reaps a child made without an exit signal.
fn wait_clone(pidfd: BorrowedFd<'_>) {
    let id = libc::id_t::try_from(pidfd.as_raw_fd()).expect("a descriptor is not negative");
    loop {
        // SAFETY: `pidfd` is open for the call and a null `siginfo_t` is allowed.
        let result = unsafe {
            libc::waitid(
                libc::P_PIDFD,
                id,
                std::ptr::null_mut(),
                libc::WEXITED | libc::__WALL,
            )
        };
        if result == 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return;
        }
    }
}

/// `struct fsverity_enable_arg` of linux/fsverity.h.
#[repr(C)]
#[derive(Default)]
struct EnableVerity {
    version: u32,
    hash_algorithm: u32,
    block_size: u32,
    salt_size: u32,
    salt_ptr: u64,
    sig_size: u32,
    reserved1: u32,
    sig_ptr: u64,
    reserved2: [u64; 11],
}

mod verity {
    use super::EnableVerity;

    nix::ioctl_write_ptr!(fs_ioc_enable_verity, b'f', 133, EnableVerity);
}

/// Makes the kernel check every later read of a file that nobody has open for writing (fs-verity).
///
/// # Errors
/// What the system says; most filesystems lack it.
pub fn enable_verity(file: &fs::File) -> io::Result<()> {
    const SHA256: u32 = 1;
    let argument = EnableVerity {
        version: 1,
        hash_algorithm: SHA256,
        block_size: 4096,
        ..EnableVerity::default()
    };
    // SAFETY: the descriptor is open for the call and `argument` is a whole, initialised struct of
    // the layout the kernel reads, without pointers in it.
    unsafe { verity::fs_ioc_enable_verity(file.as_raw_fd(), &raw const argument) }?;
    Ok(())
}
