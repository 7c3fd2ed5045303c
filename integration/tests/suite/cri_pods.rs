//! CRI: pod sandboxes.

use std::collections::HashMap;
use std::fs;

use lighter_integration::cri::{Node, newer};
use lighter_integration::{Result, eventually};
use lighter_proto::runtime::v1 as api;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tonic::Code;

/// The verbose information of a pod.
pub(crate) async fn info(node: &Node, id: &str) -> Result<Value> {
    let status = node.cri.pod_status(id).await?;
    Ok(serde_json::from_str(&status.info["info"])?)
}

fn linux(config: &mut api::PodSandboxConfig) -> &mut api::LinuxPodSandboxConfig {
    config.linux.get_or_insert_default()
}

pub(crate) fn namespaces(config: &mut api::PodSandboxConfig) -> &mut api::NamespaceOption {
    let security = linux(config).security_context.get_or_insert_default();
    security.namespace_options.get_or_insert_default()
}

#[tokio::test]
async fn a_pod_is_ready_then_stopped_then_gone() -> Result {
    let node = Node::with_network().await?;
    let config = node.pod("boat");
    let pod = node.cri.run_pod(&config).await?;
    assert!(
        pod.id.len() == 64 && pod.id.bytes().all(|b| b.is_ascii_hexdigit()),
        "{}",
        pod.id
    );
    let answer = node.cri.pod_status(&pod.id).await?;
    let status = answer.status.unwrap_or_default();
    assert_eq!(status.state(), api::PodSandboxState::SandboxReady);
    assert_eq!(status.id, pod.id);
    assert_eq!(status.metadata, config.metadata);
    assert_eq!(status.labels, config.labels);
    assert_eq!(status.annotations, config.annotations);
    assert!(status.created_at > 1_600_000_000_000_000_000, "{status:?}");
    let address = status.network.unwrap_or_default().ip;
    assert!(node.network.contains(&address), "{address}");
    let options = status
        .linux
        .unwrap_or_default()
        .namespaces
        .unwrap_or_default();
    let options = options.options.unwrap_or_default();
    assert_eq!(options.network(), api::NamespaceMode::Pod);

    let info = info(&node, &pod.id).await?;
    assert!(info["pid"].as_u64().is_some_and(|pid| pid > 1), "{info}");
    assert_eq!(info["netNamespaceClosed"], false, "{info}");
    assert_eq!(info["snapshotKey"], pod.id, "{info}");
    assert!(info["runtimeSpec"]["linux"].is_object(), "{info}");
    assert!(info["config"]["metadata"].is_object(), "{info}");
    let interfaces = &info["cniResult"]["Interfaces"];
    assert_eq!(interfaces["eth0"]["IPConfigs"][0]["IP"], address, "{info}");

    let listed = node.cri.pods(None).await?;
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].id, pod.id);
    assert_eq!(listed[0].metadata, config.metadata);
    assert_eq!(listed[0].created_at, status.created_at);

    for _ in 0..2 {
        node.cri.stop_pod(&pod.id).await?;
        let state = node.cri.pod_state(&pod.id).await?;
        assert_eq!(state, api::PodSandboxState::SandboxNotready);
    }
    let answer = node.cri.pod_status(&pod.id).await?;
    let network = answer.status.unwrap_or_default().network;
    assert_eq!(network.unwrap_or_default().ip, "");
    for _ in 0..2 {
        node.cri.remove_pod(&pod.id).await?;
    }
    let gone = node.cri.pod_status(&pod.id).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound, "{gone}");
    assert!(node.cri.pods(None).await?.is_empty());
    if !newer("stopping a pod that is gone") {
        node.cri.stop_pod(&pod.id).await?;
    }
    // The same name is free again.
    let again = node.cri.run_pod(&config).await?;
    assert_ne!(again.id, pod.id);
    node.finish().await
}

