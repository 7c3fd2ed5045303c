//! Copying a directory of an image, which is hostile: every step is taken from the descriptor of
//! the directory it is in, and no link is followed but inside the image's root.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid, chownat, fchmod,
    mkdirat, mknodat, openat, openat2, readlinkat, statat, symlinkat,
};
use rustix::io::Errno;

/// Nested directories; each holds two descriptors.
const DEPTH_MAX: usize = 200;
/// Most entries of one volume.
const ENTRIES_MAX: usize = 1_000_000;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Copies what `path` holds below `root` into the directory `target`, owners and modes included.
/// A path that the image does not have leaves it empty.
///
/// # Errors
/// What the system says; `target` may be half filled then.
pub(super) fn copy_tree(root: &Path, path: &str, target: &Path) -> io::Result<()> {
    let root = openat(CWD, root, DIRECTORY, Mode::empty())?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let source = match openat2(&root, path, flags, Mode::empty(), resolve) {
        Ok(source) => source,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let target = openat(CWD, target, DIRECTORY, Mode::empty())?;
    let mut left = ENTRIES_MAX;
    copy_directory(&source, &target, 0, &mut left)
}

fn copy_directory(
    source: &OwnedFd,
    target: &OwnedFd,
    depth: usize,
    left: &mut usize,
) -> io::Result<()> {
    if depth > DEPTH_MAX {
        return Err(io::Error::other(format!(
            "more than {DEPTH_MAX} nested directories"
        )));
    }
    for entry in Dir::read_from(source)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        *left = left
            .checked_sub(1)
            .ok_or_else(|| io::Error::other(format!("more than {ENTRIES_MAX} files")))?;
        let stat = statat(source, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                mkdirat(target, name, Mode::RWXU)?;
                let (from, to) = (
                    openat(source, name, DIRECTORY, Mode::empty())?,
                    openat(target, name, DIRECTORY, Mode::empty())?,
                );
                copy_directory(&from, &to, depth + 1, left)?;
            }
            FileType::RegularFile => copy_file(source.as_fd(), target.as_fd(), name)?,
            FileType::Symlink => {
                symlinkat(readlinkat(source, name, Vec::new())?, target, name)?;
                own(target.as_fd(), name, &stat)?;
            }
            kind @ (FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice) => {
                mknodat(target, name, kind, mode, stat.st_rdev)?;
                own(target.as_fd(), name, &stat)?;
            }
            // A socket says nothing without its listener.
            _ => {}
        }
    }
    let stat = rustix::fs::fstat(source)?;
    attributes(source.as_fd(), target.as_fd(), &stat)
}

fn copy_file(
    source: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    name: &std::ffi::CStr,
) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut from = File::from(openat(source, name, flags, Mode::empty())?);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut to = File::from(openat(target, name, flags, Mode::RUSR | Mode::WUSR)?);
    io::copy(&mut from, &mut to)?;
    let stat = rustix::fs::fstat(&from)?;
    attributes(from.as_fd(), to.as_fd(), &stat)
}

fn ids(stat: &Stat) -> (Option<Uid>, Option<Gid>) {
    (
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    )
}

fn own(target: BorrowedFd<'_>, name: &std::ffi::CStr, stat: &Stat) -> io::Result<()> {
    let (uid, gid) = ids(stat);
    Ok(chownat(target, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Owner, mode and extended attributes. The owner goes first: its change takes setuid bits away.
fn attributes(source: BorrowedFd<'_>, target: BorrowedFd<'_>, stat: &Stat) -> io::Result<()> {
    let (uid, gid) = ids(stat);
    rustix::fs::fchown(target, uid, gid)?;
    fchmod(target, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    // The kernel's own bounds: 64 KiB of names, 64 KiB of value.
    let mut names = vec![0_u8; 64 << 10];
    let length = match rustix::fs::flistxattr(source, &mut names) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let mut value = vec![0_u8; 64 << 10];
    for name in names[..length]
        .split(|byte| *byte == 0)
        .filter(|n| !n.is_empty())
    {
        // Overlay's own marks are of another place.
        if name.starts_with(b"trusted.overlay.") || name.starts_with(b"security.selinux") {
            continue;
        }
        let size = rustix::fs::fgetxattr(source, name, &mut value)?;
        let flags = rustix::fs::XattrFlags::empty();
        match rustix::fs::fsetxattr(target, name, &value[..size], flags) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn a_tree_is_copied_with_modes_and_links() {
        let dir = tempfile::tempdir().unwrap();
        let (root, to) = (dir.path().join("root"), dir.path().join("to"));
        std::fs::create_dir_all(root.join("data/sub")).unwrap();
        std::fs::create_dir(&to).unwrap();
        std::fs::write(root.join("data/sub/file"), "x").unwrap();
        let mode = std::fs::Permissions::from_mode(0o4711);
        std::fs::set_permissions(root.join("data/sub/file"), mode).unwrap();
        std::fs::set_permissions(root.join("data"), std::fs::Permissions::from_mode(0o1777))
            .unwrap();
        symlink("/etc/passwd", root.join("data/link")).unwrap();
        copy_tree(&root, "/data", &to).unwrap();
        assert_eq!(std::fs::read(to.join("sub/file")).unwrap(), b"x");
        assert_eq!(
            std::fs::metadata(to.join("sub/file")).unwrap().mode() & 0o7777,
            0o4711
        );
        assert_eq!(std::fs::metadata(&to).unwrap().mode() & 0o7777, 0o1777);
        let link = std::fs::read_link(to.join("link")).unwrap();
        assert_eq!(link, Path::new("/etc/passwd"));
    }

    /// GHSA-crp2-qrr5-8pq7: a volume's path that is a link in the image must not reach the host.
    #[test]
    fn a_volume_path_does_not_leave_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let (root, to) = (dir.path().join("root"), dir.path().join("to"));
        std::fs::create_dir_all(root.join("a")).unwrap();
        std::fs::create_dir_all(dir.path().join("host")).unwrap();
        std::fs::create_dir(&to).unwrap();
        std::fs::write(dir.path().join("host/secret"), "secret").unwrap();
        for (name, link) in [
            ("up", "../host".to_owned()),
            ("absolute", dir.path().join("host").display().to_string()),
            ("a/deep", "../../host".to_owned()),
        ] {
            symlink(link, root.join(name)).unwrap();
            copy_tree(&root, &format!("/{name}"), &to).unwrap();
            copy_tree(&root, &format!("/../{name}"), &to).unwrap();
        }
        assert_eq!(std::fs::read_dir(&to).unwrap().count(), 0);
    }
}
