//! Making a joined adjustment in an OCI spec.

use lighter_proto::nri::pkg::api::v1alpha1::{
    ContainerAdjustment, Hook, IoPrioClass, LinuxContainerAdjustment, LinuxDevice,
    LinuxMemoryPolicy, LinuxResources, LinuxScheduler, LinuxSchedulerFlag, LinuxSchedulerPolicy,
    LinuxSeccomp, Mount, MpolFlag, MpolMode,
};
use serde_json::{Map, Value, json};

use super::merge::removed;
use crate::oci::{array, object, set_env};

/// Makes an adjustment in an OCI spec. The CDI devices in it are for the caller to inject, with
/// [`cdi::Registry::inject`](crate::cdi::Registry::inject), and so is its class of block I/O, which takes
/// the operator's [`Classes`](crate::spec::classes::Classes).
pub fn apply_adjustment(spec: &mut Value, adjust: &ContainerAdjustment) {
    for (key, value) in &adjust.annotations {
        let annotations = object(spec, &["annotations"]);
        match removed(key) {
            Some(key) if !adjust.annotations.contains_key(key) => {
                annotations.remove(key);
            }
            Some(_) => {}
            None => {
                annotations.insert(key.clone(), value.clone().into());
            }
        }
    }
    apply_mounts(spec, &adjust.mounts);
    for pair in &adjust.env {
        match removed(&pair.key) {
            Some(key) => set_env(spec, key, None),
            None => set_env(spec, &pair.key, Some(&pair.value)),
        }
    }
    if !adjust.args.is_empty() {
        object(spec, &["process"]).insert("args".to_owned(), adjust.args.clone().into());
    }
    if let Some(hooks) = &adjust.hooks {
        for (name, list) in [
            ("prestart", &hooks.prestart),
            ("createRuntime", &hooks.create_runtime),
            ("createContainer", &hooks.create_container),
            ("startContainer", &hooks.start_container),
            ("poststart", &hooks.poststart),
            ("poststop", &hooks.poststop),
        ] {
            if !list.is_empty() {
                array(spec, &["hooks", name]).extend(list.iter().map(hook));
            }
        }
    }
    for limit in &adjust.rlimits {
        let kind = if limit.r#type.starts_with("RLIMIT_") {
            limit.r#type.clone()
        } else {
            format!("RLIMIT_{}", limit.r#type.to_ascii_uppercase())
        };
        let limits = array(spec, &["process", "rlimits"]);
        limits.retain(|other| other["type"] != kind.as_str());
        limits.push(json!({"type": kind, "hard": limit.hard, "soft": limit.soft}));
    }
    if let Some(linux) = &adjust.linux {
        apply_linux(spec, linux);
    }
}

