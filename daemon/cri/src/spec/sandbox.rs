//! The spec of a pod's own container: the pause process that holds its namespaces.

use std::path::Path;

use lighter_proto::runtime::v1::{
    LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig,
};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use super::apparmor::apparmor;
use super::container::{PodFiles, Process, glob};
use super::resources::oom_score_adj;
use super::user::MAX_ID;
use super::{capabilities, cgroup_path, mounts, security, set_env};
use crate::error::{Error, Result};
use crate::{config, userns};

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
    /// Its pinned user namespace; `None` makes one where one is asked for.
    pub userns: Option<&'a Path>,
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
        if userns::own(Some(options)).is_some() {
            list.push(match self.userns {
                Some(path) => json!({ "type": "user", "path": path }),
                None => json!({ "type": "user" }),
            });
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
            let owned = userns::own(Some(options)).is_some();
            if self.runtime.enable_unprivileged_icmp && !owned {
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
        let mut annotations = self.base["annotations"].clone();
        let own = json!({
            "io.kubernetes.cri.container-type": "sandbox",
            "io.kubernetes.cri.sandbox-id": self.id,
            "io.kubernetes.cri.sandbox-name": metadata.name,
            "io.kubernetes.cri.sandbox-namespace": metadata.namespace,
            "io.kubernetes.cri.sandbox-uid": metadata.uid,
            "io.kubernetes.cri.sandbox-log-directory": self.config.log_directory,
            "io.kubernetes.cri.podsandbox.image-name": self.image_name,
        });
        super::overlay(&mut annotations, own);
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

    fn mounts(&self, options: &NamespaceOption) -> Vec<Value> {
        let locked = |source: &Path, destination: &str| {
            json!({
                "destination": destination, "type": "bind", "source": source,
                "options": ["rbind", "ro", "nosuid", "nodev", "noexec"],
            })
        };
        let mut own = vec![
            locked(&self.files.shm, "/dev/shm"),
            locked(&self.files.resolv_conf, "/etc/resolv.conf"),
        ];
        if self.netns.is_none() && userns::own(Some(options)).is_some() {
            own.push(mounts::host_sys());
        }
        let mut defaults = mounts::of_base(&self.base, false);
        defaults.retain(|mount| mount["destination"] != "/sys/fs/cgroup");
        mounts::assemble(defaults, own)
    }
}

/// Copies the pod's user mappings into a spec; exactly one line each, with root mapped.
///
/// # Errors
/// For modes and mappings that are not supported.
pub(super) fn user_mappings(spec: &mut Value, options: Option<&NamespaceOption>) -> Result<()> {
    userns::check(options)?;
    if let Some(own) = userns::own(options) {
        spec["linux"]["uidMappings"] = userns::lines(&own.uids);
        spec["linux"]["gidMappings"] = userns::lines(&own.gids);
    }
    Ok(())
}

/// Who the pause process runs as: the request's user, else the image's where it is a number.
fn user(security: &LinuxSandboxSecurityContext, image: &str) -> Value {
    let number = |text: &str| text.parse::<u32>().ok().filter(|id| *id <= MAX_ID);
    let (name, group) = image.split_once(':').unwrap_or((image, ""));
    let (mut uid, mut gid) = (
        i64::from(number(name).unwrap_or(0)),
        i64::from(number(group).unwrap_or(0)),
    );
    if let Some(user) = &security.run_as_user {
        uid = user.value;
        gid = security.run_as_group.as_ref().map_or(0, |g| g.value);
    }
    let mut groups = security.supplemental_groups.clone();
    groups.push(gid);
    groups.sort_unstable();
    groups.dedup();
    json!({ "uid": uid, "gid": gid, "additionalGids": groups })
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
    spec["process"]["user"] = user(&security, &input.image.user);
    let disabled = input.runtime.disable_apparmor;
    if let Some(profile) = apparmor(security.apparmor.as_ref(), security.privileged, disabled)? {
        spec["process"]["apparmorProfile"] = json!(profile);
    }
    spec["root"] = json!({ "path": "rootfs", "readonly": true });
    spec["mounts"] = json!(input.mounts(&options));
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
    super::overlay(&mut spec["linux"]["sysctl"], input.sysctls(&options));
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