#[tokio::test]
async fn pods_are_listed_by_id_state_and_label() -> Result {
    let node = Node::start().await?;
    let mut pods = Vec::new();
    for name in ["ant", "bee", "cat"] {
        let mut config = node.pod(name);
        config.labels.insert("kind".into(), "animal".into());
        pods.push(node.cri.run_pod(&config).await?);
    }
    node.cri.stop_pod(&pods[2].id).await?;
    let list = async |filter| -> Result<Vec<String>> {
        let found = node.cri.pods(Some(filter)).await?;
        let names = found
            .into_iter()
            .map(|p| p.metadata.unwrap_or_default().name);
        let mut names: Vec<_> = names.collect();
        names.sort();
        Ok(names)
    };
    let none = api::PodSandboxFilter::default;
    assert_eq!(list(none()).await?, ["ant", "bee", "cat"]);
    let by_state = |state: api::PodSandboxState| api::PodSandboxFilter {
        state: Some(api::PodSandboxStateValue {
            state: state.into(),
        }),
        ..none()
    };
    let ready = by_state(api::PodSandboxState::SandboxReady);
    assert_eq!(list(ready).await?, ["ant", "bee"]);
    let stopped = by_state(api::PodSandboxState::SandboxNotready);
    assert_eq!(list(stopped).await?, ["cat"]);
    let by_id = |id: &str| api::PodSandboxFilter {
        id: id.to_owned(),
        ..none()
    };
    assert_eq!(list(by_id(&pods[1].id)).await?, ["bee"]);
    assert_eq!(list(by_id(&pods[1].id[..20])).await?, ["bee"]);
    assert!(list(by_id("0123456789")).await?.is_empty());
    let labels = |pairs: &[(&str, &str)]| api::PodSandboxFilter {
        label_selector: pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect(),
        ..none()
    };
    assert_eq!(list(labels(&[("kind", "animal")])).await?.len(), 3);
    let both = labels(&[("kind", "animal"), ("app", "ant")]);
    assert_eq!(list(both).await?, ["ant"]);
    let neither = labels(&[("kind", "animal"), ("app", "dog")]);
    assert!(list(neither).await?.is_empty());
    // Prefixes do for the other calls as well.
    node.cri.stop_pod(&pods[0].id[..16]).await?;
    let state = node.cri.pod_state(&pods[0].id[..16]).await?;
    assert_eq!(state, api::PodSandboxState::SandboxNotready);
    node.cri.remove_pod(&pods[0].id[..16]).await?;
    assert_eq!(list(none()).await?, ["bee", "cat"]);
    node.finish().await
}

#[tokio::test]
async fn a_name_is_taken_until_its_pod_is_removed() -> Result {
    let node = Node::start().await?;
    let config = node.pod("twin");
    let first = node.cri.run_pod(&config).await?;
    let taken = node.cri.run_pod(&config).await.unwrap_err();
    assert!(
        taken
            .message()
            .contains("failed to reserve sandbox name \"twin_harbour_uid-twin_0\""),
        "{taken}"
    );
    assert!(taken.message().contains(&first.id), "{taken}");
    node.cri.stop_pod(&first.id).await?;
    node.cri.run_pod(&config).await.unwrap_err();
    let mut next = config.clone();
    next.metadata.get_or_insert_default().attempt = 1;
    let second = node.cri.run_pod(&next).await?;
    node.cri.remove_pod(&first.id).await?;
    let third = node.cri.run_pod(&config).await?;
    // Removing a running pod stops it first.
    node.cri.remove_pod(&second.id).await?;
    node.cri.remove_pod(&third.id).await?;
    node.finish().await
}

#[tokio::test]
async fn many_calls_for_one_name_make_one_pod() -> Result {
    let node = Node::start().await?;
    let config = node.pod("race");
    let calls = (0..8).map(|_| node.cri.run_pod(&config));
    let done = futures::future::join_all(calls).await;
    assert_eq!(done.iter().filter(|d| d.is_ok()).count(), 1, "{done:?}");
    assert_eq!(node.cri.pods(None).await?.len(), 1);
    let id = node.cri.pods(None).await?[0].id.clone();
    let stops = (0..4).map(|_| node.cri.stop_pod(&id));
    for done in futures::future::join_all(stops).await {
        done?;
    }
    let removes = (0..4).map(|_| node.cri.remove_pod(&id));
    futures::future::join_all(removes).await;
    node.cri.remove_pod(&id).await?;
    node.finish().await
}

