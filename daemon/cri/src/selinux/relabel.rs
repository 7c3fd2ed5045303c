//! Giving a volume the label of a container's files.
//!
//! The tree may be changed by a container while it is walked: every step is taken from the descriptor
//! of the directory it is in, no link is followed, and a name that is gone is passed over.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{
    CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, XattrFlags, fstat, getxattr, openat,
    openat2, setxattr,
};
use rustix::io::Errno;

use crate::error::{Error, Result, io as io_error};

/// Where the kernel keeps a file's label.
const ATTRIBUTE: &str = "security.selinux";
/// Nested directories; each holds a descriptor.
const DEPTH_MAX: usize = 1000;
/// Longest label, in bytes: a page less one, as the kernel has it.
const LABEL_MAX_BYTES: usize = 4095;
/// Directories that belong to the machine: with another label it would not work any more.
const SYSTEM: [&str; 24] = [
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/etc/passwd",
    "/etc/pki",
    "/etc/shadow",
    "/home",
    "/lib",
    "/lib64",
    "/media",
    "/opt",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/srv",
    "/sys",
    "/tmp",
    "/usr",
    "/var",
    "/var/lib",
    "/var/log",
];

/// Homes of whoever started the daemon: theirs, not a container's.
fn homes() -> Vec<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let caller = std::env::var("SUDO_USER").ok();
    let caller = caller.and_then(|name| nix::unistd::User::from_name(&name).ok().flatten());
    home.into_iter()
        .chain(caller.map(|user| user.dir))
        .collect()
}

/// Whether something belongs to the machine. `path` has no links in it.
fn is_of_system(path: &Path, homes: &[PathBuf]) -> bool {
    let is = |dir: &Path| path == dir || std::fs::canonicalize(dir).is_ok_and(|real| path == real);
    SYSTEM.iter().any(|dir| is(Path::new(dir))) || homes.iter().any(|dir| is(dir))
}

/// What the machine's own files are, by device and inode: a bind shows them under any path.
type Identities = HashSet<(u64, u64)>;

fn identities(homes: &[PathBuf]) -> Identities {
    let system = SYSTEM.iter().map(Path::new);
    let all = system.chain(homes.iter().map(PathBuf::as_path));
    let found = all.filter_map(|path| std::fs::metadata(path).ok());
    found.map(|data| (data.dev(), data.ino())).collect()
}

/// Labels `path`, which has no links in it, and all below it, mounts included; itself last. File systems
/// without labels are passed over.
///
/// # Errors
/// For directories of the machine, wherever they are mounted, and when a label cannot be set.
pub(crate) fn relabel(path: &Path, label: &str) -> Result<()> {
    if label.is_empty() {
        return Ok(());
    }
    if label.len() > LABEL_MAX_BYTES {
        return Err(Error::invalid(format!(
            "relabel {:?}: the label has more than {LABEL_MAX_BYTES} bytes",
            path.display()
        )));
    }
    let homes = homes();
    if is_of_system(path, &homes) {
        return Err(Error::unknown(format!(
            "relabel {:?} with {label:?} failed: SELinux relabeling of {} is not allowed",
            path.display(),
            path.display()
        )));
    }
    let failed = format!("relabel with {label:?}");
    tree(path, label, &identities(&homes)).map_err(io_error(&failed, path))
}

fn tree(path: &Path, label: &str, system: &Identities) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let root = openat2(CWD, path, flags, Mode::empty(), resolve)?;
    // The last part of the path is opened without being followed.
    if FileType::from_raw_mode(fstat(&root)?.st_mode) == FileType::Symlink {
        return Err(Errno::LOOP.into());
    }
    if let Some(dir) = directory(root.as_fd(), system)? {
        below(dir, label, system, DEPTH_MAX)?;
    }
    set(root.as_fd(), label)
}

fn check(stat: &Stat, system: &Identities) -> io::Result<()> {
    if system.contains(&(stat.st_dev, stat.st_ino)) {
        return Err(io::Error::other(
            "SELinux relabeling of files of the machine, which are mounted in it, is not allowed",
        ));
    }
    Ok(())
}

/// The entries of what a descriptor names, if that is a directory. Nothing of the machine's.
fn directory(file: BorrowedFd<'_>, system: &Identities) -> io::Result<Option<OwnedFd>> {
    let stat = fstat(file)?;
    check(&stat, system)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Ok(None);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(Some(openat(file, c".", flags, Mode::empty())?))
}

