//! The spec of one container in a pod.

use std::path::{Path, PathBuf};

use lighter_proto::runtime::v1::{
    ContainerConfig, Int64Value, LinuxContainerSecurityContext, LinuxSandboxSecurityContext,
    NamespaceMode, PodSandboxConfig,
};
use serde_json::{Value, json};

use super::apparmor::apparmor;
use super::classes::{self, Classes};
use super::devices::{Devices, Owner};
use super::resources::{self, Machine};
use super::user::User;
use super::{capabilities, cgroup_path, mounts, security, set_env};
use crate::error::{Error, Result};
use crate::{config, userns};

/// What an image's config says of its process.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Process {
    /// Command in front of the arguments.
    #[serde(deserialize_with = "super::sandbox::nullable")]
    pub entrypoint: Vec<String>,
    /// Arguments.
    #[serde(deserialize_with = "super::sandbox::nullable")]
    pub cmd: Vec<String>,
    /// `KEY=value`.
    #[serde(deserialize_with = "super::sandbox::nullable")]
    pub env: Vec<String>,
    /// `user[:group]`.
    pub user: String,
    /// Working directory.
    pub working_dir: String,
    /// Signal that ends it.
    pub stop_signal: String,
    /// Labels.
    #[serde(deserialize_with = "super::sandbox::nullable")]
    pub labels: std::collections::BTreeMap<String, String>,
    /// Paths that want a volume.
    #[serde(deserialize_with = "super::sandbox::nullable")]
    pub volumes: std::collections::BTreeMap<String, Value>,
}

/// Files of the pod that its containers mount.
#[derive(Debug, Clone)]
pub struct PodFiles {
    /// `/etc/hostname`
    pub hostname: PathBuf,
    /// `/etc/hosts`
    pub hosts: PathBuf,
    /// `/etc/resolv.conf`
    pub resolv_conf: PathBuf,
    /// `/dev/shm`
    pub shm: PathBuf,
}

/// Everything a container's spec is made of.
#[derive(Debug)]
pub struct Input<'a> {
    /// Container id.
    pub id: &'a str,
    /// Pod id.
    pub pod_id: &'a str,
    /// The pod's config.
    pub pod: &'a PodSandboxConfig,
    /// Pid of the pod's first process.
    pub pause_pid: u32,
    /// Hostname of the pod.
    pub hostname: &'a str,
    /// The container's config.
    pub config: &'a ContainerConfig,
    /// The image's process.
    pub image: &'a Process,
    /// Name of the image.
    pub image_name: &'a str,
    /// The pod's files.
    pub files: &'a PodFiles,
    /// CRI's runtime table.
    pub runtime: &'a config::Runtime,
    /// The runtime handler.
    pub handler: &'a config::Handler,
    /// Who it runs as.
    pub user: &'a User,
    /// What the machine can limit.
    pub machine: Machine,
    /// Pid whose pid namespace is joined (mode TARGET).
    pub target_pid: Option<u32>,
    /// Binds that are made for it: image volumes.
    pub volumes: Vec<Value>,
    /// Whether the handler can mount recursively read-only.
    pub recursive_readonly: bool,
    /// Classes of block I/O, and of caches and memory bandwidth.
    pub classes: &'a Classes,
    /// What the spec starts from.
    pub base: Value,
}