#[tokio::test]
async fn names_hosts_and_resolvers_are_the_pods_own() -> Result {
    let node = Node::with_network().await?;
    let mut config = node.pod("named");
    config.hostname = "lighthouse".into();
    config.dns_config = Some(api::DnsConfig {
        servers: vec!["10.10.10.10".into(), "10.10.10.11".into()],
        searches: vec!["google.com".into(), "example.com".into()],
        options: vec!["ndots:8".into()],
    });
    let sysctls = [
        ("net.ipv4.ip_forward", "1"),
        ("kernel.shm_rmid_forced", "1"),
    ];
    linux(&mut config).sysctls = sysctls.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    let pod = node.cri.run_pod(&config).await?;
    let one = node.cri.run(&pod, &node.idle("one")).await?;
    let two = node.cri.run(&pod, &node.idle("two")).await?;
    let resolv = "search google.com example.com\nnameserver 10.10.10.10\nnameserver 10.10.10.11\noptions ndots:8\n";
    assert_eq!(node.cri.shell(&one, "cat /etc/resolv.conf").await?, resolv);
    let name = node
        .cri
        .shell(&one, "hostname; cat /etc/hostname; echo $HOSTNAME");
    assert_eq!(name.await?, "lighthouse\nlighthouse\nlighthouse\n");
    let hosts = node.cri.shell(&one, "cat /etc/hosts").await?;
    assert_eq!(hosts, fs::read_to_string("/etc/hosts")?);
    let values = "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shm_rmid_forced \
                  /proc/sys/net/ipv4/ip_unprivileged_port_start";
    let values = node.cri.shell(&one, values).await?;
    assert!(values.starts_with("1\n1\n"), "{values}");
    // Both containers see one network and one shared memory; each has its own processes.
    node.cri.shell(&one, "echo tide > /dev/shm/note").await?;
    assert_eq!(node.cri.shell(&two, "cat /dev/shm/note").await?, "tide\n");
    let links = "ip -o link | wc -l; ip -o -4 address show eth0";
    let (ours, theirs) = (
        node.cri.shell(&one, links).await?,
        node.cri.shell(&two, links).await?,
    );
    assert_eq!(ours, theirs);
    let size = node.cri.shell(&one, "stat -f -c %b*%s /dev/shm").await?;
    let bytes: u64 = size
        .trim()
        .split('*')
        .map(|n| n.parse::<u64>().unwrap_or(0))
        .product();
    assert_eq!(bytes, 64 << 20);
    node.finish().await
}

