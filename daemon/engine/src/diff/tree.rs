//! Paths of an archive as directories beneath a root descriptor.
//!
//! Every parent directory is resolved by the kernel with the root as `/`, so links in the tree,
//! absolute or with `..`, never lead out of it; what is then done in the directory goes through its
//! descriptor and never follows a link. Directories seen last stay open, since archives list
//! neighbours together.

use std::collections::HashSet;
use std::hash::{BuildHasher as _, RandomState};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags, mkdirat,
    openat, openat2, readlinkat, statat, statx, unlinkat,
};
use rustix::io::Errno;

use super::Error;

/// Directories kept open.
const OPEN_MAX: usize = 16;
/// Links followed while making the directories of one path.
const LINKS_MAX: usize = 40;
/// Looks for one path: the kernel gives up on `..` in links while anything on the machine is renamed or
/// mounted, which is over at once.
const LOOKS_MAX: usize = 100;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Told of each directory made, by path and descriptor.
pub(super) type Made<'a> = dyn FnMut(&[u8], BorrowedFd<'_>) -> Result<(), Error> + 'a;

/// The names of `path`, without empty ones and `.`, and with `..` taken back lexically; at the root
/// `..` stays there.
pub(super) fn normalize(path: &[u8]) -> Vec<u8> {
    let mut clean: Vec<u8> = Vec::with_capacity(path.len());
    for name in path.split(|b| *b == b'/') {
        match name {
            b"" | b"." => {}
            b".." => {
                let parent = clean.iter().rposition(|b| *b == b'/').unwrap_or(0);
                clean.truncate(parent);
            }
            name => {
                if !clean.is_empty() {
                    clean.push(b'/');
                }
                clean.extend_from_slice(name);
            }
        }
    }
    clean
}

/// Directory and last name of a normalized path.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

/// An open directory of the tree.
#[derive(Debug, Clone)]
pub(super) struct Opened {
    fd: Arc<OwnedFd>,
    /// New entries take its group.
    pub(super) gives_group: bool,
}

impl AsFd for Opened {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The tree below a root.
#[derive(Debug)]
pub(super) struct Tree<'a> {
    root: BorrowedFd<'a>,
    /// Directories seen last, the latest at the end.
    open: Vec<(Vec<u8>, Opened)>,
    seen: Option<Seen>,
    /// Whether a directory went away since the start, so that a remembered path may mean another.
    pub(super) directories_changed: bool,
}

/// What this archive brought, by hashes of paths: keyed at random, so that nobody can make two meet.
#[derive(Debug, Default)]
struct Seen {
    hasher: RandomState,
    paths: HashSet<u64>,
}

impl<'a> Tree<'a> {
    /// `remember`: keep track of what is added, for opaque directories on top of older content.
    pub(super) fn new(root: BorrowedFd<'a>, remember: bool) -> Self {
        Self {
            root,
            open: Vec::new(),
            seen: remember.then(Seen::default),
            directories_changed: false,
        }
    }

    /// Opens directory `path` as it is.
    pub(super) fn dir(&mut self, path: &[u8]) -> Result<Opened, Errno> {
        if let Some(at) = self.open.iter().rposition(|(have, _)| have == path) {
            return Ok(self.open[at].1.clone());
        }
        let fd = open_in(self.root, path)?;
        self.keep(path, fd)
    }

    fn keep(&mut self, path: &[u8], fd: OwnedFd) -> Result<Opened, Errno> {
        let gives_group = rustix::fs::fstat(&fd)?.st_mode & 0o2000 != 0;
        Ok(self.insert(path, fd, gives_group))
    }

    /// Remembers a directory that was just opened.
    pub(super) fn insert(&mut self, path: &[u8], fd: OwnedFd, gives_group: bool) -> Opened {
        let opened = Opened {
            fd: Arc::new(fd),
            gives_group,
        };
        self.open.retain(|(have, _)| have != path);
        if self.open.len() >= OPEN_MAX {
            self.open.remove(0);
        }
        self.open.push((path.to_vec(), opened.clone()));
        opened
    }

    /// Opens directory `path`, making what is missing of it (0755); `made` is told of each directory
    /// made, by path and descriptor.
    pub(super) fn ensure(&mut self, path: &[u8], made: &mut Made<'_>) -> Result<Opened, Error> {
        match self.dir(path) {
            Err(Errno::NOENT) => {}
            other => return other.map_err(Error::io("open directory", path)),
        }
        let mut links = 0;
        self.make_dirs(path, made, &mut links)?;
        self.dir(path).map_err(Error::io("open directory", path))
    }