impl Input<'_> {
    fn security(&self) -> LinuxContainerSecurityContext {
        self.config
            .linux
            .as_ref()
            .and_then(|l| l.security_context.clone())
            .unwrap_or_default()
    }

    fn pod_security(&self) -> LinuxSandboxSecurityContext {
        let linux = self.pod.linux.as_ref();
        linux
            .and_then(|l| l.security_context.clone())
            .unwrap_or_default()
    }

    /// What a container may only have when its pod has it.
    fn check(&self, security: &LinuxContainerSecurityContext) -> Result<()> {
        let pod = self.pod_security();
        if security.privileged && !pod.privileged {
            return Err(Error::unknown(
                "failed to generate spec opts: no privileged container allowed in sandbox",
            ));
        }
        let options = security.namespace_options.as_ref();
        userns::check(options)?;
        let (own, of_pod) = (
            userns::own(options),
            userns::own(pod.namespace_options.as_ref()),
        );
        if own != of_pod {
            return Err(Error::unknown(format!(
                "user namespace of container {:?} differs from its sandbox's: want {of_pod:?}, got \
                 {own:?}",
                self.id
            )));
        }
        Ok(())
    }

    fn args(&self) -> Result<Vec<String>> {
        let mut args = self.config.command.clone();
        let mut rest = self.config.args.clone();
        if args.is_empty() {
            args.clone_from(&self.image.entrypoint);
            if rest.is_empty() {
                rest.clone_from(&self.image.cmd);
            }
        }
        args.append(&mut rest);
        if args.is_empty() {
            Err(Error::unknown("no command specified"))
        } else {
            Ok(args)
        }
    }

    fn env(&self) -> Vec<String> {
        let mut env = vec![super::DEFAULT_PATH.to_owned()];
        if self.config.tty {
            set_env(&mut env, "TERM=xterm");
        }
        set_env(&mut env, &format!("HOSTNAME={}", self.hostname));
        for variable in &self.image.env {
            set_env(&mut env, variable);
        }
        for pair in &self.config.envs {
            let value = String::from_utf8_lossy(&pair.value);
            set_env(&mut env, &format!("{}={value}", pair.key));
        }
        env
    }

    fn cwd(&self) -> &str {
        [&self.config.working_dir, &self.image.working_dir]
            .into_iter()
            .find(|dir| !dir.is_empty())
            .map_or("/", String::as_str)
    }

    fn namespaces(&self, security: &LinuxContainerSecurityContext, privileged: bool) -> Vec<Value> {
        let joined = |kind: &str, file: &str, pid: u32| json!({ "type": kind, "path": format!("/proc/{pid}/ns/{file}") });
        let options = security.namespace_options.clone().unwrap_or_default();
        let mut list = vec![
            json!({ "type": "mount" }),
            joined("ipc", "ipc", self.pause_pid),
            joined("uts", "uts", self.pause_pid),
            joined("network", "net", self.pause_pid),
        ];
        list.push(match (options.pid(), self.target_pid) {
            (NamespaceMode::Container, _) => json!({ "type": "pid" }),
            (NamespaceMode::Target, Some(pid)) => joined("pid", "pid", pid),
            _ => joined("pid", "pid", self.pause_pid),
        });
        if userns::own(Some(&options)).is_some() {
            list.push(joined("user", "user", self.pause_pid));
        }
        let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        if unified && !privileged {
            list.push(json!({ "type": "cgroup" }));
        }
        list
    }

    fn annotations(&self) -> Value {
        let metadata = self.pod.metadata.clone().unwrap_or_default();
        let name = self
            .config
            .metadata
            .as_ref()
            .map(|m| m.name.clone())
            .unwrap_or_default();
        let mut annotations = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": self.pod_id,
            "io.kubernetes.cri.sandbox-name": metadata.name,
            "io.kubernetes.cri.sandbox-namespace": metadata.namespace,
            "io.kubernetes.cri.sandbox-uid": metadata.uid,
            "io.kubernetes.cri.container-name": name,
            "io.kubernetes.cri.image-name": self.image_name,
        });
        let passed = [
            (&self.pod.annotations, &self.handler.pod_annotations),
            (
                &self.config.annotations,
                &self.handler.container_annotations,
            ),
        ];
        for (values, globs) in passed {
            for (key, value) in values
                .iter()
                .filter(|(k, _)| globs.iter().any(|g| glob(g, k)))
            {
                annotations[key] = json!(value);
            }
        }
        annotations
    }

    fn mounts(
        &self,
        security: &LinuxContainerSecurityContext,
        privileged: bool,
    ) -> Result<(Vec<Value>, Option<&'static str>)> {
        let access = if security.readonly_rootfs { "ro" } else { "rw" };
        let mut asked = Vec::new();
        let mut root_propagation = None;
        for mount in self.config.mounts.iter().filter(|m| m.image.is_none()) {
            let requested = mounts::requested(mount, self.recursive_readonly)?;
            // Shared wins over slave: it includes it.
            if requested.root_propagation == Some("rshared") || root_propagation.is_none() {
                root_propagation = requested.root_propagation.or(root_propagation);
            }
            asked.push(requested.value);
        }
        let taken = |path: &str| asked.iter().any(|m| m["destination"] == path);
        let host_ipc = security
            .namespace_options
            .as_ref()
            .is_some_and(|options| options.ipc() == NamespaceMode::Node);
        let shm = if host_ipc {
            Path::new("/dev/shm")
        } else {
            self.files.shm.as_path()
        };
        let files = [
            (self.files.hostname.as_path(), "/etc/hostname", access),
            (self.files.hosts.as_path(), "/etc/hosts", access),
            (self.files.resolv_conf.as_path(), "/etc/resolv.conf", access),
            (shm, "/dev/shm", "rw"),
        ];
        let own_ids = userns::own(security.namespace_options.as_ref());
        let own: Vec<_> = files
            .into_iter()
            .filter(|(_, destination, _)| !taken(destination))
            .map(|(source, destination, access)| {
                let mut bind = mounts::bind(source, destination, access);
                // A tmpfs of the machine's own, such as a pod's, has the same owners for all.
                if let Some(own) = own_ids.filter(|_| destination != "/dev/shm") {
                    bind["uidMappings"] = userns::lines(&own.uids);
                    bind["gidMappings"] = userns::lines(&own.gids);
                }
                bind
            })
            .collect();
        asked.extend(own);
        asked.extend(self.volumes.iter().cloned());
        let writable = privileged || self.handler.cgroup_writable;
        let mut defaults = mounts::of_base(&self.base, privileged);
        let cgroup = defaults
            .iter_mut()
            .find(|mount| mount["destination"] == "/sys/fs/cgroup");
        if writable
            && !privileged
            && let Some(cgroup) = cgroup
        {
            cgroup["options"] = json!(["nosuid", "noexec", "nodev", "relatime", "rw"]);
        }
        let of_pod = self.pod_security();
        let pod_options = of_pod.namespace_options.as_ref();
        if own_ids.is_some()
            && pod_options.is_some_and(|o| o.network() == NamespaceMode::Node)
            && let Some(sysfs) = defaults.iter_mut().find(|m| m["destination"] == "/sys")
        {
            *sysfs = mounts::host_sys();
        }
        Ok((mounts::assemble(defaults, asked), root_propagation))
    }

    fn devices(&self, spec: &mut Value, privileged: bool) -> Result<()> {
        let mut devices = Devices::default();
        let configured = &self.base["linux"]["resources"]["devices"];
        let configured = configured.as_array().filter(|rules| !rules.is_empty());
        let mut rules = match configured {
            Some(rules) => rules.clone(),
            None => vec![json!({ "allow": false, "access": "rwm" })],
        };
        let base = self.base["linux"]["devices"].as_array();
        devices.nodes = base.cloned().unwrap_or_default();
        let all = privileged
            && (!self.handler.privileged_without_host_devices
                || self
                    .handler
                    .privileged_without_host_devices_all_devices_allowed);
        if privileged && !self.handler.privileged_without_host_devices {
            devices.add_host()?;
        }
        let mut owner = Owner::default();
        if self.runtime.device_ownership_from_security_context {
            // As the request has them: what the image says makes no device anybody's.
            let security = self.security();
            let named = |id: Option<Int64Value>| {
                let id = id.and_then(|id| u32::try_from(id.value).ok());
                id.filter(|id| *id != 0)
            };
            owner.uid = named(security.run_as_user);
            owner.gid = named(security.run_as_group);
        }
        for device in &self.config.devices {
            devices.add(device, owner)?;
        }
        if all {
            rules = vec![json!({ "allow": true, "access": "rwm" })];
        } else {
            rules.append(&mut devices.rules);
        }
        spec["linux"]["devices"] = json!(devices.nodes);
        spec["linux"]["resources"]["devices"] = json!(rules);
        Ok(())
    }
}

