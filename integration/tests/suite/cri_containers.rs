//! CRI: containers, from create to remove.

use std::fs;

use lighter_integration::cri::{Node, Pod, newer};
use lighter_integration::{Image, Layer, Result, Subject, eventually};
use lighter_proto::runtime::v1 as api;
use serde_json::{Value, json};
use tonic::Code;

fn security(config: &mut api::ContainerConfig) -> &mut api::LinuxContainerSecurityContext {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}

/// Runs a container to its end and returns its status and what it printed on stdout.
async fn output(
    node: &Node,
    pod: &Pod,
    config: &api::ContainerConfig,
) -> Result<(api::ContainerStatus, String)> {
    let id = node.cri.run(pod, config).await?;
    let status = node.cri.exited(&id).await?;
    let name = config.metadata.clone().unwrap_or_default().name;
    let lines = node.log(pod, &name)?;
    node.cri.remove(&id).await?;
    let out = lines.iter().filter(|l| l.stream == "stdout");
    Ok((status, out.map(|l| format!("{}\n", l.text)).collect()))
}

#[tokio::test]
async fn a_container_is_created_runs_ends_and_goes() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("life").await?;
    let mut config = node.container("main", &["sh", "-c", "read line; exit 7"]);
    config.stdin = true;
    config.annotations.insert("k".into(), "v".into());
    let id = node.cri.create(&pod, &config).await?;
    assert!(
        id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit()),
        "{id}"
    );
    let status = node.cri.status(&id).await?;
    assert_eq!(status.state(), api::ContainerState::ContainerCreated);
    assert_eq!(status.metadata, config.metadata);
    assert_eq!(status.labels, config.labels);
    assert_eq!(status.annotations, config.annotations);
    assert_eq!((status.started_at, status.finished_at), (0, 0));
    assert!(status.created_at > 1_600_000_000_000_000_000);
    assert_eq!(
        status.image.clone().unwrap_or_default().image,
        node.image.name
    );
    assert!(!status.image_ref.is_empty());
    let log = node.logs("life").join("main.log").display().to_string();
    assert_eq!(status.log_path, log);

    node.cri.start(&id).await?;
    let again = node.cri.start(&id).await.unwrap_err();
    assert!(
        again.message().contains("is in CONTAINER_RUNNING state"),
        "{again}"
    );
    let full = node.cri.full_status(&id).await?;
    let status = full.status.unwrap_or_default();
    assert_eq!(status.state(), api::ContainerState::ContainerRunning);
    assert!(status.started_at >= status.created_at && status.finished_at == 0);
    let info: Value = serde_json::from_str(&full.info["info"])?;
    assert_eq!(info["sandboxID"], pod.id, "{info}");
    assert!(info["pid"].as_u64().is_some_and(|pid| pid > 1), "{info}");
    assert_eq!(info["snapshotKey"], id, "{info}");
    assert!(info["runtimeSpec"]["process"].is_object(), "{info}");
    assert!(info["config"]["metadata"].is_object(), "{info}");
    let whole = node.cri.pod_status(&pod.id).await?;
    if Subject::of_run() != Subject::Containerd {
        let ids: Vec<_> = whole.containers_statuses.iter().map(|s| &s.id).collect();
        assert_eq!(ids, [&id]);
        assert!(whole.timestamp >= status.started_at);
    }

    node.cri.stop(&id, 0).await?;
    let status = node.cri.status(&id).await?;
    assert_eq!(status.state(), api::ContainerState::ContainerExited);
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    assert!(status.finished_at >= status.started_at);
    node.cri.stop(&id, 10).await?;
    let late = node.cri.start(&id).await.unwrap_err();
    assert!(
        late.message().contains("is in CONTAINER_EXITED state"),
        "{late}"
    );
    for _ in 0..2 {
        node.cri.remove(&id).await?;
    }
    let gone = node.cri.status(&id).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound, "{gone}");
    if !newer("stopping a container that is gone") {
        node.cri.stop(&id, 1).await?;
    }
    // Removing does not ask for a stop first.
    let id = node.cri.run(&pod, &config).await?;
    node.cri.remove(&id).await?;
    let id = node.cri.create(&pod, &config).await?;
    node.cri.remove(&id).await?;
    node.finish().await
}

