//! The directories behind the records: `<root>/snapshots/<id>`.
//!
//! Records decide. A directory whose number no record has is garbage, and so is anything there that
//! is not a number; a number is never used twice while something of that name exists. New
//! directories are not synced: an active snapshot's that was lost with the power is made again at
//! the next open.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Uid, chmodat, chownat, mkdirat, openat};

use crate::Error;

/// The directory tree of one driver.
#[derive(Debug)]
pub(crate) struct Dirs {
    root: PathBuf,
    snapshots: OwnedFd,
    next_id: AtomicU64,
    /// Bits the process takes from new directories; zero in any sane setup.
    umask: u32,
}

/// What was found in `snapshots/`.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// Numbered directories.
    pub(crate) ids: Vec<u64>,
    /// Anything else, e.g. what another implementation left half made.
    pub(crate) strays: Vec<PathBuf>,
}

impl Dirs {
    /// Opens or makes the tree; the root is private to its owner.
    pub(crate) fn open(root: &Path) -> Result<Self, Error> {
        let snapshots = root.join("snapshots");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(Error::io("make directory", root))?;
        fs::set_permissions(root, fs::Permissions::from_mode(0o700))
            .map_err(Error::io("set mode of", root))?;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&snapshots)
            .map_err(Error::io("make directory", &snapshots))?;
        let fd = openat(
            CWD,
            &snapshots,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|e| Error::io("open", &snapshots)(e.into()))?;
        Ok(Self {
            root: root.to_owned(),
            snapshots: fd,
            next_id: AtomicU64::new(1),
            umask: current_umask(),
        })
    }

    /// Writes everything on this filesystem to disk.
    pub(crate) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.snapshots)?)
    }

    /// Starts numbering above `highest`.
    pub(crate) fn number_above(&self, highest: u64) {
        self.next_id
            .store(highest.saturating_add(1), Ordering::Relaxed);
    }

    pub(crate) fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn snapshots(&self) -> BorrowedFd<'_> {
        self.snapshots.as_fd()
    }

    /// `<root>/snapshots/<id>`.
    pub(crate) fn path(&self, id: u64) -> PathBuf {
        self.root.join("snapshots").join(id.to_string())
    }

    /// Makes directory `path` (relative to `snapshots/`) with exactly this mode.
    pub(crate) fn make(&self, path: &str, mode: u32) -> Result<(), Error> {
        let failed = |e: rustix::io::Errno| {
            Error::io("make directory", self.root.join("snapshots").join(path))(e.into())
        };
        mkdirat(&self.snapshots, path, Mode::from_raw_mode(mode)).map_err(failed)?;
        if mode & self.umask != 0 {
            chmodat(
                &self.snapshots,
                path,
                Mode::from_raw_mode(mode),
                AtFlags::empty(),
            )
            .map_err(failed)?;
        }
        Ok(())
    }

    /// Gives `path` (relative to `snapshots/`) to another owner; links are not followed.
    pub(crate) fn chown(&self, path: &str, uid: u32, gid: u32) -> Result<(), Error> {
        chownat(
            &self.snapshots,
            path,
            Some(Uid::from_raw(uid)),
            Some(Gid::from_raw(gid)),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(|e| Error::io("change owner of", self.root.join("snapshots").join(path))(e.into()))
    }

    /// What is in `snapshots/`.
    pub(crate) fn list(&self) -> Result<Found, Error> {
        let path = self.root.join("snapshots");
        let mut found = Found::default();
        for entry in fs::read_dir(&path).map_err(Error::io("read", &path))? {
            let entry = entry.map_err(Error::io("read", &path))?;
            let name = entry.file_name();
            // Only the exact spelling of a number belongs to a record.
            match name.to_str().and_then(|n| n.parse::<u64>().ok()) {
                Some(id) if name.to_str() == Some(&id.to_string()) => found.ids.push(id),
                _ => found.strays.push(entry.path()),
            }
        }
        Ok(found)
    }

    /// Removes what is there for `id`, if anything.
    pub(crate) fn remove(&self, id: u64) -> Result<(), Error> {
        remove_tree(&self.path(id))
    }
}

/// Removes a file or a directory with all below it; absent is fine.
pub(crate) fn remove_tree(path: &Path) -> Result<(), Error> {
    let result = match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => fs::remove_file(path),
        other => other,
    };
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// The umask without changing it; the default when `/proc` does not say.
fn current_umask() -> u32 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("Umask:"))
        .and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok())
        .unwrap_or(0o022)
}
