//! Carrying mounts out at a path.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MoveMountFlags, mount as mount2, mount_change, mount_remount, move_mount,
};

use super::options::Parsed;
use super::unmount::unmount;
use super::{Error, Mount, helper, idmap, loopdev, overlay};
use crate::sys::LoopOptions;

/// Flags that a user namespace may not clear from a mount it inherited.
const LOCKED: [(rustix::fs::StatVfsMountFlags, MountFlags); 6] = [
    (rustix::fs::StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
    (rustix::fs::StatVfsMountFlags::NODEV, MountFlags::NODEV),
    (rustix::fs::StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
    (rustix::fs::StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
    (rustix::fs::StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
    (
        rustix::fs::StatVfsMountFlags::RELATIME,
        MountFlags::RELATIME,
    ),
];

/// Carries the mounts out on `target`, in order; each below the ones before it.
///
/// # Errors
/// The first failure; what was mounted before it is unmounted again.
pub fn mount_all(mounts: &[Mount], target: &Path) -> Result<(), Error> {
    let mut done: Vec<PathBuf> = Vec::new();
    for mount in mounts {
        let result = place(mount, target).and_then(|place| {
            mount_on(mount, &place.path())?;
            Ok(place)
        });
        match result {
            Ok(place) => done.push(place.named(mount, target)),
            Err(error) => {
                for path in done.iter().rev() {
                    if let Err(undo) = unmount(path) {
                        tracing::warn!(error = %lighter_proto::errdefs::render(&undo),
                            "mount stays behind after a failure");
                    }
                }
                return Err(error);
            }
        }
    }
    Ok(())
}

/// Carries one mount out on `target`, or on its `target` path below it.
///
/// # Errors
/// See [`Error`]; nothing is mounted then.
pub fn mount_at(mount: &Mount, target: &Path) -> Result<(), Error> {
    mount_all(std::slice::from_ref(mount), target)
}

/// Where a mount goes: a path of the caller, or a directory found beneath it.
enum Place {
    Given(PathBuf),
    Beneath(OwnedFd),
}

impl Place {
    fn path(&self) -> PathBuf {
        match self {
            Self::Given(path) => path.clone(),
            Self::Beneath(fd) => PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())),
        }
    }

    /// The path by which it can be unmounted once the descriptor is closed.
    fn named(&self, mount: &Mount, target: &Path) -> PathBuf {
        match self {
            Self::Given(path) => path.clone(),
            Self::Beneath(_) => std::fs::read_link(self.path())
                .unwrap_or_else(|_| target.join(mount.target.trim_start_matches('/'))),
        }
    }
}

fn place(mount: &Mount, target: &Path) -> Result<Place, Error> {
    if mount.target.is_empty() || mount.target == "/" {
        return Ok(Place::Given(target.to_owned()));
    }
    let root = File::open(target).map_err(Error::io("open mountpoint", target))?;
    let fd = openat2(
        &root,
        &mount.target,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
    .map_err(|e| {
        Error::io(
            "open mountpoint",
            target.join(mount.target.trim_start_matches('/')),
        )(e.into())
    })?;
    Ok(Place::Beneath(fd))
}

fn mount_on(mount: &Mount, target: &Path) -> Result<(), Error> {
    if let Some((program, kind)) = helper::of(&mount.fstype) {
        return helper::mount(program, kind, mount, target);
    }
    let parsed = mount.parse()?;
    if parsed.flags.remount {
        let data = parsed.data.join(",");
        return mount_remount(target, parsed.flags.bits, data.as_str())
            .map_err(|e| Error::io("remount", target)(e.into()));
    }
    if parsed.flags.bind {
        bind(mount, &parsed, target)?;
    } else if mount.fstype == "overlay" {
        overlay::mount(&parsed, mount, target)?;
    } else {
        device(mount, &parsed, target)?;
    }
    for kind in &parsed.propagation {
        if let Err(error) = mount_change(target, *kind) {
            let _ = unmount(target);
            return Err(Error::io("set propagation of", target)(error.into()));
        }
    }
    Ok(())
}

fn device(mount: &Mount, parsed: &Parsed, target: &Path) -> Result<(), Error> {
    let (source, _attached) = source_of(mount, parsed)?;
    let data = parsed.data.join(",");
    if data.len() >= overlay::page_bytes() {
        return Err(Error::TooLong);
    }
    let data = std::ffi::CString::new(data).map_err(|_| Error::Option {
        fstype: mount.fstype.clone(),
        option: String::new(),
        reason: "contains a NUL byte",
    })?;
    mount2(
        &source,
        target,
        mount.fstype.as_str(),
        parsed.flags.bits,
        data.as_c_str(),
    )
    .map_err(|e| explain(mount, target)(e.into()))?;
    if let Some(map) = &parsed.idmap {
        // The filesystem is mounted plainly first; its shifted copy then goes on top of nothing else.
        let tree = map.tree(target, false).map_err(explain(mount, target));
        let _ = unmount(target);
        attach(&tree?, target)?;
    }
    Ok(())
}

/// The source of a mount, behind a loop device where it is a file.
pub(super) fn source_of(mount: &Mount, parsed: &Parsed) -> Result<(PathBuf, Option<File>), Error> {
    if !parsed.via_loop {
        return Ok((PathBuf::from(&mount.source), None));
    }
    let options = LoopOptions {
        read_only: parsed.flags.read_only(),
        direct_io: parsed.direct_io,
    };
    let (path, device) = loopdev::attach(Path::new(&mount.source), options)?;
    Ok((path, Some(device)))
}

fn bind(mount: &Mount, parsed: &Parsed, target: &Path) -> Result<(), Error> {
    let source = Path::new(&mount.source);
    if let Some(map) = &parsed.idmap {
        let tree = map
            .tree(source, parsed.flags.recursive)
            .map_err(explain(mount, target))?;
        attach(&tree, target)?;
    } else {
        let mut flags = MountFlags::BIND;
        flags.set(MountFlags::REC, parsed.flags.recursive);
        mount2(source, target, c"", flags, None).map_err(|e| explain(mount, target)(e.into()))?;
    }
    // A bind takes no flags of its own at first.
    if parsed.flags.bits.is_empty() {
        return Ok(());
    }
    if let Err(error) = remount_bind(target, parsed.flags.bits) {
        let _ = unmount(target);
        return Err(Error::io("remount", target)(error));
    }
    Ok(())
}

fn remount_bind(target: &Path, bits: MountFlags) -> io::Result<()> {
    match mount_remount(target, MountFlags::BIND | bits, c"") {
        Err(Errno::PERM) => {}
        other => return Ok(other?),
    }
    let current = rustix::fs::statvfs(target)?.f_flag;
    let mut kept = bits;
    for (held, bit) in LOCKED {
        if current.contains(held) {
            kept |= bit;
        }
    }
    Ok(mount_remount(target, MountFlags::BIND | kept, c"")?)
}

/// Puts a detached tree at `target`.
pub(super) fn attach(tree: &OwnedFd, target: &Path) -> Result<(), Error> {
    move_mount(
        tree,
        c"",
        CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS,
    )
    .map_err(|e| Error::io("mount on", target)(e.into()))
}

/// An error that names type, source and target.
pub(super) fn explain(mount: &Mount, target: &Path) -> impl FnOnce(io::Error) -> Error {
    let text = format!(
        "{}: type {:?}, source {:?}",
        target.display(),
        mount.fstype,
        mount.source
    );
    move |source| Error::Io {
        operation: "failed to mount",
        path: PathBuf::from(text),
        source,
    }
}

/// A plain copy of the tree at `path`, for callers outside this file.
pub(super) fn tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    idmap::clone_tree(path, recursive)
}
