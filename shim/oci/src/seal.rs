//! Keeping containers from writing to the runtime's own executable (CVE-2019-5736).
//!
//! A process that is about to enter a container is a copy of the runtime; inside, `/proc/PID/exe` leads to the runtime's
//! file. It is harmless if it cannot be opened for writing there: when the process was executed through a detached
//! read-only mount of the file (no copy, shared page cache), or from a sealed memory file where mounts cannot be made.
//! Both are recognised by looking, not by a variable somebody may set.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::OnceLock;

use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, SealFlags, StatVfsMountFlags};
use rustix::mount::OpenTreeFlags;

use crate::error::{Context, Error, Result};
use crate::mount::attach;
use crate::sys;

const SELF: &str = "/proc/self/exe";

/// Whether this process's executable cannot be written through `/proc/self/exe`. Looked at once: a process and those
/// it forks keep their executable.
///
/// # Errors
/// `Io` if it cannot be looked at.
pub fn is_protected() -> Result<bool> {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    if let Some(known) = KNOWN.get() {
        return Ok(*known);
    }
    let protected = look()?;
    Ok(*KNOWN.get_or_init(|| protected))
}

fn look() -> Result<bool> {
    let exe = rustix::fs::open(SELF, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .context(|| format!("open {SELF}"))?;
    // Files of tmpfs answer as well, with no seal against writing.
    if rustix::fs::fcntl_get_seals(&exe).is_ok_and(|seals| seals.contains(SealFlags::WRITE)) {
        return Ok(true);
    }
    let found = rustix::fs::fstatvfs(&exe).context(|| format!("fstatvfs {SELF}"))?;
    Ok(found.f_flag.contains(StatVfsMountFlags::RDONLY))
}

/// A descriptor of this executable that can be executed without exposing the file: see `fexecve(3)`.
///
/// # Errors
/// `Io` if neither a mount nor a memory file can be made.
pub fn protected_exe() -> Result<OwnedFd> {
    read_only_mount().or_else(|_| sealed_copy())
}

fn read_only_mount() -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = rustix::mount::open_tree(CWD, SELF, flags)
        .context(|| "clone the mount of the runtime's executable")?;
    attach::make_read_only(tree.as_fd(), false).context(|| "make it read-only")?;
    Ok(tree)
}

fn sealed_copy() -> Result<OwnedFd> {
    let what = || "copy the runtime's executable to memory";
    let copy = rustix::fs::memfd_create(
        "lighter-oci",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )
    .context(what)?;
    let mut copy = File::from(copy);
    io::copy(&mut File::open(SELF).context(what)?, &mut copy).context(what)?;
    rustix::fs::fcntl_add_seals(
        &copy,
        SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE,
    )
    .context(what)?;
    // A descriptor open for writing cannot be executed.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&copy));
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).context(what)
}

/// Executes this program again, with the same arguments and environment, from a protected descriptor; returns at once
/// if it is protected already.
///
/// # Errors
/// `Io` if that is not possible; the process must then not create containers.
pub fn reexecute() -> Result<()> {
    if is_protected()? {
        return Ok(());
    }
    let exe = protected_exe()?;
    let arguments: Vec<CString> = std::env::args_os()
        .map(|argument| CString::new(argument.into_vec()).expect("arguments have no zero byte"))
        .collect();
    let environment: Vec<CString> = std::env::vars_os()
        .map(|(key, value)| {
            let mut text = key.into_vec();
            text.push(b'=');
            text.extend(value.into_vec());
            CString::new(text).expect("the environment has no zero byte")
        })
        .collect();
    let error = sys::fexecve(exe.as_fd(), &arguments, &environment);
    Err(Error::Io {
        what: "execute the protected runtime".into(),
        source: error,
    })
}
