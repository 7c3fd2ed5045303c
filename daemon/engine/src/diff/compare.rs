//! The difference of two trees as a layer.
//!
//! Both are mounted read-only without a path and walked together in order of name. The same trees
//! give the same bytes: entries are sorted, times cut to seconds, names of owners left out.
//!
//! Source: OCI image-spec, layer.md, "Change Types"; the rules for what counts as changed are those
//! of containerd's walking differ.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use lighter_snapshotter::Mount;
use lighter_snapshotter::mount::{Access, Detached};
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, major, minor, openat, readlinkat, statat,
};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::compression::{Compression, Compressor};
use super::pipeline::digest_text;
use super::tar::BLOCK;
use super::writer::{self, Header};
use super::{Error, LAYER_TAR, LAYER_TAR_GZIP, LAYER_TAR_ZSTD, whiteout};

/// Bytes of a file read at once.
const READ_BYTES: usize = 128 << 10;
/// Nested directories; each holds two descriptors while it is walked.
pub(super) const DEPTH_MAX: usize = 1000;
/// Longest value of a capability attribute.
const CAPABILITY_MAX_BYTES: usize = 64;

/// How a difference is made.
#[derive(Debug, Clone, Default)]
pub struct CompareOptions {
    /// Type of the result; empty: gzip.
    pub media_type: String,
    /// Latest modification time written, in seconds since the epoch.
    pub source_date_epoch: Option<i64>,
    /// Where temporary mountpoints may be made; the system's temporary directory when `None`.
    pub temp_dir: Option<PathBuf>,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compared {
    /// Media type of what was written.
    pub media_type: &'static str,
    /// Digest of the uncompressed stream, `sha256:<hex>`.
    pub diff_id: String,
    /// Its length in bytes.
    pub size_bytes: u64,
}

/// Writes what makes `upper` of `lower` to `out`, which is not flushed. Blocks.
///
/// # Errors
/// See [`Error`]; `out` holds an unusable part then.
pub fn compare<W: Write>(
    lower: &[Mount],
    upper: &[Mount],
    options: &CompareOptions,
    out: W,
) -> Result<Compared, Error> {
    let (media_type, compression) = match options.media_type.as_str() {
        "" | LAYER_TAR_GZIP => (LAYER_TAR_GZIP, Compression::Gzip),
        LAYER_TAR_ZSTD => (LAYER_TAR_ZSTD, Compression::Zstd),
        LAYER_TAR => (LAYER_TAR, Compression::None),
        other => {
            return Err(Error::Unsupported {
                media_type: other.to_owned(),
            });
        }
    };
    let temp_dir = options.temp_dir.clone().unwrap_or_else(std::env::temp_dir);
    let mount = |mounts: &[Mount]| -> Result<Option<Detached>, Error> {
        if mounts.is_empty() {
            return Ok(None);
        }
        Ok(Some(Detached::new(mounts, Access::ReadOnly, &temp_dir)?))
    };
    let (lower, upper) = (mount(lower)?, mount(upper)?);
    let mut layer = Layer {
        out: Compressor::new(compression, out).map_err(Error::Output)?,
        hash: Sha256::new(),
        size_bytes: 0,
        latest: options.source_date_epoch,
        written_dirs: HashSet::new(),
        sources: HashMap::new(),
        unmodified_links: HashMap::new(),
        buffer: vec![0; READ_BYTES],
        upper: upper.as_ref().map(Detached::root),
    };
    let lower = lower
        .as_ref()
        .map(|mount| reopen(mount.root()))
        .transpose()?;
    let upper = upper
        .as_ref()
        .map(|mount| reopen(mount.root()))
        .transpose()?;
    layer.dir(lower.as_ref(), upper.as_ref(), b"", 0)?;
    let (diff_id, size_bytes) = layer.finish()?;
    Ok(Compared {
        media_type,
        diff_id,
        size_bytes,
    })
}

fn reopen(root: BorrowedFd<'_>) -> Result<OwnedFd, Error> {
    open_dir(root, b".").map_err(Error::io("open", b"/"))
}

pub(super) fn open_dir(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(dir, name, flags, Mode::empty())
}

fn open_file(dir: &OwnedFd, name: &[u8], path: &[u8]) -> Result<File, Error> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    openat(dir, name, flags, Mode::empty())
        .map(File::from)
        .map_err(Error::io("open", path))
}

