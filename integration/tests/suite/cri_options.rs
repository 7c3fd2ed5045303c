//! CRI: what the keys of the configuration change for pods and containers.

use std::fs;
use std::path::Path;

use lighter_integration::cri::{Node, Settings, newer};
use lighter_integration::{Image, Layer, Result};
use lighter_proto::runtime::v1 as api;
use serde_json::{Value, json};

use crate::cri_pods::info;

pub(crate) async fn node_with(cri: &str) -> Result<Node> {
    let settings = Settings {
        cri: cri.to_owned(),
        ..Settings::default()
    };
    Node::start_with(&settings).await
}

pub(crate) fn security(
    config: &mut api::ContainerConfig,
) -> &mut api::LinuxContainerSecurityContext {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}

/// The OCI spec of a container.
pub(crate) async fn spec(node: &Node, id: &str) -> Result<Value> {
    let full = node.cri.full_status(id).await?;
    let mut info: Value = serde_json::from_str(&full.info["info"])?;
    Ok(info["runtimeSpec"].take())
}

#[tokio::test]
async fn log_lines_are_as_long_as_the_configuration_says() -> Result {
    let script = "head -c 250 /dev/zero | busybox tr '\\0' a; echo; head -c 100 /dev/zero | \
                  busybox tr '\\0' b; echo; head -c 40000 /dev/zero | busybox tr '\\0' c; echo";
    for limit in [100_usize, 0] {
        // Negative is without a limit.
        let text = if limit == 0 {
            "-1".to_owned()
        } else {
            limit.to_string()
        };
        let node = node_with(&format!("max_container_log_line_size = {text}")).await?;
        let pod = node.run_pod("lines").await?;
        let config = node.container("main", &["sh", "-c", script]);
        let id = node.cri.run(&pod, &config).await?;
        node.cri.exited(&id).await?;
        let lines = node.log(&pod, "main")?;
        let of = |letter: &str| -> Vec<(bool, usize)> {
            let lines = lines.iter().filter(|l| l.text.starts_with(letter));
            lines.map(|l| (l.full, l.text.len())).collect()
        };
        if limit == 0 {
            assert_eq!(of("a"), [(true, 250)]);
            assert_eq!(of("c"), [(true, 40_000)]);
        } else {
            assert_eq!(of("a"), [(false, 100), (false, 100), (true, 50)]);
            let long = of("c");
            assert_eq!(long.len(), 400);
            assert!(long[..399].iter().all(|piece| *piece == (false, 100)));
        }
        assert_eq!(of("b"), [(true, 100)]);
        node.finish().await?;
    }
    Ok(())
}

#[tokio::test]
async fn pods_may_ping_and_take_low_ports_where_the_configuration_lets_them() -> Result {
    let read = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start \
                /proc/sys/net/ipv4/ping_group_range";
    for (allowed, ports, groups) in [(true, "0", "0\t2147483647"), (false, "1024", "1\t0")] {
        let settings = Settings {
            network: true,
            cri: format!(
                "enable_unprivileged_ports = {allowed}\nenable_unprivileged_icmp = {allowed}"
            ),
            ..Settings::default()
        };
        let node = Node::start_with(&settings).await?;
        let (_, id) = node.run_idle("plain").await?;
        let seen = node.cri.shell(&id, read).await?;
        assert_eq!(seen, format!("{ports}\n{groups}\n"));
        // Who asks for a value gets it.
        let mut config = node.pod("asked");
        let linux = config.linux.get_or_insert_default();
        let key = "net.ipv4.ip_unprivileged_port_start".to_owned();
        linux.sysctls.insert(key.clone(), "500".to_owned());
        let asked = node.cri.run_pod(&config).await?;
        let id = node.cri.run(&asked, &node.idle("main")).await?;
        let seen = node.cri.shell(&id, read).await?;
        assert_eq!(seen, format!("500\n{groups}\n"));
        // The host's network is not the pod's to change.
        let mut config = node.pod("host");
        config.hostname = String::new();
        crate::cri_pods::namespaces(&mut config).network = api::NamespaceMode::Node.into();
        let host = node.cri.run_pod(&config).await?;
        let sysctls = info(&node, &host.id).await?["runtimeSpec"]["linux"]["sysctl"].take();
        assert!(sysctls[key].is_null(), "{sysctls}");
        node.finish().await?;
    }
    Ok(())
}

