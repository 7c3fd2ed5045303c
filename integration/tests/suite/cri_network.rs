//! CRI: pod networks by real plugins, and by plugins that fail.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use lighter_integration::cri::{Node, Outside, Pod, Settings, faults, newer};
use lighter_integration::{Result, eventually};
use lighter_proto::runtime::v1 as api;
use serde_json::json;

/// A pod that answers `text` on port 80, and its address.
async fn serve(node: &Node, config: &api::PodSandboxConfig, text: &str) -> Result<(Pod, String)> {
    let pod = node.cri.run_pod(config).await?;
    let script =
        format!("mkdir /www; echo {text} > /www/index.html; exec busybox httpd -f -p 80 -h /www");
    let server = node.container("server", &["sh", "-c", &script]);
    let id = node.cri.run(&pod, &server).await?;
    let status = node.cri.pod_status(&pod.id).await?.status;
    let address = status.unwrap_or_default().network.unwrap_or_default().ip;
    eventually("the server answers", async || {
        let asked = node
            .cri
            .exec(&id, &["wget", "-q", "-O", "-", "http://127.0.0.1/"])
            .await?;
        Ok((asked.exit_code == 0).then_some(()))
    })
    .await?;
    Ok((pod, address))
}

fn get(address: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[tokio::test]
async fn pods_reach_each_other_and_the_host_reaches_their_ports() -> Result {
    let node = Node::with_network().await?;
    let mut config = node.pod("server");
    let free = || -> Result<i32> {
        let port = std::net::TcpListener::bind("0.0.0.0:0")?
            .local_addr()?
            .port();
        Ok(i32::from(port))
    };
    let port = free()?;
    config.port_mappings = vec![api::PortMapping {
        protocol: api::Protocol::Tcp.into(),
        container_port: 80,
        host_port: port,
        host_ip: String::new(),
    }];
    let (server, address) = serve(&node, &config, "ahoy").await?;
    let (_, client) = node.run_idle("client").await?;
    let fetched = format!("wget -q -O - http://{address}/");
    assert_eq!(node.cri.shell(&client, &fetched).await?, "ahoy\n");
    // From the host: the pod itself, and its port on the host.
    assert!(get(&format!("{address}:80"))?.ends_with("ahoy\n"));
    let gateway = node.network.gateway();
    assert!(get(&format!("{gateway}:{port}"))?.ends_with("ahoy\n"));
    // From a pod, by the host's port.
    let fetched = format!("wget -q -O - http://{gateway}:{port}/");
    assert_eq!(node.cri.shell(&client, &fetched).await?, "ahoy\n");
    node.cri.stop_pod(&server.id).await?;
    assert!(get(&format!("{gateway}:{port}")).is_err());
    // The port and the address are free again.
    let held = node.network.held();
    assert!(
        !held.iter().any(|h| h.contains(&format!("lease {address}"))),
        "{held:?}"
    );
    assert!(!held.iter().any(|h| h.contains(&server.id)), "{held:?}");
    node.cri.remove_pod(&server.id).await?;
    let (_, address) = serve(&node, &config, "again").await?;
    assert!(get(&format!("{gateway}:{port}"))?.ends_with("again\n"));
    assert!(get(&format!("{address}:80"))?.ends_with("again\n"));
    node.finish().await
}

#[tokio::test]
async fn traffic_to_the_outside_is_masqueraded() -> Result {
    let node = Node::with_network().await?;
    let outside = Outside::new()?;
    let listener = outside.listen()?;
    let target = listener.local_addr()?;
    let (_, client) = node.run_idle("client").await?;
    let accepted = std::thread::spawn(move || -> Result<String> {
        let (mut stream, from) = listener.accept()?;
        stream.write_all(b"welcome\n")?;
        Ok(from.ip().to_string())
    });
    let script = format!("nc -w 10 {} {} < /dev/null", target.ip(), target.port());
    let said = node.cri.shell(&client, &script).await?;
    assert_eq!(said, "welcome\n");
    let from = accepted.join().map_err(|_| anyhow::anyhow!("panicked"))??;
    assert_eq!(from, outside.here().to_string());
    node.finish().await
}

#[tokio::test]
async fn bandwidth_is_what_annotations_say() -> Result {
    let node = Node::with_network().await?;
    let plugin = json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } });
    node.network.write(&node.network.list(&[plugin]))?;
    eventually("the list is read", async || {
        let request = api::StatusRequest { verbose: true };
        let status = node.cri.runtime().status(request).await?.into_inner();
        let told = status.info.get("cniconfig").cloned().unwrap_or_default();
        Ok(told.contains("bandwidth").then_some(()))
    })
    .await?;
    let mut config = node.pod("slow");
    let limits = [("ingress", "8M"), ("egress", "16M")];
    for (way, rate) in limits {
        let key = format!("kubernetes.io/{way}-bandwidth");
        config.annotations.insert(key, rate.to_owned());
    }
    let pod = node.cri.run_pod(&config).await?;
    let shaped = || -> Result<String> {
        let output = std::process::Command::new("tc")
            .args(["qdisc", "show"])
            .output()?;
        let text = String::from_utf8(output.stdout)?;
        let lines = text.lines().filter(|l| l.contains(" tbf "));
        Ok(lines.collect::<Vec<_>>().join("\n"))
    };
    let rules = shaped()?;
    assert!(rules.contains("rate 8Mbit"), "{rules}");
    assert!(rules.contains("rate 16Mbit"), "{rules}");
    node.cri.end_pod(&pod.id).await?;
    assert!(!shaped()?.contains("rate 16Mbit"), "{}", shaped()?);
    if !newer("a pod that was refused for its bandwidth can be removed") {
        config
            .annotations
            .insert("kubernetes.io/ingress-bandwidth".into(), "much".into());
        let refused = node.cri.run_pod(&config).await.unwrap_err();
        assert!(refused.message().contains("bandwidth"), "{refused}");
    }
    node.finish().await
}

