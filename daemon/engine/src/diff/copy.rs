//! Files into and out of a tree as a plain archive: what `cp` is to a container.
//!
//! No layer: names that mean deletions there are names like others here, and an archive has the path
//! itself at its top, or `./` for the whole tree. Everything is resolved by the kernel with the
//! tree's root as `/`; who changes the tree meanwhile gets nothing beyond it read or written.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, Write};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Uid, fchmod, fchown, fstat, fstatfs, major, minor,
    openat, readlinkat, statat,
};
use rustix::io::Errno;

use super::Error;
use super::compare::{DEPTH_MAX, capability, names, open_dir};
use super::tar::{Archive, BLOCK, Entry, Kind};
use super::tree::{Tree, normalize, open_in, resolve, split};
use super::unpack::{Unpack, write_data};
use super::writer::{self, Header};

/// Bytes of a file read at once.
const READ_BYTES: usize = 128 << 10;
/// Bytes of names of files of several names that are remembered; those beyond are packed once for each
/// name.
const LINKS_MAX_BYTES: usize = 16 << 20;
/// What remembering one takes besides its name, about.
const SOURCE_BYTES: usize = 48;
/// Whom the kernel shows for an owner that a user namespace does not have.
const NOBODY: u32 = 65534;
/// Mode of directories on the way to where an archive goes.
const IMPLIED_MODE: u32 = 0o755;

/// Ids of users or groups in a container, and on the machine. None: the same.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMap {
    ranges: Vec<Range>,
}

/// `count` ids from `inside` on, which are those from `outside` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    inside: u32,
    outside: u32,
    count: u32,
}

impl IdMap {
    /// Of ranges: first id inside, first id outside, how many.
    #[must_use]
    pub fn new(ranges: impl IntoIterator<Item = (u32, u32, u32)>) -> Self {
        let ranges = ranges.into_iter().map(|(inside, outside, count)| Range {
            inside,
            outside,
            count,
        });
        Self {
            ranges: ranges.collect(),
        }
    }

    /// Reads `/proc/<pid>/uid_map` or `gid_map`. A line that is none is left out.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        Self::new(text.lines().filter_map(|line| {
            let mut words = line.split_whitespace().map(|word| word.parse().ok());
            Some((words.next()??, words.next()??, words.next()??))
        }))
    }

    /// The machine's id of one inside; `None` for one that is not there.
    fn outside(&self, id: u32) -> Option<u32> {
        if self.ranges.is_empty() {
            return Some(id);
        }
        self.ranges.iter().find_map(|range| {
            let offset = id.checked_sub(range.inside)?;
            (offset < range.count)
                .then(|| range.outside.checked_add(offset))
                .flatten()
        })
    }

    /// The id inside of one of the machine's.
    fn inside(&self, id: u32) -> u32 {
        if self.ranges.is_empty() {
            return id;
        }
        let found = self.ranges.iter().find_map(|range| {
            let offset = id.checked_sub(range.outside)?;
            (offset < range.count)
                .then(|| range.inside.checked_add(offset))
                .flatten()
        });
        found.unwrap_or(NOBODY)
    }
}

/// Whose the files of an archive become.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Owners {
    /// As the archive says; else everything is root's.
    pub keep: bool,
    /// Users of the tree's owner.
    pub users: IdMap,
    /// Groups of the tree's owner.
    pub groups: IdMap,
}

impl Owners {
    /// Owner and group of `entry` on the machine.
    pub(super) fn of(&self, entry: &Entry) -> Result<(u32, u32), Error> {
        if !self.keep {
            return Ok(self.root());
        }
        let id = |map: &IdMap, id: u64| {
            // The highest value means "leave alone" to the kernel.
            u32::try_from(id)
                .ok()
                .filter(|id| *id != u32::MAX)
                .and_then(|id| map.outside(id))
                .ok_or_else(|| {
                    Error::entry(&entry.path, format!("owner {id} is not in the container"))
                })
        };
        Ok((id(&self.users, entry.uid)?, id(&self.groups, entry.gid)?))
    }