    fn make_dirs(
        &mut self,
        path: &[u8],
        made: &mut Made<'_>,
        links: &mut usize,
    ) -> Result<(), Error> {
        let mut parent = open_in(self.root, b"").map_err(Error::io("open directory", b"/"))?;
        let mut end = 0;
        while end < path.len() {
            let start = end;
            end = path[start + 1..]
                .iter()
                .position(|b| *b == b'/')
                .map_or(path.len(), |at| start + 1 + at);
            let prefix = &path[..end];
            let name = split(prefix).1;
            match open_in(self.root, prefix) {
                Ok(fd) => {
                    parent = fd;
                    continue;
                }
                Err(Errno::NOENT) => {}
                Err(error) => return Err(Error::io("open directory", prefix)(error)),
            }
            match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                Ok(()) => {
                    parent = openat(&parent, name, DIRECTORY, Mode::empty())
                        .map_err(Error::io("open directory", prefix))?;
                    made(prefix, parent.as_fd())?;
                    self.mark(prefix);
                }
                // A link to nowhere: what it names is made, inside the root.
                Err(Errno::EXIST) => {
                    *links += 1;
                    if *links > LINKS_MAX {
                        return Err(Error::io("open directory", prefix)(Errno::LOOP));
                    }
                    let target = readlinkat(&parent, name, Vec::new())
                        .map_err(Error::io("read link", prefix))?;
                    let target = resolve_link(split(prefix).0, target.as_bytes());
                    self.make_dirs(&target, made, links)?;
                    parent =
                        open_in(self.root, prefix).map_err(Error::io("open directory", prefix))?;
                }
                Err(error) => return Err(Error::io("make directory", prefix)(error)),
            }
        }
        Ok(())
    }

    /// Notes that the archive brought `path` and thus its parents.
    pub(super) fn mark(&mut self, path: &[u8]) {
        let Some(seen) = &mut self.seen else {
            return;
        };
        let mut path = path;
        while !path.is_empty() && seen.paths.insert(seen.hasher.hash_one(path)) {
            path = split(path).0;
        }
    }

    fn unmark(&mut self, path: &[u8]) {
        if let Some(seen) = &mut self.seen {
            seen.paths.remove(&seen.hasher.hash_one(path));
        }
    }

    fn is_marked(&self, path: &[u8]) -> bool {
        self.seen
            .as_ref()
            .is_some_and(|seen| seen.paths.contains(&seen.hasher.hash_one(path)))
    }

    /// Removes `name` of `dir`, whatever it is, with all below it. Whether there was something.
    pub(super) fn remove(&mut self, dir: BorrowedFd<'_>, path: &[u8]) -> Result<bool, Error> {
        let name = split(path).1;
        match unlinkat(dir, name, AtFlags::empty()) {
            Ok(()) => {
                // It may have been a link that other paths went through.
                self.open.clear();
                self.unmark(path);
                Ok(true)
            }
            Err(Errno::NOENT) => Ok(false),
            Err(Errno::ISDIR | Errno::PERM) => {
                self.open.clear();
                self.directories_changed = true;
                self.clear(dir, path, None)?;
                unlinkat(dir, name, AtFlags::REMOVEDIR).map_err(Error::io("remove", path))?;
                self.unmark(path);
                Ok(true)
            }
            Err(error) => Err(Error::io("remove", path)(error)),
        }
    }

    /// Removes `name` of `dir` in a tree that processes use: no directory with something in it, and
    /// nothing that has a mount on it. The kernel would not mind: from outside of the container, removing
    /// a name takes the mounts on it away, and what is in them is not the container's to lose.
    pub(super) fn remove_unused(&mut self, dir: BorrowedFd<'_>, path: &[u8]) -> Result<(), Error> {
        let name = split(path).1;
        let found = match statx(dir, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE) {
            Err(Errno::NOENT) => return Ok(()),
            found => found.map_err(Error::io("stat", path))?,
        };
        let mounted = StatxAttributes::MOUNT_ROOT;
        let told = found.stx_attributes_mask.contains(mounted);
        if !told || found.stx_attributes.contains(mounted) {
            let reason =
                "a mount is in the way: a file that is mounted can be replaced by its own path";
            return Err(Error::entry(path, reason));
        }
        self.open.clear();
        let directory = FileType::from_raw_mode(found.stx_mode.into()) == FileType::Directory;
        let flags = if directory {
            self.directories_changed = true;
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        match unlinkat(dir, name, flags) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::NOTEMPTY | Errno::EXIST) => {
                let reason = "a directory that is not empty is in the way: remove it first";
                Err(Error::entry(path, reason))
            }
            Err(error) => Err(Error::io("remove", path)(error)),
        }
    }

    /// Empties directory `path` of everything this archive did not bring.
    pub(super) fn clear_older(&mut self, path: &[u8]) -> Result<(), Error> {
        if self.seen.is_none() {
            return Ok(());
        }
        let opened = match self.dir(path) {
            Ok(opened) => opened,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            Err(error) => return Err(Error::io("open directory", path)(error)),
        };
        self.open.clear();
        self.directories_changed = true;
        let fd = openat(&opened, c".", DIRECTORY, Mode::empty())
            .map_err(Error::io("open directory", path))?;
        self.clear_dir(&fd, path, Some(()))
    }

    fn clear(&mut self, dir: BorrowedFd<'_>, path: &[u8], older: Option<()>) -> Result<(), Error> {
        let fd = openat(dir, split(path).1, DIRECTORY, Mode::empty())
            .map_err(Error::io("open directory", path))?;
        self.clear_dir(&fd, path, older)
    }

    /// Depth is bounded by the length of a path; each level holds one descriptor.
    fn clear_dir(&mut self, fd: &OwnedFd, path: &[u8], older: Option<()>) -> Result<(), Error> {
        let failed = |e: Errno| Error::io("empty directory", path)(e);
        let mut names = Vec::new();
        for entry in Dir::read_from(fd).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
        }
        for name in names {
            let mut below = path.to_vec();
            if !below.is_empty() {
                below.push(b'/');
            }
            below.extend_from_slice(&name);
            if older.is_some() && self.is_marked(&below) {
                let stat =
                    statat(fd, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
                if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                    self.clear(fd.as_fd(), &below, older)?;
                }
                continue;
            }
            match unlinkat(fd, name.as_slice(), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR | Errno::PERM) => {
                    self.clear(fd.as_fd(), &below, None)?;
                    unlinkat(fd, name.as_slice(), AtFlags::REMOVEDIR).map_err(failed)?;
                }
                Err(error) => return Err(failed(error)),
            }
            self.unmark(&below);
        }
        Ok(())
    }
}