#[tokio::test]
async fn exits_are_told_with_code_and_reason() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("exits").await?;
    let cases = [
        ("ok", "exit 0", 0, "Completed"),
        ("bad", "exit 42", 42, "Error"),
        // What a lost end is told as; this one is not lost.
        ("worst", "exit 255", 255, "Error"),
        ("killed", "sh -c 'kill -KILL $$'; exit $?", 137, "Error"),
    ];
    for (name, script, code, reason) in cases {
        let id = node
            .cri
            .run(&pod, &node.container(name, &["sh", "-c", script]))
            .await?;
        let status = node.cri.exited(&id).await?;
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (code, reason),
            "{name}"
        );
        // The reference sets the times apart, in either order when the process ends at once.
        let in_order = status.finished_at >= status.started_at && status.started_at > 0;
        assert!(in_order || Subject::of_run() == Subject::Containerd);
    }
    let id = node
        .cri
        .create(&pod, &node.container("none", &["/no/such"]))
        .await?;
    let failed = node.cri.start(&id).await.unwrap_err();
    assert!(failed.message().contains("/no/such"), "{failed}");
    let status = node.cri.status(&id).await?;
    assert_eq!(status.state(), api::ContainerState::ContainerExited);
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (128, "StartError")
    );
    assert!(status.message.contains("/no/such"), "{status:?}");
    assert!(status.finished_at > 0);
    node.cri.remove(&id).await?;

    let mut config = node.container("oom", &["sh", "-c", "tail /dev/zero"]);
    config.linux.get_or_insert_default().resources = Some(api::LinuxContainerResources {
        memory_limit_in_bytes: 32 << 20,
        ..Default::default()
    });
    let id = node.cri.run(&pod, &config).await?;
    let status = node.cri.exited(&id).await?;
    // The shell may live to tell of its child.
    assert_eq!(status.exit_code, 137);
    eventually("the reason is told", async || {
        let status = node.cri.status(&id).await?;
        Ok((status.reason == "OOMKilled").then_some(()))
    })
    .await?;
    node.finish().await
}

#[tokio::test]
async fn stopping_sends_the_stop_signal_then_kills() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("signals").await?;
    let script = "trap 'exit 15' TERM; trap 'exit 10' USR1; echo up; while :; do sleep 0.05; done";
    let up = async |pod: &Pod, name: &str| {
        eventually("the trap is set", async || {
            Ok(node.log(pod, name).ok().filter(|l| !l.is_empty()).map(drop))
        })
        .await
    };
    let polite = node
        .cri
        .run(&pod, &node.container("polite", &["sh", "-c", script]))
        .await?;
    up(&pod, "polite").await?;
    node.cri.stop(&polite, 20).await?;
    assert_eq!(node.cri.status(&polite).await?.exit_code, 15);

    // The image's own signal.
    let layer = node.image.layers[0].clone();
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Cmd": ["sh"], "Env": ["PATH=/bin"], "StopSignal": "SIGUSR1" },
        "rootfs": { "type": "layers", "diff_ids": [layer.diff_id] },
    });
    let image = Image::with_config("docker.io/test/signal:1", &config, vec![layer])?;
    node.store(&image).await?;
    let mut container = node.container("image", &["sh", "-c", script]);
    container.image.get_or_insert_default().image = image.name.clone();
    let id = node.cri.run(&pod, &container).await?;
    up(&pod, "image").await?;
    node.cri.stop(&id, 20).await?;
    assert_eq!(node.cri.status(&id).await?.exit_code, 10);

    let script = "trap '' TERM; echo up; while :; do sleep 0.05; done";
    let stubborn = node
        .cri
        .run(&pod, &node.container("stubborn", &["sh", "-c", script]))
        .await?;
    up(&pod, "stubborn").await?;
    let begun = std::time::Instant::now();
    node.cri.stop(&stubborn, 1).await?;
    assert!(begun.elapsed() >= std::time::Duration::from_secs(1));
    let status = node.cri.status(&stubborn).await?;
    assert_eq!(status.state(), api::ContainerState::ContainerExited);
    assert_eq!(status.exit_code, 137);
    node.finish().await
}