#[tokio::test]
async fn namespaces_are_shared_as_asked() -> Result {
    let node = Node::with_network().await?;
    let own = |kind: &str| -> Result<String> {
        Ok(fs::read_link(format!("/proc/self/ns/{kind}"))?
            .display()
            .to_string())
    };
    let inside = async |id: &str, kind: &str| -> Result<String> {
        let script = format!("readlink /proc/self/ns/{kind}");
        Ok(node.cri.shell(id, &script).await?.trim().to_owned())
    };

    let mut config = node.pod("host");
    config.hostname = String::new();
    let options = namespaces(&mut config);
    for field in [&mut options.network, &mut options.pid, &mut options.ipc] {
        *field = api::NamespaceMode::Node.into();
    }
    let host = node.cri.run_pod(&config).await?;
    let mut container = node.idle("main");
    let security = container.linux.get_or_insert_default();
    let security = security.security_context.get_or_insert_default();
    security.namespace_options = Some(namespaces(&mut config).clone());
    let id = node.cri.run(&host, &container).await?;
    for kind in ["net", "pid", "ipc"] {
        assert_eq!(inside(&id, kind).await?, own(kind)?, "{kind}");
    }
    assert_ne!(inside(&id, "mnt").await?, own("mnt")?);
    let status = node.cri.pod_status(&host.id).await?.status;
    assert_eq!(
        status.unwrap_or_default().network.unwrap_or_default().ip,
        ""
    );
    let name = node.cri.shell(&id, "hostname").await?;
    assert_eq!(name.trim(), nix::unistd::gethostname()?.to_string_lossy());
    // Ending such a pod must not end what else runs on the host.
    node.cri.end_pod(&host.id).await?;

    let mut config = node.pod("shared");
    namespaces(&mut config).pid = api::NamespaceMode::Pod.into();
    let shared = node.cri.run_pod(&config).await?;
    let mut container = node.idle("one");
    let security = container.linux.get_or_insert_default();
    let security = security.security_context.get_or_insert_default();
    security.namespace_options = Some(namespaces(&mut config).clone());
    let one = node.cri.run(&shared, &container).await?;
    container.metadata.get_or_insert_default().name = "two".into();
    let two = node.cri.run(&shared, &container).await?;
    assert_eq!(inside(&one, "pid").await?, inside(&two, "pid").await?);
    assert_eq!(inside(&one, "ipc").await?, inside(&two, "ipc").await?);
    assert_eq!(inside(&one, "uts").await?, inside(&two, "uts").await?);
    for kind in ["net", "pid", "ipc", "uts"] {
        assert_ne!(inside(&one, kind).await?, own(kind)?, "{kind}");
    }
    let first = node.cri.shell(&one, "cat /proc/1/cmdline").await?;
    assert!(
        !first.starts_with("sh"),
        "the sandbox's process is first: {first}"
    );
    // A third looks at the processes of the first only.
    let security = container.linux.get_or_insert_default();
    let security = security.security_context.get_or_insert_default();
    security.namespace_options = Some(api::NamespaceOption {
        pid: api::NamespaceMode::Target.into(),
        target_id: one.clone(),
        ..Default::default()
    });
    container.metadata.get_or_insert_default().name = "debug".into();
    let debug = node.cri.run(&shared, &container).await?;
    assert_eq!(inside(&one, "pid").await?, inside(&debug, "pid").await?);
    // When the sandbox's process dies, its namespace's processes die with it.
    let pid = info(&node, &shared.id).await?["pid"].as_i64().unwrap_or(0);
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    eventually("the pod is not ready", async || {
        let state = node.cri.pod_state(&shared.id).await?;
        Ok((state == api::PodSandboxState::SandboxNotready).then_some(()))
    })
    .await?;
    for id in [&one, &two, &debug] {
        assert_eq!(node.cri.exited(id).await?.exit_code, 137);
    }
    let refused = node
        .cri
        .create(&shared, &node.idle("late"))
        .await
        .unwrap_err();
    let words = refused.message().contains("is not running");
    assert!(words || newer("this refusal's text"), "{refused}");
    node.finish().await
}

#[tokio::test]
async fn stopping_a_pod_ends_its_containers_and_keeps_their_exits() -> Result {
    let node = Node::with_network().await?;
    let (pod, main) = node.run_idle("crew").await?;
    let done = node
        .cri
        .run(&pod, &node.container("done", &["sh", "-c", "exit 3"]))
        .await?;
    node.cri.exited(&done).await?;
    let created = node.cri.create(&pod, &node.idle("created")).await?;
    node.cri.stop_pod(&pod.id).await?;
    let status = node.cri.status(&main).await?;
    assert_eq!(status.state(), api::ContainerState::ContainerExited);
    assert_eq!(status.exit_code, 137);
    assert_eq!(node.cri.status(&done).await?.exit_code, 3);
    let state = node.cri.status(&created).await?.state();
    assert_eq!(state, api::ContainerState::ContainerCreated);
    let listed = node.cri.containers(Some(api::ContainerFilter {
        pod_sandbox_id: pod.id.clone(),
        ..Default::default()
    }));
    assert_eq!(listed.await?.len(), 3);
    node.cri.remove_pod(&pod.id).await?;
    for id in [&main, &done, &created] {
        let gone = node.cri.status(id).await.unwrap_err();
        assert_eq!(gone.code(), Code::NotFound, "{gone}");
    }
    node.finish().await
}