/// The spec.
///
/// # Errors
/// For anything the request asks that cannot be had; the message says which.
pub fn spec(input: &Input<'_>) -> Result<Value> {
    let security = input.security();
    let privileged = security.privileged;
    input.check(&security)?;
    let mut spec = input.base.clone();
    let set = if privileged {
        capabilities::own()
    } else {
        let asked = security.capabilities.clone().unwrap_or_default();
        let base = capabilities::of_base(&input.base);
        capabilities::adjusted(base, &asked.add_capabilities, &asked.drop_capabilities)
    };
    spec["process"]["terminal"] = json!(input.config.tty);
    spec["process"]["args"] = json!(input.args()?);
    spec["process"]["env"] = json!(input.env());
    spec["process"]["cwd"] = json!(input.cwd());
    spec["process"]["user"] = json!({
        "uid": input.user.uid, "gid": input.user.gid, "additionalGids": input.user.additional_gids,
    });
    spec["process"]["capabilities"] = capabilities::object(&set);
    spec["process"]["noNewPrivileges"] = json!(security.no_new_privs);
    spec["root"] = json!({ "path": "rootfs", "readonly": security.readonly_rootfs });
    let (mounts, propagation) = input.mounts(&security, privileged)?;
    spec["mounts"] = json!(mounts);
    if let Some(word) = propagation {
        spec["linux"]["rootfsPropagation"] = json!(word);
    }
    super::overlay(&mut spec["annotations"], input.annotations());
    spec["linux"]["namespaces"] = json!(input.namespaces(&security, privileged));
    super::sandbox::user_mappings(&mut spec, security.namespace_options.as_ref())?;
    let parent = input
        .pod
        .linux
        .as_ref()
        .map_or("", |l| l.cgroup_parent.as_str());
    spec["linux"]["cgroupsPath"] = json!(cgroup_path(parent, input.id));
    if let Some(asked) = input
        .config
        .linux
        .as_ref()
        .and_then(|l| l.resources.as_ref())
    {
        resources::check(asked, input.machine, input.runtime)?;
        resources::merge(&mut spec["linux"]["resources"], asked, input.machine);
        let restrict = input.runtime.restrict_oom_score_adj;
        spec["process"]["oomScoreAdj"] =
            json!(resources::oom_score_adj(asked.oom_score_adj, restrict));
    }
    input.devices(&mut spec, privileged)?;
    classes::apply(input, &mut spec)?;
    confine(input, &security, &set, &mut spec)?;
    Ok(spec)
}

