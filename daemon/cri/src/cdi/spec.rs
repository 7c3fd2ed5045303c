//! The CDI spec file: its fields, and the rules for its names.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;

/// Bytes of one spec file.
const MAX_BYTES: u64 = 4 << 20;
/// Devices in one spec.
const MAX_DEVICES: usize = 16384;

/// One spec file.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    /// Version of the format.
    pub cdi_version: String,
    /// Vendor and class, as `vendor.com/class`.
    pub kind: String,
    /// Free annotations.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// The devices.
    pub devices: Vec<Device>,
    /// Edits made once for any device of this spec.
    #[serde(default)]
    pub container_edits: Edits,
}

/// One device.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    /// Its name within the kind.
    pub name: String,
    /// Free annotations.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// Edits made for this device.
    #[serde(default)]
    pub container_edits: Edits,
}

/// Changes to a container's spec.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Edits {
    /// Variables, as `NAME=value`.
    pub env: Vec<String>,
    /// Device nodes.
    pub device_nodes: Vec<DeviceNode>,
    /// Network interfaces moved in.
    pub net_devices: Vec<NetDevice>,
    /// OCI hooks.
    pub hooks: Vec<Hook>,
    /// Mounts.
    pub mounts: Vec<Mount>,
    /// Cache and memory bandwidth class; the last one counts.
    pub intel_rdt: Option<serde_json::Map<String, serde_json::Value>>,
    /// Supplementary groups.
    #[serde(rename = "additionalGids", alias = "additionalGIDs")]
    pub additional_gids: Vec<u32>,
}

/// One device node.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeviceNode {
    /// Path in the container.
    pub path: String,
    /// Path on the host; the same when empty.
    #[serde(default)]
    pub host_path: String,
    /// `b`, `c`, `u` or `p`; asked from the host when empty.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// Major number; asked from the host when 0.
    #[serde(default)]
    pub major: i64,
    /// Minor number.
    #[serde(default)]
    pub minor: i64,
    /// Permission bits.
    #[serde(default)]
    pub file_mode: Option<u32>,
    /// Access for the cgroup, of `rwm`.
    #[serde(default)]
    pub permissions: String,
    /// Owner.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Group.
    #[serde(default)]
    pub gid: Option<u32>,
}

/// One network interface.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetDevice {
    /// Name on the host.
    pub host_interface_name: String,
    /// Name in the container.
    pub name: String,
}

/// One OCI hook.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hook {
    /// When it runs, as the OCI spec names it.
    pub hook_name: String,
    /// Its binary.
    pub path: String,
    /// Arguments, its own name first.
    #[serde(default)]
    pub args: Vec<String>,
    /// Environment.
    #[serde(default)]
    pub env: Vec<String>,
    /// Seconds it may take.
    #[serde(default)]
    pub timeout: Option<i64>,
}

/// One mount.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mount {
    /// Path on the host.
    pub host_path: String,
    /// Path in the container.
    pub container_path: String,
    /// Filesystem type; empty for a bind mount.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// Options.
    #[serde(default)]
    pub options: Vec<String>,
}

