//! The runtime itself: version, conditions, handlers, configuration.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use lighter_proto::errdefs::render;
use lighter_proto::runtime::v1 as api;

use crate::cni::Cni;
use crate::error::Result;
use crate::plugin::Plugin;
use crate::runtime::deprecated;
use crate::runtime::features::ASK_AGAIN;

pub(in crate::runtime) async fn version(
    this: Arc<Plugin>,
    _: api::VersionRequest,
) -> Result<api::VersionResponse> {
    Ok(api::VersionResponse {
        version: "0.1.0".to_owned(),
        runtime_name: "containerd".to_owned(),
        runtime_version: this.version.clone(),
        runtime_api_version: "v1".to_owned(),
    })
}

pub(in crate::runtime) async fn update_runtime_config(
    this: Arc<Plugin>,
    request: api::UpdateRuntimeConfigRequest,
) -> Result<api::UpdateRuntimeConfigResponse> {
    let network = request.runtime_config.and_then(|c| c.network_config);
    if let Some(cidr) = network.map(|n| n.pod_cidr).filter(|c| !c.is_empty()) {
        this.cni.write_from_template(cidr.trim()).await?;
    }
    Ok(api::UpdateRuntimeConfigResponse {})
}

fn condition(name: &str, problem: Option<(&str, String)>) -> api::RuntimeCondition {
    let (reason, message) = problem.unwrap_or_default();
    api::RuntimeCondition {
        r#type: name.to_owned(),
        status: reason.is_empty(),
        reason: reason.to_owned(),
        message,
    }
}

pub(in crate::runtime) async fn status(
    this: Arc<Plugin>,
    request: api::StatusRequest,
) -> Result<api::StatusResponse> {
    let mut network = this.cni.status().await;
    for own in this.own_cni.values() {
        if network.is_ok() {
            network = own.status().await;
        }
    }
    let network = network.err().map(|e| {
        let message = format!("Network plugin returns error: {}", render(&e));
        ("NetworkPluginNotReady", message)
    });
    let warnings = deprecated::warnings(&this.config, unified());
    let deprecated = (!warnings.is_empty()).then(|| {
        let text = serde_json::json!(warnings).to_string();
        ("ContainerdHasDeprecationWarnings", text)
    });
    let conditions = vec![
        condition("RuntimeReady", None),
        condition("NetworkReady", network),
        condition("ContainerdHasNoDeprecationWarnings", deprecated),
    ];
    let named = this.config.runtime.containerd.runtimes.keys();
    let names = std::iter::once("").chain(named.map(String::as_str));
    // All at once: one that hangs takes as long as it may.
    let plugin = &this;
    let known = names.map(|name| async move {
        // One that does not say offers nothing, until it says.
        let known = plugin.features(name, ASK_AGAIN).await.unwrap_or_default();
        api::RuntimeHandler {
            name: name.to_owned(),
            features: Some(known.told),
        }
    });
    let runtime_handlers = futures::future::join_all(known).await;
    Ok(api::StatusResponse {
        status: Some(api::RuntimeStatus { conditions }),
        runtime_handlers,
        features: Some(api::RuntimeFeatures {
            supplemental_groups_policy: true,
            user_namespaces_host_network: true,
            ..Default::default()
        }),
        info: if request.verbose {
            this.status_info()?
        } else {
            HashMap::new()
        },
    })
}

/// Whether the machine has one hierarchy of cgroups.
fn unified() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

impl Plugin {
    fn status_info(&self) -> Result<HashMap<String, String>> {
        let loaded = |cni: &Cni| match cni.load_status() {
            Some(error) => render(&*error),
            None => "OK".to_owned(),
        };
        let networks = match self.cni.networks() {
            Ok(networks) => networks
                .iter()
                .map(|n| serde_json::json!({ "Name": n.name, "Source": String::from_utf8_lossy(&n.raw) }))
                .collect(),
            Err(_) => Vec::new(),
        };
        let cni = serde_json::json!({
            "PluginDirs": self.cni.config().bin_dirs,
            "PluginConfDir": self.cni.config().conf_dir,
            "PluginMaxConfNum": self.cni.config().max_conf_num,
            "Prefix": "eth",
            "Networks": networks,
        });
        let mut info = HashMap::from([
            ("config".to_owned(), self.told_config()?.to_string()),
            ("golang".to_owned(), serde_json::json!("").to_string()),
            ("lastCNILoadStatus".to_owned(), loaded(&self.cni)),
            ("lastCNILoadStatus.default".to_owned(), loaded(&self.cni)),
            ("cniconfig".to_owned(), cni.to_string()),
        ]);
        for (name, own) in &self.own_cni {
            info.insert(format!("lastCNILoadStatus.{name}"), loaded(own));
        }
        Ok(info)
    }
}

pub(in crate::runtime) async fn runtime_config(
    this: Arc<Plugin>,
    _: api::RuntimeConfigRequest,
) -> Result<api::RuntimeConfigResponse> {
    let runtimes = &this.config.runtime.containerd;
    let default = runtimes.runtimes.get(&runtimes.default_runtime_name);
    let all = default.into_iter().chain(runtimes.runtimes.values());
    let mut ours = all.filter(|h| h.takes_runc_options());
    let systemd = match ours.next() {
        Some(handler) => {
            let option = handler.options.get("SystemdCgroup");
            option.and_then(toml::Value::as_bool) == Some(true)
        }
        None => Path::new("/run/systemd/system").is_dir(),
    };
    let driver = if systemd {
        api::CgroupDriver::Systemd
    } else {
        api::CgroupDriver::Cgroupfs
    };
    let linux = api::LinuxRuntimeConfiguration {
        cgroup_driver: driver.into(),
    };
    Ok(api::RuntimeConfigResponse { linux: Some(linux) })
}