#[tokio::test]
async fn oom_scores_do_not_go_below_the_daemons_where_they_are_restricted() -> Result {
    // The harness restricts them.
    let node = Node::start().await?;
    let own = fs::read_to_string(format!("/proc/{}/oom_score_adj", node.daemon.pid()?))?;
    let own: i64 = own.trim().parse()?;
    let pod = node.run_pod("scores").await?;
    for (name, asked) in [("low", -998), ("high", 700)] {
        let mut config = node.idle(name);
        config.linux.get_or_insert_default().resources = Some(api::LinuxContainerResources {
            oom_score_adj: asked,
            ..Default::default()
        });
        let id = node.cri.run(&pod, &config).await?;
        let pid = spec_pid(&node, &id).await?;
        let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?;
        assert_eq!(score.trim().parse::<i64>()?, asked.max(own), "{name}");
    }
    let pause = info(&node, &pod.id).await?["pid"]
        .as_i64()
        .unwrap_or_default();
    let score = fs::read_to_string(format!("/proc/{pause}/oom_score_adj"))?;
    assert_eq!(score.trim().parse::<i64>()?, own.max(-998));
    node.finish().await
}

async fn spec_pid(node: &Node, id: &str) -> Result<i64> {
    let full = node.cri.full_status(id).await?;
    let info: Value = serde_json::from_str(&full.info["info"])?;
    Ok(info["pid"].as_i64().unwrap_or_default())
}

#[tokio::test]
async fn containers_that_ask_for_no_seccomp_profile_get_the_configured_one() -> Result {
    let node = node_with("unset_seccomp_profile = \"runtime/default\"").await?;
    let mut config = node.pod("filter");
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let pod = node.cri.run_pod(&config).await?;
    let base = |name: &str| node.container(name, &["grep", "^Seccomp:", "/proc/self/status"]);
    let mut unconfined = base("unconfined");
    security(&mut unconfined).seccomp = Some(api::SecurityProfile {
        profile_type: api::security_profile::ProfileType::Unconfined.into(),
        ..Default::default()
    });
    let mut privileged = base("privileged");
    security(&mut privileged).privileged = true;
    // Whoever confines this test confines them.
    let own = fs::read_to_string("/proc/self/status")?;
    let own = own.lines().find_map(|line| line.strip_prefix("Seccomp:\t"));
    let own: u32 = own.unwrap_or("0").parse()?;
    for (config, mode) in [(base("unset"), 2), (unconfined, own), (privileged, own)] {
        let part = config.metadata.clone().unwrap_or_default().name;
        let id = node.cri.run(&pod, &config).await?;
        node.cri.exited(&id).await?;
        let lines = node.log(&pod, &part)?;
        assert_eq!(lines.len(), 1, "{part}: {lines:?}");
        assert_eq!(lines[0].text, format!("Seccomp:\t{mode}"), "{part}");
    }
    node.finish().await
}

