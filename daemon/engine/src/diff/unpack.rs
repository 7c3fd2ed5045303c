//! Entries of an archive into files, beneath a root descriptor.
//!
//! Order of the attributes of each: create, owner, extended attributes, mode (after the owner,
//! which clears setuid bits and capabilities), times. Times of directories come last of all.
//! What they are is in `attributes.rs`, what goes into files in `data.rs`. Layers, and archives that are
//! none ([`Unpack::copying`]).

mod attributes;
mod data;

use std::io::BufRead;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Timestamps, chmod, chownat, fchmod, fchown, futimens, linkat,
    makedev, mkdirat, mknodat, openat, statat, symlinkat, utimensat,
};
use rustix::io::Errno;

use self::attributes::{by_fd, gid, inherit, owner, times, uid, umask};
pub(super) use self::data::write_data;
use super::Error;
use super::copy::{Owners, undescribed};
use super::tar::{Archive, Entry, Kind};
use super::tree::{Opened, Tree, normalize, split};
use super::whiteout::{self, Attributes, Mark};

/// Mode of directories that the archive only implies.
const IMPLIED_MODE: u32 = 0o755;

/// How deletions are kept.
#[derive(Debug)]
pub(super) enum Form {
    /// Things are deleted.
    Plain,
    /// The root is the upper directory of an overlay over `lower`, nearest first.
    Overlay {
        attributes: Attributes,
        lower: Vec<String>,
    },
}

/// What is under the root at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Base {
    /// Nothing; every directory is of this archive.
    Empty,
    /// Other content, to be changed.
    Filled,
}

/// Writes entries beneath a root.
pub(super) struct Unpack<'a> {
    tree: Tree<'a>,
    form: Form,
    directory_times: Vec<(Vec<u8>, Timestamps)>,
    /// Mode bits that new files lose; all of them where default access lists may take more.
    umask: u32,
    in_user_namespace: bool,
    leans_on: LeansOn,
    /// Set where the archive is no layer: names mean nothing special.
    copying: Option<Owners>,
}

/// What a layer that was unpacked without the layers below it would have wanted to know of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeansOn {
    /// A directory was made that the archive only implies: its attributes are those of below.
    pub attributes: bool,
    /// What it deletes. A mark that hides nothing would be seen by itself.
    pub deleted: Vec<Vec<u8>>,
}

/// Deletions that are kept for a later look; a layer with more is unpacked again.
const DELETED_MAX: usize = 4096;

impl<'a> Unpack<'a> {
    pub(super) fn new(root: BorrowedFd<'a>, form: Form, base: Base) -> Self {
        let remember = matches!(form, Form::Plain) && base == Base::Filled;
        Self {
            tree: Tree::new(root, remember),
            form,
            directory_times: Vec::new(),
            umask: if base == Base::Empty { umask() } else { 0o7777 },
            in_user_namespace: in_user_namespace(),
            leans_on: LeansOn::default(),
            copying: None,
        }
    }

    /// For an archive that is no layer, into a directory that may hold anything.
    pub(super) fn copying(root: BorrowedFd<'a>, owners: Owners) -> Self {
        Self {
            tree: Tree::new(root, false),
            form: Form::Plain,
            directory_times: Vec::new(),
            umask: 0o7777,
            in_user_namespace: in_user_namespace(),
            leans_on: LeansOn::default(),
            copying: Some(owners),
        }
    }

    /// Writes all entries of `archive`. What it wanted of layers below is told for an overlay's upper
    /// directory of which none are known.
    pub(super) fn all<R: BufRead>(mut self, archive: &mut Archive<R>) -> Result<LeansOn, Error> {
        while let Some(entry) = archive.next()? {
            self.entry(&entry, archive)?;
        }
        let leans_on = std::mem::take(&mut self.leans_on);
        self.finish()?;
        Ok(leans_on)
    }

