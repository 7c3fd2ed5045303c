//! The OCI specs of pods and containers, built from what the kubelet asks and the image says.
//!
//! Pure but for lookups of users, devices and mount sources. Specs are JSON values, as CDI and NRI
//! edit them. Spec: OCI runtime-spec, config.md and config-linux.md.

mod apparmor;
mod blockio;
pub mod capabilities;
pub mod classes;
pub mod container;
pub mod devices;
pub mod mounts;
pub mod resources;
pub mod sandbox;
pub mod security;
pub mod user;

use serde_json::{Value, json};

/// Search path of a process whose image sets none.
pub const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Version of the runtime spec that a spec says it follows. What later versions added is used where it is
/// asked for, and runtimes take it or leave it; but crun, up to 1.8 at least, refuses any other version.
const OCI_VERSION: &str = "1.0.2";

/// What a spec starts from when no base spec is configured.
#[must_use]
pub fn base() -> Value {
    json!({
        "ociVersion": OCI_VERSION,
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": [],
            "cwd": "/",
            "env": [],
            "noNewPrivileges": false
        },
        "root": { "path": "rootfs" },
        "mounts": [],
        "linux": { "resources": {}, "namespaces": [] }
    })
}

/// Path of a cgroup: the systemd form below a slice, else below the parent, else the namespace.
#[must_use]
pub fn cgroup_path(parent: &str, id: &str) -> String {
    if parent.is_empty() {
        return format!("/{}/{id}", crate::NAMESPACE);
    }
    if parent.ends_with(".slice") {
        let base = parent.rsplit('/').next().unwrap_or(parent);
        return format!("{base}:cri-containerd:{id}");
    }
    format!("{}/{id}", parent.trim_end_matches('/'))
}

/// Puts the entries of an object over those of another.
fn overlay(under: &mut Value, over: Value) {
    let Value::Object(over) = over else { return };
    match under {
        Value::Object(under) => under.extend(over),
        other => *other = Value::Object(over),
    }
}

/// Sets `key=value` in a list of environment variables: in place when the key is there, else last.
pub fn set_env(env: &mut Vec<String>, variable: &str) {
    let key = variable.split('=').next().unwrap_or(variable);
    let same = |known: &String| known.split('=').next() == Some(key);
    match env.iter_mut().find(|known| same(known)) {
        Some(known) => variable.clone_into(known),
        None => env.push(variable.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_gets_the_systemd_form() {
        assert_eq!(cgroup_path("", "x"), "/k8s.io/x");
        assert_eq!(cgroup_path("/kubepods/pod1", "x"), "/kubepods/pod1/x");
        let slice = "/kubepods.slice/kubepods-pod1.slice";
        assert_eq!(
            cgroup_path(slice, "x"),
            "kubepods-pod1.slice:cri-containerd:x"
        );
    }

    #[test]
    fn a_repeated_variable_keeps_its_first_place() {
        let mut env = vec!["A=1".to_owned(), "B=2".to_owned()];
        set_env(&mut env, "A=3");
        set_env(&mut env, "C=4");
        assert_eq!(env, ["A=3", "B=2", "C=4"]);
    }
}