#[tokio::test]
async fn huge_pages_without_their_controller_are_refused_or_let_be() -> Result {
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let present = unified || Path::new("/sys/fs/cgroup/hugetlb").exists();
    for (disabled, tolerated) in [(false, false), (false, true), (true, false)] {
        let node = node_with(&format!(
            "disable_hugetlb_controller = {disabled}\n\
             tolerate_missing_hugetlb_controller = {tolerated}"
        ))
        .await?;
        let pod = node.run_pod("huge").await?;
        let mut config = node.idle("main");
        config.linux.get_or_insert_default().resources = Some(api::LinuxContainerResources {
            hugepage_limits: vec![api::HugepageLimit {
                page_size: "2MB".into(),
                limit: 4 << 20,
            }],
            ..Default::default()
        });
        let made = node.cri.create(&pod, &config).await;
        if !present && !disabled && !tolerated {
            let refused = made.unwrap_err();
            let text = "huge pages limits are specified but hugetlb cgroup controller is missing";
            assert!(refused.message().contains(text), "{refused}");
        } else {
            let id = made?;
            let limits = spec(&node, &id).await?["linux"]["resources"]["hugepageLimits"].take();
            let limited = limits.as_array().is_some_and(|limits| !limits.is_empty());
            assert_eq!(limited, present && !disabled, "{limits}");
            if !limited {
                node.cri.start(&id).await?;
            }
        }
        node.finish().await?;
    }
    Ok(())
}

#[tokio::test]
async fn volumes_of_the_image_can_be_ignored() -> Result {
    let node = node_with("ignore_image_defined_volumes = true").await?;
    let pod = node.run_pod("volumes").await?;
    let files = Layer::files(&[("data/seed", b"grain\n")])?;
    let layers = vec![node.image.layers[0].clone(), files];
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Cmd": ["sh"], "Env": ["PATH=/bin"], "Volumes": { "/data": {} } },
        "rootfs": { "type": "layers", "diff_ids": [layers[0].diff_id, layers[1].diff_id] },
    });
    let image = Image::with_config("docker.io/test/ignored:1", &config, layers)?;
    node.store(&image).await?;
    let mut config = node.idle("main");
    config.image.get_or_insert_default().image = image.name.clone();
    let id = node.cri.run(&pod, &config).await?;
    let script = "cat /data/seed; grep -c ' /data ' /proc/self/mountinfo || true";
    assert_eq!(node.cri.shell(&id, script).await?, "grain\n0\n");
    node.finish().await
}

#[tokio::test]
async fn capabilities_follow_the_rules() -> Result {
    const DEFAULT: u64 = 0xa804_25fb;
    const NET_ADMIN: u64 = 1 << 12;
    let node = Node::start().await?;
    let pod = node.run_pod("caps").await?;
    let own = fs::read_to_string("/proc/self/status")?;
    let own = mask(&own, "CapEff")?;
    type Asked = (
        &'static str,
        &'static [&'static str],
        &'static [&'static str],
        u64,
    );
    let asked: [Asked; 5] = [
        ("all", &["ALL"], &[], own),
        ("allbut", &["all"], &["net_admin"], own & !NET_ADMIN),
        ("only", &["NET_ADMIN"], &["ALL"], NET_ADMIN),
        // The prefix is put before whatever is asked for, so this is none.
        ("prefix", &["CAP_NET_ADMIN"], &[], DEFAULT),
        ("odd", &["NO_SUCH"], &["ALSO_NONE"], DEFAULT),
    ];
    for (name, add, drop, wanted) in asked {
        let words = |list: &[&str]| list.iter().map(|&word| word.to_owned()).collect();
        let mut config = node.idle(name);
        security(&mut config).capabilities = Some(api::Capability {
            add_capabilities: words(add),
            drop_capabilities: words(drop),
            ..Default::default()
        });
        let id = node.cri.run(&pod, &config).await?;
        let status = node.cri.shell(&id, "cat /proc/1/status").await?;
        for (line, value) in [
            ("CapEff", wanted),
            ("CapPrm", wanted),
            ("CapBnd", wanted),
            ("CapInh", 0),
            ("CapAmb", 0),
        ] {
            assert_eq!(mask(&status, line)?, value, "{name}: {line}");
        }
    }
    // Somebody else than root holds none, and cannot get more than these.
    let mut config = node.idle("sailor");
    security(&mut config).run_as_user = Some(api::Int64Value { value: 1000 });
    let id = node.cri.run(&pod, &config).await?;
    let status = node.cri.shell(&id, "cat /proc/1/status").await?;
    for (line, value) in [
        ("CapEff", 0),
        ("CapPrm", 0),
        ("CapAmb", 0),
        ("CapBnd", DEFAULT),
    ] {
        assert_eq!(mask(&status, line)?, value, "sailor: {line}");
    }
    node.finish().await
}