#[tokio::test]
async fn containers_are_listed_by_id_pod_state_and_label() -> Result {
    let node = Node::start().await?;
    let (one, main) = node.run_idle("one").await?;
    let (two, other) = node.run_idle("two").await?;
    let done = node
        .cri
        .run(&one, &node.container("done", &["true"]))
        .await?;
    node.cri.exited(&done).await?;
    let created = node.cri.create(&two, &node.idle("created")).await?;
    let list = async |filter| -> Result<Vec<String>> {
        let found = node.cri.containers(Some(filter)).await?;
        let mut ids: Vec<_> = found.into_iter().map(|c| c.id).collect();
        ids.sort();
        Ok(ids)
    };
    let sorted = |ids: &[&String]| {
        let mut ids: Vec<String> = ids.iter().map(|&id| id.clone()).collect();
        ids.sort();
        ids
    };
    let none = api::ContainerFilter::default;
    assert_eq!(
        list(none()).await?,
        sorted(&[&main, &other, &done, &created])
    );
    let by_pod = |id: &str| api::ContainerFilter {
        pod_sandbox_id: id.to_owned(),
        ..none()
    };
    assert_eq!(list(by_pod(&one.id)).await?, sorted(&[&main, &done]));
    assert_eq!(
        list(by_pod(&two.id[..16])).await?,
        sorted(&[&other, &created])
    );
    let by_state = |state: api::ContainerState| api::ContainerFilter {
        state: Some(api::ContainerStateValue {
            state: state.into(),
        }),
        ..none()
    };
    let running = by_state(api::ContainerState::ContainerRunning);
    assert_eq!(list(running).await?, sorted(&[&main, &other]));
    let exited = by_state(api::ContainerState::ContainerExited);
    assert_eq!(list(exited).await?, sorted(&[&done]));
    let by_id = api::ContainerFilter {
        id: main[..16].to_owned(),
        ..none()
    };
    assert_eq!(list(by_id).await?, sorted(&[&main]));
    let by_label = api::ContainerFilter {
        label_selector: [("part".to_owned(), "created".to_owned())].into(),
        ..none()
    };
    assert_eq!(list(by_label).await?, sorted(&[&created]));
    let both = api::ContainerFilter {
        label_selector: [("part".to_owned(), "created".to_owned())].into(),
        ..by_pod(&one.id)
    };
    assert!(list(both).await?.is_empty());
    let all = node.cri.containers(None).await?;
    let item = all
        .iter()
        .find(|c| c.id == main)
        .cloned()
        .unwrap_or_default();
    assert_eq!(item.pod_sandbox_id, one.id);
    assert_eq!(item.metadata.unwrap_or_default().name, "main");
    assert_eq!(item.state, i32::from(api::ContainerState::ContainerRunning));
    assert!(item.created_at > 0 && !item.image_ref.is_empty());
    node.finish().await
}

