//! Device nodes of the host that a container gets, and the cgroup rules that go with them.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use lighter_proto::runtime::v1::Device;
use serde_json::{Value, json};

use crate::error::{Error, Result, io};

/// Most devices one container may get: directories expand.
const MAX_DEVICES: usize = 4096;
/// Below `/dev` but not devices of the host's to hand out.
const OWN: [&str; 7] = [
    "/dev/pts",
    "/dev/shm",
    "/dev/fd",
    "/dev/mqueue",
    "/dev/console",
    "/dev/lxc",
    "/dev/.lxc",
];

/// Who devices belong to in the container; `None` leaves the host's.
#[derive(Debug, Clone, Copy, Default)]
pub struct Owner {
    /// User.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
}

/// Nodes for `linux.devices`, and rules for `linux.resources.devices`.
#[derive(Debug, Default)]
pub struct Devices {
    /// Nodes.
    pub nodes: Vec<Value>,
    /// Rules that allow them.
    pub rules: Vec<Value>,
}

impl Devices {
    /// Adds what the kubelet asks for; a directory gives every device below it.
    ///
    /// # Errors
    /// For a path that is no device, or permissions other than `rwm`.
    pub fn add(&mut self, asked: &Device, owner: Owner) -> Result<()> {
        let access = &asked.permissions;
        if access.is_empty() || !access.chars().all(|c| "rwm".contains(c)) {
            return Err(Error::invalid(format!(
                "device {}: permissions {access:?} are not some of rwm",
                asked.host_path
            )));
        }
        let host = std::fs::canonicalize(&asked.host_path)
            .map_err(io("failed to resolve device", Path::new(&asked.host_path)))?;
        let container = if asked.container_path.is_empty() {
            &asked.host_path
        } else {
            &asked.container_path
        };
        let mut found = Vec::new();
        walk(&host, Path::new(container), &mut found)?;
        if found.is_empty() {
            return Err(Error::unknown(format!(
                "{} is not a device node",
                asked.host_path
            )));
        }
        for (host, container) in found {
            self.push(&host, &container, access, owner)?;
        }
        Ok(())
    }

    /// Adds every device of the host, for a privileged container.
    ///
    /// # Errors
    /// When `/dev` cannot be read.
    pub fn add_host(&mut self) -> Result<()> {
        let mut found = Vec::new();
        walk(Path::new("/dev"), Path::new("/dev"), &mut found)?;
        for (host, container) in found {
            // A node that vanished meanwhile is no loss.
            let _ = self.push(&host, &container, "rwm", Owner::default());
        }
        Ok(())
    }

    fn push(&mut self, host: &Path, container: &Path, access: &str, owner: Owner) -> Result<()> {
        if self.nodes.len() >= MAX_DEVICES {
            return Err(Error::unknown(format!("more than {MAX_DEVICES} devices")));
        }
        let data = std::fs::metadata(host).map_err(io("stat device", host))?;
        let kind = if data.file_type().is_block_device() {
            "b"
        } else {
            "c"
        };
        let (major, minor) = (
            rustix::fs::major(data.rdev()),
            rustix::fs::minor(data.rdev()),
        );
        let uid = owner.uid.unwrap_or_else(|| data.uid());
        let gid = owner.gid.unwrap_or_else(|| data.gid());
        self.nodes.push(json!({
            "path": container, "type": kind, "major": major, "minor": minor,
            "fileMode": data.mode() & 0o7777, "uid": uid, "gid": gid,
        }));
        self.rules.push(json!({
            "allow": true, "type": kind, "major": major, "minor": minor, "access": access,
        }));
        Ok(())
    }
}

fn walk(host: &Path, container: &Path, found: &mut Vec<(PathBuf, PathBuf)>) -> Result<()> {
    if found.len() >= MAX_DEVICES || OWN.iter().any(|own| host == Path::new(own)) {
        return Ok(());
    }
    let data = std::fs::symlink_metadata(host).map_err(io("stat", host))?;
    let kind = data.file_type();
    if kind.is_block_device() || kind.is_char_device() {
        found.push((host.to_owned(), container.to_owned()));
    } else if kind.is_dir() {
        let entries = std::fs::read_dir(host).map_err(io("list", host))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            // What goes away while it is listed is skipped.
            let _ = walk(&host.join(&name), &container.join(&name), found);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_given_under_another_name() {
        let mut devices = Devices::default();
        let asked = Device {
            host_path: "/dev/null".into(),
            container_path: "/dev/void".into(),
            permissions: "rw".into(),
        };
        let owner = Owner {
            uid: Some(7),
            gid: None,
        };
        devices.add(&asked, owner).unwrap();
        let host = std::fs::metadata("/dev/null").unwrap();
        assert_eq!(
            (&devices.nodes[0]["uid"], &devices.nodes[0]["gid"]),
            (&json!(7), &json!(host.gid()))
        );
        assert_eq!(devices.nodes[0]["path"], "/dev/void");
        assert_eq!(
            (&devices.nodes[0]["major"], &devices.nodes[0]["minor"]),
            (&json!(1), &json!(3))
        );
        assert_eq!(devices.rules[0]["access"], "rw");
    }

    #[test]
    fn what_is_no_device_is_refused() {
        let mut devices = Devices::default();
        for (path, access) in [("/etc/passwd", "rw"), ("/dev/null", "x"), ("/nosuch", "r")] {
            let asked = Device {
                host_path: path.into(),
                container_path: String::new(),
                permissions: access.into(),
            };
            assert!(devices.add(&asked, Owner::default()).is_err(), "{path}");
        }
    }
}
