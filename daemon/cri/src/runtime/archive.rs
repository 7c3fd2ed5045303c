//! What a checkpoint may bring into a container's directory.
//!
//! A checkpoint comes from a stranger: as a tar, or as the files of an image. Only what a restore
//! reads is taken, regular files and directories alone, into a directory that was made for it;
//! everything is opened beneath that directory's descriptor, and no link is made or followed.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2, statat,
};
use rustix::io::Errno;

/// What criu wrote.
pub(super) const CHECKPOINT: &str = "checkpoint";
/// What the container had changed of its image, as a layer.
pub(super) const LAYER: &str = "rootfs-diff.tar";
/// Its log so far.
pub(super) const LOG: &str = "container.log";
/// What it was made of, as JSON.
pub(super) const CONFIG: &str = "config.dump";

/// Most files of a checkpoint.
const MAX_FILES: usize = 100_000;
/// Most bytes of a checkpoint: the memory of its processes, and what they had written.
const MAX_BYTES: u64 = 256 << 30;
/// Directories in one another.
const MAX_DEPTH: usize = 8;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);
const REGULAR: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

fn refuse(path: &Path, why: &str) -> io::Error {
    let message = format!("{:?} in a checkpoint: {why}", path.display().to_string());
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// The directory that a checkpoint is put into.
struct Target {
    root: OwnedFd,
    files: usize,
    bytes: u64,
}

impl Target {
    /// Makes `dir`, which must not be there yet.
    fn make(dir: &Path) -> io::Result<Self> {
        if let Some(parent) = dir.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::DirBuilder::new().mode(0o700).create(dir)?;
        Ok(Self {
            root: openat(CWD, dir, DIRECTORY, Mode::empty())?,
            files: 0,
            bytes: 0,
        })
    }

    fn count(&mut self, path: &Path) -> io::Result<()> {
        self.files += 1;
        if self.files > MAX_FILES {
            return Err(refuse(path, "too many files"));
        }
        Ok(())
    }

    /// Makes a directory and those above it.
    fn directory(&mut self, path: &Path) -> io::Result<()> {
        if path.components().count() > MAX_DEPTH {
            return Err(refuse(path, "too many directories in one another"));
        }
        let mut made = PathBuf::new();
        for part in path.components() {
            made.push(part);
            match mkdirat(&self.root, made.as_path(), Mode::RWXU) {
                Ok(()) => self.count(path)?,
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Writes a file that is not there yet.
    fn file(&mut self, path: &Path, from: &mut dyn Read) -> io::Result<()> {
        self.count(path)?;
        if let Some(parent) = path.parent() {
            self.directory(parent)?;
        }
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let mut file = File::from(openat2(&self.root, path, flags, mode, BENEATH)?);
        let left = MAX_BYTES - self.bytes;
        self.bytes += io::copy(&mut from.take(left), &mut file)?;
        if self.bytes == MAX_BYTES {
            return Err(refuse(path, "too many bytes"));
        }
        Ok(())
    }
}

/// The path of an entry that is of use for a restore; `None` for any other.
///
/// # Errors
/// For one that leads out.
fn of_use(path: &Path) -> io::Result<Option<PathBuf>> {
    let mut inside = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => inside.push(name),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                return Err(refuse(path, "a path that leads out"));
            }
        }
    }
    let top = inside.components().next();
    let whole = [LAYER, LOG, CONFIG]
        .iter()
        .any(|name| inside == Path::new(name));
    let below = top.is_some_and(|top| top.as_os_str() == CHECKPOINT);
    Ok((whole || below).then_some(inside))
}

/// Whether an entry only says more of the next one.
fn is_extension(kind: tar::EntryType) -> bool {
    kind.is_pax_local_extensions()
        || kind.is_pax_global_extensions()
        || kind.is_gnu_longname()
        || kind.is_gnu_longlink()
}

/// Takes what a restore needs from the tar at `archive` into the new directory `dir`.
///
/// # Errors
/// For a file that cannot be read, is no tar, or holds what no checkpoint does; `dir` may be half
/// filled then.
pub(super) fn from_tar(archive: &Path, dir: &Path) -> io::Result<()> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = File::options()
        .read(true)
        .custom_flags(flags)
        .open(archive)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut target = Target::make(dir)?;
    let mut archive = tar::Archive::new(io::BufReader::new(file));
    // Raw: long names and extended headers would be read into memory, however long they are. The
    // names of a checkpoint are short; a file of 8 GiB or more has its size where GNU puts it.
    for entry in archive.entries()?.raw(true) {
        // Without the crate's words, which quote the file: it may be any of the node's.
        let mut entry = entry.map_err(|e| io::Error::new(e.kind(), "not a whole tar archive"))?;
        let kind = entry.header().entry_type();
        if is_extension(kind) {
            continue;
        }
        let path = entry.path()?.into_owned();
        let Some(inside) = of_use(&path)? else {
            continue;
        };
        match kind {
            tar::EntryType::Directory => target.directory(&inside)?,
            tar::EntryType::Regular => target.file(&inside, &mut entry)?,
            _ => return Err(refuse(&path, "neither a file nor a directory")),
        }
    }
    Ok(())
}

