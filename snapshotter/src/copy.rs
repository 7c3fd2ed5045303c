//! Copying a tree with everything that makes a root filesystem: owners, modes, times, xattrs, hard
//! links, devices, holes. Blocks are shared where the filesystem can.
//!
//! Both trees are walked by descriptors; links are never followed.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::buffer::spare_capacity;
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags,
    chownat, fchmod, fchown, futimens, ioctl_ficlone, linkat, mkdirat, mknodat, openat, readlinkat,
    statat, symlinkat, utimensat,
};
use rustix::io::Errno;

use crate::Error;

/// Directories open at once; deeper trees are refused rather than running out of descriptors.
const DEPTH_MAX: usize = 400;
/// Longest list of attribute names and longest value of the kernel.
const XATTR_MAX_BYTES: usize = 64 << 10;

/// Copies what is in `from` into `to`, and the attributes of `from` itself; `to` exists and is empty.
///
/// # Errors
/// When something cannot be read or made; sockets are left out.
pub(crate) fn copy_tree(from: &Path, to: &Path) -> Result<(), Error> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = |path: &Path| {
        openat(CWD, path, flags, Mode::empty()).map_err(|e| Error::io("open", path)(e.into()))
    };
    let (source, target) = (open(from)?, open(to)?);
    let mut copy = Copy {
        linked: HashMap::new(),
        target_root: target.as_fd(),
    };
    copy.dir(&source, &target, &CString::default(), 0)
        .map_err(Error::io("copy snapshot", from))
}

/// Copies the data of file `from` to the new file `to`, durably; holes stay holes.
///
/// # Errors
/// When `to` exists, or the system refuses; what was made of `to` stays.
pub(crate) fn copy_image(from: &Path, to: &Path) -> Result<(), Error> {
    let copy = || {
        let source = OwnedFd::from(File::open(from)?);
        let target = File::options().write(true).create_new(true).open(to)?;
        let target = OwnedFd::from(target);
        if ioctl_ficlone(&target, &source).is_err() {
            copy_data(&source, &target, &rustix::fs::fstat(&source)?)?;
        }
        fchmod(&target, Mode::RUSR | Mode::WUSR)?;
        File::from(target).sync_all()
    };
    copy().map_err(Error::io("copy snapshot to", to))
}

struct Copy<'a> {
    /// Where the first link of an inode went, relative to the target's root.
    linked: HashMap<(u64, u64), CString>,
    target_root: BorrowedFd<'a>,
}

impl Copy<'_> {
    fn dir(&mut self, from: &OwnedFd, to: &OwnedFd, path: &CStr, depth: usize) -> io::Result<()> {
        if depth > DEPTH_MAX {
            return Err(io::Error::other(
                "directories are nested too deeply to be copied",
            ));
        }
        for entry in Dir::read_from(from)? {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
            let path = join(path, name);
            self.entry(from, to, name, &path, &stat, depth)?;
        }
        let stat = rustix::fs::fstat(from)?;
        copy_xattrs(from.as_fd(), to.as_fd())?;
        fchown(
            to,
            Some(Uid::from_raw(stat.st_uid)),
            Some(Gid::from_raw(stat.st_gid)),
        )?;
        fchmod(to, Mode::from_raw_mode(stat.st_mode))?;
        Ok(futimens(to, &times(&stat))?)
    }

    fn entry(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        name: &CStr,
        path: &CStr,
        stat: &Stat,
        depth: usize,
    ) -> io::Result<()> {
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            mkdirat(to, name, Mode::RWXU)?;
            let source = openat(from, name, flags, Mode::empty())?;
            let target = openat(to, name, flags, Mode::empty())?;
            return self.dir(&source, &target, path, depth + 1);
        }
        if kind == FileType::Socket {
            return Ok(());
        }
        if stat.st_nlink > 1 {
            let inode = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.linked.get(&inode) {
                return Ok(linkat(
                    self.target_root,
                    first.as_c_str(),
                    to,
                    name,
                    AtFlags::empty(),
                )?);
            }
            self.linked.insert(inode, path.to_owned());
        }
        match kind {
            FileType::RegularFile => return copy_file(from, to, name, stat),
            FileType::Symlink => {
                let link = readlinkat(from, name, Vec::new())?;
                symlinkat(link.as_c_str(), to, name)?;
            }
            _ => mknodat(
                to,
                name,
                kind,
                Mode::from_raw_mode(stat.st_mode),
                stat.st_rdev,
            )?,
        }
        finish_special(from, to, name, kind, stat)
    }
}

