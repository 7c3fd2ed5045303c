//! Id maps of mounts: `container:host:size[,…]` into a user namespace and idmapped trees.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::sys::{self, MountAttr};

/// Ranges accepted in one map; the kernel takes 340 lines.
const RANGES_MAX: usize = 340;
/// User namespaces kept for reuse; making one costs a fork.
const NAMESPACES_MAX: usize = 32;

/// How owners on disk become owners seen through a mount.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct IdMap {
    /// Lines of `uid_map`.
    uid: String,
    /// Lines of `gid_map`.
    gid: String,
}

impl IdMap {
    /// Reads two lists of `container:host:size`, separated by commas. `None` when malformed.
    #[must_use]
    pub fn parse(uid: &str, gid: &str) -> Option<Self> {
        Some(Self {
            uid: lines(uid)?,
            gid: lines(gid)?,
        })
    }

    fn namespace(&self) -> io::Result<Arc<OwnedFd>> {
        static CACHE: Mutex<Option<HashMap<IdMap, Arc<OwnedFd>>>> = Mutex::new(None);
        let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
        let cache = cache.get_or_insert_default();
        if let Some(found) = cache.get(self) {
            return Ok(Arc::clone(found));
        }
        let made = Arc::new(sys::user_namespace(&self.uid, &self.gid)?);
        if cache.len() >= NAMESPACES_MAX {
            cache.clear();
        }
        cache.insert(self.clone(), Arc::clone(&made));
        Ok(made)
    }

    /// A detached copy of the tree at `path` with owners shifted.
    pub(crate) fn tree(&self, path: &Path, recursive: bool) -> io::Result<OwnedFd> {
        let tree = clone_tree(path, recursive)?;
        let userns = self.namespace()?;
        sys::mount_setattr(
            tree.as_fd(),
            recursive,
            MountAttr {
                userns: Some((*userns).as_fd()),
                ..MountAttr::default()
            },
        )?;
        Ok(tree)
    }
}

/// A detached copy of the mount at `path`.
pub(crate) fn clone_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(CWD, path, flags)?)
}

fn ranges(map: &str) -> Option<Vec<[u32; 3]>> {
    let ranges: Vec<_> = map
        .split(',')
        .take(RANGES_MAX + 1)
        .map(|range| {
            let mut numbers = range.split(':').map(|n| n.parse::<u32>().ok());
            let found = [numbers.next()??, numbers.next()??, numbers.next()??];
            (numbers.next().is_none() && found[2] > 0).then_some(found)
        })
        .collect::<Option<_>>()?;
    (ranges.len() <= RANGES_MAX).then_some(ranges)
}

fn lines(map: &str) -> Option<String> {
    let mut text = String::new();
    for [container, host, size] in ranges(map)? {
        writeln!(text, "{container} {host} {size}").expect("a string takes any text");
    }
    Some(text)
}

/// The host's uid and gid that root of the container has under these maps.
#[must_use]
pub fn root_pair(uid: &str, gid: &str) -> Option<(u32, u32)> {
    let root = |map: &str| {
        ranges(map)?
            .iter()
            .find(|range| range[0] == 0)
            .map(|range| range[1])
    };
    Some((root(uid)?, root(gid)?))
}