    /// Who the tree's root is on the machine.
    pub(super) fn root(&self) -> (u32, u32) {
        let root = |map: &IdMap| map.outside(0).unwrap_or(0);
        (root(&self.users), root(&self.groups))
    }
}

/// The names of `path` from the root on, without `.`, `..`, empty ones and slashes around them.
#[must_use]
pub fn clean(path: &str) -> String {
    let clean = normalize(path.as_bytes());
    String::from_utf8(clean).expect("whole names of a text are text")
}

/// A path that is there.
#[derive(Debug)]
pub struct Found {
    dir: OwnedFd,
    /// Name in `dir`; `.` for the root.
    name: Vec<u8>,
    stat: Stat,
}

/// Looks for `path` beneath `root`. A link at its end is the link itself.
///
/// # Errors
/// The system's.
pub fn find(root: BorrowedFd<'_>, path: &str) -> io::Result<Found> {
    let path = normalize(path.as_bytes());
    let (dir, name) = split(&path);
    let name = if name.is_empty() { b"." } else { name };
    let dir = open_in(root, dir)?;
    let stat = statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(Found {
        dir,
        name: name.to_vec(),
        stat,
    })
}

/// Writes `found`, with what is in it if `walk`, as an archive to `out`. Blocks.
///
/// The kernel's own filesystems (`/proc`, `/sys`) are not walked; sockets are left out, and so is what
/// goes away meanwhile.
///
/// # Errors
/// See [`Error`]; `out` holds an unusable part then.
pub fn pack<W: Write>(found: &Found, walk: bool, owners: &Owners, out: W) -> Result<(), Error> {
    let mut pack = Pack {
        out,
        owners,
        sources: HashMap::new(),
        sources_bytes: 0,
        buffer: vec![0; READ_BYTES],
    };
    let shown: &[u8] = if found.name == b"." { b"" } else { &found.name };
    let node = Node {
        dir: &found.dir,
        name: &found.name,
        stat: found.stat,
    };
    pack.node(&node, shown)?;
    if walk && node.kind() == FileType::Directory {
        pack.below(&node, shown, None, 0)?;
    }
    pack.write(&[0; 2 * BLOCK])?;
    pack.out.flush().map_err(Error::Output)
}

struct Node<'a> {
    dir: &'a OwnedFd,
    name: &'a [u8],
    stat: Stat,
}

impl Node<'_> {
    fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }
}

struct Pack<'a, W> {
    out: W,
    owners: &'a Owners,
    /// The name by which a file of several was packed.
    sources: HashMap<(u64, u64), Vec<u8>>,
    /// What they take in all.
    sources_bytes: usize,
    buffer: Vec<u8>,
}