/// Masked paths, seccomp, AppArmor. Labels are put in by whoever holds them.
#[allow(deprecated, reason = "older kubelets still send the paths")]
fn confine(
    input: &Input<'_>,
    security: &LinuxContainerSecurityContext,
    capabilities: &[String],
    spec: &mut Value,
) -> Result<()> {
    let linux = &mut spec["linux"];
    if security.privileged {
        linux["maskedPaths"] = json!([]);
        linux["readonlyPaths"] = json!([]);
    } else if input.runtime.disable_proc_mount {
        linux["maskedPaths"] = json!(security::MASKED);
        linux["readonlyPaths"] = json!(security::READONLY);
    } else {
        linux["maskedPaths"] = json!(security.masked_paths);
        linux["readonlyPaths"] = json!(security.readonly_paths);
    }
    if !security.privileged {
        let profile = security::seccomp(
            security.seccomp.as_ref(),
            &security.seccomp_profile_path,
            &input.runtime.unset_seccomp_profile,
            capabilities,
        )?;
        if let Some(profile) = profile {
            linux["seccomp"] = profile;
        }
    }
    let disabled = input.runtime.disable_apparmor;
    if let Some(profile) = apparmor(security.apparmor.as_ref(), security.privileged, disabled)? {
        spec["process"]["apparmorProfile"] = json!(profile);
    }
    Ok(())
}

/// Whether `text` matches a pattern of literals, `*` and `?`.
#[must_use]
pub fn glob(pattern: &str, text: &str) -> bool {
    fn matches(pattern: &[u8], text: &[u8]) -> bool {
        match (pattern.first(), text.first()) {
            (None, None) => true,
            (Some(b'*'), _) => {
                matches(&pattern[1..], text) || !text.is_empty() && matches(pattern, &text[1..])
            }
            (Some(b'?'), Some(_)) => matches(&pattern[1..], &text[1..]),
            (Some(p), Some(t)) if p == t => matches(&pattern[1..], &text[1..]),
            _ => false,
        }
    }
    matches(pattern.as_bytes(), text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_whole_keys() {
        assert!(glob("a.*", "a.b/c"));
        assert!(glob("?b*", "ab"));
        assert!(!glob("a", "ab"));
    }
}
