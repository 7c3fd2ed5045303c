//! Making a device's edits in an OCI spec.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use serde_json::{Map, Value, json};

use super::spec::{DeviceNode, Edits};
use crate::oci::{array, object, set_env};

/// Hooks by the names of CDI and of the OCI spec.
pub(super) const HOOKS: [(&str, &str); 6] = [
    ("prestart", "prestart"),
    ("createRuntime", "createRuntime"),
    ("createContainer", "createContainer"),
    ("startContainer", "startContainer"),
    ("poststart", "poststart"),
    ("poststop", "poststop"),
];

pub(super) fn apply(spec: &mut Value, edits: &Edits) -> Result<(), String> {
    for pair in &edits.env {
        if let Some((name, value)) = pair.split_once('=') {
            set_env(spec, name, Some(value));
        }
    }
    for node in &edits.device_nodes {
        add_node(spec, node)?;
    }
    for device in &edits.net_devices {
        object(spec, &["linux", "netDevices"]).insert(
            device.host_interface_name.clone(),
            json!({"name": device.name}),
        );
    }
    add_mounts(spec, edits);
    for hook in &edits.hooks {
        let mut entry = Map::new();
        entry.insert("path".to_owned(), hook.path.clone().into());
        if !hook.args.is_empty() {
            entry.insert("args".to_owned(), hook.args.clone().into());
        }
        if !hook.env.is_empty() {
            entry.insert("env".to_owned(), hook.env.clone().into());
        }
        if let Some(timeout) = hook.timeout {
            entry.insert("timeout".to_owned(), timeout.into());
        }
        let name = HOOKS.iter().find(|(name, _)| *name == hook.hook_name);
        let (_, oci) = name.ok_or_else(|| format!("unknown hook name {:?}", hook.hook_name))?;
        array(spec, &["hooks", oci]).push(entry.into());
    }
    if let Some(rdt) = &edits.intel_rdt {
        object(spec, &["linux"]).insert("intelRdt".to_owned(), rdt.clone().into());
    }
    for gid in edits.additional_gids.iter().filter(|gid| **gid != 0) {
        let gids = array(spec, &["process", "user", "additionalGids"]);
        if !gids.contains(&json!(gid)) {
            gids.push(json!(gid));
        }
    }
    Ok(())
}

fn add_mounts(spec: &mut Value, edits: &Edits) {
    if edits.mounts.is_empty() {
        return;
    }
    let mounts = array(spec, &["mounts"]);
    for mount in &edits.mounts {
        mounts.retain(|other| other["destination"] != mount.container_path.as_str());
        let mut entry = Map::new();
        entry.insert(
            "destination".to_owned(),
            mount.container_path.clone().into(),
        );
        if !mount.kind.is_empty() {
            entry.insert("type".to_owned(), mount.kind.clone().into());
        }
        entry.insert("source".to_owned(), mount.host_path.clone().into());
        if !mount.options.is_empty() {
            entry.insert("options".to_owned(), mount.options.clone().into());
        }
        mounts.push(entry.into());
    }
    // A mount below another one must come after it.
    mounts.sort_by_key(|mount| {
        let destination = mount["destination"].as_str().unwrap_or_default();
        destination
            .split('/')
            .filter(|part| !part.is_empty())
            .count()
    });
}

fn add_node(spec: &mut Value, node: &DeviceNode) -> Result<(), String> {
    let host = if node.host_path.is_empty() {
        &node.path
    } else {
        &node.host_path
    };
    let (kind, major, minor) = numbers(node, host)?;
    let user = |key: &str| spec["process"]["user"][key].as_u64().filter(|id| *id > 0);
    let uid = node.uid.map(u64::from).or_else(|| user("uid"));
    let gid = node.gid.map(u64::from).or_else(|| user("gid"));
    let mut device = Map::new();
    device.insert("path".to_owned(), node.path.clone().into());
    device.insert("type".to_owned(), kind.clone().into());
    if kind != "p" {
        device.insert("major".to_owned(), major.into());
        device.insert("minor".to_owned(), minor.into());
    }
    if let Some(mode) = node.file_mode {
        device.insert("fileMode".to_owned(), mode.into());
    }
    if let Some(uid) = uid {
        device.insert("uid".to_owned(), uid.into());
    }
    if let Some(gid) = gid {
        device.insert("gid".to_owned(), gid.into());
    }
    let devices = array(spec, &["linux", "devices"]);
    devices.retain(|other| other["path"] != node.path.as_str());
    devices.push(device.into());
    if kind == "b" || kind == "c" {
        let access = match node.permissions.as_str() {
            "" => "rwm",
            given => given,
        };
        array(spec, &["linux", "resources", "devices"]).push(json!({
            "allow": true, "type": kind, "major": major, "minor": minor, "access": access,
        }));
    }
    Ok(())
}

/// Type and numbers of a node, those that the spec leaves open from the host.
fn numbers(node: &DeviceNode, host: &str) -> Result<(String, i64, i64), String> {
    let complete = match node.kind.as_str() {
        "p" => true,
        "" => false,
        _ => node.major != 0 || node.minor != 0,
    };
    if complete {
        return Ok((node.kind.clone(), node.major, node.minor));
    }
    let meta = std::fs::metadata(host)
        .map_err(|e| format!("failed to stat CDI host device {host:?}: {e}"))?;
    let kind = meta.file_type();
    let found = if kind.is_block_device() {
        "b"
    } else if kind.is_char_device() {
        "c"
    } else if kind.is_fifo() {
        "p"
    } else {
        return Err(format!("CDI host device {host:?} is not a device node"));
    };
    let same = match node.kind.as_str() {
        "" => true,
        "u" => found == "c",
        wanted => wanted == found,
    };
    if !same {
        return Err(format!(
            "CDI device ({:?}, {host:?}), host type mismatch ({}, {found})",
            node.path, node.kind
        ));
    }
    let number = |part: u64| i64::try_from(part).unwrap_or(0);
    let major = number(nix::sys::stat::major(meta.rdev()));
    let minor = number(nix::sys::stat::minor(meta.rdev()));
    Ok((found.to_owned(), major, minor))
}