impl<W: Write> Pack<'_, W> {
    /// What is in directory `node`, which lies in a directory of device `above`.
    fn below(
        &mut self,
        node: &Node<'_>,
        shown: &[u8],
        above: Option<u64>,
        depth: usize,
    ) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(Error::entry(shown, "directories are nested too deeply"));
        }
        let dir = match open_dir(node.dir.as_fd(), node.name) {
            Ok(dir) => dir,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if depth > 0 => return Ok(()),
            Err(error) => return Err(Error::io("open", shown)(error)),
        };
        if above != Some(node.stat.st_dev) && is_the_kernels(&dir, shown)? {
            return Ok(());
        }
        let listed = match names(Some(&dir), shown) {
            Err(Error::Io { source, .. })
                if depth > 0 && source.kind() == io::ErrorKind::NotFound =>
            {
                return Ok(());
            }
            listed => listed?,
        };
        for name in listed {
            let mut below = shown.to_vec();
            if !below.is_empty() {
                below.push(b'/');
            }
            below.extend_from_slice(&name);
            let stat = match statat(&dir, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(Error::io("stat", &below)(error)),
            };
            let inner = Node {
                dir: &dir,
                name: &name,
                stat,
            };
            self.node(&inner, &below)?;
            if inner.kind() == FileType::Directory {
                self.below(&inner, &below, Some(node.stat.st_dev), depth + 1)?;
            }
        }
        Ok(())
    }

    /// The entry of one node.
    fn node(&mut self, node: &Node<'_>, shown: &[u8]) -> Result<(), Error> {
        let kind = node.kind();
        if kind == FileType::Socket {
            return Ok(());
        }
        let stat = &node.stat;
        let mut header = Header {
            name: shown.to_vec(),
            flag: b'0',
            mode: stat.st_mode & 0o7777,
            uid: self.owners.users.inside(stat.st_uid),
            gid: self.owners.groups.inside(stat.st_gid),
            modified: stat.st_mtime,
            ..Header::default()
        };
        if kind != FileType::Directory && stat.st_nlink > 1 {
            let inode = (stat.st_dev, stat.st_ino);
            if let Some(source) = self.sources.get(&inode) {
                header.flag = b'1';
                header.link.clone_from(source);
                return self.write(&header.encode());
            }
            if self.sources_bytes < LINKS_MAX_BYTES {
                self.sources_bytes += SOURCE_BYTES + shown.len();
                self.sources.insert(inode, shown.to_vec());
            }
        }
        match kind {
            FileType::RegularFile => return self.file(node, shown, header),
            FileType::Directory => {
                header.flag = b'5';
                let end: &[u8] = if shown.is_empty() { b"./" } else { b"/" };
                header.name.extend_from_slice(end);
            }
            FileType::Symlink => {
                header.flag = b'2';
                let read = readlinkat(node.dir, node.name, Vec::new());
                header.link = read.map_err(Error::io("read link", shown))?.into_bytes();
            }
            FileType::Fifo => header.flag = b'6',
            kind => {
                header.flag = if kind == FileType::BlockDevice {
                    b'4'
                } else {
                    b'3'
                };
                header.device = (major(stat.st_rdev), minor(stat.st_rdev));
            }
        }
        self.write(&header.encode())
    }

    fn file(&mut self, node: &Node<'_>, shown: &[u8], mut header: Header) -> Result<(), Error> {
        let mut file = match open_file(node.dir.as_fd(), node.name, OFlags::RDONLY) {
            Ok(Some(file)) => file,
            // It went, or something else took its place since it was listed.
            Ok(None) | Err(Errno::NOENT | Errno::LOOP) => {
                self.sources.remove(&(node.stat.st_dev, node.stat.st_ino));
                return Ok(());
            }
            Err(error) => return Err(Error::io("open", shown)(error)),
        };
        let stat = fstat(&file).map_err(Error::io("stat", shown))?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        header.size_bytes = size;
        header.capability = capability(&file, shown)?;
        self.write(&header.encode())?;
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut write = |part: &[u8]| self.write(part);
        let done = writer::data(&mut file, size, shown, &mut buffer, &mut write);
        self.buffer = buffer;
        done
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.out.write_all(bytes).map_err(Error::Output)
    }
}

