//! The mounts of a container: the defaults, the pod's files, and what the kubelet asks for.

use std::path::{Path, PathBuf};

use lighter_proto::runtime::v1::{Mount, MountPropagation};
use serde_json::{Value, json};

use crate::error::{Error, Result, io};

/// Mounts every container has unless its request replaces them, in order.
#[must_use]
pub fn defaults(privileged: bool, cgroup: bool) -> Vec<Value> {
    let sysfs = if privileged { "rw" } else { "ro" };
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    let mut mounts = vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", sysfs]),
    ];
    if cgroup {
        mounts.push(mount(
            "/sys/fs/cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", sysfs],
        ));
    }
    mounts
}

/// The machine's `/sys`, for a user namespace on the machine's network: the kernel lets nobody mount a
/// sysfs of a network that belongs to another.
#[must_use]
pub fn host_sys() -> Value {
    json!({
        "destination": "/sys", "type": "bind", "source": "/sys",
        "options": ["rbind", "nosuid", "noexec", "nodev", "rro"],
    })
}

/// The mounts of a configured base spec, else the defaults; writable where they are so for the
/// privileged.
#[must_use]
pub fn of_base(base: &Value, privileged: bool) -> Vec<Value> {
    let configured = base["mounts"].as_array().filter(|list| !list.is_empty());
    let Some(configured) = configured else {
        return defaults(privileged, true);
    };
    let mut mounts = configured.clone();
    for mount in &mut mounts {
        let kernel = matches!(mount["type"].as_str(), Some("sysfs" | "cgroup" | "cgroup2"));
        if privileged
            && kernel
            && let Some(options) = mount["options"].as_array_mut()
        {
            for option in options.iter_mut().filter(|o| *o == "ro") {
                *option = json!("rw");
            }
        }
    }
    mounts
}

/// How a mount is shared with the host, and what that asks of its source.
struct Propagation {
    word: &'static str,
    needs: Option<&'static [&'static str]>,
}

fn propagation(asked: MountPropagation) -> Propagation {
    match asked {
        MountPropagation::PropagationPrivate => Propagation {
            word: "rprivate",
            needs: None,
        },
        MountPropagation::PropagationHostToContainer => Propagation {
            word: "rslave",
            needs: Some(&["shared:", "master:"]),
        },
        MountPropagation::PropagationBidirectional => Propagation {
            word: "rshared",
            needs: Some(&["shared:"]),
        },
    }
}

/// Whether the mount that holds `path` has one of the optional fields `tags`.
fn is_propagating(path: &Path, tags: &[&str]) -> bool {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut best: Option<(usize, bool)> = None;
    for line in table.lines() {
        let mut fields = line.split(' ');
        let Some(point) = fields.nth(4) else { continue };
        let shared = fields
            .skip(1)
            .take_while(|f| *f != "-")
            .any(|f| tags.iter().any(|t| f.starts_with(t)));
        // A later line of the same mountpoint covers an earlier one.
        if path.starts_with(point) && best.is_none_or(|(length, _)| point.len() >= length) {
            best = Some((point.len(), shared));
        }
    }
    best.is_some_and(|(_, shared)| shared)
}

/// One requested mount with what the container's root must be for it to work.
#[derive(Debug)]
pub struct Requested {
    /// The spec's mount.
    pub value: Value,
    /// Propagation the root must have, where one.
    pub root_propagation: Option<&'static str>,
}