/// A line of capabilities in a process's status.
fn mask(status: &str, name: &str) -> Result<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let hex = line.unwrap_or_default().trim_start_matches(':').trim();
    Ok(u64::from_str_radix(hex, 16)?)
}

/// The form of a cgroup's path that systemd is asked with, as an OCI runtime gets it.
#[tokio::test]
async fn cgroups_of_systemd_are_named_by_slice_prefix_and_id() -> Result {
    let dir = tempfile::tempdir()?;
    let program = dir.path().join("recorder");
    let script = format!(
        "#!/bin/sh\nfor word; do\n[ \"$last\" = --bundle ] && bundle=$word\n\
         [ \"$last\" = --log ] && log=$word\nlast=$word\ndone\n\
         case \" $* \" in *' create '*) cp \"$bundle/config.json\" {dir}/spec; echo \" $*\" > \
         {dir}/words;; esac\n[ -z \"$log\" ] || echo '{said}' >>\"$log\"\nexit 1\n",
        dir = dir.path().display(),
        said = json!({ "level": "error", "msg": "this runtime only takes notes" })
    );
    lighter_testing::executable(&program, script)?;
    let settings = Settings {
        config: format!(
            "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n\
             runtime_type = \"io.containerd.runc.v2\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\n\
             BinaryName = {program:?}\nSystemdCgroup = true\n"
        ),
        ..Settings::default()
    };
    let node = Node::start_with(&settings).await?;
    for (parent, path) in [
        (
            "/kubepods.slice/kubepods-pod1.slice",
            "kubepods-pod1.slice:cri-containerd:",
        ),
        ("alone.slice", "alone.slice:cri-containerd:"),
        ("/plain", "/plain/"),
    ] {
        let mut config = node.pod("unit");
        config.linux.get_or_insert_default().cgroup_parent = parent.to_owned();
        let refused = node.cri.run_pod(&config).await.unwrap_err();
        assert!(refused.message().contains("only takes notes"), "{refused}");
        let spec: Value = serde_json::from_slice(&fs::read(dir.path().join("spec"))?)?;
        let named = spec["linux"]["cgroupsPath"].as_str().unwrap_or_default();
        let id = named.strip_prefix(path).unwrap_or_default();
        assert!(
            id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit()),
            "{parent}: {named}"
        );
        let words = fs::read_to_string(dir.path().join("words"))?;
        assert!(words.contains(" --systemd-cgroup "), "{words}");
        fs::remove_file(dir.path().join("spec"))?;
    }
    assert!(node.cri.pods(None).await?.is_empty());
    node.finish().await
}

/// Where there is no systemd to ask, a pod that needs it says so and leaves nothing.
#[tokio::test]
async fn without_systemd_its_cgroups_are_refused() -> Result {
    if newer("an OCI runtime in the shim") || Path::new("/run/systemd/system").exists() {
        return Ok(());
    }
    let settings = Settings {
        config: "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n\
                 runtime_type = \"io.containerd.runc.v2\"\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\n\
                 SystemdCgroup = true\n"
            .to_owned(),
        ..Settings::default()
    };
    let node = Node::start_with(&settings).await?;
    let mut config = node.pod("unit");
    config.linux.get_or_insert_default().cgroup_parent = "alone.slice".into();
    let refused = node.cri.run_pod(&config).await.unwrap_err();
    assert!(refused.message().contains("systemd"), "{refused}");
    assert!(node.cri.pods(None).await?.is_empty());
    node.finish().await
}

