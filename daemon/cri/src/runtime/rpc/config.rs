//! The configuration as a verbose status tells it: under containerd's names, for clients that read it.
//!
//! Upstream: internal/cri/config. What containerd keeps in the tables of the runtime comes at the top.

use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::plugin::Plugin;

/// Names that are not the file's in camel case.
const NAMES: &[(&str, &str)] = &[
    ("container_annotations", "ContainerAnnotations"),
    (
        "device_ownership_from_security_context",
        "device_ownership_from_security_context",
    ),
    ("drain_exec_sync_io_timeout", "drainExecSyncIOTimeout"),
    ("enable_cdi", "enableCDI"),
    ("enable_criu", "enableCRIU"),
    ("enable_tls_streaming", "enableTLSStreaming"),
    ("enable_unprivileged_icmp", "enableUnprivilegedICMP"),
    (
        "ignore_blockio_not_enabled_errors",
        "ignoreBlockIONotEnabledErrors",
    ),
    ("io_type", "io_type"),
    ("pod_annotations", "PodAnnotations"),
    (
        "privileged_without_host_devices",
        "privileged_without_host_devices",
    ),
    (
        "privileged_without_host_devices_all_devices_allowed",
        "privileged_without_host_devices_all_devices_allowed",
    ),
    ("restrict_oom_score_adj", "restrictOOMScoreAdj"),
];

/// Tables whose keys are the operator's: they stay.
const FREE: &[&str] = &["headers", "options", "pinned_images"];
/// Tables by names of the operator's, of tables whose keys are ours.
const NAMED: &[&str] = &["runtimes", "configs", "mirrors", "runtime_platforms"];

fn camel(key: &str) -> String {
    if let Some((_, name)) = NAMES.iter().find(|(known, _)| *known == key) {
        return (*name).to_owned();
    }
    let mut parts = key.split('_');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |name, part| {
        let mut letters = part.chars();
        let initial = letters.next().map(|l| l.to_ascii_uppercase());
        name + &initial.into_iter().chain(letters).collect::<String>()
    })
}

/// `value` with its keys under containerd's names.
fn renamed(value: Value) -> Value {
    let Value::Object(map) = value else {
        return value;
    };
    let pairs = map.into_iter().map(|(key, value)| {
        let value = match value {
            free if FREE.contains(&key.as_str()) => free,
            Value::Object(tables) if NAMED.contains(&key.as_str()) => {
                let tables = tables
                    .into_iter()
                    .map(|(name, table)| (name, renamed(table)));
                Value::Object(tables.collect())
            }
            other => renamed(other),
        };
        (camel(&key), value)
    });
    Value::Object(pairs.collect::<Map<_, _>>())
}

impl Plugin {
    /// The configuration.
    ///
    /// # Errors
    /// Never in practice: it was read from a file like that.
    pub(super) fn told_config(&self) -> Result<Value> {
        let mut config = renamed(serde_json::to_value(&self.config.runtime)?);
        let mut images = serde_json::to_value(&self.config.images)?;
        if let Some(registry) = images["registry"].as_object_mut() {
            // Credentials are nobody's to read.
            registry.retain(|key, _| key != "configs" && key != "auths");
        }
        config["images"] = renamed(images);
        config["server"] = renamed(serde_json::to_value(&self.config.server)?);
        config["containerdRootDir"] = json!(self.root.parent());
        config["rootDir"] = json!(self.root);
        config["stateDir"] = json!(self.state);
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    #[test]
    fn clients_find_what_containerd_tells() {
        let mut runtime = config::Runtime::default();
        let handler = runtime.containerd.runtimes.get_mut("runc").unwrap();
        handler.options.insert("Binary_Name".into(), "x".into());
        let told = renamed(serde_json::to_value(&runtime).unwrap());
        assert_eq!(told["maxContainerLogLineSize"], 16384);
        assert_eq!(told["restrictOOMScoreAdj"], false);
        assert!(told["cni"]["confDir"].is_string(), "{told}");
        let handler = &told["containerd"]["runtimes"]["runc"];
        assert_eq!(handler["runtimeType"], "io.containerd.runc.v2");
        assert_eq!(handler["options"]["Binary_Name"], "x");
        assert!(handler["cniMaxConfNum"].is_number(), "{handler}");
    }
}
