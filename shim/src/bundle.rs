//! The bundle directory: what the shim reads from it and writes into it.
//!
//! | File | Written by | Content |
//! |---|---|---|
//! | `config.json` | daemon | the OCI spec |
//! | `rootfs/` | daemon | where the shim mounts the root file system |
//! | `options.json` | shim, 0600 | the runc options as JSON, for `delete` of a later shim process |
//! | `runtime` | shim, 0600 | the runtime binary's name; empty for the built-in runtime |
//! | `address` | shim | the shim's socket, for daemons that know no `bootstrap.json` |
//! | `init.pid`, `<exec>.pid` | runtime | pids |
//! | `log.json` | runtime | its log |
//! | `s` | shim, by `start` | link to the directory of sockets |

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use lighter_proto::containerd::runc::v1::Options;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Annotations that name the group of a container, by precedence. One shim serves a group.
const GROUP_ANNOTATIONS: [&str; 2] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
];
/// Largest spec that is read.
const MAX_SPEC_BYTES: u64 = 64 << 20;

/// The runc options as upstream writes them into `options.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct StoredOptions {
    #[serde(skip_serializing_if = "is_default")]
    no_pivot_root: bool,
    #[serde(skip_serializing_if = "is_default")]
    no_new_keyring: bool,
    #[serde(skip_serializing_if = "is_default")]
    shim_cgroup: String,
    #[serde(skip_serializing_if = "is_default")]
    io_uid: u32,
    #[serde(skip_serializing_if = "is_default")]
    io_gid: u32,
    #[serde(skip_serializing_if = "is_default")]
    binary_name: String,
    #[serde(skip_serializing_if = "is_default")]
    root: String,
    #[serde(skip_serializing_if = "is_default")]
    systemd_cgroup: bool,
    #[serde(skip_serializing_if = "is_default")]
    criu_image_path: String,
    #[serde(skip_serializing_if = "is_default")]
    criu_work_path: String,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The parts of a spec that the shim itself needs.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Spec {
    /// Annotations.
    #[serde(default)]
    pub(crate) annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    linux: Option<Linux>,
}

#[derive(Debug, Default, Deserialize)]
struct Linux {
    #[serde(default)]
    namespaces: Option<Vec<Namespace>>,
}

#[derive(Debug, Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}

impl Spec {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// `Io` when it cannot be read, `InvalidArgument` when it is no spec.
    pub(crate) fn read(bundle: &Path) -> Result<Self> {
        let path = bundle.join("config.json");
        let size = std::fs::metadata(&path)
            .map_err(Error::io("read", &path))?
            .len();
        if size > MAX_SPEC_BYTES {
            return Err(Error::InvalidArgument(format!(
                "{}: too large",
                path.display()
            )));
        }
        let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
        serde_json::from_slice(&bytes)
            .map_err(|e| Error::InvalidArgument(format!("{}: {e}", path.display())))
    }

    /// The group whose shim serves this container, if the annotations name one.
    pub(crate) fn group(&self) -> Option<&str> {
        let annotations = self.annotations.as_ref()?;
        GROUP_ANNOTATIONS
            .iter()
            .find_map(|key| annotations.get(*key))
            .map(String::as_str)
    }

    /// Whether init's end takes every other process with it, by the kernel's doing.
    pub(crate) fn has_private_pids(&self) -> bool {
        let namespaces = self
            .linux
            .as_ref()
            .and_then(|linux| linux.namespaces.as_ref());
        namespaces.is_some_and(|all| all.iter().any(|n| n.kind == "pid" && n.path.is_empty()))
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::io("create", path))?;
    file.write_all(bytes).map_err(Error::io("write", path))
}

/// Records how the container is run, for a `delete` in another process.
///
/// # Errors
/// `Io`.
pub(crate) fn record(bundle: &Path, options: &Options) -> Result<()> {
    if *options == Options::default() {
        // What is not there reads as the defaults.
        return Ok(());
    }
    let stored = StoredOptions {
        no_pivot_root: options.no_pivot_root,
        no_new_keyring: options.no_new_keyring,
        shim_cgroup: options.shim_cgroup.clone(),
        io_uid: options.io_uid,
        io_gid: options.io_gid,
        binary_name: options.binary_name.clone(),
        root: options.root.clone(),
        systemd_cgroup: options.systemd_cgroup,
        criu_image_path: options.criu_image_path.clone(),
        criu_work_path: options.criu_work_path.clone(),
    };
    let json = serde_json::to_vec(&stored).expect("plain fields serialise");
    write(&bundle.join("options.json"), &json)?;
    write(&bundle.join("runtime"), options.binary_name.as_bytes())
}

/// What [`record`] wrote, or the defaults for a bundle that never got so far.
pub(crate) fn recorded(bundle: &Path) -> Options {
    let read = |name: &str| std::fs::read(bundle.join(name)).unwrap_or_default();
    let stored: StoredOptions = serde_json::from_slice(&read("options.json")).unwrap_or_default();
    let runtime = String::from_utf8(read("runtime")).unwrap_or_default();
    Options {
        no_pivot_root: stored.no_pivot_root,
        no_new_keyring: stored.no_new_keyring,
        binary_name: if runtime.is_empty() {
            stored.binary_name
        } else {
            runtime
        },
        root: stored.root,
        systemd_cgroup: stored.systemd_cgroup,
        ..Options::default()
    }
}

/// Removes what [`record`] wrote: after a create that failed.
pub(crate) fn forget(bundle: &Path) {
    for name in ["options.json", "runtime", "init.pid"] {
        let _ = std::fs::remove_file(bundle.join(name));
    }
}

/// The pid that the runtime wrote into a pid file.
///
/// # Errors
/// `Io` when there is none, `Runtime` when it holds no number.
pub(crate) fn read_pid(path: &Path) -> Result<u32> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    text.trim()
        .parse()
        .map_err(|_| Error::Runtime(format!("{}: not a pid: {text:?}", path.display())))
}

/// Path of an exec's pid file.
pub(crate) fn exec_pid_file(bundle: &Path, exec_id: &str) -> PathBuf {
    bundle.join(format!("{exec_id}.pid"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_is_found_again() {
        let bundle = tempfile::tempdir().unwrap();
        let options = Options {
            binary_name: "crun".into(),
            root: "/run/x".into(),
            systemd_cgroup: true,
            ..Options::default()
        };
        record(bundle.path(), &options).unwrap();
        assert_eq!(recorded(bundle.path()), options);
        forget(bundle.path());
        assert_eq!(recorded(bundle.path()), Options::default());
    }

    #[test]
    fn the_group_and_the_pid_namespace_come_from_the_spec() {
        let spec: Spec = serde_json::from_str(
            r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod","io.containerd.runc.v2.group":"g"},
                "linux":{"namespaces":[{"type":"pid"}]}}"#,
        )
        .unwrap();
        assert_eq!((spec.group(), spec.has_private_pids()), (Some("g"), true));
        let shared = r#"{"linux":{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}}"#;
        let spec: Spec = serde_json::from_str(shared).unwrap();
        assert_eq!((spec.group(), spec.has_private_pids()), (None, false));
    }
}