fn below(dir: OwnedFd, label: &str, system: &Identities, depth: usize) -> io::Result<()> {
    let Some(depth) = depth.checked_sub(1) else {
        return Err(io::Error::other(format!(
            "more than {DEPTH_MAX} nested directories"
        )));
    };
    let mut dir = Dir::new(dir)?;
    while let Some(entry) = dir.read() {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = match openat(dir.fd()?, name, flags, Mode::empty()) {
            Err(Errno::NOENT) => continue,
            found => found?,
        };
        let inside = match directory(found.as_fd(), system) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            inside => inside?,
        };
        set(found.as_fd(), label)?;
        // One descriptor a level is enough.
        drop(found);
        if let Some(inside) = inside {
            below(inside, label, system, depth)?;
        }
    }
    Ok(())
}

/// Labels what a descriptor names, a link included: the way through `/proc` ends at it.
fn set(file: BorrowedFd<'_>, label: &str) -> io::Result<()> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut known = vec![0_u8; LABEL_MAX_BYTES + 1];
    if let Ok(length) = getxattr(path.as_str(), ATTRIBUTE, &mut known)
        && known[..length]
            .strip_suffix(b"\0")
            .unwrap_or(&known[..length])
            == label.as_bytes()
    {
        return Ok(());
    }
    match setxattr(
        path.as_str(),
        ATTRIBUTE,
        label.as_bytes(),
        XattrFlags::empty(),
    ) {
        // One was removed meanwhile, another is where there are no labels.
        Ok(()) | Err(Errno::NOENT | Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether files in `dir` can be labelled, which takes root but no SELinux.
#[cfg(test)]
pub(super) fn can_label(dir: &Path) -> bool {
    std::fs::File::open(dir).is_ok_and(|dir| {
        rustix::fs::fsetxattr(&dir, ATTRIBUTE, b"test", XattrFlags::empty()).is_ok()
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn label_of(path: &Path) -> Option<String> {
        let mut value = [0_u8; 64];
        let length = rustix::fs::lgetxattr(path, ATTRIBUTE, &mut value).ok()?;
        Some(String::from_utf8_lossy(&value[..length]).into_owned())
    }

    #[test]
    fn a_tree_is_labelled_and_what_links_name_is_not() {
        let dir = tempfile::tempdir().unwrap();
        if !can_label(dir.path()) {
            return;
        }
        let base = dir.path().canonicalize().unwrap();
        let volume = base.join("volume");
        std::fs::create_dir_all(volume.join("a/b")).unwrap();
        std::fs::write(volume.join("a/b/file"), "").unwrap();
        std::fs::create_dir(base.join("outside")).unwrap();
        std::fs::write(base.join("outside/secret"), "").unwrap();
        symlink("../outside", volume.join("directory")).unwrap();
        symlink("../../outside/secret", volume.join("a/link")).unwrap();
        let outside = ["outside", "outside/secret"].map(|path| base.join(path));
        let before = outside.each_ref().map(|path| label_of(path));
        nix::unistd::mkfifo(&volume.join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        relabel(&volume, "u:o:t:s0:c1,c2").unwrap();
        for path in ["", "a", "a/b", "a/b/file", "a/link", "directory", "fifo"] {
            let label = label_of(&volume.join(path));
            assert_eq!(label.as_deref(), Some("u:o:t:s0:c1,c2"), "{path:?}");
        }
        assert_eq!(outside.each_ref().map(|path| label_of(path)), before);
    }

    #[test]
    fn a_link_in_the_path_of_a_volume_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().join("real");
        std::fs::create_dir(&real).unwrap();
        let before = label_of(&real);
        symlink("real", dir.path().join("link")).unwrap();
        assert!(relabel(&dir.path().join("link"), "u:o:t").is_err());
        assert_eq!(label_of(&real), before);
    }

    #[test]
    fn the_machines_own_files_are_known_under_any_path() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(base.join("volume/mounted")).unwrap();
        std::fs::write(base.join("volume/mounted/file"), "").unwrap();
        let before = label_of(&base.join("volume/mounted/file"));
        // As if it were a bind of that directory.
        for seen in ["volume", "volume/mounted"] {
            let system = identities(&[base.join(seen)]);
            let refused = tree(&base.join("volume"), "u:o:t", &system).unwrap_err();
            assert!(refused.to_string().contains("not allowed"), "{refused}");
        }
        assert_eq!(label_of(&base.join("volume/mounted/file")), before);
        let root = std::fs::metadata("/").unwrap();
        assert!(identities(&[]).contains(&(root.dev(), root.ino())));
    }

    #[test]
    fn the_machines_own_directories_keep_their_labels() {
        for path in SYSTEM {
            let refused = relabel(Path::new(path), "u:o:t").unwrap_err().to_string();
            assert!(refused.contains("is not allowed"), "{refused}");
        }
        assert!(is_of_system(Path::new("/h/me"), &[PathBuf::from("/h/me")]));
        assert!(!is_of_system(
            Path::new("/h/me/volume"),
            &[PathBuf::from("/h/me")]
        ));
        relabel(Path::new("/"), "").unwrap();
    }
}