#[tokio::test]
async fn labels_and_annotations_reach_the_record_and_the_spec() -> Result {
    let node = Node::start().await?;
    let mut config = node.pod("marked");
    config.annotations = HashMap::from([("key".into(), "value".into())]);
    let pod = node.cri.run_pod(&config).await?;
    let id = node.cri.run(&pod, &node.idle("main")).await?;
    let client = node.client().await?;
    use lighter_proto::containerd::services::containers::v1::GetContainerRequest;
    let get = async |id: &str| -> Result<_> {
        let request = GetContainerRequest { id: id.to_owned() };
        let answer = client.containers().get(request).await?.into_inner();
        Ok(answer.container.unwrap_or_default())
    };
    let record = get(&pod.id).await?;
    assert_eq!(record.labels["io.cri-containerd.kind"], "sandbox");
    assert_eq!(record.labels["app"], "marked");
    assert_eq!(record.snapshot_key, pod.id);
    let record = get(&id).await?;
    assert_eq!(record.labels["io.cri-containerd.kind"], "container");
    assert_eq!(record.labels["part"], "main");
    assert_eq!(record.image, node.image.name);
    let spec: Value = serde_json::from_slice(&record.spec.unwrap_or_default().value)?;
    let annotation = |name: &str| spec["annotations"][format!("io.kubernetes.cri.{name}")].clone();
    assert_eq!(annotation("container-type"), "container");
    assert_eq!(annotation("sandbox-id"), pod.id);
    assert_eq!(annotation("container-name"), "main");
    assert_eq!(annotation("sandbox-name"), "marked");
    assert_eq!(annotation("sandbox-namespace"), "harbour");
    let group = spec["linux"]["cgroupsPath"].as_str().unwrap_or_default();
    assert_eq!(group, format!("/{}/{id}", node.daemon.namespace()));
    // A kubelet's cAdvisor asks for the task of what it sees in the cgroup tree.
    let task = client.task(&id, "").await?;
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", task.pid))?;
    assert!(groups.contains(&format!("/{id}\n")), "{groups}");
    node.finish().await
}

#[tokio::test]
async fn resources_of_a_pod_are_kept_and_shown() -> Result {
    if newer("UpdatePodSandboxResources") {
        return Ok(());
    }
    let mut node = Node::start().await?;
    let (pod, _) = node.run_idle("grown").await?;
    let info = async |node: &Node| -> Result<Value> {
        let answer = node.cri.pod_status(&pod.id).await?;
        Ok(serde_json::from_str(&answer.info["info"])?)
    };
    assert!(info(&node).await?["resources"].is_null());
    let linux = |shares| {
        Some(api::LinuxContainerResources {
            cpu_shares: shares,
            ..Default::default()
        })
    };
    let request = api::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.id.clone(),
        overhead: linux(11),
        resources: linux(222),
    };
    node.cri
        .runtime()
        .update_pod_sandbox_resources(request)
        .await?;
    for restarted in [false, true] {
        if restarted {
            node.daemon.kill()?;
            node.boot().await?;
        }
        let told = info(&node).await?;
        let shares = |of: &str| {
            let value = &told[of]["linux"]["cpu_shares"];
            value.as_i64().or_else(|| value.as_str()?.parse().ok())
        };
        assert_eq!(shares("overhead"), Some(11), "{told}");
        assert_eq!(shares("resources"), Some(222), "{told}");
    }
    let request = api::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: "0123456789abcdef".into(),
        ..Default::default()
    };
    let unknown = node
        .cri
        .runtime()
        .update_pod_sandbox_resources(request)
        .await;
    assert_eq!(unknown.unwrap_err().code(), Code::NotFound);
    node.finish().await
}
