//! `tmpcopyup`: a tmpfs that starts with what its target held.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use crate::error::{Context, Error, Result};

/// Directories within directories that are copied before the tree is called too deep.
const MAX_DEPTH: usize = 128;

/// Bytes copied per call.
const CHUNK: usize = 1 << 20;

/// Copies the content of directory `from` into directory `to`: files, directories, links, owners and modes.
pub(crate) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
    copy_directory(from, to, 0)
}

fn copy_directory(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: usize) -> Result<()> {
    let what = || "copy the content of a tmpcopyup target";
    if depth > MAX_DEPTH {
        return Err(Error::Spec(format!(
            "tmpcopyup: more than {MAX_DEPTH} directories deep"
        )));
    }
    let listing = rustix::fs::openat(
        from,
        ".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context(what)?;
    for entry in Dir::read_from(&listing).context(what)? {
        let entry = entry.context(what)?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        copy_entry(from, to, name, depth)?;
    }
    let stat = rustix::fs::fstat(&listing).context(what)?;
    rustix::fs::fchown(
        to,
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    )
    .context(what)?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777)).context(what)
}

fn copy_entry(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &OsStr, depth: usize) -> Result<()> {
    let what = || format!("copy {name:?} of a tmpcopyup target");
    let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW).context(what)?;
    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
    let owner = (
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    );
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match rustix::fs::mkdirat(to, name, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error).context(what),
            }
            let source = rustix::fs::openat(from, name, flags, Mode::empty()).context(what)?;
            let copy = rustix::fs::openat(to, name, flags, Mode::empty()).context(what)?;
            copy_directory(source.as_fd(), copy.as_fd(), depth + 1)
        }
        FileType::RegularFile => {
            let source = rustix::fs::openat(
                from,
                name,
                OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .context(what)?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let copy =
                rustix::fs::openat(to, name, flags, Mode::RUSR | Mode::WUSR).context(what)?;
            while rustix::fs::sendfile(&copy, &source, None, CHUNK).context(what)? > 0 {}
            rustix::fs::fchown(&copy, owner.0, owner.1).context(what)?;
            rustix::fs::fchmod(&copy, mode).context(what)
        }
        FileType::Symlink => {
            let link = rustix::fs::readlinkat(from, name, Vec::new()).context(what)?;
            rustix::fs::symlinkat(&link, to, name).context(what)?;
            rustix::fs::chownat(to, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).context(what)
        }
        kind @ (FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice) => {
            rustix::fs::mknodat(to, name, kind, mode, stat.st_rdev).context(what)?;
            rustix::fs::chownat(to, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).context(what)
        }
        // Sockets belong to a process that is not in the copy.
        _ => Ok(()),
    }
}
