//! What an entry's owner, times and extended attributes are, as the archive has them or, for a
//! directory that it only implies, the layers below.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};

use rustix::fs::{
    FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, fchmod,
    fchown, openat2,
};
use rustix::io::Errno;

use super::Unpack;
use crate::diff::Error;
use crate::diff::tar::{Entry, Kind, Time};
use crate::diff::tree::open_root;
use crate::diff::whiteout;

/// Longest extended attribute value of the kernel, and of a list of names.
const XATTR_MAX_BYTES: usize = 64 << 10;

impl Unpack<'_> {
    /// Sets the extended attributes of what was made at `path`.
    pub(super) fn xattrs(
        &mut self,
        entry: &Entry,
        path: &[u8],
        fd: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        for (name, value) in &entry.xattrs {
            if whiteout::is_overlay_attribute(name) {
                // They would redirect lookups into other directories of the machine's layers.
                continue;
            }
            if name == b"system.posix_acl_default" {
                self.umask = 0o7777;
            }
            // By way of /proc, since descriptors without read access take no attributes.
            match rustix::fs::setxattr(by_fd(fd), name.as_slice(), value, XattrFlags::empty()) {
                Ok(()) | Err(Errno::OPNOTSUPP) => {}
                Err(Errno::PERM)
                    if name.starts_with(b"user.")
                        && !matches!(entry.kind, Kind::File | Kind::Directory) => {}
                Err(error) => {
                    tracing::debug!(name = %String::from_utf8_lossy(name), "attribute refused");
                    return Err(Error::io("set extended attribute of", path)(error));
                }
            }
        }
        Ok(())
    }
}

/// Gives a directory that the archive only implies what it is in the lower layers.
pub(super) fn inherit(
    lower: &[String],
    path: &[u8],
    made: BorrowedFd<'_>,
    times: &mut Vec<(Vec<u8>, Timestamps)>,
) -> Result<(), Error> {
    for layer in lower {
        let Ok(layer) = open_root(layer) else {
            continue;
        };
        let found = openat2(
            &layer,
            path,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        );
        let Ok(found) = found else { continue };
        let stat = rustix::fs::fstat(&found).map_err(Error::io("stat", path))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            // Replaced: what is further below is hidden.
            return Ok(());
        }
        let owner = (stat.st_uid, stat.st_gid);
        fchown(made, uid(owner), gid(owner)).map_err(Error::io("change owner of", path))?;
        copy_xattrs(found.as_fd(), made).map_err(Error::io("copy attributes of", path))?;
        fchmod(made, Mode::from_raw_mode(stat.st_mode)).map_err(Error::io("set mode of", path))?;
        times.push((path.to_vec(), times_of(&stat)));
        return Ok(());
    }
    Ok(())
}

fn copy_xattrs(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), Errno> {
    use rustix::buffer::spare_capacity;
    let (from, to) = (by_fd(from), by_fd(to));
    let mut names = Vec::with_capacity(XATTR_MAX_BYTES);
    match rustix::fs::listxattr(&from, spare_capacity(&mut names)) {
        Ok(_) => {}
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(error) => return Err(error),
    }
    for name in names.split(|b| *b == 0) {
        if name.is_empty() || whiteout::is_overlay_attribute(name) {
            continue;
        }
        let mut value = Vec::with_capacity(XATTR_MAX_BYTES);
        if rustix::fs::getxattr(&from, name, spare_capacity(&mut value)).is_ok() {
            match rustix::fs::setxattr(&to, name, &value, XattrFlags::empty()) {
                Ok(()) | Err(Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

pub(super) fn by_fd(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

pub(super) fn uid(owner: (u32, u32)) -> Option<Uid> {
    Some(Uid::from_raw(owner.0))
}

pub(super) fn gid(owner: (u32, u32)) -> Option<Gid> {
    Some(Gid::from_raw(owner.1))
}

pub(super) fn owner(entry: &Entry) -> Result<(u32, u32), Error> {
    let id = |id: u64| {
        // The highest value means "leave alone" to the kernel.
        u32::try_from(id)
            .ok()
            .filter(|id| *id != u32::MAX)
            .ok_or_else(|| Error::entry(&entry.path, format!("owner {id} is out of range")))
    };
    Ok((id(entry.uid)?, id(entry.gid)?))
}

/// Times before the epoch, or later than nanoseconds in 64 bits can say, become the epoch.
fn bounded(time: Time) -> Time {
    if time.seconds < 0 || time.seconds > i64::MAX / 1_000_000_000 {
        Time::default()
    } else {
        time
    }
}

pub(super) fn times(entry: &Entry) -> Timestamps {
    let modified = bounded(entry.modified);
    let accessed = entry.accessed.map_or(modified, bounded).max(modified);
    let spec = |time: Time| Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanos.into(),
    };
    Timestamps {
        last_access: spec(accessed),
        last_modification: spec(modified),
    }
}

#[allow(
    clippy::cast_possible_wrap,
    reason = "the kernel's own values, which fit"
)]
fn times_of(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: stat.st_atime,
            tv_nsec: stat.st_atime_nsec as _,
        },
        last_modification: Timespec {
            tv_sec: stat.st_mtime,
            tv_nsec: stat.st_mtime_nsec as _,
        },
    }
}

/// The umask without changing it; everything where `/proc` does not say, which is always right.
pub(super) fn umask() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("Umask:"))
        .and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok())
        .unwrap_or(0o7777)
}
