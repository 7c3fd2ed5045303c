//! Mounts without a path: reached through a descriptor, gone with the process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::apply::tree;
use super::temp::adapt;
use super::{Access, Error, Mount, TempMount, overlay};
use crate::sys::{MountAttr, mount_setattr};

/// What keeps the mounts alive.
#[derive(Debug)]
enum Held {
    /// Closing it dissolves the tree.
    Tree { _fd: OwnedFd },
    /// Dropping it unmounts.
    Temp { _mount: TempMount },
}

/// The root of mounts that no other process sees.
///
/// Where the kernel cannot do it (several mounts, helper programs, old kernels), it is a
/// [`TempMount`] underneath.
#[derive(Debug)]
pub struct Detached {
    root: OwnedFd,
    // Dropped after `root`, which would keep it busy.
    _held: Held,
}

impl Detached {
    /// Makes the mounts; `fallback` is where a temporary mountpoint may be made.
    ///
    /// # Errors
    /// When a mount cannot be made either way.
    pub fn new(mounts: &[Mount], access: Access, fallback: &Path) -> Result<Self, Error> {
        if let [mount] = mounts
            && let Some((tree, root)) = single(&adapt(mount, access))?
        {
            return Ok(Self {
                root,
                _held: Held::Tree { _fd: tree },
            });
        }
        let temp = TempMount::new(fallback, mounts, access)?;
        let root = open_dir(temp.path())?;
        Ok(Self {
            root,
            _held: Held::Temp { _mount: temp },
        })
    }

    /// The root directory; paths are resolved beneath it.
    #[must_use]
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

fn open_dir(path: &Path) -> Result<OwnedFd, Error> {
    openat(
        CWD,
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|e| Error::io("open", path)(e.into()))
}

/// `None` when it must be done at a path.
fn single(mount: &Mount) -> Result<Option<(OwnedFd, OwnedFd)>, Error> {
    if !mount.target.is_empty() || !matches!(mount.fstype.as_str(), "bind" | "overlay") {
        return Ok(None);
    }
    let parsed = mount.parse()?;
    if parsed.flags.remount || parsed.via_loop {
        return Ok(None);
    }
    let made = if parsed.flags.bind {
        let source = Path::new(&mount.source);
        match &parsed.idmap {
            Some(map) => map.tree(source, parsed.flags.recursive),
            None => tree(source, parsed.flags.recursive),
        }
        .and_then(|tree| {
            let set = u64::from(overlay::attributes(parsed.flags.bits).bits());
            if set != 0 {
                let attr = MountAttr {
                    set,
                    ..MountAttr::default()
                };
                mount_setattr(tree.as_fd(), false, attr)?;
            }
            Ok(tree)
        })
    } else {
        overlay::detached(&parsed, mount)
    };
    // The tree is an O_PATH descriptor: reopen its root as a directory that can be read.
    Ok(made.ok().and_then(|tree| {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(&tree, c".", flags, Mode::empty()).ok()?;
        Some((tree, root))
    }))
}
