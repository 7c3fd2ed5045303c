//! The spec of a pod's own container: the pause process that holds its namespaces.

use std::path::Path;

use lighter_proto::runtime::v1::{
    LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig,
};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use super::container::{PodFiles, Process, glob};
use super::resources::oom_score_adj;
use super::{capabilities, cgroup_path, mounts, security, set_env};
use crate::config;
use crate::error::{Error, Result};

/// `oom_score_adj` of a pause process: the last to be killed but the node's own.
const PAUSE_OOM_SCORE_ADJ: i64 = -998;
/// CPU shares of a pause process: it never runs.
const PAUSE_CPU_SHARES: u64 = 2;

/// A list or map that JSON may have as `null`.
pub(super) fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> std::result::Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// Everything a pod's spec is made of.
#[derive(Debug)]
pub struct Input<'a> {
    /// Pod id.
    pub id: &'a str,
    /// The pod's config.
    pub config: &'a PodSandboxConfig,
    /// The pause image's process.
    pub image: &'a Process,
    /// Name of the pause image.
    pub image_name: &'a str,
    /// Its files.
    pub files: &'a PodFiles,
    /// Its network namespace; `None` for the host's.
    pub netns: Option<&'a Path>,
    /// Its hostname.
    pub hostname: &'a str,
    /// CRI's runtime table.
    pub runtime: &'a config::Runtime,
    /// The runtime handler.
    pub handler: &'a config::Handler,
    /// What the spec starts from.
    pub base: Value,
}

impl Input<'_> {
    fn security(&self) -> LinuxSandboxSecurityContext {
        self.config
            .linux
            .as_ref()
            .and_then(|l| l.security_context.clone())
            .unwrap_or_default()
    }

    fn namespaces(&self, options: &NamespaceOption) -> Vec<Value> {
        let mut list = vec![json!({ "type": "mount" })];
        if options.pid() != NamespaceMode::Node {
            list.push(json!({ "type": "pid" }));
        }
        if options.ipc() != NamespaceMode::Node {
            list.push(json!({ "type": "ipc" }));
        }
        if let Some(netns) = self.netns {
            list.push(json!({ "type": "network", "path": netns }));
            list.push(json!({ "type": "uts" }));
        }
        if options
            .userns_options
            .as_ref()
            .is_some_and(|u| u.mode() == NamespaceMode::Pod)
        {
            list.push(json!({ "type": "user" }));
        }
        list
    }

    fn sysctls(&self, options: &NamespaceOption) -> Value {
        let asked = self
            .config
            .linux
            .as_ref()
            .map(|l| l.sysctls.clone())
            .unwrap_or_default();
        let mut sysctls = json!({});
        if self.netns.is_some() {
            if self.runtime.enable_unprivileged_ports {
                sysctls["net.ipv4.ip_unprivileged_port_start"] = json!("0");
            }
            let userns = options
                .userns_options
                .as_ref()
                .is_some_and(|u| u.mode() == NamespaceMode::Pod);
            if self.runtime.enable_unprivileged_icmp && !userns {
                sysctls["net.ipv4.ping_group_range"] = json!("0 2147483647");
            }
        }
        for (key, value) in asked {
            sysctls[key] = json!(value);
        }
        sysctls
    }

    fn annotations(&self) -> Value {
        let metadata = self.config.metadata.clone().unwrap_or_default();
        let mut annotations = json!({
            "io.kubernetes.cri.container-type": "sandbox",
            "io.kubernetes.cri.sandbox-id": self.id,
            "io.kubernetes.cri.sandbox-name": metadata.name,
            "io.kubernetes.cri.sandbox-namespace": metadata.namespace,
            "io.kubernetes.cri.sandbox-uid": metadata.uid,
            "io.kubernetes.cri.sandbox-log-directory": self.config.log_directory,
            "io.kubernetes.cri.podsandbox.image-name": self.image_name,
        });
        if let Some(resources) = self
            .config
            .linux
            .as_ref()
            .and_then(|l| l.resources.as_ref())
        {
            let numbers = [
                ("period", resources.cpu_period),
                ("quota", resources.cpu_quota),
                ("shares", resources.cpu_shares),
            ];
            for (name, value) in numbers {
                let key = format!("io.kubernetes.cri.sandbox-cpu-{name}");
                annotations[key] = json!(value.to_string());
            }
            let memory = resources.memory_limit_in_bytes.to_string();
            annotations["io.kubernetes.cri.sandbox-memory"] = json!(memory);
        }
        let passed = |key: &String| self.handler.pod_annotations.iter().any(|g| glob(g, key));
        for (key, value) in self.config.annotations.iter().filter(|(k, _)| passed(k)) {
            annotations[key] = json!(value);
        }
        annotations
    }

    fn mounts(&self) -> Vec<Value> {
        let locked = |source: &Path, destination: &str| {
            json!({
                "destination": destination, "type": "bind", "source": source,
                "options": ["rbind", "ro", "nosuid", "nodev", "noexec"],
            })
        };
        let own = vec![
            locked(&self.files.shm, "/dev/shm"),
            locked(&self.files.resolv_conf, "/etc/resolv.conf"),
        ];
        mounts::assemble(mounts::defaults(false, false), own)
    }
}

