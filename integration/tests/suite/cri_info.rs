//! CRI: what the runtime says of itself.

use lighter_integration::cri::{Node, Settings, newer};
use lighter_integration::{Result, eventually};
use lighter_proto::runtime::v1 as api;

async fn condition(node: &Node, name: &str) -> Result<api::RuntimeCondition> {
    let request = api::StatusRequest { verbose: false };
    let answer = node.cri.runtime().status(request).await?.into_inner();
    let conditions = answer.status.unwrap_or_default().conditions;
    let found = conditions.into_iter().find(|c| c.r#type == name);
    found.ok_or_else(|| anyhow::anyhow!("no condition {name}"))
}

#[tokio::test]
async fn version_status_and_configuration_are_told() -> Result {
    let node = Node::start().await?;
    let request = api::VersionRequest {
        version: "whatever".into(),
    };
    let version = node.cri.runtime().version(request).await?.into_inner();
    assert_eq!(version.version, "0.1.0");
    assert_eq!(version.runtime_name, "containerd");
    assert_eq!(version.runtime_api_version, "v1");
    assert!(!version.runtime_version.is_empty());

    let ready = condition(&node, "RuntimeReady").await?;
    assert!(ready.status && ready.reason.is_empty(), "{ready:?}");
    let request = api::StatusRequest { verbose: true };
    let answer = node.cri.runtime().status(request).await?.into_inner();
    let config: serde_json::Value = serde_json::from_str(&answer.info["config"])?;
    assert!(config["containerd"].is_object(), "{config}");
    assert!(answer.info.contains_key("lastCNILoadStatus"), "{answer:?}");

    let request = api::UpdateRuntimeConfigRequest {
        runtime_config: Some(api::RuntimeConfig {
            network_config: Some(api::NetworkConfig {
                pod_cidr: "10.1.0.0/24".into(),
            }),
        }),
    };
    // Without a template there is nothing to write.
    node.cri.runtime().update_runtime_config(request).await?;
    node.cri
        .runtime()
        .update_runtime_config(api::UpdateRuntimeConfigRequest::default())
        .await?;
    node.finish().await
}

#[tokio::test]
async fn what_is_deprecated_is_told_unless_it_is_ignored() -> Result {
    if newer("the condition of deprecations") {
        return Ok(());
    }
    const CONDITION: &str = "ContainerdHasNoDeprecationWarnings";
    let prefix = "io.containerd.deprecation/";
    let ignored = format!("{prefix}cgroup-v1");
    let settings = Settings {
        cri: format!("enable_cdi = false\nignore_deprecation_warnings = [{ignored:?}]"),
        ..Settings::default()
    };
    let node = Node::start_with(&settings).await?;
    let told = condition(&node, CONDITION).await?;
    assert!(!told.status, "{told:?}");
    assert_eq!(told.reason, "ContainerdHasDeprecationWarnings");
    let message: serde_json::Value = serde_json::from_str(&told.message)?;
    let ids: Vec<_> = message
        .as_object()
        .into_iter()
        .flatten()
        .map(|(id, _)| id)
        .collect();
    assert_eq!(ids, [&format!("{prefix}enable-cdi")]);
    node.finish().await?;
    let settings = Settings {
        cri: format!("ignore_deprecation_warnings = [{ignored:?}]"),
        ..Settings::default()
    };
    let node = Node::start_with(&settings).await?;
    let told = condition(&node, CONDITION).await?;
    assert!(told.status && told.message.is_empty(), "{told:?}");
    node.finish().await
}

/// The metrics page of a daemon.
async fn page(node: &Node) -> Result<String> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let socket = node.daemon.dir().join("state").join("debug.sock");
    let mut stream = tokio::net::UnixStream::connect(socket).await?;
    let request = b"GET /v1/metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    stream.write_all(request).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

#[tokio::test]
async fn calls_are_counted_and_timed() -> Result {
    if newer("a metrics page on the debug socket") {
        return Ok(());
    }
    let node = Node::start().await?;
    let (pod, id) = node.run_idle("counted").await?;
    node.cri.stop(&id, 0).await?;
    node.cri.end_pod(&pod.id).await?;
    let _ = node.cri.pull("127.0.0.1:1/nothing:1", None).await;
    let text = page(&node).await?;
    for name in [
        "container_create",
        "container_start",
        "container_stop",
        "sandbox_runtime_create",
        "sandbox_runtime_stop",
        "sandbox_remove",
    ] {
        let line =
            format!("containerd_cri_{name}_seconds_count{{runtime=\"io.containerd.runc.v2\"}} 1\n");
        assert!(text.contains(&line), "{line} in {text}");
    }
    for line in [
        "containerd_cri_container_events_dropped_total 0\n",
        "containerd_cri_sandboxed_image_pulls_total{status=\"failure\"} 1\n",
        "containerd_cri_sandboxed_in_progress_image_pulls_total 0\n",
        "containerd_nri_active_plugins_total 0\n",
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
    node.finish().await
}

#[tokio::test]
async fn the_cgroup_driver_and_handlers_are_told() -> Result {
    if newer("RuntimeConfig") {
        return Ok(());
    }
    let node = Node::start().await?;
    let request = api::RuntimeConfigRequest {};
    let config = node.cri.runtime().runtime_config(request).await?;
    let linux = config.into_inner().linux.unwrap_or_default();
    assert_eq!(linux.cgroup_driver(), api::CgroupDriver::Cgroupfs);
    let request = api::StatusRequest { verbose: false };
    let answer = node.cri.runtime().status(request).await?.into_inner();
    let names: Vec<_> = answer.runtime_handlers.iter().map(|h| &h.name).collect();
    assert!(names.windows(2).all(|w| w[0] < w[1]), "sorted: {names:?}");
    assert!(names.iter().any(|name| name.is_empty()), "{names:?}");
    assert!(names.iter().any(|name| *name == "runc"), "{names:?}");
    let features = answer.features.unwrap_or_default();
    assert!(features.supplemental_groups_policy);
    node.finish().await
}

#[tokio::test]
async fn the_network_is_ready_once_its_configuration_is_there() -> Result {
    let node = Node::start().await?;
    let network = condition(&node, "NetworkReady").await?;
    assert!(!network.status, "{network:?}");
    assert_eq!(network.reason, "NetworkPluginNotReady");
    assert!(
        network.message.ends_with("cni plugin not initialized"),
        "{network:?}"
    );
    let mut pod = node.pod("early");
    let security = pod.linux.as_mut().and_then(|l| l.security_context.as_mut());
    if let Some(security) = security {
        security.namespace_options = None;
    }
    let refused = node.cri.run_pod(&pod).await.unwrap_err();
    assert!(
        refused.message().contains("cni plugin not initialized"),
        "{refused}"
    );
    let none = node.cri.pods(None).await?.is_empty();
    assert!(none || newer("a failed pod is not kept"));

    node.network.write_bridge()?;
    eventually("the network is ready", async || {
        let network = condition(&node, "NetworkReady").await?;
        Ok(network.status.then_some(()))
    })
    .await?;
    std::fs::write(node.network.conf_dir().join("10-test.conflist"), "{")?;
    eventually("a bad file makes it unready", async || {
        let network = condition(&node, "NetworkReady").await?;
        Ok((!network.status).then_some(()))
    })
    .await?;
    node.network.write_bridge()?;
    eventually("the network is ready again", async || {
        let network = condition(&node, "NetworkReady").await?;
        Ok(network.status.then_some(()))
    })
    .await?;
    node.finish().await
}