#[tokio::test]
async fn every_end_of_a_pod_frees_its_network() -> Result {
    let node = Node::with_network().await?;
    let pod = node.run_pod("ends").await?;
    assert_eq!(
        node.network
            .held()
            .iter()
            .filter(|h| h.starts_with("lease"))
            .count(),
        1
    );
    let info = crate::cri_pods::info(&node, &pod.id).await?;
    let namespaces = info["runtimeSpec"]["linux"]["namespaces"]
        .as_array()
        .cloned();
    let path = namespaces
        .into_iter()
        .flatten()
        .find(|n| n["type"] == "network")
        .and_then(|n| n["path"].as_str().map(str::to_owned))
        .unwrap_or_default();
    assert!(std::fs::exists(&path)?, "{path}");
    // Someone takes the namespace away: stopping and removing go on.
    nix::mount::umount2(path.as_str(), nix::mount::MntFlags::MNT_DETACH)?;
    std::fs::remove_file(&path)?;
    node.cri.end_pod(&pod.id).await?;
    assert!(!std::fs::exists(&path)?);
    let held = node.network.held();
    // The bridge plugin takes its rules back only while it can look into the namespace.
    assert!(held.iter().all(|h| h.starts_with("rule")), "{held:?}");
    node.network.sweep();
    node.finish().await
}

/// A node whose one network is the plugin `fault`.
pub(crate) async fn faulty(script: &str) -> Result<Node> {
    let settings = Settings {
        network: true,
        ..Settings::default()
    };
    let node = Node::start_with(&settings).await?;
    node.network.plugin("fault", script)?;
    let list = json!({
        "cniVersion": "1.0.0", "name": node.network.name(), "plugins": [{ "type": "fault" }]
    });
    node.network.write(&list)?;
    eventually("the list is read", async || {
        let request = api::StatusRequest { verbose: true };
        let status = node.cri.runtime().status(request).await?.into_inner();
        let told = status.info.get("cniconfig").cloned().unwrap_or_default();
        Ok(told.contains("fault").then_some(()))
    })
    .await?;
    Ok(node)
}

#[tokio::test]
async fn a_failing_plugin_fails_the_pod_and_leaves_nothing() -> Result {
    let cases = [
        (faults::FAILS, "no berth is free"),
        (faults::CRASHES, "fault"),
        (faults::GARBAGE, "fault"),
        (faults::NO_ADDRESS, "failed to find network info"),
        ("exit 3", "fault"),
    ];
    let node = faulty("exit 0").await?;
    let config = node.pod("unlucky");
    for (script, told) in cases {
        node.network.plugin("fault", script)?;
        let refused = node.cri.run_pod(&config).await.unwrap_err();
        let said = refused.message();
        assert!(
            said.contains("failed to setup network for sandbox") || said.contains(told),
            "{said}"
        );
        let left = node.cri.pods(None).await?;
        if !newer("a failed pod is not kept, and what is said of the plugin") {
            assert!(said.contains(told), "{script}: {said}");
            assert!(left.is_empty(), "{script}: {left:?}");
            let kept = node.records();
            assert!(kept.is_empty(), "{script}: {kept:?}");
        }
        node.network.plugin("fault", &faults::good("10.99.0.7"))?;
        for pod in left {
            node.cri.end_pod(&pod.id).await?;
        }
    }
    let pod = node.cri.run_pod(&config).await?;
    let status = node
        .cri
        .pod_status(&pod.id)
        .await?
        .status
        .unwrap_or_default();
    assert_eq!(status.network.unwrap_or_default().ip, "10.99.0.7");
    node.finish().await
}

#[tokio::test]
async fn a_plugin_that_never_answers_ends_with_the_calls_deadline() -> Result {
    let node = faulty(faults::HANGS).await?;
    let config = node.pod("stuck");
    let mut request = tonic::Request::new(api::RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: String::new(),
    });
    request.set_timeout(Duration::from_secs(2));
    let late = node
        .cri
        .runtime()
        .run_pod_sandbox(request)
        .await
        .unwrap_err();
    let codes = [tonic::Code::DeadlineExceeded, tonic::Code::Cancelled];
    assert!(codes.contains(&late.code()), "{late}");
    eventually("the plugin is gone", async || {
        let bin = node.network.bin_dir().display().to_string();
        Ok((!running(&bin)?).then_some(()))
    })
    .await?;
    node.network.plugin("fault", &faults::good("10.99.0.7"))?;
    eventually("the pod is gone", async || {
        for pod in node.cri.pods(None).await? {
            node.cri.end_pod(&pod.id).await?;
        }
        Ok(node.cri.run_pod(&config).await.ok().map(drop))
    })
    .await?;
    node.finish().await
}

