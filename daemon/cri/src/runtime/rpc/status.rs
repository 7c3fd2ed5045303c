//! The runtime itself: version, conditions, handlers, configuration.

use std::sync::Arc;

use lighter_proto::errdefs::render;
use lighter_proto::runtime::v1 as api;

use crate::error::Result;
use crate::plugin::Plugin;

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
        this.cni.write_from_template(&cidr).await?;
    }
    Ok(api::UpdateRuntimeConfigResponse {})
}

pub(in crate::runtime) async fn status(
    this: Arc<Plugin>,
    _: api::StatusRequest,
) -> Result<api::StatusResponse> {
    let network = this.cni.status().await;
    let condition = |name: &str, problem: Option<(&str, String)>| {
        let (reason, message) = problem.unwrap_or_default();
        api::RuntimeCondition {
            r#type: name.to_owned(),
            status: reason.is_empty(),
            reason: reason.to_owned(),
            message,
        }
    };
    let network = network.err().map(|e| {
        let message = format!("Network plugin returns error: {}", render(&e));
        ("NetworkPluginNotReady", message)
    });
    let conditions = vec![
        condition("RuntimeReady", None),
        condition("NetworkReady", network),
        condition("ContainerdHasNoDeprecationWarnings", None),
    ];
    let names = this.config.runtime.containerd.runtimes.keys().cloned();
    let handler = |name: String| api::RuntimeHandler {
        name,
        features: Some(api::RuntimeHandlerFeatures {
            recursive_read_only_mounts: true,
            user_namespaces: false,
        }),
    };
    Ok(api::StatusResponse {
        status: Some(api::RuntimeStatus { conditions }),
        runtime_handlers: std::iter::once(String::new())
            .chain(names)
            .map(handler)
            .collect(),
        features: Some(api::RuntimeFeatures {
            supplemental_groups_policy: true,
            ..Default::default()
        }),
        ..Default::default()
    })
}

pub(in crate::runtime) async fn runtime_config(
    this: Arc<Plugin>,
    _: api::RuntimeConfigRequest,
) -> Result<api::RuntimeConfigResponse> {
    let handler = this.handler("")?;
    let systemd = handler
        .options
        .get("SystemdCgroup")
        .and_then(toml::Value::as_bool);
    let driver = if systemd == Some(true) {
        api::CgroupDriver::Systemd
    } else {
        api::CgroupDriver::Cgroupfs
    };
    let linux = api::LinuxRuntimeConfiguration {
        cgroup_driver: driver.into(),
    };
    Ok(api::RuntimeConfigResponse { linux: Some(linux) })
}
