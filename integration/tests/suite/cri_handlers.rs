//! CRI: runtime handlers with a shim, a spec and devices of their own.

use std::fs;
use std::path::Path;

use lighter_integration::cri::stream::{Channel, Transport};
use lighter_integration::cri::{Node, Settings, newer};
use lighter_integration::{Result, Subject, eventually};
use lighter_proto::runtime::v1 as api;
use serde_json::{Value, json};

use crate::cri_attach::attach;
use crate::cri_exec::IN_OUT;

/// A shim made for containerd, as Debian packs it: the reference uses it for everything.
const SHIM: &str = "/usr/bin/containerd-shim-runc-v2";

/// A node whose default handler uses [`SHIM`].
async fn foreign() -> Result<Node> {
    let config = match Subject::of_run() {
        Subject::Containerd => String::new(),
        Subject::Lighter => format!(
            "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n\
             runtime_type = \"io.containerd.runc.v2\"\nruntime_path = {SHIM:?}\n"
        ),
    };
    let settings = Settings {
        config,
        ..Settings::default()
    };
    Node::start_with(&settings).await
}

#[tokio::test]
async fn another_shims_output_is_logged_and_attached_to() -> Result {
    let node = foreign().await?;
    let pod = node.run_pod("guest").await?;
    let script = "echo out; echo err >&2; while read l; do echo got $l; done; printf tail; exit 7";
    let mut config = node.container("main", &["sh", "-c", script]);
    config.stdin = true;
    let id = node.cri.run(&pod, &config).await?;
    eventually("both streams are logged", async || {
        Ok((node.log(&pod, "main")?.len() == 2).then_some(()))
    })
    .await?;
    let mut session = attach(&node, &id, IN_OUT, Transport::SPDY).await?;
    session.write(b"one\n").await?;
    session.until("got one").await?;
    // The log goes on in a new file, and the client stays.
    let path = node.logs("guest").join("main.log");
    fs::rename(&path, path.with_extension("old"))?;
    let request = api::ReopenContainerLogRequest {
        container_id: id.clone(),
    };
    node.cri.runtime().reopen_container_log(request).await?;
    session.write(b"two\n").await?;
    session.until("got two").await?;
    assert_eq!(node.cri.shell(&id, "echo beside").await?, "beside\n");
    drop(session);
    let mut session = attach(&node, &id, IN_OUT, Transport::WEBSOCKET).await?;
    session.write(b"three\n").await?;
    session.until("got three").await?;
    drop(session);
    node.cri.stop(&id, 0).await?;
    let lines = node.log(&pod, "main")?;
    let texts: Vec<_> = lines.iter().map(|l| l.text.as_str()).collect();
    assert_eq!(texts, ["got two", "got three"]);
    node.finish().await
}

#[tokio::test]
async fn another_shims_last_words_are_in_the_log_when_its_end_is_told() -> Result {
    let node = foreign().await?;
    let pod = node.run_pod("words").await?;
    for n in 0..5 {
        let name = format!("main{n}");
        let script = "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; exit 3";
        let config = node.container(&name, &["sh", "-c", script]);
        let id = node.cri.run(&pod, &config).await?;
        let status = node.cri.exited(&id).await?;
        assert_eq!(status.exit_code, 3);
        let lines = node.log(&pod, &name)?;
        assert_eq!(lines.len(), 2000);
        assert_eq!(lines[1999].text, "line 1999");
    }
    let terminal = api::ContainerConfig {
        tty: true,
        ..node.container("tty", &["sh", "-c", "echo out; echo err >&2"])
    };
    let id = node.cri.run(&pod, &terminal).await?;
    node.cri.exited(&id).await?;
    let lines = node.log(&pod, "tty")?;
    let all: Vec<_> = lines
        .iter()
        .map(|l| (l.stream.as_str(), l.text.as_str()))
        .collect();
    assert_eq!(all, [("stdout", "out"), ("stdout", "err")]);
    node.finish().await
}

