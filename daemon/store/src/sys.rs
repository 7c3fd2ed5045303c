//! The one system call that no crate wraps: fs-verity.
#![allow(unsafe_code, reason = "ioctl")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `struct fsverity_enable_arg` of linux/fsverity.h.
#[repr(C)]
#[derive(Default)]
pub(crate) struct EnableVerity {
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

mod ioctl {
    use super::EnableVerity;

    nix::ioctl_write_ptr!(fs_ioc_enable_verity, b'f', 133, EnableVerity);
}

/// Makes the kernel check every later read of a file that nobody has open for writing.
///
/// # Errors
/// What the system says; most filesystems lack it.
pub(crate) fn enable_verity(file: &File) -> io::Result<()> {
    const SHA256: u32 = 1;
    let argument = EnableVerity {
        version: 1,
        hash_algorithm: SHA256,
        block_size: 4096,
        ..EnableVerity::default()
    };
    // SAFETY: the descriptor is open for the call and `argument` is a whole, initialised struct of
    // the layout the kernel reads, without pointers in it.
    unsafe { ioctl::fs_ioc_enable_verity(file.as_raw_fd(), &raw const argument) }?;
    Ok(())
}