/// What happened to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    /// Added or modified.
    Written,
    Unmodified,
}

/// One directory entry with what `stat` says.
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

/// The layer while it is written.
struct Layer<'a, W: Write> {
    out: Compressor<W>,
    hash: Sha256,
    size_bytes: u64,
    latest: Option<i64>,
    /// Directories that have their entry.
    written_dirs: HashSet<Vec<u8>>,
    /// The path by which an inode of several links was written.
    sources: HashMap<(u64, u64), Vec<u8>>,
    /// Unmodified paths of inodes that were not written so far.
    unmodified_links: HashMap<(u64, u64), Vec<Vec<u8>>>,
    buffer: Vec<u8>,
    upper: Option<BorrowedFd<'a>>,
}

impl<W: Write> Layer<'_, W> {
    fn dir(
        &mut self,
        lower: Option<&OwnedFd>,
        upper: Option<&OwnedFd>,
        path: &[u8],
        depth: usize,
    ) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(Error::entry(path, "directories are nested too deeply"));
        }
        let (old, new) = (names(lower, path)?, names(upper, path)?);
        let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
        loop {
            // The smaller name next; both when equal.
            let (name, in_old, in_new) = match (old.peek(), new.peek()) {
                (None, None) => return Ok(()),
                (Some(a), None) => (*a, true, false),
                (None, Some(b)) => (*b, false, true),
                (Some(a), Some(b)) => (*a.min(b), a <= b, b <= a),
            };
            let before = if in_old { lower } else { None };
            let after = if in_new { upper } else { None };
            if in_old {
                old.next();
            }
            if in_new {
                new.next();
            }
            let before = before
                .and_then(|dir| look(dir, name).transpose())
                .transpose();
            let after = after
                .and_then(|dir| look(dir, name).transpose())
                .transpose();
            let mut below = path.to_vec();
            if !below.is_empty() {
                below.push(b'/');
            }
            below.extend_from_slice(name);
            let before = before.map_err(Error::io("stat", &below))?;
            let after = after.map_err(Error::io("stat", &below))?;
            self.entry(before.as_ref(), after.as_ref(), &below, depth)?;
        }
    }

    fn entry(
        &mut self,
        before: Option<&Node<'_>>,
        after: Option<&Node<'_>>,
        path: &[u8],
        depth: usize,
    ) -> Result<(), Error> {
        let Some(after) = after else {
            return match before {
                Some(_) => self.deletion(path),
                None => Ok(()),
            };
        };
        let change = match before {
            Some(before) if same(before, after, path)? => Change::Unmodified,
            _ => Change::Written,
        };
        self.node(after, path, change)?;
        if after.kind() != FileType::Directory {
            return Ok(());
        }
        let inner = |node: &Node<'_>| {
            open_dir(node.dir.as_fd(), node.name).map_err(Error::io("open", path))
        };
        let upper = inner(after)?;
        let lower = before
            .filter(|node| node.kind() == FileType::Directory)
            .map(inner)
            .transpose()?;
        self.dir(lower.as_ref(), Some(&upper), path, depth + 1)
    }

    fn deletion(&mut self, path: &[u8]) -> Result<(), Error> {
        let (dir, name) = super::tree::split(path);
        let mut marked = dir.to_vec();
        if !marked.is_empty() {
            marked.push(b'/');
        }
        marked.extend_from_slice(whiteout::PREFIX);
        marked.extend_from_slice(name);
        self.parents(path)?;
        self.header(&Header {
            name: marked,
            flag: b'0',
            ..Header::default()
        })
    }

    /// Writes the entry of `node`, unless nothing of it changed.
    fn node(&mut self, node: &Node<'_>, path: &[u8], change: Change) -> Result<(), Error> {
        let kind = node.kind();
        if kind == FileType::Socket {
            return Ok(());
        }
        let linked = kind != FileType::Directory && node.stat.st_nlink > 1;
        let inode = (node.stat.st_dev, node.stat.st_ino);
        if !linked && change == Change::Unmodified {
            return Ok(());
        }
        if linked {
            if let Some(source) = self.sources.get(&inode).cloned() {
                return self.link(node, path, source);
            }
            if change == Change::Unmodified {
                let waiting = self.unmodified_links.entry(inode).or_default();
                waiting.push(path.to_vec());
                return Ok(());
            }
            self.sources.insert(inode, path.to_vec());
        }
        let mut header = self.describe(node, path)?;
        self.parents(path)?;
        if kind == FileType::Directory {
            self.written_dirs.insert(path.to_vec());
            header.name.push(b'/');
        }
        self.header(&header)?;
        if kind == FileType::RegularFile {
            self.data(node, path, header.size_bytes)?;
        }
        // Links seen before anything of their inode was known to be changed.
        for other in self.unmodified_links.remove(&inode).unwrap_or_default() {
            self.link(node, &other, path.to_vec())?;
        }
        Ok(())
    }

    fn link(&mut self, node: &Node<'_>, path: &[u8], source: Vec<u8>) -> Result<(), Error> {
        let header = Header {
            name: path.to_vec(),
            link: source,
            flag: b'1',
            size_bytes: 0,
            ..self.describe(node, path)?
        };
        self.parents(path)?;
        self.header(&header)
    }

    fn describe(&self, node: &Node<'_>, path: &[u8]) -> Result<Header, Error> {
        let stat = &node.stat;
        let mut header = Header {
            name: path.to_vec(),
            flag: b'0',
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            modified: self
                .latest
                .map_or(stat.st_mtime, |latest| stat.st_mtime.min(latest)),
            ..Header::default()
        };
        match node.kind() {
            FileType::RegularFile => {
                header.size_bytes = u64::try_from(stat.st_size).unwrap_or(0);
                header.capability = capability_of(node, path)?;
            }
            FileType::Directory => {
                header.flag = b'5';
                header.capability = capability_of(node, path)?;
            }
            FileType::Symlink => {
                header.flag = b'2';
                header.link = readlinkat(node.dir, node.name, Vec::new())
                    .map_err(Error::io("read link", path))?
                    .into_bytes();
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
        Ok(header)
    }

    /// Writes the directories above `path` that have no entry so far.
    fn parents(&mut self, path: &[u8]) -> Result<(), Error> {
        let dirs: Vec<usize> = (0..path.len()).filter(|at| path[*at] == b'/').collect();
        let first = dirs
            .iter()
            .rposition(|at| self.written_dirs.contains(&path[..*at]));
        for at in &dirs[first.map_or(0, |index| index + 1)..] {
            let dir = &path[..*at];
            let Some(root) = self.upper else { break };
            let (above, name) = super::tree::split(dir);
            let above = super::tree::open_in(root, above).map_err(Error::io("open", dir))?;
            let stat =
                statat(&above, name, AtFlags::SYMLINK_NOFOLLOW).map_err(Error::io("stat", dir))?;
            let node = Node {
                dir: &above,
                name,
                stat,
            };
            let mut header = self.describe(&node, dir)?;
            header.name.push(b'/');
            self.written_dirs.insert(dir.to_vec());
            self.header(&header)?;
        }
        Ok(())
    }

    fn header(&mut self, header: &Header) -> Result<(), Error> {
        let bytes = header.encode();
        self.write(&bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.hash.update(bytes);
        self.size_bytes += bytes.len() as u64;
        self.out.write_all(bytes).map_err(Error::Output)
    }

    fn data(&mut self, node: &Node<'_>, path: &[u8], size: u64) -> Result<(), Error> {
        let mut file = open_file(node.dir, node.name, path)?;
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut write = |part: &[u8]| self.write(part);
        let done = writer::data(&mut file, size, path, &mut buffer, &mut write);
        self.buffer = buffer;
        done
    }

    fn finish(mut self) -> Result<(String, u64), Error> {
        self.write(&[0; 2 * BLOCK])?;
        self.out.finish().map_err(Error::Output)?;
        Ok((digest_text(self.hash), self.size_bytes))
    }
}

/// The names in a directory, sorted by bytes.
pub(super) fn names(dir: Option<&OwnedFd>, path: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
    let Some(dir) = dir else {
        return Ok(Vec::new());
    };
    let failed = |e: Errno| Error::io("read directory", path)(e);
    let mut found = Vec::new();
    for entry in Dir::read_from(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            found.push(name.to_vec());
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// `None` for what is listed and not there, as overlayfs lists its whiteouts in some directories.
fn look<'a>(dir: &'a OwnedFd, name: &'a [u8]) -> Result<Option<Node<'a>>, Errno> {
    match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(Node { dir, name, stat })),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn capability_of(node: &Node<'_>, path: &[u8]) -> Result<Option<Vec<u8>>, Error> {
    capability(&open_file(node.dir, node.name, path)?, path)
}

/// The capabilities that a program in `file` gets.
pub(super) fn capability(file: &File, path: &[u8]) -> Result<Option<Vec<u8>>, Error> {
    use rustix::buffer::spare_capacity;
    let mut value = Vec::with_capacity(CAPABILITY_MAX_BYTES);
    match rustix::fs::fgetxattr(file, "security.capability", spare_capacity(&mut value)) {
        Ok(_) => Ok(Some(value)),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(error) => Err(Error::io("read capabilities of", path)(error)),
    }
}

/// Whether nothing that a layer records differs.
fn same(before: &Node<'_>, after: &Node<'_>, path: &[u8]) -> Result<bool, Error> {
    let (a, b) = (&before.stat, &after.stat);
    if (a.st_mode, a.st_uid, a.st_gid, a.st_rdev) != (b.st_mode, b.st_uid, b.st_gid, b.st_rdev) {
        return Ok(false);
    }
    // The same inode, untouched: the change time is out of everyone's hands. (The device numbers of
    // two overlays over the same layers differ.)
    if a.st_ino == b.st_ino && (a.st_ctime, a.st_ctime_nsec) == (b.st_ctime, b.st_ctime_nsec) {
        return Ok(true);
    }
    let kind = after.kind();
    if matches!(kind, FileType::RegularFile | FileType::Directory)
        && capability_of(before, path)? != capability_of(after, path)?
    {
        return Ok(false);
    }
    if kind == FileType::Directory {
        return Ok(true);
    }
    if (a.st_size, a.st_mtime, a.st_mtime_nsec) != (b.st_size, b.st_mtime, b.st_mtime_nsec) {
        return Ok(false);
    }
    match kind {
        FileType::Symlink => {
            let read = |node: &Node<'_>| {
                readlinkat(node.dir, node.name, Vec::new()).map_err(Error::io("read link", path))
            };
            Ok(read(before)? == read(after)?)
        }
        // A time of whole seconds may have come out of an archive for both.
        FileType::RegularFile if a.st_mtime_nsec == 0 => same_content(
            open_file(before.dir, before.name, path)?,
            open_file(after.dir, after.name, path)?,
        )
        .map_err(Error::io("read", path)),
        _ => Ok(true),
    }
}

fn same_content(mut one: File, mut two: File) -> io::Result<bool> {
    let mut buffers = (vec![0; READ_BYTES], vec![0; READ_BYTES]);
    loop {
        let read = fill(&mut one, &mut buffers.0)?;
        if read != fill(&mut two, &mut buffers.1)? || buffers.0[..read] != buffers.1[..read] {
            return Ok(false);
        }
        if read < READ_BYTES {
            return Ok(true);
        }
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(more) => filled += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests;