fn apply_mounts(spec: &mut Value, mounts: &[Mount]) {
    if mounts.is_empty() {
        return;
    }
    let list = array(spec, &["mounts"]);
    for mount in mounts {
        let path = removed(&mount.destination).unwrap_or(&mount.destination);
        list.retain(|other| other["destination"] != path);
        if removed(&mount.destination).is_none() {
            let mut entry = Map::new();
            entry.insert("destination".to_owned(), mount.destination.clone().into());
            for (key, text) in [("type", &mount.r#type), ("source", &mount.source)] {
                if !text.is_empty() {
                    entry.insert(key.to_owned(), text.clone().into());
                }
            }
            if !mount.options.is_empty() {
                entry.insert("options".to_owned(), mount.options.clone().into());
            }
            list.push(entry.into());
        }
    }
    // A mount below another one must come after it.
    list.sort_by_key(|mount| {
        let destination = mount["destination"].as_str().unwrap_or_default();
        destination
            .split('/')
            .filter(|part| !part.is_empty())
            .count()
    });
}

fn hook(hook: &Hook) -> Value {
    let mut entry = Map::new();
    entry.insert("path".to_owned(), hook.path.clone().into());
    for (key, list) in [("args", &hook.args), ("env", &hook.env)] {
        if !list.is_empty() {
            entry.insert(key.to_owned(), list.clone().into());
        }
    }
    if let Some(timeout) = &hook.timeout {
        entry.insert("timeout".to_owned(), timeout.value.into());
    }
    entry.into()
}

fn apply_linux(spec: &mut Value, linux: &LinuxContainerAdjustment) {
    for device in &linux.devices {
        apply_device(spec, device);
    }
    if let Some(resources) = &linux.resources {
        apply_resources(spec, resources);
    }
    let part = object(spec, &["linux"]);
    if !linux.cgroups_path.is_empty() {
        part.insert("cgroupsPath".to_owned(), linux.cgroups_path.clone().into());
    }
    if let Some(policy) = &linux.seccomp_policy {
        part.insert("seccomp".to_owned(), seccomp(policy));
    }
    if let Some(policy) = &linux.memory_policy {
        part.insert("memoryPolicy".to_owned(), memory_policy(policy));
    }
    if let Some(rdt) = &linux.rdt {
        if rdt.remove {
            part.remove("intelRdt");
        }
        let rdt_object = |key: &str, value: Value, spec: &mut Value| {
            object(spec, &["linux", "intelRdt"]).insert(key.to_owned(), value);
        };
        if let Some(id) = &rdt.clos_id {
            rdt_object("closID", id.value.clone().into(), spec);
        }
        if let Some(schemata) = &rdt.schemata {
            rdt_object("schemata", schemata.value.clone().into(), spec);
        }
        if let Some(on) = &rdt.enable_monitoring {
            rdt_object("enableMonitoring", on.value.into(), spec);
        }
    }
    for namespace in &linux.namespaces {
        let kind = removed(&namespace.r#type).unwrap_or(&namespace.r#type);
        let list = array(spec, &["linux", "namespaces"]);
        list.retain(|other| other["type"] != kind);
        if removed(&namespace.r#type).is_none() {
            let mut entry = json!({"type": kind});
            if !namespace.path.is_empty() {
                entry["path"] = namespace.path.clone().into();
            }
            list.push(entry);
        }
    }
    for (key, value) in &linux.sysctl {
        let sysctl = object(spec, &["linux", "sysctl"]);
        match removed(key) {
            Some(key) if !linux.sysctl.contains_key(key) => {
                sysctl.remove(key);
            }
            Some(_) => {}
            None => {
                sysctl.insert(key.clone(), value.clone().into());
            }
        }
    }
    for (key, device) in &linux.net_devices {
        let devices = object(spec, &["linux", "netDevices"]);
        match removed(key) {
            Some(key) if !linux.net_devices.contains_key(key) => {
                devices.remove(key);
            }
            Some(_) => {}
            None => {
                devices.insert(key.clone(), json!({"name": device.name}));
            }
        }
    }
    apply_process(spec, linux);
}

/// The parts of a Linux adjustment that the spec keeps with the process.
fn apply_process(spec: &mut Value, linux: &LinuxContainerAdjustment) {
    let process = object(spec, &["process"]);
    if let Some(score) = &linux.oom_score_adj {
        process.insert("oomScoreAdj".to_owned(), score.value.into());
    }
    if let Some(priority) = &linux.io_priority {
        let class = priority.class();
        if class == IoPrioClass::IoprioClassNone {
            process.remove("ioPriority");
        } else {
            let value = json!({"class": class.as_str_name(), "priority": priority.priority});
            process.insert("ioPriority".to_owned(), value);
        }
    }
    if let Some(scheduler) = &linux.scheduler {
        if scheduler.policy() == LinuxSchedulerPolicy::SchedNone {
            process.remove("scheduler");
        } else {
            process.insert("scheduler".to_owned(), scheduler_value(scheduler));
        }
    }
}

fn scheduler_value(scheduler: &LinuxScheduler) -> Value {
    let mut value = Map::new();
    value.insert("policy".to_owned(), scheduler.policy().as_str_name().into());
    for (key, number) in [("nice", scheduler.nice), ("priority", scheduler.priority)] {
        if number != 0 {
            value.insert(key.to_owned(), number.into());
        }
    }
    let flags: Vec<Value> = scheduler
        .flags()
        .map(|flag: LinuxSchedulerFlag| flag.as_str_name().into())
        .collect();
    if !flags.is_empty() {
        value.insert("flags".to_owned(), flags.into());
    }
    for (key, number) in [
        ("runtime", scheduler.runtime),
        ("deadline", scheduler.deadline),
        ("period", scheduler.period),
    ] {
        if number != 0 {
            value.insert(key.to_owned(), number.into());
        }
    }
    value.into()
}

fn memory_policy(policy: &LinuxMemoryPolicy) -> Value {
    let mode: MpolMode = policy.mode();
    let flags: Vec<&str> = policy
        .flags()
        .map(|flag: MpolFlag| flag.as_str_name())
        .collect();
    json!({"mode": mode.as_str_name(), "nodes": policy.nodes, "flags": flags})
}

fn apply_device(spec: &mut Value, device: &LinuxDevice) {
    let path = removed(&device.path).unwrap_or(&device.path);
    let list = array(spec, &["linux", "devices"]);
    list.retain(|other| other["path"] != path);
    if removed(&device.path).is_some() {
        return;
    }
    let mut entry = Map::new();
    entry.insert("path".to_owned(), device.path.clone().into());
    entry.insert("type".to_owned(), device.r#type.clone().into());
    entry.insert("major".to_owned(), device.major.into());
    entry.insert("minor".to_owned(), device.minor.into());
    if let Some(mode) = &device.file_mode {
        entry.insert("fileMode".to_owned(), mode.value.into());
    }
    for (key, id) in [("uid", &device.uid), ("gid", &device.gid)] {
        if let Some(id) = id {
            entry.insert(key.to_owned(), id.value.into());
        }
    }
    list.push(entry.into());
    let access = json!({
        "allow": true, "type": device.r#type, "major": device.major, "minor": device.minor,
        "access": "rwm",
    });
    array(spec, &["linux", "resources", "devices"]).push(access);
}

/// Sets resources in an OCI spec; those that are not given stay, and so does a class of block I/O.
pub fn apply_resources(spec: &mut Value, resources: &LinuxResources) {
    let mut put = |group: &str, key: &str, value: Option<Value>| {
        if let Some(value) = value {
            object(spec, &["linux", "resources", group]).insert(key.to_owned(), value);
        }
    };
    macro_rules! values {
        ($group:literal, $from:expr, $($field:ident => $key:literal),+ $(,)?) => {
            $(put($group, $key, $from.$field.as_ref().map(|v| v.value.into()));)+
        };
    }
    if let Some(memory) = &resources.memory {
        values!("memory", memory,
            limit => "limit", reservation => "reservation", swap => "swap", kernel => "kernel",
            kernel_tcp => "kernelTCP", swappiness => "swappiness",
            disable_oom_killer => "disableOOMKiller", use_hierarchy => "useHierarchy",
        );
    }
    if let Some(cpu) = &resources.cpu {
        values!("cpu", cpu,
            shares => "shares", quota => "quota", period => "period",
            realtime_runtime => "realtimeRuntime", realtime_period => "realtimePeriod",
        );
        let text = |text: &String| (!text.is_empty()).then(|| text.clone().into());
        put("cpu", "cpus", text(&cpu.cpus));
        put("cpu", "mems", text(&cpu.mems));
    }
    if let Some(pids) = &resources.pids {
        put("pids", "limit", Some(pids.limit.into()));
    }
    for limit in &resources.hugepage_limits {
        let list = array(spec, &["linux", "resources", "hugepageLimits"]);
        list.retain(|other| other["pageSize"] != limit.page_size.as_str());
        list.push(json!({"pageSize": limit.page_size, "limit": limit.limit}));
    }
    for (key, value) in &resources.unified {
        object(spec, &["linux", "resources", "unified"]).insert(key.clone(), value.clone().into());
    }
    if let Some(class) = resources
        .rdt_class
        .as_ref()
        .filter(|class| !class.value.is_empty())
    {
        object(spec, &["linux", "intelRdt"])
            .insert("closID".to_owned(), class.value.clone().into());
    }
}

fn seccomp(policy: &LinuxSeccomp) -> Value {
    let mut value = Map::new();
    value.insert(
        "defaultAction".to_owned(),
        policy.default_action.clone().into(),
    );
    if let Some(errno) = &policy.default_errno {
        value.insert("defaultErrnoRet".to_owned(), errno.value.into());
    }
    for (key, list) in [
        ("architectures", &policy.architectures),
        ("flags", &policy.flags),
    ] {
        if !list.is_empty() {
            value.insert(key.to_owned(), list.clone().into());
        }
    }
    for (key, text) in [
        ("listenerPath", &policy.listener_path),
        ("listenerMetadata", &policy.listener_metadata),
    ] {
        if !text.is_empty() {
            value.insert(key.to_owned(), text.clone().into());
        }
    }
    let rules = policy.syscalls.iter().map(|rule| {
        let mut entry = json!({"names": rule.names, "action": rule.action});
        if let Some(errno) = &rule.errno_ret {
            entry["errnoRet"] = errno.value.into();
        }
        if !rule.args.is_empty() {
            let args = rule.args.iter().map(|arg| {
                json!({
                    "index": arg.index, "value": arg.value, "valueTwo": arg.value_two, "op": arg.op,
                })
            });
            entry["args"] = args.collect();
        }
        entry
    });
    value.insert("syscalls".to_owned(), rules.collect());
    value.into()
}