    fn entry<R: BufRead>(&mut self, entry: &Entry, archive: &mut Archive<R>) -> Result<(), Error> {
        let path = normalize(&entry.path);
        let (dir, name) = split(&path);
        if name.is_empty() {
            // The root itself belongs to whoever made it.
            return Ok(());
        }
        let mark = match &self.copying {
            None => Mark::of(&entry.path, name)?,
            Some(_) => Mark::None,
        };
        match mark {
            Mark::None => {}
            Mark::Ignored => return Ok(()),
            Mark::Opaque => return self.opaque(dir),
            Mark::Whiteout(deleted) => return self.whiteout(dir, deleted, entry),
        }
        let owner = match &self.copying {
            None => owner(entry)?,
            Some(owners) => owners.of(entry)?,
        };
        let parent = self.parent(dir)?;
        self.tree.mark(&path);
        match entry.kind {
            Kind::File => self.file(entry, &path, &parent, owner, archive),
            Kind::Directory => self.directory(entry, &path, &parent, owner),
            Kind::HardLink => self.hard_link(entry, &path, &parent),
            Kind::Symlink | Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {
                self.special(entry, &path, &parent, owner)
            }
            Kind::Other(flag) => Err(Error::entry(
                &entry.path,
                format!("unhandled tar header type {flag}"),
            )),
        }
    }

    /// The directory at `path`, made with the attributes it has in lower layers where it is missing.
    fn parent(&mut self, path: &[u8]) -> Result<Opened, Error> {
        let lower: &[String] = match &self.form {
            Form::Overlay { lower, .. } => lower,
            Form::Plain => &[],
        };
        let alone = matches!(self.form, Form::Overlay { .. }) && lower.is_empty();
        let implied = &mut self.leans_on.attributes;
        let times = &mut self.directory_times;
        let chmod = self.umask & IMPLIED_MODE != 0;
        let copying = self.copying.as_ref();
        self.tree.ensure(path, &mut |path, made| {
            if let Some(owners) = copying {
                return undescribed(path, made, owners);
            }
            *implied |= alone;
            if chmod {
                fchmod(made, Mode::from_raw_mode(IMPLIED_MODE))
                    .map_err(Error::io("set mode of", path))?;
            }
            inherit(lower, path, made, times)
        })
    }

    fn opaque(&mut self, dir: &[u8]) -> Result<(), Error> {
        match self.form {
            Form::Plain => self.tree.clear_older(dir),
            Form::Overlay { attributes, .. } => {
                let opened = self.parent(dir)?;
                whiteout::make_opaque(opened.as_fd(), attributes)
                    .and_then(|()| whiteout::remove_marks(opened.as_fd()))
                    .map_err(Error::io("make opaque", dir))
            }
        }
    }

    fn whiteout(&mut self, dir: &[u8], deleted: &[u8], entry: &Entry) -> Result<(), Error> {
        let mut path = dir.to_vec();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(deleted);
        let parent = match self.form {
            Form::Overlay { .. } => self.parent(dir)?,
            Form::Plain => match self.tree.dir(dir) {
                Ok(parent) => parent,
                // Nothing there to delete.
                Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
                Err(error) => return Err(Error::io("open directory", dir)(error)),
            },
        };
        self.tree.remove(parent.as_fd(), &path)?;
        let Form::Overlay { lower, .. } = &self.form else {
            return Ok(());
        };
        let alone = lower.is_empty();
        // Where nothing is hidden, overlayfs would list the mark itself.
        if !lower.is_empty() && !whiteout::visible(lower, &path) || self.below_opaque(dir) {
            return Ok(());
        }
        if alone {
            if self.leans_on.deleted.len() < DELETED_MAX {
                self.leans_on.deleted.push(path.clone());
            } else {
                self.leans_on.attributes = true;
            }
        }
        whiteout::make_whiteout(parent.as_fd(), deleted, owner(entry)?)
            .map_err(Error::io("make whiteout", &path))
    }

    /// Whether directory `path` or one above it is opaque by this layer.
    fn below_opaque(&mut self, path: &[u8]) -> bool {
        let mut path = path;
        while !path.is_empty() {
            if self
                .tree
                .dir(path)
                .is_ok_and(|dir| whiteout::is_opaque(dir.as_fd()))
            {
                return true;
            }
            path = split(path).0;
        }
        false
    }

