//! CRI: the devices of containers, and whom they belong to.

use std::fs;
use std::os::unix::fs::FileTypeExt as _;

use lighter_integration::cri::{Node, Pod, Settings, newer};
use lighter_integration::{Image, Layer, Result};
use lighter_proto::runtime::v1 as api;
use serde_json::{Value, json};

use crate::cri_options::{node_with, security, spec};

/// Devices that every container has.
const USUAL: [&str; 8] = [
    "null", "zero", "full", "random", "urandom", "tty", "ptmx", "console",
];

/// A privileged pod of a runtime handler.
async fn privileged_pod(node: &Node, handler: &str) -> Result<Pod> {
    let mut config = node.pod(&format!("bold{handler}"));
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let request = api::RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: handler.to_owned(),
    };
    let answer = node.cri.runtime().run_pod_sandbox(request).await?;
    Ok(Pod {
        id: answer.into_inner().pod_sandbox_id,
        config,
    })
}

#[tokio::test]
async fn privileged_containers_have_the_devices_that_their_handler_gives() -> Result {
    let table = |name: &str, keys: &str| {
        format!(
            "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{name}]\n\
             runtime_type = \"io.containerd.runc.v2\"\n{keys}\n"
        )
    };
    let bare = "privileged_without_host_devices = true";
    let open = "privileged_without_host_devices = true\n\
                privileged_without_host_devices_all_devices_allowed = true";
    let lacks_open = newer("privileged_without_host_devices_all_devices_allowed");
    let open = if lacks_open {
        String::new()
    } else {
        table("open", open)
    };
    let settings = Settings {
        config: format!(
            "{}{}{}{open}",
            table("runc", ""),
            table("all", ""),
            table("bare", bare)
        ),
        ..Settings::default()
    };
    let node = Node::start_with(&settings).await?;
    let unusual = fs::read_dir("/dev")?.flatten().find_map(|entry| {
        let kind = entry.file_type().ok()?;
        let name = entry.file_name().into_string().ok()?;
        let device = kind.is_char_device() || kind.is_block_device();
        (device && !USUAL.contains(&name.as_str())).then_some(name)
    });
    let unusual = unusual.unwrap_or_else(|| "none".to_owned());
    for (handler, has, may) in [
        ("all", unusual != "none", true),
        ("bare", false, false),
        ("open", false, true),
    ] {
        if handler == "open" && lacks_open {
            continue;
        }
        let pod = privileged_pod(&node, handler).await?;
        let mut config = node.idle("main");
        security(&mut config).privileged = true;
        let id = node.cri.run(&pod, &config).await?;
        let seen = format!("test -e /dev/{unusual} && echo there || echo missing");
        let seen = node.cri.shell(&id, &seen).await?;
        assert_eq!(
            seen.trim() == "there",
            has,
            "{handler}: /dev/{unusual} {seen}"
        );
        let rules = spec(&node, &id).await?["linux"]["resources"]["devices"].take();
        let every = |rule: &Value| {
            let kind = rule["type"].as_str().unwrap_or("a");
            rule["allow"] == true && matches!(kind, "" | "a") && rule["major"].is_null()
        };
        let allowed = rules.as_array().into_iter().flatten().any(every);
        assert_eq!(allowed, may, "{handler}: {rules}");
        // The node can be made either way; the rules say who may open it. Nothing is written.
        let open =
            "busybox mknod /tmp/node c 1 11 && (: >/tmp/node) 2>/dev/null && echo may || echo not";
        let opened = node.cri.shell(&id, open).await?;
        assert_eq!(opened.trim() == "may", may, "{handler}: {opened}");
    }
    node.finish().await
}

#[tokio::test]
async fn devices_belong_to_whom_the_security_context_names() -> Result {
    let node = node_with("device_ownership_from_security_context = true").await?;
    let pod = node.run_pod("owner").await?;
    let layer = Layer::busybox()?;
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Cmd": ["sh"], "Env": ["PATH=/bin"], "User": "sailor" },
        "rootfs": { "type": "layers", "diff_ids": [layer.diff_id] },
    });
    let sailors = Image::with_config("docker.io/test/sailors:1", &config, vec![layer])?;
    node.store(&sailors).await?;
    let value = |value| Some(api::Int64Value { value });
    let base = |name: &str| {
        let mut config = node.container(name, &["stat", "-c", "%u:%g", "/dev/mine"]);
        config.devices = vec![api::Device {
            container_path: "/dev/mine".into(),
            host_path: "/dev/null".into(),
            permissions: "rw".into(),
        }];
        config
    };
    let mut both = base("both");
    security(&mut both).run_as_user = value(1000);
    security(&mut both).run_as_group = value(2000);
    let mut user = base("user");
    security(&mut user).run_as_user = value(1000);
    let mut root = base("root");
    security(&mut root).run_as_user = value(0);
    let mut name = base("name");
    security(&mut name).run_as_username = "sailor".into();
    let mut image = base("image");
    image.image.get_or_insert_default().image = sailors.name.clone();
    for (config, owner) in [
        (both, "1000:2000"),
        (user, "1000:0"),
        (root, "0:0"),
        // Nobody named these by number.
        (name, "0:0"),
        (image, "0:0"),
    ] {
        let part = config.metadata.clone().unwrap_or_default().name;
        let id = node.cri.run(&pod, &config).await?;
        node.cri.exited(&id).await?;
        let lines = node.log(&pod, &part)?;
        assert_eq!(lines.len(), 1, "{part}: {lines:?}");
        assert_eq!(lines[0].text, owner, "{part}");
    }
    node.finish().await
}
