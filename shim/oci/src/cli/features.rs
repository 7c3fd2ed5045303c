//! `features`: what this runtime knows, whether or not this machine has it.
//! Spec: OCI runtime-spec, features.md and features-linux.md.

use super::{Context, Status, print_line};
use crate::capability;
use crate::error::Result;
use crate::init::memory;
use crate::mount::options;
use crate::namespaces::KINDS;
use crate::seccomp;

/// Latest version of the specification whose properties are known.
pub(crate) const SPEC_VERSION: &str = "1.3.0";

/// `features`
pub(super) fn features(_context: &Context) -> Result<Status> {
    print_line(&serde_json::to_string_pretty(&document()).expect("plain data"));
    Ok(0)
}

/// The features document, for callers that want it without a process.
#[must_use]
pub(crate) fn document() -> serde_json::Value {
    let mut namespaces: Vec<&str> = KINDS.iter().map(|(name, _, _)| *name).collect();
    namespaces.sort_unstable();
    let architectures: Vec<&str> = seccomp::ARCHITECTURES
        .iter()
        .map(|(name, _)| *name)
        .collect();
    serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": SPEC_VERSION,
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": options::known(),
        "linux": {
            "namespaces": namespaces,
            "capabilities": capability::names(),
            "cgroup": {"v1": true, "v2": true, "systemd": true, "systemdUser": true, "rdma": true},
            "seccomp": {
                "enabled": true,
                "actions": seccomp::ACTIONS,
                "operators": seccomp::OPERATORS,
                "archs": architectures,
                "knownFlags": seccomp::FLAGS,
                "supportedFlags": seccomp::FLAGS,
            },
            "apparmor": {"enabled": true},
            "selinux": {"enabled": true},
            "intelRdt": {"enabled": true},
            "mountExtensions": {"idmap": {"enabled": true}},
            "netDevices": {"enabled": true},
            "memoryPolicy": {"modes": memory::modes(), "flags": memory::flags()},
        },
        "annotations": {
            "io.github.seccomp.libseccomp.version": seccomp::library_version(),
            "org.opencontainers.runc.checkpoint.enabled": "true",
        },
        "potentiallyUnsafeConfigAnnotations": [],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idmapped_mounts_are_announced_where_containerd_looks() {
        let document = document();
        assert_eq!(
            document["linux"]["mountExtensions"]["idmap"]["enabled"],
            true
        );
        let options = document["mountOptions"].as_array().unwrap();
        for option in ["rro", "tmpcopyup", "idmap", "rslave", "nosuid"] {
            assert!(options.iter().any(|known| known == option), "{option}");
        }
    }
}