    /// Runs `make`, and again after removing what is in its way.
    fn replace<T>(
        &mut self,
        parent: &Opened,
        path: &[u8],
        operation: &'static str,
        make: impl Fn(BorrowedFd<'_>, &[u8]) -> Result<T, Errno>,
    ) -> Result<T, Error> {
        let name = split(path).1;
        match make(parent.as_fd(), name) {
            Err(Errno::EXIST) => {}
            other => return other.map_err(Error::io(operation, path)),
        }
        if self.copying.is_some() {
            self.tree.remove_unused(parent.as_fd(), path)?;
        } else {
            self.tree.remove(parent.as_fd(), path)?;
        }
        self.tree.mark(path);
        make(parent.as_fd(), name).map_err(Error::io(operation, path))
    }

    fn file<R: BufRead>(
        &mut self,
        entry: &Entry,
        path: &[u8],
        parent: &Opened,
        owner: (u32, u32),
        archive: &mut Archive<R>,
    ) -> Result<(), Error> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(entry.mode & 0o777);
        let fd = self.replace(parent, path, "create", |dir, name| {
            openat(dir, name, flags, mode)
        })?;
        let mut file = std::fs::File::from(fd);
        write_data(entry, path, &mut file, archive)?;
        let failed = |what| Error::io::<Errno>(what, path);
        if owner != (0, 0) || parent.gives_group {
            fchown(&file, uid(owner), gid(owner)).map_err(failed("change owner of"))?;
        }
        self.xattrs(entry, path, file.as_fd())?;
        if entry.mode & (0o7000 | self.umask) != 0 || self.umask == 0o7777 {
            fchmod(&file, Mode::from_raw_mode(entry.mode)).map_err(failed("set mode of"))?;
        }
        futimens(&file, &times(entry)).map_err(failed("set times of"))
    }