impl Spec {
    /// Reads and checks a file.
    pub(super) fn read(path: &Path) -> Result<Self, String> {
        let mut text = String::new();
        let file = std::fs::File::open(path).map_err(|e| e.to_string())?;
        file.take(MAX_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(|e| e.to_string())?;
        if text.len() as u64 > MAX_BYTES {
            return Err("larger than 4 MiB".to_owned());
        }
        let spec: Self = if path.extension().is_some_and(|e| e == "json") {
            serde_json::from_str(&text).map_err(|e| e.to_string())?
        } else {
            serde_yaml_ng::from_str(&text).map_err(|e| e.to_string())?
        };
        spec.check()?;
        Ok(spec)
    }

    fn check(&self) -> Result<(), String> {
        let version = self.cdi_version.trim_start_matches('v');
        if !version.starts_with("0.") && !version.starts_with("1.") {
            return Err(format!(
                "invalid cdiVersion {:?}: want 0.x or 1.x",
                self.cdi_version
            ));
        }
        let (vendor, class) = self.kind.split_once('/').unwrap_or((&self.kind, ""));
        if !is_vendor(vendor) || !is_class(class) {
            return Err(format!(
                "invalid kind {:?}: want vendor.com/class",
                self.kind
            ));
        }
        if self.devices.is_empty() {
            return Err("invalid spec, no devices".to_owned());
        }
        if self.devices.len() > MAX_DEVICES {
            return Err(format!("more than {MAX_DEVICES} devices"));
        }
        self.container_edits.check()?;
        let mut seen = std::collections::HashSet::new();
        for device in &self.devices {
            if !is_device(&device.name) {
                return Err(format!("invalid device name {:?}", device.name));
            }
            if !seen.insert(&device.name) {
                return Err(format!("invalid spec, multiple device {:?}", device.name));
            }
            let edits = &device.container_edits;
            edits
                .check()
                .map_err(|e| format!("device {:?}: {e}", device.name))?;
        }
        Ok(())
    }
}

impl Edits {
    fn check(&self) -> Result<(), String> {
        for pair in &self.env {
            if pair.split_once('=').is_none_or(|(name, _)| name.is_empty()) {
                return Err(format!("invalid environment variable {pair:?}"));
            }
        }
        for node in &self.device_nodes {
            if node.path.is_empty() {
                return Err("invalid (empty) device path".to_owned());
            }
            if !matches!(node.kind.as_str(), "" | "b" | "c" | "u" | "p") {
                return Err(format!(
                    "device {:?}: invalid type {:?}",
                    node.path, node.kind
                ));
            }
            if node.permissions.chars().any(|c| !"rwm".contains(c)) {
                let given = &node.permissions;
                return Err(format!(
                    "device {:?}: invalid permissions {given:?}",
                    node.path
                ));
            }
        }
        for hook in &self.hooks {
            if super::edits::HOOKS
                .iter()
                .all(|(name, _)| *name != hook.hook_name)
            {
                return Err(format!("invalid hook name {:?}", hook.hook_name));
            }
            if hook.path.is_empty() {
                return Err(format!("invalid hook {:?}, empty path", hook.hook_name));
            }
        }
        for mount in &self.mounts {
            if mount.host_path.is_empty() || mount.container_path.is_empty() {
                return Err("invalid mount, empty host or container path".to_owned());
            }
        }
        for device in &self.net_devices {
            if device.host_interface_name.is_empty() || device.name.is_empty() {
                return Err("invalid net device, empty name".to_owned());
            }
        }
        Ok(())
    }

    /// Adds the edits of another device.
    pub(super) fn append(&mut self, other: &Self) {
        self.env.extend_from_slice(&other.env);
        self.device_nodes.extend_from_slice(&other.device_nodes);
        self.net_devices.extend_from_slice(&other.net_devices);
        self.hooks.extend_from_slice(&other.hooks);
        self.mounts.extend_from_slice(&other.mounts);
        self.additional_gids
            .extend_from_slice(&other.additional_gids);
        if other.intel_rdt.is_some() {
            self.intel_rdt.clone_from(&other.intel_rdt);
        }
    }
}

/// Whether a name has the form `vendor.com/class=device`.
pub(super) fn is_qualified(name: &str) -> bool {
    let Some((kind, device)) = name.split_once('=') else {
        return false;
    };
    let Some((vendor, class)) = kind.split_once('/') else {
        return false;
    };
    is_vendor(vendor) && is_class(class) && is_device(device)
}

fn is_vendor(name: &str) -> bool {
    has_form(name, "_-.", char::is_ascii_alphabetic)
}

fn is_class(name: &str) -> bool {
    has_form(name, "_-", char::is_ascii_alphabetic)
}

fn is_device(name: &str) -> bool {
    has_form(name, "_-.:", char::is_ascii_alphanumeric)
}

/// Letters, digits and `inner`, where the first is as told and the last a letter or digit.
fn has_form(name: &str, inner: &str, first: fn(&char) -> bool) -> bool {
    name.chars().next().is_some_and(|c| first(&c))
        && name.ends_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || inner.contains(c))
}