#[tokio::test]
async fn a_class_of_block_io_is_what_the_file_says() -> Result {
    if newer("classes of block I/O") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("blockio.yaml");
    fs::write(
        &file,
        "Classes:\n  slow:\n  - Weight: 80\n  fast:\n  - Weight: 400\n",
    )?;
    let settings = Settings {
        config: format!(
            "[plugins.\"io.containerd.service.v1.tasks-service\"]\nblockio_config_file = {file:?}\n"
        ),
        ..Settings::default()
    };
    let node = Node::start_with(&settings).await?;
    let mut config = node.pod("classes");
    let of_pod = "blockio.resources.beta.kubernetes.io";
    config
        .annotations
        .insert(format!("{of_pod}/pod"), "slow".into());
    config
        .annotations
        .insert(format!("{of_pod}/container.lost"), "nosuch".into());
    let pod = node.cri.run_pod(&config).await?;
    let mut own = node.idle("own");
    own.annotations
        .insert("io.kubernetes.cri.blockio-class".into(), "fast".into());
    for (config, weight) in [(node.idle("any"), 80), (own, 400)] {
        // Not started: not every machine can limit its disks.
        let id = node.cri.create(&pod, &config).await?;
        let limits = spec(&node, &id).await?["linux"]["resources"]["blockIO"].take();
        assert_eq!(limits, json!({ "weight": weight }));
    }
    let lost = node.cri.create(&pod, &node.idle("lost")).await;
    let message = lost.unwrap_err().message().to_owned();
    assert!(
        message.contains("no OCI BlockIO parameters for class \"nosuch\""),
        "{message}"
    );
    node.finish().await
}

#[tokio::test]
async fn a_class_without_a_file_is_refused_unless_it_may_be_passed_over() -> Result {
    for ignore in [false, true] {
        let settings = Settings {
            config: format!(
                "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n\
                 ignore_blockio_not_enabled_errors = {ignore}\n"
            ),
            ..Settings::default()
        };
        if newer("classes of block I/O") {
            return Ok(());
        }
        let node = Node::start_with(&settings).await?;
        let pod = node.run_pod("classes").await?;
        let mut config = node.idle("main");
        config
            .annotations
            .insert("io.kubernetes.cri.blockio-class".into(), "slow".into());
        match node.cri.create(&pod, &config).await {
            Ok(id) => {
                assert!(ignore);
                let limits = spec(&node, &id).await?["linux"]["resources"]["blockIO"].take();
                assert!(limits.is_null(), "{limits}");
            }
            Err(refused) => {
                assert!(!ignore, "{refused}");
                let message = refused.message();
                assert!(message.contains("blockio disabled"), "{message}");
            }
        }
        node.finish().await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_pause_image_that_may_not_be_pulled_has_to_be_there() -> Result {
    if newer("pause images that are not pulled") {
        return Ok(());
    }
    let name = "docker.io/test/hold:1";
    let settings = Settings {
        cri: format!("sandbox_image = {name:?}\n"),
        config: "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n\
                 runtime_type = \"io.containerd.runc.v2\"\n\
                 disable_pause_image_pull = true\n"
            .to_owned(),
        ..Settings::default()
    };
    let node = Node::start_with(&settings).await?;
    let config = node.pod("held");
    let refused = node.cri.run_pod(&config).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::NotFound, "{refused}");
    assert!(
        refused.message().contains("disable_pause_image_pull"),
        "{refused}"
    );
    assert!(node.cri.pods(None).await?.is_empty());
    let layer = Layer::busybox()?;
    let process = json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Cmd": ["sh", "-c", "while :; do sleep 60; done"], "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [layer.diff_id] },
    });
    let hold = Image::with_config(name, &process, vec![layer])?;
    node.store(&hold).await?;
    let pod = node.cri.run_pod(&config).await?;
    let id = node.cri.run(&pod, &node.idle("main")).await?;
    assert_eq!(node.cri.shell(&id, "echo here").await?, "here\n");
    node.finish().await
}