    fn directory(
        &mut self,
        entry: &Entry,
        path: &[u8],
        parent: &Opened,
        owner: (u32, u32),
    ) -> Result<(), Error> {
        let name = split(path).1;
        let mode = Mode::from_raw_mode(entry.mode);
        let mut existed = false;
        match mkdirat(parent, name, mode) {
            Ok(()) => {}
            Err(Errno::EXIST) => existed = self.make_way_for_directory(path, parent, mode)?,
            Err(error) => return Err(Error::io("make directory", path)(error)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(parent, name, flags, Mode::empty())
            .map_err(Error::io("open directory", path))?;
        // Who copies without owners has nothing to say about a directory that was there.
        let stays = existed && self.copying.as_ref().is_some_and(|owners| !owners.keep);
        if !stays && (existed || owner != (0, 0) || parent.gives_group) {
            fchown(&fd, uid(owner), gid(owner)).map_err(Error::io("change owner of", path))?;
        }
        self.xattrs(entry, path, fd.as_fd())?;
        if existed
            || parent.gives_group
            || entry.mode & (0o7000 | self.umask) != 0
            || self.umask == 0o7777
        {
            fchmod(&fd, mode).map_err(Error::io("set mode of", path))?;
        }
        self.directory_times.push((path.to_vec(), times(entry)));
        // What comes next is likely to be in it.
        self.tree.insert(path, fd, entry.mode & 0o2000 != 0);
        Ok(())
    }

    /// Something of that name exists: a directory stays, anything else goes. Whether it stayed.
    fn make_way_for_directory(
        &mut self,
        path: &[u8],
        parent: &Opened,
        mode: Mode,
    ) -> Result<bool, Error> {
        let name = split(path).1;
        let stat =
            statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(Error::io("stat", path))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            return Ok(true);
        }
        let made = self.replace(parent, path, "make directory", |dir, name| {
            mkdirat(dir, name, mode)
        });
        made?;
        if let Form::Overlay { attributes, .. } = self.form
            && whiteout::is_whiteout(&stat)
        {
            // The deletion must outlive its mark.
            let fd = open_name(parent.as_fd(), name).map_err(Error::io("open directory", path))?;
            whiteout::make_opaque(fd.as_fd(), attributes)
                .map_err(Error::io("make opaque", path))?;
        }
        Ok(false)
    }

    fn hard_link(&mut self, entry: &Entry, path: &[u8], parent: &Opened) -> Result<(), Error> {
        let target = normalize(&entry.link);
        if target == path {
            return Ok(());
        }
        let (dir, name) = split(&target);
        if name.is_empty() {
            return Err(Error::entry(&entry.path, "hard link to the root"));
        }
        let missing = |error: Errno| match error {
            Errno::NOENT | Errno::PERM | Errno::NOTDIR | Errno::LOOP => Error::entry(
                &entry.path,
                format!(
                    "cannot hard link to {:?}: {error}",
                    String::from_utf8_lossy(&entry.link)
                ),
            ),
            error => Error::io("link", path)(error),
        };
        let source = self.tree.dir(dir).map_err(missing)?;
        // Look before anything in the way is removed: the target may be what is in the way.
        statat(&source, name, AtFlags::SYMLINK_NOFOLLOW).map_err(missing)?;
        match linkat(&source, name, parent, split(path).1, AtFlags::empty()) {
            Err(Errno::EXIST) => {}
            other => return other.map_err(missing),
        }
        if same_file(&source, name, parent, split(path).1) {
            return Ok(());
        }
        self.replace(parent, path, "link", |to, new| {
            linkat(&source, name, to, new, AtFlags::empty())
        })
    }

    /// Links, devices and fifos: what cannot be opened to be changed.
    fn special(
        &mut self,
        entry: &Entry,
        path: &[u8],
        parent: &Opened,
        owner: (u32, u32),
    ) -> Result<(), Error> {
        let name = split(path).1;
        let kind = match entry.kind {
            Kind::CharDevice => FileType::CharacterDevice,
            Kind::BlockDevice => FileType::BlockDevice,
            Kind::Fifo => FileType::Fifo,
            _ => FileType::Symlink,
        };
        if kind == FileType::Symlink {
            if entry.link.is_empty() {
                return Err(Error::entry(&entry.path, "symbolic link without a target"));
            }
            self.replace(parent, path, "make link", |dir, name| {
                symlinkat(entry.link.as_slice(), dir, name)
            })?;
        } else {
            let mode = Mode::from_raw_mode(entry.mode);
            let device = makedev(entry.device.0, entry.device.1);
            let made = self.replace(parent, path, "make device", |dir, name| {
                mknodat(dir, name, kind, mode, device)
            });
            match made {
                // A user namespace makes no devices; the runtime provides those that matter.
                Err(Error::Io { source, .. })
                    if self.in_user_namespace
                        && kind != FileType::Fifo
                        && source.kind() == std::io::ErrorKind::PermissionDenied =>
                {
                    return Ok(());
                }
                other => other?,
            }
        }
        if owner != (0, 0) || parent.gives_group {
            chownat(
                parent,
                name,
                uid(owner),
                gid(owner),
                AtFlags::SYMLINK_NOFOLLOW,
            )
            .map_err(Error::io("change owner of", path))?;
        }
        if !entry.xattrs.is_empty() || kind != FileType::Symlink {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = openat(parent, name, flags, Mode::empty()).map_err(Error::io("open", path))?;
            self.xattrs(entry, path, fd.as_fd())?;
            if kind != FileType::Symlink {
                chmod(by_fd(fd.as_fd()), Mode::from_raw_mode(entry.mode))
                    .map_err(Error::io("set mode of", path))?;
            }
        }
        utimensat(parent, name, &times(entry), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(Error::io("set times of", path))
    }

    fn finish(mut self) -> Result<(), Error> {
        for (path, times) in std::mem::take(&mut self.directory_times) {
            let (dir, name) = split(&path);
            let done = self.tree.dir(dir).and_then(|parent| {
                if self.tree.directories_changed {
                    // It may be something else by now.
                    futimens(open_name(parent.as_fd(), name)?, &times)
                } else {
                    utimensat(&parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)
                }
            });
            match done {
                Ok(()) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(Error::io("set times of", &path)(error)),
            }
        }
        Ok(())
    }
}

fn open_name(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(dir, name, flags, Mode::empty())
}

fn same_file(dir: &Opened, name: &[u8], other: &Opened, other_name: &[u8]) -> bool {
    let identity = |dir: &Opened, name: &[u8]| {
        statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map(|s| (s.st_dev, s.st_ino))
    };
    match (identity(dir, name), identity(other, other_name)) {
        (Ok(one), Ok(two)) => one == two,
        _ => false,
    }
}

/// Whether root here is not the machine's root.
pub(super) fn in_user_namespace() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let words: Vec<&str> = map.split_whitespace().collect();
    words != ["0", "0", "4294967295"]
}