/// Turns a requested host mount into the spec's. A source that does not exist becomes a directory.
///
/// # Errors
/// For a source that cannot be made or is not shared as asked, and contradictory options.
pub fn requested(mount: &Mount, recursive_readonly: bool) -> Result<Requested> {
    let destination = &mount.container_path;
    if destination.is_empty() || mount.host_path.is_empty() {
        return Err(Error::invalid(format!(
            "mount {destination:?} of {:?}: both paths are needed",
            mount.host_path
        )));
    }
    let asked = mount.propagation();
    if mount.recursive_read_only {
        if !mount.readonly {
            return Err(Error::unknown(format!(
                "recursive read-only mount {destination} conflicts with RW mount"
            )));
        }
        if asked != MountPropagation::PropagationPrivate {
            return Err(Error::unknown(format!(
                "recursive read-only mount {destination} needs private propagation"
            )));
        }
        if !recursive_readonly {
            return Err(Error::unknown(format!(
                "RROUnsupported: recursive read-only mount {destination} is not supported by \
                 this runtime handler"
            )));
        }
    }
    let source = source_of(Path::new(&mount.host_path))?;
    let propagation = propagation(asked);
    if let Some(tags) = propagation.needs
        && !is_propagating(&source, tags)
    {
        let kind = if tags.len() == 1 {
            "a shared"
        } else {
            "a shared or slave"
        };
        return Err(Error::unknown(format!(
            "path {:?} is mounted on {:?} but it is not {kind} mount",
            mount.host_path,
            source.display()
        )));
    }
    let access = match (mount.recursive_read_only, mount.readonly) {
        (true, _) => "rro",
        (false, true) => "ro",
        (false, false) => "rw",
    };
    let mut value = json!({
        "destination": destination,
        "type": "bind",
        "source": source,
        "options": ["rbind", propagation.word, access],
    });
    for (key, mappings) in [
        ("uidMappings", &mount.uid_mappings),
        ("gidMappings", &mount.gid_mappings),
    ] {
        if !mappings.is_empty() {
            let lines: Vec<_> = mappings
                .iter()
                .map(|m| json!({ "containerID": m.container_id, "hostID": m.host_id, "size": m.length }))
                .collect();
            value[key] = json!(lines);
        }
    }
    Ok(Requested {
        value,
        root_propagation: propagation.needs.map(|_| propagation.word),
    })
}

/// The source with its links resolved; made as a directory when it is missing.
fn source_of(path: &Path) -> Result<PathBuf> {
    use std::os::unix::fs::DirBuilderExt as _;
    match std::fs::canonicalize(path) {
        Ok(path) => Ok(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let made = std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(path);
            made.map_err(io("failed to create mount source", path))?;
            std::fs::canonicalize(path).map_err(io("resolve mount source", path))
        }
        Err(error) => Err(io("resolve mount source", path)(error)),
    }
}

/// A bind of a file or directory of the pod's.
#[must_use]
pub fn bind(source: &Path, destination: &str, access: &str) -> Value {
    json!({
        "destination": destination,
        "type": "bind",
        "source": source,
        "options": ["rbind", "rprivate", access],
    })
}

/// Defaults not replaced by `asked`, then `asked` by depth of destination. A supplied `/dev` also
/// replaces what would be mounted below it by default.
#[must_use]
pub fn assemble(defaults: Vec<Value>, mut asked: Vec<Value>) -> Vec<Value> {
    let destination = |mount: &Value| {
        mount["destination"]
            .as_str()
            .unwrap_or_default()
            .trim_end_matches('/')
            .to_owned()
    };
    let taken: Vec<String> = asked.iter().map(&destination).collect();
    let covered = |mount: &Value| {
        let own = destination(mount);
        taken.contains(&own)
            || taken.contains(&"/dev".to_owned())
                && matches!(own.as_str(), "/dev/pts" | "/dev/mqueue")
    };
    let mut mounts: Vec<Value> = defaults.into_iter().filter(|m| !covered(m)).collect();
    asked.sort_by_key(|mount| destination(mount).matches('/').count());
    mounts.extend(asked);
    mounts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requested_mounts_replace_defaults_and_go_by_depth() {
        let asked = vec![
            bind(Path::new("/a"), "/x/y/z", "rw"),
            bind(Path::new("/b"), "/dev", "rw"),
            bind(Path::new("/c"), "/sys/", "rw"),
        ];
        let mounts = assemble(defaults(false, true), asked);
        let destinations: Vec<_> = mounts
            .iter()
            .map(|m| m["destination"].as_str().unwrap())
            .collect();
        assert_eq!(
            destinations,
            ["/proc", "/sys/fs/cgroup", "/dev", "/sys/", "/x/y/z"]
        );
    }

    #[test]
    fn contradictions_are_refused() {
        let mut mount = Mount {
            container_path: "/c".into(),
            host_path: "/tmp".into(),
            recursive_read_only: true,
            ..Default::default()
        };
        assert!(
            requested(&mount, true)
                .unwrap_err()
                .to_string()
                .contains("conflicts with RW")
        );
        mount.readonly = true;
        assert!(
            requested(&mount, false)
                .unwrap_err()
                .to_string()
                .starts_with("RROUnsupported: ")
        );
        let value = requested(&mount, true).unwrap().value;
        assert_eq!(value["options"], json!(["rbind", "rprivate", "rro"]));
    }
}