/// Opens `name` if it is a regular file. Looked at before it is opened: opening a device that took a
/// file's place may do something.
fn open_file(dir: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> Result<Option<File>, Errno> {
    let looked = openat(
        dir,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    reopen(looked.as_fd(), flags)
}

fn reopen(looked: BorrowedFd<'_>, flags: OFlags) -> Result<Option<File>, Errno> {
    if FileType::from_raw_mode(fstat(looked)?.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    let path = format!("/proc/self/fd/{}", looked.as_raw_fd());
    let opened = openat(
        rustix::fs::CWD,
        path,
        flags | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    Ok(Some(File::from(opened)))
}

/// Whether a file, or what is in a directory, is the kernel's account of itself and no files: without
/// end, and of no use elsewhere.
fn is_the_kernels(node: &OwnedFd, shown: &[u8]) -> Result<bool, Error> {
    let stat = fstatfs(node).map_err(Error::io("stat filesystem of", shown))?;
    // proc, sysfs, cgroup, cgroup2, debugfs, tracefs, securityfs: linux/magic.h.
    Ok(matches!(
        stat.f_type,
        0x9fa0 | 0x6265_6572 | 0x0027_e0eb | 0x6367_7270 | 0x6462_6720 | 0x7472_6163 | 0x7363_6673
    ))
}

/// Puts the entries of an archive into directory `path` beneath `root`, which is made if it is not
/// there; links in it lead nowhere but below it. Where `path` is a file, the archive must hold one file,
/// and its bytes replace those of `path`. Blocks.
///
/// # Errors
/// See [`Error`]; what was put there before stays.
pub fn place<R: BufRead>(
    root: BorrowedFd<'_>,
    path: &str,
    owners: &Owners,
    source: R,
) -> Result<(), Error> {
    let path = normalize(path.as_bytes());
    let mut archive = Archive::new(source);
    let dir = match open_in(root, &path) {
        Ok(dir) => dir,
        Err(Errno::NOTDIR) => return overwrite(root, &path, owners, &mut archive),
        Err(Errno::NOENT) => make(root, &path, owners)?,
        Err(error) => return Err(Error::io("open directory", &path)(error)),
    };
    Unpack::copying(dir.as_fd(), owners.clone()).all(&mut archive)?;
    whole(&archive)
}

/// A stream that breaks ends like one that is over: only the archive says that all of it came.
fn whole<R: BufRead>(archive: &Archive<R>) -> Result<(), Error> {
    if archive.is_whole() {
        return Ok(());
    }
    let reason = "the archive has no end: two empty blocks are missing";
    let cut = io::Error::new(io::ErrorKind::UnexpectedEof, reason);
    Err(Error::Stream(cut))
}

fn make(root: BorrowedFd<'_>, path: &[u8], owners: &Owners) -> Result<OwnedFd, Error> {
    let mut tree = Tree::new(root, false);
    tree.ensure(path, &mut |path, made| undescribed(path, made, owners))?;
    open_in(root, path).map_err(Error::io("open directory", path))
}

/// Mode and owner of a directory that nobody described.
pub(super) fn undescribed(path: &[u8], made: BorrowedFd<'_>, owners: &Owners) -> Result<(), Error> {
    let (user, group) = owners.root();
    fchown(made, Some(Uid::from_raw(user)), Some(Gid::from_raw(group)))
        .map_err(Error::io("change owner of", path))?;
    fchmod(made, Mode::from_raw_mode(IMPLIED_MODE)).map_err(Error::io("set mode of", path))
}

/// Replaces what is in a file, which stays the file it is: it may be mounted somewhere.
fn overwrite<R: BufRead>(
    root: BorrowedFd<'_>,
    path: &[u8],
    owners: &Owners,
    archive: &mut Archive<R>,
) -> Result<(), Error> {
    let looked = match resolve(root, path, OFlags::PATH) {
        Err(Errno::NOTDIR) => return Err(Error::entry(path, "it leads through a file")),
        looked => looked.map_err(Error::io("open", path))?,
    };
    // A link of the container's may lead there, and who writes here has rights that it has not.
    if is_the_kernels(&looked, path)? {
        return Err(Error::entry(path, "it is the kernel's, and no file"));
    }
    let Some(entry) = archive.next()? else {
        return Err(Error::entry(path, "the archive for a file is empty"));
    };
    if entry.kind != Kind::File {
        return Err(Error::entry(
            &entry.path,
            "only a file can take the place of a file",
        ));
    }
    let owner = owners.of(&entry)?;
    let opened = reopen(looked.as_fd(), OFlags::WRONLY | OFlags::TRUNC);
    let opened = opened.map_err(Error::io("open", path))?;
    let Some(mut file) = opened else {
        return Err(Error::entry(path, "neither a directory nor a regular file"));
    };
    write_data(&entry, path, &mut file, archive)?;
    if owners.keep {
        let (user, group) = (Uid::from_raw(owner.0), Gid::from_raw(owner.1));
        fchown(&file, Some(user), Some(group)).map_err(Error::io("change owner of", path))?;
    }
    match archive.next()? {
        None => whole(archive),
        Some(more) => Err(Error::entry(
            &more.path,
            "an archive for a file holds more than one entry",
        )),
    }
}

#[cfg(test)]
mod tests;