/// Whether a process runs whose CNI path names this directory.
fn running(bin: &str) -> Result<bool> {
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        let text = String::from_utf8_lossy(&environment);
        if text.contains("CNI_COMMAND=ADD") && text.contains(bin) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[tokio::test]
async fn output_without_end_is_not_taken_into_memory() -> Result {
    if newer("a bound on a plugin's output") {
        return Ok(());
    }
    let node = faulty(faults::FLOODS).await?;
    let refused = node.cri.run_pod(&node.pod("flood")).await.unwrap_err();
    assert!(refused.message().contains("fault"), "{refused}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.daemon.pid()?))?;
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let peak: u64 = peak
        .and_then(|l| l.split_whitespace().next()?.parse().ok())
        .unwrap_or(u64::MAX);
    assert!(peak < 300_000, "{peak} kB");
    assert!(node.cri.pods(None).await?.is_empty());
    node.finish().await
}

#[tokio::test]
async fn a_teardown_that_fails_is_done_again() -> Result {
    let node = faulty(&faults::good("10.99.0.8")).await?;
    let pod = node.run_pod("again").await?;
    let fails = "cat >/dev/null\necho '{\"cniVersion\":\"1.0.0\",\"code\":11,\"msg\":\"the rope is stuck\"}'; exit 1";
    node.network.plugin("fault", fails)?;
    let stuck = node.cri.stop_pod(&pod.id).await.unwrap_err();
    assert!(stuck.message().contains("the rope is stuck"), "{stuck}");
    node.cri.remove_pod(&pod.id).await.unwrap_err();
    let state = node.cri.pod_state(&pod.id).await?;
    assert_eq!(state, api::PodSandboxState::SandboxNotready);
    node.network.plugin("fault", &faults::good("10.99.0.8"))?;
    node.cri.stop_pod(&pod.id).await?;
    node.cri.remove_pod(&pod.id).await?;
    node.finish().await
}

#[tokio::test]
async fn plugins_are_told_what_the_specification_says() -> Result {
    let node = faulty("exit 0").await?;
    let seen = node.network.dir().join("seen");
    std::fs::create_dir(&seen)?;
    let script = format!(
        "env | grep ^CNI_ | sort > {seen}/$CNI_COMMAND.env\ncat > {seen}/$CNI_COMMAND.json\n{}",
        faults::good("10.99.0.9"),
        seen = seen.display(),
    );
    node.network.plugin("fault", &script)?;
    let mut config = node.pod("told");
    config.port_mappings = vec![api::PortMapping {
        protocol: api::Protocol::Udp.into(),
        container_port: 53,
        host_port: 5353,
        host_ip: "127.0.0.1".into(),
    }];
    let list = json!({
        "cniVersion": "1.0.0", "name": node.network.name(),
        "plugins": [{ "type": "fault", "capabilities": { "portMappings": true } }]
    });
    node.network.write(&list)?;
    eventually("the list is read", async || {
        let request = api::StatusRequest { verbose: true };
        let status = node.cri.runtime().status(request).await?.into_inner();
        let told = status.info.get("cniconfig").cloned().unwrap_or_default();
        Ok(told.contains("portMappings").then_some(()))
    })
    .await?;
    let pod = node.cri.run_pod(&config).await?;
    let environment = std::fs::read_to_string(seen.join("ADD.env"))?;
    for line in [
        format!("CNI_CONTAINERID={}", pod.id),
        "CNI_IFNAME=eth0".to_owned(),
        "K8S_POD_NAME=told".to_owned(),
        "K8S_POD_NAMESPACE=harbour".to_owned(),
        format!("K8S_POD_INFRA_CONTAINER_ID={}", pod.id),
        "K8S_POD_UID=uid-told".to_owned(),
        "IgnoreUnknown=1".to_owned(),
    ] {
        assert!(environment.contains(&line), "{line} in {environment}");
    }
    let stdin: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(seen.join("ADD.json"))?)?;
    assert_eq!(stdin["name"], node.network.name());
    assert_eq!(stdin["cniVersion"], "1.0.0");
    let mapping = stdin["runtimeConfig"]["portMappings"][0]
        .to_string()
        .to_lowercase();
    assert!(mapping.contains("\"hostport\":5353"), "{stdin}");
    assert!(mapping.contains("\"containerport\":53"), "{stdin}");
    assert!(mapping.contains("\"protocol\":\"udp\""), "{stdin}");
    node.cri.stop_pod(&pod.id).await?;
    let stdin: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(seen.join("DEL.json"))?)?;
    assert_eq!(
        stdin["prevResult"]["ips"][0]["address"], "10.99.0.9/24",
        "{stdin}"
    );
    node.finish().await
}
