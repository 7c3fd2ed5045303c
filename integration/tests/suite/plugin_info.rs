//! What one plugin says of itself, and a runtime through it.

use lighter_integration::{Daemon, Result};
use lighter_proto::any;
use lighter_proto::containerd::services::introspection::v1 as api;
use lighter_proto::containerd::types::{RuntimeInfo, RuntimeRequest};
use prost_types::Any;
use serde_json::Value;
use tonic::Code;

const TASKS: (&str, &str) = ("io.containerd.runtime.v2", "task");

fn ask((kind, id): (&str, &str), options: Option<Any>) -> api::PluginInfoRequest {
    api::PluginInfoRequest {
        r#type: kind.to_owned(),
        id: id.to_owned(),
        options,
    }
}

fn runtime(name: &str) -> Option<Any> {
    Some(any::pack(&RuntimeRequest {
        runtime_path: name.to_owned(),
        options: None,
    }))
}

#[tokio::test]
async fn a_runtime_says_what_it_can_do() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    if !client.is_recent().await? {
        return daemon.finish().await;
    }
    let mut introspection = client.introspection();
    let plain = introspection.plugin_info(ask(TASKS, None)).await?;
    let plain = plain.into_inner();
    let plugin = plain.plugin.expect("the plugin");
    assert_eq!((plugin.r#type.as_str(), plugin.id.as_str()), TASKS);
    assert!(plain.extra.is_none(), "{:?}", plain.extra);
    let whole = ask(TASKS, runtime("io.containerd.runc.v2"));
    let whole = introspection.plugin_info(whole).await?.into_inner();
    let info: RuntimeInfo = any::unpack(&whole.extra.expect("what the runtime says"))?;
    // Its own name, whichever shim stands behind the one asked for.
    assert!(info.name.starts_with("io.containerd."), "{info:?}");
    assert!(info.version.is_some(), "{info:?}");
    let features = info.features.expect("its features");
    assert_eq!(
        features.type_url.trim_start_matches('/'),
        any::FEATURES,
        "clients look for this type"
    );
    // OCI runtime-spec, features.md.
    let features: Value = serde_json::from_slice(&features.value)?;
    assert!(features["ociVersionMax"].is_string(), "{features}");
    let namespaces = features["linux"]["namespaces"].as_array();
    let namespaces = namespaces.expect("the namespaces it knows");
    assert!(namespaces.contains(&Value::from("mount")), "{features}");
    daemon.finish().await
}

#[tokio::test]
async fn what_is_asked_of_no_plugin_is_refused() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    if !client.is_recent().await? {
        return daemon.finish().await;
    }
    let mut introspection = client.introspection();
    let nobody = introspection.plugin_info(ask(("io.containerd.none.v1", "x"), None));
    assert_eq!(nobody.await.expect_err("none").code(), Code::NotFound);
    // A plugin that has nothing more to say.
    let store = ("io.containerd.content.v1", "content");
    let silent = ask(store, runtime("io.containerd.runc.v2"));
    let silent = introspection.plugin_info(silent).await;
    assert_eq!(silent.expect_err("no more").code(), Code::Unimplemented);
    let missing = ask(TASKS, runtime("io.containerd.no-such-runtime.v9"));
    introspection
        .plugin_info(missing)
        .await
        .expect_err("no such runtime");
    daemon.finish().await
}
