//! Device nodes and the usual links in the container's /dev.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Uid};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;

use crate::error::{Context, Error, Result};
use crate::mount::attach;
use crate::mount::target::{self, Shape};
use crate::spec::Linux;
use crate::spec::linux::Device;

/// Devices every container has (config-linux.md, "Default Devices"): name and minor of major 1, tty of major 5.
const DEFAULT: &[(&str, i64, i64)] = &[
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// (link, what it points to)
const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// Makes the configured and the default devices, and the links.
pub(crate) fn make(root: BorrowedFd<'_>, linux: &Linux, user_namespace: bool) -> Result<()> {
    let directory = target::make(root, Path::new("/dev"), Shape::Directory)?;
    for (name, major, minor) in DEFAULT {
        let path = Path::new("/dev").join(name);
        if linux
            .devices
            .iter()
            .any(|device| target::clean(&device.path) == path)
        {
            continue;
        }
        let device = Device {
            kind: "c".into(),
            path,
            major: *major,
            minor: *minor,
            file_mode: Some(0o666),
            uid: None,
            gid: None,
        };
        make_one(directory.as_fd(), &device, user_namespace)?;
    }
    for device in &linux.devices {
        let path = target::clean(&device.path);
        // The terminal is bound there later.
        if path == Path::new("/dev/ptmx") {
            continue;
        }
        let parent = path
            .parent()
            .ok_or_else(|| Error::Spec("a device cannot be /".into()))?;
        let parent = target::make(root, parent, Shape::Directory)?;
        make_one(parent.as_fd(), device, user_namespace)?;
    }
    for (link, to) in LINKS {
        make_link(directory.as_fd(), link, to)?;
    }
    if Path::new("/proc/kcore").exists() {
        make_link(directory.as_fd(), "core", "/proc/kcore")?;
    }
    // Always the container's own devpts, also over a node an image brings.
    match rustix::fs::unlinkat(&directory, "ptmx", AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => make_link(directory.as_fd(), "ptmx", "pts/ptmx"),
        Err(error) => Err(error).context(|| "replace /dev/ptmx"),
    }
}

fn make_link(directory: BorrowedFd<'_>, name: &str, to: &str) -> Result<()> {
    match rustix::fs::symlinkat(to, directory, name) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).context(|| format!("link /dev/{name}")),
    }
}

fn make_one(parent: BorrowedFd<'_>, device: &Device, user_namespace: bool) -> Result<()> {
    let what = || format!("make device {}", device.path.display());
    let name = device
        .path
        .file_name()
        .ok_or_else(|| Error::Spec(format!("device path {:?} has no name", device.path)))?;
    let kind = match device.kind.as_str() {
        "c" | "u" => FileType::CharacterDevice,
        "b" => FileType::BlockDevice,
        "p" => FileType::Fifo,
        other => {
            return Err(Error::Spec(format!(
                "device {:?}: unknown type {other:?}",
                device.path
            )));
        }
    };
    let number = |value: i64| {
        u32::try_from(value)
            .map_err(|_| Error::Spec(format!("device {:?}: number {value}", device.path)))
    };
    let id = if kind == FileType::Fifo {
        0
    } else {
        rustix::fs::makedev(number(device.major)?, number(device.minor)?)
    };
    if user_namespace && kind != FileType::Fifo {
        return bind(parent, device, id);
    }
    let mode = Mode::from_raw_mode(device.file_mode.unwrap_or(0o666) & 0o7777);
    match rustix::fs::mknodat(parent, name, kind, mode, id) {
        Ok(()) => {}
        Err(Errno::PERM) => return bind(parent, device, id),
        Err(Errno::EXIST) => {
            // From the image or a volume: it must be the device itself, not a link or file in its name.
            let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).context(what)?;
            let same = FileType::from_raw_mode(stat.st_mode) == kind
                && (kind == FileType::Fifo || stat.st_rdev == id);
            return if same {
                Ok(())
            } else {
                Err(Error::Process(format!(
                    "{}: file exists and is another device",
                    what()
                )))
            };
        }
        Err(error) => return Err(error).context(what),
    }
    // mknod masked the mode; the name is in a directory nobody else can change yet.
    rustix::fs::chmodat(parent, name, mode, AtFlags::empty()).context(what)?;
    if device.uid.is_some() || device.gid.is_some() {
        let (uid, gid) = (device.uid.map(Uid::from_raw), device.gid.map(Gid::from_raw));
        rustix::fs::chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW).context(what)?;
    }
    Ok(())
}

/// Where nodes cannot be made, the host's own is bound.
fn bind(parent: BorrowedFd<'_>, device: &Device, id: u64) -> Result<()> {
    let what = || format!("bind device {}", device.path.display());
    let name = device.path.file_name().expect("checked by the caller");
    let source = rustix::mount::open_tree(
        CWD,
        &device.path,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
    .context(what)?;
    let stat = rustix::fs::fstat(&source).context(what)?;
    if stat.st_rdev != id {
        return Err(Error::Process(format!(
            "{}: the host's is another device",
            what()
        )));
    }
    let place = target::make(parent, Path::new(name), Shape::File)?;
    attach::move_to(source.as_fd(), place.as_fd()).context(what)
}
