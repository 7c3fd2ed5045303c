//! Finding and making mount targets inside a root filesystem whose content is hostile.
//!
//! Every look-up is one `openat2` with `RESOLVE_IN_ROOT` from the descriptor of the root: symbolic links, absolute or
//! not, and `..` end inside it, also while somebody renames directories. What was found is kept as a descriptor and
//! used as one; no checked path is walked again.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{Context, Error, Result};

/// Links followed while one target is made, as in the kernel's own look-up.
const MAX_LINKS: usize = 40;

/// Times an interrupted look-up (`EAGAIN`: a rename raced with it) is repeated.
const MAX_RACES: usize = 32;

/// What a target has to be if it is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Directory,
    File,
}

/// Opens `path` inside `root` without leaving it.
pub(crate) fn open_in(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    let relative = if relative.as_os_str().is_empty() {
        Path::new(".")
    } else {
        relative
    };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..MAX_RACES {
        match rustix::fs::openat2(
            root,
            relative,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        ) {
            Err(Errno::AGAIN) => {}
            other => return Ok(other?),
        }
    }
    Err(Errno::AGAIN.into())
}

/// The path without `.`, `..` and doubled slashes, absolute.
pub(crate) fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

/// Opens `path` inside `root`, making what is missing: directories (0755), and at the end a directory or an empty file.
pub(crate) fn make(root: BorrowedFd<'_>, path: &Path, shape: Shape) -> Result<OwnedFd> {
    let path = clean(path);
    let name = || format!("{} inside the root filesystem", path.display());
    match open_in(root, &path, OFlags::PATH) {
        Ok(found) => return Ok(found),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
        Err(error) => return Err(error).context(|| format!("open {}", name())),
    }
    // The part resolved so far, as a path without links, and what is left to walk.
    let mut reached = PathBuf::from("/");
    let mut left: VecDeque<OsString> = path.iter().skip(1).map(OsStr::to_owned).collect();
    let mut here = open_in(root, Path::new("/"), OFlags::PATH | OFlags::DIRECTORY).context(name)?;
    let mut links = 0;
    while let Some(part) = left.pop_front() {
        if part == ".." {
            reached.pop();
            here = open_in(root, &reached, OFlags::PATH | OFlags::DIRECTORY).context(name)?;
            continue;
        }
        let wanted = if left.is_empty() {
            shape
        } else {
            Shape::Directory
        };
        let next = make_one(here.as_fd(), &part, wanted).context(|| format!("make {}", name()))?;
        let stat = rustix::fs::fstat(&next).context(name)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::LOOP).context(name);
            }
            let link = rustix::fs::readlinkat(&next, "", Vec::new()).context(name)?;
            let link = Path::new(OsStr::from_bytes(link.as_bytes()));
            if link.is_absolute() {
                reached = PathBuf::from("/");
                here = open_in(root, &reached, OFlags::PATH | OFlags::DIRECTORY).context(name)?;
            }
            for part in link.components().rev() {
                match part {
                    Component::Normal(part) => left.push_front(part.to_owned()),
                    Component::ParentDir => left.push_front("..".into()),
                    Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
                }
            }
        } else {
            reached.push(&part);
            here = next;
        }
    }
    Ok(here)
}

/// Opens one component without following it, making it first if it is missing.
fn make_one(parent: BorrowedFd<'_>, name: &OsStr, shape: Shape) -> io::Result<OwnedFd> {
    // Crossing a mount point here is fine: `parent` is a descriptor inside the root already.
    let open = || {
        rustix::fs::openat(
            parent,
            name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
    };
    match open() {
        Err(Errno::NOENT) => {}
        other => return Ok(other?),
    }
    let made = match shape {
        Shape::Directory => rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)),
        Shape::File => rustix::fs::openat(
            parent,
            name,
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o644),
        )
        .map(drop),
    };
    match made {
        Ok(()) | Err(Errno::EXIST) => Ok(open()?),
        Err(error) => Err(error.into()),
    }
}

/// Fails unless `fd` is of filesystem type `magic` (statfs(2)).
pub(crate) fn require_filesystem(fd: BorrowedFd<'_>, magic: i64, name: &str) -> Result<()> {
    let found = rustix::fs::fstatfs(fd)
        .context(|| format!("fstatfs {name}"))?
        .f_type;
    if found == magic {
        Ok(())
    } else {
        Err(Error::Process(format!(
            "{name} is not on the filesystem it must be on (type {found:#x})"
        )))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let fd =
            rustix::fs::open(dir.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        (dir, fd)
    }

    #[test]
    fn targets_behind_absolute_links_are_made_inside_the_root() {
        let (dir, fd) = root();
        symlink("/etc/made-by-lighter", dir.path().join("link")).unwrap();
        make(fd.as_fd(), Path::new("/link/deep"), Shape::Directory).unwrap();
        assert!(dir.path().join("etc/made-by-lighter/deep").is_dir());
        assert!(!Path::new("/etc/made-by-lighter").exists());
    }

    #[test]
    fn climbing_links_stay_inside_the_root() {
        let (dir, fd) = root();
        symlink("../../../../../../tmp/lighter-climb", dir.path().join("up")).unwrap();
        make(fd.as_fd(), Path::new("/up"), Shape::File).unwrap();
        assert!(dir.path().join("tmp/lighter-climb").is_file());
        assert!(!Path::new("/tmp/lighter-climb").exists());
    }

    #[test]
    fn endless_links_end() {
        let (dir, fd) = root();
        symlink("b/x", dir.path().join("a")).unwrap();
        symlink("a/x", dir.path().join("b")).unwrap();
        assert!(make(fd.as_fd(), Path::new("/a/c"), Shape::Directory).is_err());
    }

    #[test]
    fn paths_are_cleaned() {
        assert_eq!(clean(Path::new("a/../../b//./c")), Path::new("/b/c"));
        assert_eq!(clean(Path::new("/..")), Path::new("/"));
    }
}