/// Takes what a restore needs from the files of an image, mounted at `root`, into the new directory
/// `dir`.
///
/// # Errors
/// As [`from_tar`].
pub(super) fn from_directory(root: &Path, dir: &Path) -> io::Result<()> {
    let source = openat(CWD, root, DIRECTORY, Mode::empty())?;
    let mut target = Target::make(dir)?;
    for name in [LAYER, LOG, CONFIG] {
        match openat2(&source, name, REGULAR, Mode::empty(), BENEATH) {
            Ok(file) => take_file(file, Path::new(name), &mut target)?,
            Err(Errno::NOENT) => {}
            Err(Errno::LOOP) => return Err(refuse(Path::new(name), "a link")),
            Err(error) => return Err(error.into()),
        }
    }
    match openat(&source, CHECKPOINT, DIRECTORY, Mode::empty()) {
        Ok(images) => take_directory(&images, Path::new(CHECKPOINT), &mut target),
        Err(Errno::NOENT) => Ok(()),
        Err(Errno::LOOP | Errno::NOTDIR) => Err(refuse(Path::new(CHECKPOINT), "not a directory")),
        Err(error) => Err(error.into()),
    }
}

fn take_file(file: OwnedFd, path: &Path, target: &mut Target) -> io::Result<()> {
    let mut file = File::from(file);
    if !file.metadata()?.is_file() {
        return Err(refuse(path, "neither a file nor a directory"));
    }
    target.file(path, &mut file)
}