#[tokio::test]
async fn another_shims_output_waits_for_the_next_daemon() -> Result {
    let mut node = foreign().await?;
    let pod = node.run_pod("guest").await?;
    let go = node.daemon.dir().join("go");
    fs::create_dir(&go)?;
    let script = "echo before; until [ -e /go/x ]; do sleep 0.05; done; echo while; \
                  until [ -e /go/y ]; do sleep 0.05; done; echo after; read l; echo got $l";
    let mut config = node.container("main", &["sh", "-c", script]);
    config.stdin = true;
    config.mounts = vec![api::Mount {
        container_path: "/go".into(),
        host_path: go.display().to_string(),
        ..Default::default()
    }];
    let id = node.cri.run(&pod, &config).await?;
    let logged = async |node: &Node, count: usize| {
        eventually("the lines are there", async || {
            let lines = node.log(&pod, "main")?;
            let texts = lines.into_iter().map(|l| l.text).collect::<Vec<_>>();
            Ok((texts.len() >= count).then_some(texts))
        })
        .await
    };
    logged(&node, 1).await?;
    node.daemon.kill()?;
    fs::write(go.join("x"), "")?;
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    node.boot().await?;
    logged(&node, 2).await?;
    fs::write(go.join("y"), "")?;
    assert_eq!(logged(&node, 3).await?, ["before", "while", "after"]);
    let mut session = attach(&node, &id, IN_OUT, Transport::SPDY).await?;
    session.write(b"word\n").await?;
    session.until("got word").await?;
    session.sink.close(Channel::Stdin).await?;
    assert_eq!(node.cri.exited(&id).await?.exit_code, 0);
    assert_eq!(logged(&node, 4).await?[3], "got word");
    node.finish().await
}

/// The reference's own default, with a limit that nothing else sets.
fn base_spec(path: &Path) -> Result {
    let output = std::process::Command::new("/usr/bin/ctr")
        .args(["oci", "spec"])
        .output()?;
    let mut spec: Value = serde_json::from_slice(&output.stdout)?;
    spec["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "hard": 777, "soft": 333 }]);
    Ok(fs::write(path, spec.to_string())?)
}

#[tokio::test]
async fn specs_start_from_the_handlers_own() -> Result {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("base.json");
    base_spec(&file)?;
    let config = format!(
        "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n\
         runtime_type = \"io.containerd.runc.v2\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.limited]\n\
         runtime_type = \"io.containerd.runc.v2\"\nbase_runtime_spec = {file:?}\n"
    );
    let settings = Settings {
        config,
        ..Settings::default()
    };
    let node = Node::start_with(&settings).await?;
    let request = api::RunPodSandboxRequest {
        config: Some(node.pod("limited")),
        runtime_handler: "limited".into(),
    };
    let id = node.cri.runtime().run_pod_sandbox(request).await?;
    let pod = lighter_integration::cri::Pod {
        id: id.into_inner().pod_sandbox_id,
        config: node.pod("limited"),
    };
    let id = node.cri.run(&pod, &node.idle("main")).await?;
    let limits = "grep 'Max open files' /proc/1/limits";
    let said = node.cri.shell(&id, limits).await?;
    let words: Vec<_> = said.split_whitespace().collect();
    assert_eq!(words[3..5], ["333", "777"], "{said}");
    // Another handler has the default.
    let (_, other) = node.run_idle("free").await?;
    assert!(!node.cri.shell(&other, limits).await?.contains(" 777"));
    node.finish().await
}

#[tokio::test]
async fn devices_of_cdi_are_injected() -> Result {
    if newer("CDI") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let spec = json!({
        "cdiVersion": "0.6.0", "kind": "harbour.test/buoy",
        "containerEdits": { "env": ["ALL=1"] },
        "devices": [
            { "name": "red", "containerEdits": {
                "env": ["RED=1"],
                "deviceNodes": [{ "path": "/dev/buoy", "hostPath": "/dev/null" }],
                "mounts": [{ "hostPath": "/etc/hostname", "containerPath": "/etc/red",
                             "options": ["ro", "bind"] }],
            } },
            { "name": "green", "containerEdits": { "env": ["GREEN=1"] } },
        ],
    });
    let settings = Settings {
        cri: format!("cdi_spec_dirs = [{:?}]", dir.path()),
        ..Settings::default()
    };
    let node = Node::start_with(&settings).await?;
    let pod = node.run_pod("sea").await?;
    let mut config = node.idle("main");
    config.cdi_devices = vec![api::CdiDevice {
        name: "harbour.test/buoy=red".into(),
    }];
    let refused = node.cri.create(&pod, &config).await.unwrap_err();
    assert!(
        refused.message().contains("harbour.test/buoy=red"),
        "{refused}"
    );
    // Specs that come later are found.
    fs::write(dir.path().join("buoy.json"), spec.to_string())?;
    config.annotations = [(
        "cdi.k8s.io/test".to_owned(),
        "harbour.test/buoy=green".to_owned(),
    )]
    .into();
    let id = node.cri.run(&pod, &config).await?;
    let script = "echo $ALL $RED $GREEN; test -c /dev/buoy && echo x > /dev/buoy; cat /etc/red";
    let said = node.cri.shell(&id, script).await?;
    let own = fs::read_to_string("/etc/hostname")?;
    assert_eq!(said, format!("1 1 1\n{own}"));
    // The name is free again after the refusal, and is taken now.
    assert!(node.cri.create(&pod, &config).await.is_err());
    node.finish().await
}