#[tokio::test]
async fn commands_arguments_environment_and_directory_follow_the_rules() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("rules").await?;
    let layer = node.image.layers[0].clone();
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": {
            "Entrypoint": ["echo", "entry"], "Cmd": ["cmd"], "WorkingDir": "/var",
            "Env": ["PATH=/bin", "COLOUR=red", "SHIP=sloop"],
        },
        "rootfs": { "type": "layers", "diff_ids": [layer.diff_id] },
    });
    let image = Image::with_config("docker.io/test/rules:1", &config, vec![layer])?;
    node.store(&image).await?;
    let with = |name: &str, command: &[&str], args: &[&str]| {
        let mut container = node.container(name, command);
        container.image.get_or_insert_default().image = image.name.clone();
        container.args = args.iter().map(|&a| a.to_owned()).collect();
        container
    };
    let cases: [(&[&str], &[&str], &str); 4] = [
        (&[], &[], "entry cmd\n"),
        (&[], &["arg"], "entry arg\n"),
        (&["echo", "mine"], &[], "mine\n"),
        (&["echo", "mine"], &["arg"], "mine arg\n"),
    ];
    for (n, (command, args, expected)) in cases.into_iter().enumerate() {
        let (status, out) = output(&node, &pod, &with(&format!("c{n}"), command, args)).await?;
        assert_eq!((status.exit_code, out.as_str()), (0, expected));
    }
    let mut container = with(
        "env",
        &["sh", "-c", "pwd; echo $COLOUR $SHIP $NEW; echo $PATH"],
        &[],
    );
    container.envs = [("SHIP", "ketch"), ("NEW", "a=b c")]
        .map(|(key, value)| api::KeyValue {
            key: key.into(),
            value: value.into(),
        })
        .to_vec();
    let (_, out) = output(&node, &pod, &container).await?;
    assert_eq!(out, "/var\nred ketch a=b c\n/bin\n");
    container.metadata.get_or_insert_default().name = "dir".into();
    container.log_path = "dir.log".into();
    container.working_dir = "/made/for/it".into();
    let (_, out) = output(&node, &pod, &container).await?;
    assert!(out.starts_with("/made/for/it\n"), "{out}");

    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": [node.image.layers[0].diff_id] },
    });
    let layers = node.image.layers.clone();
    let image = Image::with_config("docker.io/test/nothing:1", &config, layers)?;
    node.store(&image).await?;
    let mut container = node.container("nothing", &[]);
    container.image.get_or_insert_default().image = image.name.clone();
    let refused = node.cri.create(&pod, &container).await.unwrap_err();
    assert!(
        refused.message().contains("no command specified"),
        "{refused}"
    );
    node.finish().await
}

#[tokio::test]
async fn users_and_groups_are_those_asked_for() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("users").await?;
    let script = "id -u; id -g; grep ^Groups: /proc/self/status";
    let base = |name: &str| node.container(name, &["sh", "-c", script]);
    let value = |value: i64| Some(api::Int64Value { value });
    let groups = |text: &str| {
        text.lines()
            .nth(2)
            .map(|l| {
                l.split_whitespace()
                    .skip(1)
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            })
            .unwrap_or_default()
    };

    let mut config = base("number");
    security(&mut config).run_as_user = value(1000);
    security(&mut config).supplemental_groups = vec![3000, 4000];
    let (_, out) = output(&node, &pod, &config).await?;
    assert!(out.starts_with("1000\n1000\n"), "{out}");
    let found = groups(&out);
    // The image says that user 1000 is in group 2000 too.
    for group in ["2000", "3000", "4000"] {
        assert!(found.iter().any(|g| g == group), "{group} in {out}");
    }
    let mut config = base("name");
    security(&mut config).run_as_username = "sailor".into();
    let (_, out) = output(&node, &pod, &config).await?;
    assert!(out.starts_with("1000\n1000\n"), "{out}");
    let mut config = base("group");
    security(&mut config).run_as_user = value(1000);
    security(&mut config).run_as_group = value(777);
    let (_, out) = output(&node, &pod, &config).await?;
    assert!(out.starts_with("1000\n777\n"), "{out}");

    let mut config = base("alone");
    security(&mut config).run_as_group = value(777);
    node.cri.create(&pod, &config).await.unwrap_err();
    let mut config = base("nobody");
    security(&mut config).run_as_username = "nosuch".into();
    let refused = node.cri.create(&pod, &config).await.unwrap_err();
    assert!(refused.message().contains("no users found"), "{refused}");
    // Failures keep no name.
    let mut config = base("nobody");
    security(&mut config).run_as_username = "root".into();
    let (_, out) = output(&node, &pod, &config).await?;
    assert!(out.starts_with("0\n0\n"), "{out}");
    node.finish().await
}