fn take_directory(source: &OwnedFd, path: &Path, target: &mut Target) -> io::Result<()> {
    target.directory(path)?;
    for entry in Dir::read_from(source)? {
        let entry = entry?;
        let name: &CStr = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let inside = path.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
        let stat = statat(source, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let below = openat(source, name, DIRECTORY, Mode::empty())?;
                take_directory(&below, &inside, target)?;
            }
            FileType::RegularFile => {
                let file = openat(source, name, REGULAR, Mode::empty())?;
                take_file(file, &inside, target)?;
            }
            _ => return Err(refuse(&inside, "neither a file nor a directory")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    /// An entry as a stranger would write it, past the checks of whoever makes archives.
    fn entry(tar: &mut tar::Builder<Vec<u8>>, path: &str, kind: tar::EntryType, data: &[u8]) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        if kind.is_symlink() || kind.is_hard_link() {
            header.set_link_name("/etc/passwd").unwrap();
        }
        header.set_cksum();
        tar.append(&header, data).unwrap();
    }

    fn unpacked(
        entries: &[(&str, tar::EntryType, &[u8])],
    ) -> (tempfile::TempDir, PathBuf, io::Result<()>) {
        let dir = tempfile::tempdir().unwrap();
        let mut tar = tar::Builder::new(Vec::new());
        for (path, kind, data) in entries {
            entry(&mut tar, path, *kind, data);
        }
        let (archive, to) = (dir.path().join("c.tar"), dir.path().join("a/to"));
        std::fs::write(&archive, tar.into_inner().unwrap()).unwrap();
        let done = from_tar(&archive, &to);
        (dir, to, done)
    }

    const FILE: tar::EntryType = tar::EntryType::Regular;

    #[test]
    fn only_what_a_restore_reads_is_taken() {
        let (_dir, to, done) = unpacked(&[
            ("./config.dump", FILE, b"{}"),
            ("spec.dump", FILE, b"{}"),
            ("status.dump", tar::EntryType::Symlink, b""),
            ("checkpoint/", tar::EntryType::Directory, b""),
            ("checkpoint/pages-1.img", FILE, b"memory"),
            ("checkpoint/deep/x.img", FILE, b"x"),
            (
                "checkpoint/PaxHeaders.0/core-1.img",
                tar::EntryType::XHeader,
                b"16 path=/escape\n",
            ),
            ("checkpoint/core-1.img", FILE, b"core"),
            ("container.log", FILE, b"line\n"),
            ("checkpointed/x", FILE, b"x"),
            ("rootfs-diff.tar/x", FILE, b"x"),
        ]);
        done.unwrap();
        let mut names: Vec<_> = std::fs::read_dir(&to)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["checkpoint", "config.dump", "container.log"]);
        assert_eq!(
            std::fs::read(to.join("checkpoint/pages-1.img")).unwrap(),
            b"memory"
        );
        assert_eq!(
            std::fs::read(to.join("checkpoint/core-1.img")).unwrap(),
            b"core"
        );
        assert_eq!(
            std::fs::read(to.join("checkpoint/deep/x.img")).unwrap(),
            b"x"
        );
        assert_eq!(
            std::fs::metadata(&to).unwrap().permissions().mode() & 0o777,
            0o700
        );
    }

    /// GHSA-rgh6-rfwx-v388, and its kin.
    #[test]
    fn nothing_leads_out_of_the_directory() {
        let hostile: [(&str, tar::EntryType); 7] = [
            ("../config.dump", FILE),
            ("/config.dump", FILE),
            ("checkpoint/../../x", FILE),
            ("container.log", tar::EntryType::Symlink),
            ("checkpoint/pages-1.img", tar::EntryType::Link),
            ("checkpoint", tar::EntryType::Symlink),
            ("checkpoint/dev", tar::EntryType::Char),
        ];
        for (path, kind) in hostile {
            let (dir, to, done) = unpacked(&[(path, kind, b"")]);
            let refused = done.unwrap_err().to_string();
            assert!(refused.contains("in a checkpoint"), "{path}: {refused}");
            assert!(!dir.path().join("config.dump").exists());
            assert_eq!(std::fs::read_dir(&to).unwrap().count(), 0, "{path}");
        }
        let twice = [
            ("config.dump", FILE, &b"1"[..]),
            ("config.dump", FILE, &b"2"[..]),
        ];
        assert!(unpacked(&twice).2.is_err());
        let deep = format!("checkpoint/{}x", "d/".repeat(MAX_DEPTH));
        assert!(unpacked(&[(&deep, FILE, b"")]).2.is_err());
    }

    #[test]
    fn a_link_to_an_archive_and_no_archive_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        symlink("/etc/passwd", &link).unwrap();
        assert!(from_tar(&link, &dir.path().join("one")).is_err());
        assert!(from_tar(dir.path(), &dir.path().join("two")).is_err());
        let text = dir.path().join("text");
        std::fs::write(&text, "secret".repeat(400)).unwrap();
        let refused = from_tar(&text, &dir.path().join("three")).unwrap_err();
        assert_eq!(refused.to_string(), "not a whole tar archive");
    }

    #[test]
    fn files_of_an_image_are_taken_and_links_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("checkpoint")).unwrap();
        std::fs::write(root.join("config.dump"), "{}").unwrap();
        std::fs::write(root.join("checkpoint/core-1.img"), "core").unwrap();
        symlink("/etc/passwd", root.join("spec.dump")).unwrap();
        from_directory(&root, &dir.path().join("good")).unwrap();
        let core = std::fs::read(dir.path().join("good/checkpoint/core-1.img"));
        assert_eq!(core.unwrap(), b"core");
        assert!(!dir.path().join("good/spec.dump").exists());
        symlink("/etc/passwd", root.join("container.log")).unwrap();
        assert!(from_directory(&root, &dir.path().join("log")).is_err());
        std::fs::remove_file(root.join("container.log")).unwrap();
        symlink("/etc/passwd", root.join("checkpoint/pages-1.img")).unwrap();
        assert!(from_directory(&root, &dir.path().join("pages")).is_err());
        std::fs::remove_dir_all(root.join("checkpoint")).unwrap();
        symlink("/etc", root.join("checkpoint")).unwrap();
        assert!(from_directory(&root, &dir.path().join("dir")).is_err());
    }
}