/// Copies the pod's user mappings into a spec; exactly one line each, with root mapped.
///
/// # Errors
/// For modes and mappings that are not supported.
pub(super) fn user_mappings(spec: &mut Value, options: Option<&NamespaceOption>) -> Result<()> {
    let Some(userns) = options.and_then(|o| o.userns_options.as_ref()) else {
        return Ok(());
    };
    match userns.mode() {
        NamespaceMode::Node if userns.uids.is_empty() && userns.gids.is_empty() => return Ok(()),
        NamespaceMode::Pod => {}
        NamespaceMode::Node => {
            return Err(Error::unknown(
                "can't use mappings with user namespace mode NODE",
            ));
        }
        other => {
            return Err(Error::unknown(format!(
                "unsupported user namespace mode: {}",
                other.as_str_name()
            )));
        }
    }
    for (name, key, lines) in [
        ("uid", "uidMappings", &userns.uids),
        ("gid", "gidMappings", &userns.gids),
    ] {
        let [line] = lines.as_slice() else {
            return Err(Error::unknown(format!(
                "exactly one {name} mapping is supported, got {}",
                lines.len()
            )));
        };
        if line.container_id != 0 || line.length == 0 {
            return Err(Error::unknown(format!(
                "{name} 0 of the container must be mapped"
            )));
        }
        spec["linux"][key] = json!([{
            "containerID": line.container_id, "hostID": line.host_id, "size": line.length,
        }]);
    }
    Ok(())
}

/// The spec.
///
/// # Errors
/// For anything the request asks that cannot be had.
#[allow(deprecated, reason = "older kubelets still send the path")]
pub fn spec(input: &Input<'_>) -> Result<Value> {
    let security = input.security();
    let options = security.namespace_options.clone().unwrap_or_default();
    let mut spec = input.base.clone();
    let args: Vec<_> = input
        .image
        .entrypoint
        .iter()
        .chain(&input.image.cmd)
        .cloned()
        .collect();
    if args.is_empty() {
        return Err(Error::unknown(format!(
            "invalid empty entrypoint and cmd in image {}",
            input.image_name
        )));
    }
    let mut env = vec![super::DEFAULT_PATH.to_owned()];
    for variable in &input.image.env {
        set_env(&mut env, variable);
    }
    let set: Vec<String> = capabilities::DEFAULT
        .iter()
        .map(|c| (*c).to_owned())
        .collect();
    spec["process"]["args"] = json!(args);
    spec["process"]["env"] = json!(env);
    if !input.image.working_dir.is_empty() {
        spec["process"]["cwd"] = json!(input.image.working_dir);
    }
    spec["process"]["capabilities"] = capabilities::object(&set);
    spec["process"]["noNewPrivileges"] = json!(true);
    let restrict = input.runtime.restrict_oom_score_adj;
    spec["process"]["oomScoreAdj"] = json!(oom_score_adj(PAUSE_OOM_SCORE_ADJ, restrict));
    if let Some(user) = &security.run_as_user {
        let gid = security.run_as_group.as_ref().map_or(0, |g| g.value);
        spec["process"]["user"] = json!({ "uid": user.value, "gid": gid });
    }
    spec["root"] = json!({ "path": "rootfs", "readonly": true });
    spec["mounts"] = json!(input.mounts());
    if input.netns.is_some() {
        spec["hostname"] = json!(input.hostname);
    }
    spec["annotations"] = input.annotations();
    let parent = input
        .config
        .linux
        .as_ref()
        .map_or("", |l| l.cgroup_parent.as_str());
    spec["linux"]["namespaces"] = json!(input.namespaces(&options));
    user_mappings(&mut spec, Some(&options))?;
    spec["linux"]["cgroupsPath"] = json!(cgroup_path(parent, input.id));
    spec["linux"]["sysctl"] = input.sysctls(&options);
    spec["linux"]["resources"] = json!({
        "cpu": { "shares": PAUSE_CPU_SHARES },
        "devices": [{ "allow": false, "access": "rwm" }],
    });
    spec["linux"]["maskedPaths"] = json!(security::MASKED);
    spec["linux"]["readonlyPaths"] = json!(security::READONLY);
    if !security.privileged {
        let unset = &input.runtime.unset_seccomp_profile;
        let path = &security.seccomp_profile_path;
        if let Some(profile) = security::seccomp(security.seccomp.as_ref(), path, unset, &set)? {
            spec["linux"]["seccomp"] = profile;
        }
    }
    Ok(spec)
}
