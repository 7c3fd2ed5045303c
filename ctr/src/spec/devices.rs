//! Devices of the host, as a spec names them.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::Context as _;

use super::model::Device;

/// Below `/dev`, but not the host's devices to give: other filesystems and other people's terminals.
const SKIPPED: [&str; 8] = [
    "pts",
    "shm",
    "fd",
    "mqueue",
    ".lxc",
    ".lxd-mounts",
    ".udev",
    "console",
];
/// Directories nested deeper than this below a device directory are not looked at.
const MAX_DEPTH: usize = 16;
/// Permission bits of a mode.
const PERMISSIONS: u32 = 0o7777;

/// The device at a path, or every device below a directory.
pub(super) fn at(path: &Path) -> anyhow::Result<Vec<Device>> {
    let metadata = std::fs::metadata(path)
        .with_context(|| format!("cannot find the device {}", path.display()))?;
    if !metadata.is_dir() {
        let device = device(path, &metadata)
            .with_context(|| format!("{} is no device node", path.display()))?;
        return Ok(vec![device]);
    }
    let mut found = Vec::new();
    below(path, &[], MAX_DEPTH, &mut found)?;
    Ok(found)
}

/// Every device of the host.
pub(super) fn all() -> anyhow::Result<Vec<Device>> {
    let mut found = Vec::new();
    below(Path::new("/dev"), &SKIPPED, MAX_DEPTH, &mut found)?;
    Ok(found)
}

fn below(
    dir: &Path,
    skipped: &[&str],
    depth: usize,
    found: &mut Vec<Device>,
) -> anyhow::Result<()> {
    if depth == 0 {
        return Ok(());
    }
    let entries =
        std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    for entry in entries {
        let entry = entry?;
        if skipped.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        // Not following links: what they lead to is found under its own name.
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        if metadata.is_dir() {
            below(&entry.path(), skipped, depth - 1, found)?;
        } else if let Some(device) = device(&entry.path(), &metadata) {
            found.push(device);
        }
    }
    Ok(())
}

fn device(path: &Path, metadata: &Metadata) -> Option<Device> {
    let kind = metadata.file_type();
    let kind = if kind.is_char_device() {
        "c"
    } else if kind.is_block_device() {
        "b"
    } else {
        return None;
    };
    Some(Device {
        path: path.to_str()?.to_owned(),
        kind: kind.to_owned(),
        major: i64::from(rustix::fs::major(metadata.rdev())),
        minor: i64::from(rustix::fs::minor(metadata.rdev())),
        file_mode: Some(metadata.mode() & PERMISSIONS),
        uid: metadata.uid(),
        gid: metadata.gid(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_is_1_3() {
        let devices = at(Path::new("/dev/null")).unwrap();
        assert_eq!(
            (devices[0].major, devices[0].minor, devices[0].kind.as_str()),
            (1, 3, "c")
        );
    }

    #[test]
    fn a_file_is_no_device() {
        assert!(at(Path::new("/etc/passwd")).is_err());
        assert!(at(Path::new("/dev/does-not-exist")).is_err());
    }

    #[test]
    fn all_devices_leave_out_terminals_of_others() {
        let devices = all().unwrap();
        assert!(devices.iter().any(|device| device.path == "/dev/null"));
        assert!(
            !devices
                .iter()
                .any(|device| device.path.starts_with("/dev/pts/"))
        );
    }
}
