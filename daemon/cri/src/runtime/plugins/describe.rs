//! Pods, containers and resources as NRI plugins read them: from their specs, which hold what was
//! really asked of the runtime.

use std::collections::HashMap;

use lighter_proto::nri::pkg::api::v1alpha1 as nri;
use lighter_proto::runtime::v1 as api;
use lighter_proto::time;
use serde_json::Value;

use crate::store::{Container, ContainerStatus, Pod};

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn texts(value: &Value) -> Vec<String> {
    items(value).iter().map(text).collect()
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn small(value: &Value) -> u32 {
    let number = value.as_u64().and_then(|n| u32::try_from(n).ok());
    number.unwrap_or_default()
}

fn pairs(value: &Value) -> HashMap<String, String> {
    let object = value.as_object().into_iter().flatten();
    object
        .map(|(key, value)| (key.clone(), text(value)))
        .collect()
}

/// `base` with `more` over it.
fn joined(
    mut base: HashMap<String, String>,
    more: &HashMap<String, String>,
) -> HashMap<String, String> {
    base.extend(more.iter().map(|(k, v)| (k.clone(), v.clone())));
    base
}

fn namespaces(spec: &Value) -> Vec<nri::LinuxNamespace> {
    let list = items(&spec["linux"]["namespaces"]).iter();
    list.map(|namespace| nri::LinuxNamespace {
        r#type: text(&namespace["type"]),
        path: text(&namespace["path"]),
    })
    .collect()
}

fn int64(value: &Value) -> Option<nri::OptionalInt64> {
    Some(nri::OptionalInt64 {
        value: value.as_i64()?,
    })
}

fn uint64(value: &Value) -> Option<nri::OptionalUInt64> {
    Some(nri::OptionalUInt64 {
        value: value.as_u64()?,
    })
}

fn flag(value: &Value) -> Option<nri::OptionalBool> {
    Some(nri::OptionalBool {
        value: value.as_bool()?,
    })
}

/// Resources of a spec.
fn spec_resources(resources: &Value) -> Option<nri::LinuxResources> {
    if !resources.is_object() {
        return None;
    }
    let (memory, cpu) = (&resources["memory"], &resources["cpu"]);
    let devices = items(&resources["devices"]).iter();
    let pages = items(&resources["hugepageLimits"]).iter();
    Some(nri::LinuxResources {
        memory: memory.is_object().then(|| nri::LinuxMemory {
            limit: int64(&memory["limit"]),
            reservation: int64(&memory["reservation"]),
            swap: int64(&memory["swap"]),
            kernel: int64(&memory["kernel"]),
            kernel_tcp: int64(&memory["kernelTCP"]),
            swappiness: uint64(&memory["swappiness"]),
            disable_oom_killer: flag(&memory["disableOOMKiller"]),
            use_hierarchy: flag(&memory["useHierarchy"]),
        }),
        cpu: cpu.is_object().then(|| nri::LinuxCpu {
            shares: uint64(&cpu["shares"]),
            quota: int64(&cpu["quota"]),
            period: uint64(&cpu["period"]),
            realtime_runtime: int64(&cpu["realtimeRuntime"]),
            realtime_period: uint64(&cpu["realtimePeriod"]),
            cpus: text(&cpu["cpus"]),
            mems: text(&cpu["mems"]),
        }),
        hugepage_limits: pages
            .map(|limit| nri::HugepageLimit {
                page_size: text(&limit["pageSize"]),
                limit: limit["limit"].as_u64().unwrap_or_default(),
            })
            .collect(),
        unified: pairs(&resources["unified"]),
        devices: devices
            .map(|rule| nri::LinuxDeviceCgroup {
                allow: rule["allow"].as_bool().unwrap_or_default(),
                r#type: text(&rule["type"]),
                major: int64(&rule["major"]),
                minor: int64(&rule["minor"]),
                access: text(&rule["access"]),
            })
            .collect(),
        pids: resources["pids"]["limit"]
            .as_i64()
            .map(|limit| nri::LinuxPids { limit }),
        ..nri::LinuxResources::default()
    })
}

/// What the kubelet asks, for plugins.
pub(super) fn resources(asked: &api::LinuxContainerResources) -> nri::LinuxResources {
    let unsigned = |number: i64| {
        Some(nri::OptionalUInt64 {
            value: u64::try_from(number).unwrap_or_default(),
        })
    };
    let signed = |value: i64| Some(nri::OptionalInt64 { value });
    let pages = asked.hugepage_limits.iter();
    nri::LinuxResources {
        cpu: Some(nri::LinuxCpu {
            shares: unsigned(asked.cpu_shares),
            quota: signed(asked.cpu_quota),
            period: unsigned(asked.cpu_period),
            cpus: asked.cpuset_cpus.clone(),
            mems: asked.cpuset_mems.clone(),
            ..nri::LinuxCpu::default()
        }),
        memory: Some(nri::LinuxMemory {
            limit: signed(asked.memory_limit_in_bytes),
            ..nri::LinuxMemory::default()
        }),
        hugepage_limits: pages
            .map(|limit| nri::HugepageLimit {
                page_size: limit.page_size.clone(),
                limit: limit.limit,
            })
            .collect(),
        unified: asked.unified.clone(),
        ..nri::LinuxResources::default()
    }
}

/// What a plugin wants, as the kubelet would ask it.
pub(super) fn asked(wanted: &nri::LinuxResources) -> api::LinuxContainerResources {
    let unsigned = |value: &Option<nri::OptionalUInt64>| {
        let number = value.as_ref().and_then(|v| i64::try_from(v.value).ok());
        number.unwrap_or_default()
    };
    let signed = |value: &Option<nri::OptionalInt64>| value.as_ref().map_or(0, |v| v.value);
    let mut asked = api::LinuxContainerResources {
        unified: wanted.unified.clone(),
        hugepage_limits: wanted
            .hugepage_limits
            .iter()
            .map(|limit| api::HugepageLimit {
                page_size: limit.page_size.clone(),
                limit: limit.limit,
            })
            .collect(),
        ..Default::default()
    };
    if let Some(memory) = &wanted.memory {
        asked.memory_limit_in_bytes = signed(&memory.limit);
        asked.memory_swap_limit_in_bytes = signed(&memory.swap);
    }
    if let Some(cpu) = &wanted.cpu {
        asked.cpu_shares = unsigned(&cpu.shares);
        asked.cpu_period = unsigned(&cpu.period);
        asked.cpu_quota = signed(&cpu.quota);
        asked.cpuset_cpus.clone_from(&cpu.cpus);
        asked.cpuset_mems.clone_from(&cpu.mems);
    }
    asked
}

/// A pod; `spec` is its pause container's.
pub(super) fn pod(pod: &Pod, spec: &Value) -> nri::PodSandbox {
    let metadata = pod.config.metadata.clone().unwrap_or_default();
    let linux = pod.config.linux.clone().unwrap_or_default();
    let state = pod.state();
    let mut namespaces = namespaces(spec);
    // The network's goes before the pod does.
    namespaces.retain(|n| n.r#type != "network" || std::path::Path::new(&n.path).exists());
    let ips = Some(state.ip).filter(|ip| !ip.is_empty());
    let ips = ips.into_iter().chain(state.additional_ips);
    nri::PodSandbox {
        id: pod.id.clone(),
        name: metadata.name,
        uid: metadata.uid,
        namespace: metadata.namespace,
        labels: pod.config.labels.clone(),
        annotations: joined(pod.config.annotations.clone(), &pairs(&spec["annotations"])),
        runtime_handler: pod.handler.clone(),
        linux: Some(nri::LinuxPodSandbox {
            pod_overhead: linux.overhead.as_ref().map(resources),
            pod_resources: linux.resources.as_ref().map(resources),
            cgroup_parent: linux.cgroup_parent,
            cgroups_path: text(&spec["linux"]["cgroupsPath"]),
            namespaces,
            resources: spec_resources(&spec["linux"]["resources"]),
        }),
        pid: state.pid,
        ips: ips.collect(),
    }
}

fn mounts(spec: &Value) -> Vec<nri::Mount> {
    let list = items(&spec["mounts"]).iter();
    list.map(|mount| nri::Mount {
        destination: text(&mount["destination"]),
        r#type: text(&mount["type"]),
        source: text(&mount["source"]),
        options: texts(&mount["options"]),
    })
    .collect()
}

fn hooks(spec: &Value) -> Option<nri::Hooks> {
    let stage = |name: &str| {
        let list = items(&spec["hooks"][name]).iter();
        list.map(|hook| nri::Hook {
            path: text(&hook["path"]),
            args: texts(&hook["args"]),
            env: texts(&hook["env"]),
            timeout: hook["timeout"]
                .as_i64()
                .map(|value| nri::OptionalInt { value }),
        })
        .collect()
    };
    spec["hooks"].is_object().then(|| nri::Hooks {
        prestart: stage("prestart"),
        create_runtime: stage("createRuntime"),
        create_container: stage("createContainer"),
        start_container: stage("startContainer"),
        poststart: stage("poststart"),
        poststop: stage("poststop"),
    })
}

fn devices(spec: &Value) -> Vec<nri::LinuxDevice> {
    let id = |value: &Value| {
        value.as_u64().map(|_| nri::OptionalUInt32 {
            value: small(value),
        })
    };
    let list = items(&spec["linux"]["devices"]).iter();
    list.map(|device| nri::LinuxDevice {
        path: text(&device["path"]),
        r#type: text(&device["type"]),
        major: device["major"].as_i64().unwrap_or_default(),
        minor: device["minor"].as_i64().unwrap_or_default(),
        file_mode: device["fileMode"].as_u64().map(|_| nri::OptionalFileMode {
            value: small(&device["fileMode"]),
        }),
        uid: id(&device["uid"]),
        gid: id(&device["gid"]),
    })
    .collect()
}

fn seccomp(spec: &Value) -> Option<nri::LinuxSeccomp> {
    let policy = &spec["linux"]["seccomp"];
    let errno = |value: &Value| {
        value.as_u64().map(|_| nri::OptionalUInt32 {
            value: small(value),
        })
    };
    let arg = |arg: &Value| nri::LinuxSeccompArg {
        index: small(&arg["index"]),
        value: arg["value"].as_u64().unwrap_or_default(),
        value_two: arg["valueTwo"].as_u64().unwrap_or_default(),
        op: text(&arg["op"]),
    };
    policy.is_object().then(|| nri::LinuxSeccomp {
        default_action: text(&policy["defaultAction"]),
        default_errno: errno(&policy["defaultErrnoRet"]),
        architectures: texts(&policy["architectures"]),
        flags: texts(&policy["flags"]),
        listener_path: text(&policy["listenerPath"]),
        listener_metadata: text(&policy["listenerMetadata"]),
        syscalls: items(&policy["syscalls"])
            .iter()
            .map(|rule| nri::LinuxSyscall {
                names: texts(&rule["names"]),
                action: text(&rule["action"]),
                errno_ret: errno(&rule["errnoRet"]),
                args: items(&rule["args"]).iter().map(arg).collect(),
            })
            .collect(),
    })
}

fn rdt(spec: &Value) -> Option<nri::LinuxRdt> {
    let rdt = &spec["linux"]["intelRdt"];
    rdt.is_object().then(|| nri::LinuxRdt {
        clos_id: Some(nri::OptionalString {
            value: text(&rdt["closID"]),
        }),
        schemata: Some(nri::OptionalRepeatedString {
            value: texts(&rdt["schemata"]),
        }),
        enable_monitoring: flag(&rdt["enableMonitoring"]),
        remove: false,
    })
}

fn linux(config: &api::ContainerConfig, spec: &Value) -> nri::LinuxContainer {
    let security = config
        .linux
        .as_ref()
        .and_then(|l| l.security_context.as_ref());
    let profile = security.and_then(|s| s.seccomp.as_ref());
    nri::LinuxContainer {
        namespaces: namespaces(spec),
        devices: devices(spec),
        resources: spec_resources(&spec["linux"]["resources"]),
        oom_score_adj: spec["process"]["oomScoreAdj"]
            .as_i64()
            .map(|value| nri::OptionalInt { value }),
        cgroups_path: text(&spec["linux"]["cgroupsPath"]),
        seccomp_profile: profile.map(|profile| nri::SecurityProfile {
            profile_type: profile.profile_type,
            localhost_ref: profile.localhost_ref.clone(),
        }),
        seccomp_policy: seccomp(spec),
        sysctl: pairs(&spec["linux"]["sysctl"]),
        rdt: rdt(spec),
        ..nri::LinuxContainer::default()
    }
}

/// What is told of a container, made or about to be.
#[derive(Debug)]
pub(super) struct Described<'a> {
    pub(super) id: &'a str,
    pub(super) pod_id: &'a str,
    pub(super) config: &'a api::ContainerConfig,
    pub(super) image_id: &'a str,
    pub(super) image_name: &'a str,
    pub(super) image_digest: &'a str,
    /// `None` before it is made.
    pub(super) status: Option<ContainerStatus>,
}

impl<'a> Described<'a> {
    /// One that was made.
    pub(super) fn made(container: &'a Container) -> Self {
        let image = container.config.image.as_ref();
        Self {
            id: &container.id,
            pod_id: &container.pod_id,
            config: &container.config,
            image_id: &container.image_id,
            image_name: image.map_or("", |i| &i.image),
            image_digest: "",
            status: Some(container.status()),
        }
    }

    /// As plugins read it.
    pub(super) fn message(&self, spec: &Value) -> nri::Container {
        let config = self.config;
        let annotations = joined(pairs(&spec["annotations"]), &config.annotations);
        let limits = items(&spec["process"]["rlimits"]).iter();
        let user = &spec["process"]["user"];
        let mut message = nri::Container {
            id: self.id.to_owned(),
            pod_sandbox_id: self.pod_id.to_owned(),
            name: config
                .metadata
                .as_ref()
                .map_or_else(String::new, |m| m.name.clone()),
            labels: config.labels.clone(),
            annotations,
            args: texts(&spec["process"]["args"]),
            env: texts(&spec["process"]["env"]),
            mounts: mounts(spec),
            hooks: hooks(spec),
            linux: Some(linux(config, spec)),
            rlimits: limits
                .map(|limit| nri::PosixRlimit {
                    r#type: text(&limit["type"]),
                    hard: limit["hard"].as_u64().unwrap_or_default(),
                    soft: limit["soft"].as_u64().unwrap_or_default(),
                })
                .collect(),
            cdi_devices: config
                .cdi_devices
                .iter()
                .map(|device| nri::CdiDevice {
                    name: device.name.clone(),
                })
                .collect(),
            user: Some(nri::User {
                uid: small(&user["uid"]),
                gid: small(&user["gid"]),
                additional_gids: items(&user["additionalGids"]).iter().map(small).collect(),
            }),
            image: Some(nri::Image {
                name: self.image_name.to_owned(),
                digest: self.image_digest.to_owned(),
                config_digest: self.image_id.to_owned(),
            }),
            ..nri::Container::default()
        };
        if let Some(status) = &self.status {
            fill(&mut message, status);
        }
        message
    }
}

fn fill(message: &mut nri::Container, status: &ContainerStatus) {
    let nanos = |at: Option<std::time::SystemTime>| at.map_or(0, time::to_nanos);
    let state = match status.state {
        api::ContainerState::ContainerCreated => nri::ContainerState::ContainerCreated,
        api::ContainerState::ContainerRunning => nri::ContainerState::ContainerRunning,
        api::ContainerState::ContainerExited => nri::ContainerState::ContainerStopped,
        api::ContainerState::ContainerUnknown => nri::ContainerState::ContainerUnknown,
    };
    message.set_state(state);
    message.pid = status.pid;
    message.created_at = time::to_nanos(status.created_at);
    message.started_at = nanos(status.started_at);
    message.finished_at = nanos(status.finished_at);
    message.exit_code = status.exit_code;
    message.status_reason.clone_from(&status.reason);
    message.status_message.clone_from(&status.message);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_container_is_told_by_its_spec() {
        let spec = json!({
            "annotations": { "a": "spec", "b": "spec" },
            "process": { "args": ["sh"], "user": { "uid": 7, "gid": 8, "additionalGids": [9] },
                         "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 2, "soft": 1 }] },
            "mounts": [{ "destination": "/x", "type": "bind", "source": "/y", "options": ["ro"] }],
            "linux": {
                "resources": { "memory": { "limit": 5 }, "cpu": { "shares": 3, "cpus": "0" },
                               "devices": [{ "allow": false, "access": "rwm" }] },
                "namespaces": [{ "type": "network", "path": "/run/n" }],
                "seccomp": { "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
                             "syscalls": [{ "names": ["read"], "action": "SCMP_ACT_ALLOW" }] },
            },
        });
        let config = api::ContainerConfig {
            annotations: HashMap::from([("a".into(), "config".into())]),
            ..Default::default()
        };
        let described = Described {
            id: "c",
            pod_id: "p",
            config: &config,
            image_id: "sha256:1",
            image_name: "busybox",
            image_digest: "",
            status: None,
        };
        let message = described.message(&spec);
        assert_eq!(message.annotations["a"], "config");
        assert_eq!(message.annotations["b"], "spec");
        assert_eq!(message.mounts[0].options, ["ro"]);
        assert_eq!(message.rlimits[0].hard, 2);
        let linux = message.linux.unwrap();
        let resources = linux.resources.unwrap();
        assert_eq!(resources.memory.unwrap().limit.unwrap().value, 5);
        assert!(!resources.devices[0].allow && resources.devices[0].major.is_none());
        assert_eq!(linux.seccomp_policy.unwrap().syscalls[0].names, ["read"]);
        assert_eq!(message.user.unwrap().additional_gids, [9]);
    }

    #[test]
    fn resources_go_to_plugins_and_back() {
        let kubelet = api::LinuxContainerResources {
            cpu_period: 1,
            cpu_quota: -1,
            cpu_shares: 2,
            memory_limit_in_bytes: 3,
            cpuset_cpus: "0-1".into(),
            unified: HashMap::from([("memory.high".into(), "4".into())]),
            ..Default::default()
        };
        assert_eq!(asked(&resources(&kubelet)), kubelet);
    }
}
