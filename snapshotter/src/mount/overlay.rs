//! Overlay mounts, however many lower directories they have.
//!
//! One page of options is what `mount(2)` takes. Beyond it the directories go to the kernel one by
//! one (`lowerdir+`, Linux 6.8), and on older kernels relative to their longest common directory,
//! from a thread whose working directory is its own.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use nix::sched::CloneFlags;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_fd, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount as mount2,
    unmount,
};

use super::apply::{attach, explain};
use super::options::Parsed;
use super::{Error, IdMap, Mount};

/// Longest string `fsconfig` takes, with its NUL.
const FSCONFIG_MAX_BYTES: usize = 256;

/// Bytes of option data that `mount(2)` takes, with the NUL.
pub(super) fn page_bytes() -> usize {
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    // 4 KiB is the smallest page of any Linux.
    size.ok()
        .flatten()
        .and_then(|bytes| usize::try_from(bytes).ok())
        .unwrap_or(4096)
}

/// A lower directory: by path, or by a descriptor when its owners are shifted.
enum Lower {
    Path { path: String, data_only: bool },
    Tree(OwnedFd),
}

pub(super) fn mount(parsed: &Parsed, mount: &Mount, target: &Path) -> Result<(), Error> {
    if let Some(map) = &parsed.idmap {
        return mapped(parsed, map, mount, target);
    }
    let data = parsed.data.join(",");
    if data.len() + 1 < page_bytes() {
        return plain(mount, target, parsed.flags.bits, &data);
    }
    match context(parsed, mount, lowers(&parsed.data)) {
        Ok(tree) => attach(&tree, target),
        // No `lowerdir+`: an older kernel.
        Err(Errno::INVAL | Errno::NOSYS) => relative(parsed, mount, target),
        Err(error) => Err(explain(mount, target)(error.into())),
    }
}

fn plain(mount: &Mount, target: &Path, bits: MountFlags, data: &str) -> Result<(), Error> {
    let data = CString::new(data).map_err(|_| Error::Option {
        fstype: mount.fstype.clone(),
        option: String::new(),
        reason: "contains a NUL byte",
    })?;
    mount2(
        mount.source.as_str(),
        target,
        "overlay",
        bits,
        data.as_c_str(),
    )
    .map_err(|e| explain(mount, target)(e.into()))
}

/// The overlay as a detached tree.
pub(super) fn detached(parsed: &Parsed, mount: &Mount) -> io::Result<OwnedFd> {
    let lower = match &parsed.idmap {
        Some(map) => mapped_lowers(&parsed.data, map)?,
        None => lowers(&parsed.data),
    };
    Ok(context(parsed, mount, lower)?)
}

fn lowers(data: &[String]) -> Vec<Lower> {
    let Some(list) = data.iter().find_map(|o| o.strip_prefix("lowerdir=")) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let mut data_only = false;
    for path in split_unescaped(list) {
        if path.is_empty() {
            // `::` starts the directories that only hold file data.
            data_only = true;
        } else {
            found.push(Lower::Path { path, data_only });
        }
    }
    found
}

/// Splits at colons that no backslash protects, and drops the protection.
pub(super) fn split_unescaped(list: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = list.chars();
    while let Some(c) = chars.next() {
        let last = parts.last_mut().expect("starts with one part");
        match c {
            '\\' => last.extend(chars.next()),
            ':' => parts.push(String::new()),
            c => last.push(c),
        }
    }
    parts
}

fn mapped_lowers(data: &[String], map: &IdMap) -> io::Result<Vec<Lower>> {
    lowers(data)
        .into_iter()
        .map(|lower| match lower {
            Lower::Path { path, .. } => Ok(Lower::Tree(map.tree(Path::new(&path), false)?)),
            tree @ Lower::Tree(_) => Ok(tree),
        })
        .collect()
}

fn context(parsed: &Parsed, mount: &Mount, lower: Vec<Lower>) -> Result<OwnedFd, Errno> {
    let fs = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    if !mount.source.is_empty() {
        fsconfig_set_string(fs.as_fd(), "source", mount.source.as_str())?;
    }
    if parsed.flags.read_only() {
        fsconfig_set_flag(fs.as_fd(), "ro")?;
    }
    for lower in lower {
        match lower {
            Lower::Path { path, data_only } => {
                let key = if data_only { "datadir+" } else { "lowerdir+" };
                set_dir(fs.as_fd(), key, &path)?;
            }
            Lower::Tree(tree) => fsconfig_set_fd(fs.as_fd(), "lowerdir+", tree.as_fd())?,
        }
    }
    for word in &parsed.data {
        match word.split_once('=') {
            Some(("lowerdir", _)) => {}
            Some((key @ ("upperdir" | "workdir"), path)) => set_dir(fs.as_fd(), key, path)?,
            Some((key, value)) => fsconfig_set_string(fs.as_fd(), key, unquoted(key, value))?,
            None => fsconfig_set_flag(fs.as_fd(), word.as_str())?,
        }
    }
    fsconfig_create(fs.as_fd())?;
    fsmount(
        fs.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes(parsed.flags.bits),
    )
}

/// A label without the quotes that hold it together among the words of `mount(2)`.
fn unquoted<'a>(key: &str, value: &'a str) -> &'a str {
    let label = matches!(key, "context" | "fscontext" | "defcontext" | "rootcontext");
    let bare = value
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'));
    bare.filter(|_| label).unwrap_or(value)
}