fn join(dir: &CStr, name: &CStr) -> CString {
    let mut path = dir.to_bytes().to_vec();
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name.to_bytes());
    CString::new(path).expect("file names have no NUL")
}

#[allow(
    clippy::unnecessary_cast,
    clippy::cast_possible_wrap,
    reason = "widths differ between targets"
)]
fn times(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: stat.st_atime as _,
            tv_nsec: stat.st_atime_nsec as _,
        },
        last_modification: Timespec {
            tv_sec: stat.st_mtime as _,
            tv_nsec: stat.st_mtime_nsec as _,
        },
    }
}

/// Attributes of what cannot be opened for writing: links, devices, fifos.
fn finish_special(
    from: &OwnedFd,
    to: &OwnedFd,
    name: &CStr,
    kind: FileType,
    stat: &Stat,
) -> io::Result<()> {
    chownat(
        to,
        name,
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let source = openat(from, name, flags, Mode::empty())?;
    let target = openat(to, name, flags, Mode::empty())?;
    copy_xattrs(source.as_fd(), target.as_fd())?;
    if kind != FileType::Symlink {
        // After the owner: changing it clears setuid bits.
        rustix::fs::chmod(by_fd(target.as_fd()), Mode::from_raw_mode(stat.st_mode))?;
    }
    Ok(utimensat(
        to,
        name,
        &times(stat),
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

fn by_fd(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn copy_file(from: &OwnedFd, to: &OwnedFd, name: &CStr, stat: &Stat) -> io::Result<()> {
    let source = openat(
        from,
        name,
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let target = openat(
        to,
        name,
        OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::RUSR | Mode::WUSR,
    )?;
    if stat.st_size > 0 && ioctl_ficlone(&target, &source).is_err() {
        copy_data(&source, &target, stat)?;
    }
    fchown(
        &target,
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    )?;
    copy_xattrs(source.as_fd(), target.as_fd())?;
    fchmod(&target, Mode::from_raw_mode(stat.st_mode))?;
    Ok(futimens(&target, &times(stat))?)
}

/// Copies the extents that hold data; holes stay holes.
fn copy_data(source: &OwnedFd, target: &OwnedFd, stat: &Stat) -> io::Result<()> {
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let mut source = File::from(source.try_clone()?);
    let mut target = File::from(target.try_clone()?);
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(&source, rustix::fs::SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL) => at,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(&source, rustix::fs::SeekFrom::Hole(start)).unwrap_or(size);
        let end = end.min(size).max(start);
        source.seek(SeekFrom::Start(start))?;
        target.seek(SeekFrom::Start(start))?;
        // `io::copy` between files is copy_file_range.
        let copied = io::copy(&mut io::Read::take(&mut source, end - start), &mut target)?;
        if copied == 0 {
            break;
        }
        at = start + copied;
    }
    target.flush()?;
    target.set_len(size)
}

/// Copies all extended attributes; a filesystem without them is fine.
fn copy_xattrs(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let (from, to) = (by_fd(from), by_fd(to));
    let mut names = Vec::with_capacity(512);
    loop {
        match rustix::fs::listxattr(&from, spare_capacity(&mut names)) {
            Ok(_) => break,
            Err(Errno::OPNOTSUPP) => return Ok(()),
            Err(Errno::RANGE) if names.capacity() < XATTR_MAX_BYTES => {
                names.reserve_exact(XATTR_MAX_BYTES);
            }
            Err(error) => return Err(error.into()),
        }
    }
    for name in names.split_inclusive(|b| *b == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else {
            continue;
        };
        let mut value = Vec::with_capacity(XATTR_MAX_BYTES);
        match rustix::fs::getxattr(&from, name, spare_capacity(&mut value)) {
            Ok(_) => {}
            Err(Errno::NODATA | Errno::OPNOTSUPP) => continue,
            Err(error) => return Err(error.into()),
        }
        match rustix::fs::setxattr(&to, name, &value, XattrFlags::empty()) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            // User attributes exist on files and directories only.
            Err(Errno::PERM) if name.to_bytes().starts_with(b"user.") => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