#[tokio::test]
async fn privileges_are_those_asked_for() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("rights").await?;
    let script = "grep ^CapEff /proc/self/status; grep ^NoNewPrivs /proc/self/status; \
                  touch /file 2>/dev/null && echo writable || echo readonly; \
                  cat /proc/kcore 2>/dev/null | head -c 1 | wc -c; \
                  echo x 2>/dev/null >/proc/sys/kernel/domainname && echo set || echo kept";
    let base = |name: &str| node.container(name, &["sh", "-c", script]);
    let capabilities = |out: &str| {
        let line = out.lines().next().unwrap_or_default();
        let hex = line.split_whitespace().nth(1).unwrap_or_default();
        u64::from_str_radix(hex, 16).unwrap_or(0)
    };
    let (_, out) = output(&node, &pod, &base("plain")).await?;
    assert_eq!(capabilities(&out), 0xa804_25fb, "{out}");
    assert!(out.contains("NoNewPrivs:\t0\nwritable\n"), "{out}");
    let mut config = base("none");
    let capability = |add: &[&str], drop: &[&str]| {
        Some(api::Capability {
            add_capabilities: add.iter().map(|&c| c.to_owned()).collect(),
            drop_capabilities: drop.iter().map(|&c| c.to_owned()).collect(),
            ..Default::default()
        })
    };
    security(&mut config).capabilities = capability(&["net_admin"], &["ALL"]);
    security(&mut config).no_new_privs = true;
    security(&mut config).readonly_rootfs = true;
    security(&mut config).readonly_paths = vec!["/proc/sys".into()];
    security(&mut config).masked_paths = vec!["/proc/kcore".into()];
    let (_, out) = output(&node, &pod, &config).await?;
    assert_eq!(capabilities(&out), 1 << 12, "{out}");
    assert!(out.contains("NoNewPrivs:\t1\nreadonly\n0\nkept\n"), "{out}");
    let mut config = base("more");
    security(&mut config).capabilities = capability(&["SYS_PTRACE"], &["MKNOD"]);
    let (_, out) = output(&node, &pod, &config).await?;
    assert_eq!(
        capabilities(&out),
        (0xa804_25fb | 1 << 19) & !(1 << 27),
        "{out}"
    );

    let mut config = base("mighty");
    security(&mut config).privileged = true;
    let refused = node.cri.create(&pod, &config).await.unwrap_err();
    let text = "no privileged container allowed in sandbox";
    assert!(refused.message().contains(text), "{refused}");
    let mut sandbox = node.pod("mighty");
    let linux = sandbox.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let mighty = node.cri.run_pod(&sandbox).await?;
    let (_, out) = output(&node, &mighty, &config).await?;
    assert_eq!(
        capabilities(&out).count_ones(),
        own_capabilities()?.count_ones(),
        "{out}"
    );
    node.finish().await
}

fn own_capabilities() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    Ok(u64::from_str_radix(line.unwrap_or_default().trim(), 16)?)
}

#[tokio::test]
async fn host_paths_are_mounted_as_asked() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("mounts").await?;
    let dir = node.daemon.dir().join("shared");
    fs::create_dir(&dir)?;
    fs::write(dir.join("note"), "from the host\n")?;
    std::os::unix::fs::symlink(&dir, node.daemon.dir().join("link"))?;
    let mount = |host: &str, inside: &str, readonly| api::Mount {
        container_path: inside.to_owned(),
        host_path: node.daemon.dir().join(host).display().to_string(),
        readonly,
        ..Default::default()
    };
    let mut config = node.idle("main");
    config.mounts = vec![
        mount("shared", "/rw", false),
        mount("shared", "/ro", true),
        mount("link", "/linked", false),
        mount("not/there/yet", "/made", false),
        mount("shared/note", "/etc/hosts", true),
    ];
    let id = node.cri.run(&pod, &config).await?;
    let script = "cat /ro/note /linked/note /etc/hosts; echo x > /rw/back; echo x > /ro/no || echo refused; ls -d /made";
    let out = node.cri.shell(&id, script).await?;
    assert_eq!(
        out,
        "from the host\nfrom the host\nfrom the host\nrefused\n/made\n"
    );
    assert_eq!(fs::read_to_string(dir.join("back"))?, "x\n");
    assert!(node.daemon.dir().join("not/there/yet").is_dir());
    let status = node.cri.status(&id).await?;
    assert_eq!(status.mounts.len(), 5);
    assert!(
        status
            .mounts
            .iter()
            .any(|m| m.container_path == "/ro" && m.readonly)
    );

    let mut config = node.idle("device");
    config.devices = vec![api::Device {
        container_path: "/dev/nothing".into(),
        host_path: "/dev/null".into(),
        permissions: "rw".into(),
    }];
    let id = node.cri.run(&pod, &config).await?;
    let out = node
        .cri
        .shell(&id, "echo x > /dev/nothing; stat -c %F /dev/nothing")
        .await?;
    assert_eq!(out, "character special file\n");
    node.finish().await
}