/// The descriptor of directory `path` beneath nothing but the machine's root.
pub(super) fn open_root(path: &str) -> Result<OwnedFd, Error> {
    openat(
        CWD,
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(Error::io("open", path.as_bytes()))
}

/// Whether a directory has no entries.
pub(super) fn is_empty(dir: BorrowedFd<'_>) -> Result<bool, Error> {
    let fd = open_in(dir, b"").map_err(Error::io("open", b"/"))?;
    for entry in Dir::new(fd).map_err(Error::io("read", b"/"))? {
        let entry = entry.map_err(Error::io("read", b"/"))?;
        if entry.file_name() != c"." && entry.file_name() != c".." {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Opens directory `path` with `root` as `/`.
pub(super) fn open_in(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    resolve(root, path, OFlags::RDONLY | OFlags::DIRECTORY)
}

/// Opens `path` with `root` as `/`.
pub(super) fn resolve(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let path: &[u8] = if path.is_empty() { b"." } else { path };
    let (flags, mode) = (flags | OFlags::CLOEXEC, Mode::empty());
    let beneath = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let mut looks = 1;
    loop {
        match openat2(root, path, flags, mode, beneath) {
            Err(Errno::AGAIN) if looks < LOOKS_MAX => looks += 1,
            found => return found,
        }
    }
}

/// Where a link in directory `dir` points, lexically and inside the root.
fn resolve_link(dir: &[u8], target: &[u8]) -> Vec<u8> {
    if target.starts_with(b"/") {
        return normalize(target);
    }
    let mut path = dir.to_vec();
    path.push(b'/');
    path.extend_from_slice(target);
    normalize(&path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cleaned_and_never_leave_the_root() {
        for (given, clean) in [
            ("a/b", "a/b"),
            ("/a//./b/", "a/b"),
            ("../../etc/passwd", "etc/passwd"),
            ("a/../../b", "b"),
            ("./", ""),
            ("..", ""),
            ("a/..", ""),
            ("...", "..."),
        ] {
            assert_eq!(normalize(given.as_bytes()), clean.as_bytes(), "{given}");
        }
    }

    #[test]
    fn links_to_nowhere_get_their_directories_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/usr/../usr/lib", dir.path().join("lib")).unwrap();
        std::os::unix::fs::symlink("../../../..", dir.path().join("up")).unwrap();
        std::os::unix::fs::symlink("loop", dir.path().join("loop")).unwrap();
        let root = std::fs::File::open(dir.path()).unwrap();
        let mut tree = Tree::new(root.as_fd(), false);
        let mut made = Vec::new();
        let mut note = |path: &[u8], _: BorrowedFd<'_>| {
            made.push(String::from_utf8(path.to_vec()).unwrap());
            Ok(())
        };
        tree.ensure(b"lib/x", &mut note).unwrap();
        tree.ensure(b"up/y", &mut note).unwrap();
        assert!(tree.ensure(b"loop/z", &mut note).is_err());
        assert_eq!(made, ["usr", "usr/lib", "lib/x", "up/y"]);
        assert!(dir.path().join("usr/lib/x").is_dir() && dir.path().join("y").is_dir());
    }
}