fn set_dir(fs: BorrowedFd<'_>, key: &str, path: &str) -> Result<(), Errno> {
    if path.len() + 1 < FSCONFIG_MAX_BYTES {
        return fsconfig_set_string(fs, key, path);
    }
    let dir = openat(
        CWD,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    fsconfig_set_fd(fs, key, dir.as_fd())
}

/// The flags of `mount(2)` in the words of `fsmount(2)`.
pub(super) fn attributes(bits: MountFlags) -> MountAttrFlags {
    let mut found = MountAttrFlags::empty();
    for (bit, attribute) in [
        (MountFlags::RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (MountFlags::NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (MountFlags::NODEV, MountAttrFlags::MOUNT_ATTR_NODEV),
        (MountFlags::NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (MountFlags::NOATIME, MountAttrFlags::MOUNT_ATTR_NOATIME),
        (
            MountFlags::STRICTATIME,
            MountAttrFlags::MOUNT_ATTR_STRICTATIME,
        ),
        (
            MountFlags::NODIRATIME,
            MountAttrFlags::MOUNT_ATTR_NODIRATIME,
        ),
    ] {
        found.set(attribute, bits.contains(bit));
    }
    found
}

/// An overlay whose lower directories have shifted owners.
fn mapped(parsed: &Parsed, map: &IdMap, mount: &Mount, target: &Path) -> Result<(), Error> {
    let trees = mapped_lowers(&parsed.data, map).map_err(explain(mount, target))?;
    match context(parsed, mount, trees) {
        Ok(tree) => return attach(&tree, target),
        // Descriptors as layers: Linux 6.13; of detached trees: 6.15.
        Err(Errno::INVAL | Errno::NOSYS | Errno::XDEV | Errno::PERM) => {}
        Err(error) => return Err(explain(mount, target)(error.into())),
    }
    let trees = mapped_lowers(&parsed.data, map).map_err(explain(mount, target))?;
    let base = tempfile::Builder::new()
        .prefix("lighter-idmap-")
        .tempdir()
        .map_err(Error::io("make directory in", std::env::temp_dir()))?;
    let attached = Attached::new(base.path(), &trees)?;
    let mut parsed = parsed.clone();
    parsed.idmap = None;
    for word in &mut parsed.data {
        if word.starts_with("lowerdir=") {
            *word = format!("lowerdir={}", attached.list());
        }
    }
    self::mount(&parsed, mount, target)
}

/// Trees attached for as long as it takes to make the overlay, which holds them afterwards.
struct Attached(Vec<PathBuf>);

impl Attached {
    fn new(base: &Path, trees: &[Lower]) -> Result<Self, Error> {
        let mut attached = Self(Vec::new());
        for (index, lower) in trees.iter().enumerate() {
            let Lower::Tree(tree) = lower else { continue };
            let path = base.join(index.to_string());
            std::fs::create_dir(&path).map_err(Error::io("make directory", &path))?;
            attach(tree, &path)?;
            attached.0.push(path);
        }
        Ok(attached)
    }

    fn list(&self) -> String {
        let paths: Vec<_> = self.0.iter().map(|p| p.to_string_lossy()).collect();
        paths.join(":")
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(error) = unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                tracing::warn!(%error, path = %path.display(), "temporary mount stays behind");
            }
        }
    }
}

/// The mount from inside the longest common directory of the lower directories.
fn relative(parsed: &Parsed, mount: &Mount, target: &Path) -> Result<(), Error> {
    let paths: Vec<PathBuf> = lowers(&parsed.data)
        .into_iter()
        .filter_map(|lower| match lower {
            Lower::Path { path, .. } => Some(PathBuf::from(path)),
            Lower::Tree(_) => None,
        })
        .collect();
    let Some(common) = common_dir(&paths) else {
        return Err(Error::TooLong);
    };
    let list: Vec<String> = paths
        .iter()
        .map(|path| {
            let rest = path.strip_prefix(&common).unwrap_or(path);
            rest.to_string_lossy().replace(':', "\\:")
        })
        .collect();
    let data: Vec<String> = parsed
        .data
        .iter()
        .map(|word| match word.strip_prefix("lowerdir=") {
            Some(_) => format!("lowerdir={}", list.join(":")),
            None => word.clone(),
        })
        .collect();
    let data = data.join(",");
    if data.len() >= page_bytes() {
        return Err(Error::TooLong);
    }
    let target = std::path::absolute(target).map_err(Error::io("resolve", target))?;
    let bits = parsed.flags.bits;
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            // From here on this thread's working directory is nobody else's.
            nix::sched::unshare(CloneFlags::CLONE_FS)
                .and_then(|()| nix::unistd::chdir(&common))
                .map_err(|e| Error::io("enter directory", &common)(e.into()))?;
            plain(mount, &target, bits, &data)
        });
        inside.join().unwrap_or(Err(Error::TooLong))
    })
}

fn common_dir(paths: &[PathBuf]) -> Option<PathBuf> {
    let mut common = paths.first()?.parent()?.to_owned();
    for path in paths {
        while !path.starts_with(&common) {
            common = common.parent()?.to_owned();
        }
    }
    (common.as_os_str().len() > 1).then_some(common)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_labels_lose_their_quotes() {
        let label = "\"u:o:t:s0:c1,c2\"";
        assert_eq!(unquoted("context", label), "u:o:t:s0:c1,c2");
        assert_eq!(unquoted("context", "u:o:t"), "u:o:t");
        assert_eq!(unquoted("context", "\""), "\"");
        assert_eq!(unquoted("xino", label), label);
    }
}