#[tokio::test]
async fn volumes_of_the_image_are_filled_from_it() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("volumes").await?;
    let files = Layer::files(&[("data/seed", b"grain\n")])?;
    let layers = vec![node.image.layers[0].clone(), files];
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Cmd": ["sh"], "Env": ["PATH=/bin"], "Volumes": { "/data": {} } },
        "rootfs": { "type": "layers", "diff_ids": [layers[0].diff_id, layers[1].diff_id] },
    });
    let image = Image::with_config("docker.io/test/volumes:1", &config, layers)?;
    node.store(&image).await?;
    let mut config = node.idle("main");
    config.image.get_or_insert_default().image = image.name.clone();
    let id = node.cri.run(&pod, &config).await?;
    let out = node.cri.shell(
        &id,
        "cat /data/seed; echo more > /data/new; grep -c ' /data ' /proc/self/mountinfo",
    );
    assert_eq!(out.await?, "grain\n1\n");
    node.finish().await
}

#[tokio::test]
async fn resources_are_set_shown_and_changed() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("limits").await?;
    let mut config = node.idle("main");
    let resources = api::LinuxContainerResources {
        cpu_shares: 512,
        cpu_quota: 20_000,
        cpu_period: 100_000,
        memory_limit_in_bytes: 64 << 20,
        ..Default::default()
    };
    config.linux.get_or_insert_default().resources = Some(resources.clone());
    let id = node.cri.run(&pod, &config).await?;
    let group = |controller: &str, file: &str| -> Result<String> {
        let namespace = node.daemon.namespace();
        let path = format!("/sys/fs/cgroup/{controller}/{namespace}/{id}/{file}");
        Ok(fs::read_to_string(path)?.trim().to_owned())
    };
    let v1 = fs::exists("/sys/fs/cgroup/memory")?;
    if v1 {
        assert_eq!(
            group("memory", "memory.limit_in_bytes")?,
            (64 << 20).to_string()
        );
        assert_eq!(group("cpu", "cpu.shares")?, "512");
        assert_eq!(group("cpu", "cpu.cfs_quota_us")?, "20000");
    }
    let request = api::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(api::LinuxContainerResources {
            cpu_shares: 256,
            memory_limit_in_bytes: 96 << 20,
            ..Default::default()
        }),
        ..Default::default()
    };
    node.cri
        .runtime()
        .update_container_resources(request.clone())
        .await?;
    if v1 {
        assert_eq!(
            group("memory", "memory.limit_in_bytes")?,
            (96 << 20).to_string()
        );
        assert_eq!(group("cpu", "cpu.shares")?, "256");
        // What is not named stays.
        assert_eq!(group("cpu", "cpu.cfs_quota_us")?, "20000");
    }
    let shown = node.cri.status(&id).await?.resources;
    let shown = shown.and_then(|r| r.linux);
    if let Some(shown) = shown {
        assert_eq!((shown.cpu_shares, shown.cpu_quota), (256, 20_000));
        assert_eq!(shown.memory_limit_in_bytes, 96 << 20);
    } else {
        assert!(newer("resources in the status"));
    }
    let created = node.cri.create(&pod, &node.idle("created")).await?;
    let mut later = request.clone();
    later.container_id = created.clone();
    node.cri.runtime().update_container_resources(later).await?;
    node.cri.start(&created).await?;
    if v1 {
        let namespace = node.daemon.namespace();
        let path = format!("/sys/fs/cgroup/cpu/{namespace}/{created}/cpu.shares");
        assert_eq!(fs::read_to_string(path)?.trim(), "256");
    }
    let mut unknown = request;
    unknown.container_id = "0123456789abcdef".into();
    let refused = node
        .cri
        .runtime()
        .update_container_resources(unknown)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused}");
    node.finish().await
}
