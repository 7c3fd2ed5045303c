//! What a kubelet waits for, against containerd and lighter in one run.
//!
//! Every contender has the same network: bridge, firewall and portmap on a subnet of its own. What
//! these programs take is printed apart. `PATH` decides which containerd it is; rows that it has no
//! call for stay empty. `BENCH=name` runs the rows whose name contains it; `ROUNDS=n` scales the work;
//! `ONLY_OURS=1` leaves containerd out, for a profile.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use lighter_integration::cri::{Node, Pod, Settings};
use lighter_integration::{Result, Subject};
use lighter_proto::runtime::v1 as api;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio_stream::StreamExt as _;

mod report;

use report::lean::Lean;
use report::{measure, millis, rounds, say, wanted};

/// Pods on a busy node.
const PODS: u32 = 100;
/// Calls of each list in a second, as a kubelet makes them.
const POLLS_PER_SECOND: f64 = 1.5;
/// Time between two readings of all stats, as a kubelet does.
const STATS_PERIOD: Duration = Duration::from_secs(10);

struct Contender {
    name: &'static str,
    node: Node,
}

/// Has runc started for each step, where the daemon could do it itself.
const RUNC: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n\
    runtime_type = \"io.containerd.runc.v2\"\n\
    [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\n\
    BinaryName = \"runc\"\n";

async fn contenders() -> Result<Vec<Contender>> {
    let variants = [
        ("containerd+runc", Subject::Containerd, RUNC),
        ("lighter+runc", Subject::Lighter, RUNC),
        ("lighter", Subject::Lighter, ""),
    ];
    let mut all = Vec::new();
    for (name, subject, config) in variants {
        if subject == Subject::Containerd && std::env::var_os("ONLY_OURS").is_some() {
            continue;
        }
        let settings = Settings {
            network: true,
            config: config.to_owned(),
            log_level: Some("warn"),
            state_in_memory: true,
            subject: Some(subject),
            ..Settings::default()
        };
        let node = Node::start_with(&settings).await?;
        all.push(Contender { name, node });
    }
    Ok(all)
}

fn name(contender: &Contender) -> &'static str {
    contender.name
}

/// A pod on the host's network.
fn without_network(node: &Node, name: &str) -> api::PodSandboxConfig {
    let mut config = node.pod(name);
    config.hostname = String::new();
    let linux = config.linux.get_or_insert_default();
    let security = linux.security_context.get_or_insert_default();
    let options = security.namespace_options.get_or_insert_default();
    options.network = api::NamespaceMode::Node.into();
    config
}

/// The steps of a pod's life, each a row: all are measured in one pass, in this order.
async fn life(all: &[Contender]) -> Result {
    const ROWS: [&str; 7] = [
        "RunPodSandbox",
        "RunPodSandbox, host network",
        "CreateContainer + StartContainer",
        "ExecSync of true",
        "StopContainer that ends on SIGTERM",
        "StopPodSandbox",
        "RemovePodSandbox",
    ];
    if !ROWS.iter().any(|row| wanted(row)) {
        return Ok(());
    }
    let mut taken: Vec<Vec<Vec<f64>>> = Vec::new();
    for round in 0..rounds(20) {
        taken.push(Vec::new());
        for contender in all {
            let times = one_life(&contender.node, round).await?;
            if let Some(last) = taken.last_mut() {
                last.push(times);
            }
        }
    }
    for (n, row) in ROWS.iter().enumerate() {
        let count = u32::try_from(taken.len())?;
        let each = async |c: &Contender, round: u32| {
            let at = all.iter().position(|other| other.name == c.name);
            let round = taken.get(usize::try_from(round)?);
            let times = round.zip(at).and_then(|(round, at)| round.get(at));
            Ok(times.and_then(|t| t.get(n)).copied().unwrap_or(f64::NAN))
        };
        report::print(all, name, row, "ms", count, each).await?;
    }
    Ok(())
}

async fn one_life(node: &Node, round: u32) -> Result<Vec<f64>> {
    let cri = &node.cri;
    let mut times = Vec::new();
    let begun = Instant::now();
    let pod = cri.run_pod(&node.pod(&format!("pod{round}"))).await?;
    times.push(millis(begun));
    let bare = without_network(node, &format!("bare{round}"));
    let begun = Instant::now();
    let bare = cri.run_pod(&bare).await?;
    times.push(millis(begun));
    let config = node.idle("main");
    let begun = Instant::now();
    let id = cri.run(&pod, &config).await?;
    times.push(millis(begun));
    let begun = Instant::now();
    cri.exec(&id, &["true"]).await?;
    times.push(millis(begun));
    // The shell has set its trap once it lets a command run beside it.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let begun = Instant::now();
    cri.stop(&id, 30).await?;
    times.push(millis(begun));
    let begun = Instant::now();
    cri.stop_pod(&pod.id).await?;
    times.push(millis(begun));
    let begun = Instant::now();
    cri.remove_pod(&pod.id).await?;
    times.push(millis(begun));
    cri.end_pod(&bare.id).await?;
    Ok(times)
}

/// What the network's programs take by themselves.
async fn plugins(all: &[Contender]) -> Result {
    let first = all.first().context("a contender")?;
    let name = "the network's programs alone, ADD";
    let one = std::slice::from_ref(first);
    measure(
        one,
        |_| "plugins",
        name,
        "ms",
        10,
        async |c, round| {
            let id = format!("bench{round}");
            let namespace = format!("it-{}-{round}", std::process::id());
            ip(&["netns", "add", &namespace])?;
            let path = format!("/run/netns/{namespace}");
            let begun = Instant::now();
            let added = chain(&c.node, "ADD", &id, &path);
            let taken = millis(begun);
            let removed = chain(&c.node, "DEL", &id, &path);
            ip(&["netns", "delete", &namespace])?;
            added?;
            removed?;
            Ok(taken)
        },
    )
    .await
}

fn ip(arguments: &[&str]) -> Result {
    let status = Command::new("ip").args(arguments).status()?;
    anyhow::ensure!(status.success(), "ip {arguments:?}: {status}");
    Ok(())
}

/// Runs the network's programs one after the other, as a runtime would.
fn chain(node: &Node, command: &str, id: &str, namespace: &str) -> Result {
    let list = node.network.list(&[]);
    let mut plugins = list["plugins"].as_array().cloned().unwrap_or_default();
    if command == "DEL" {
        plugins.reverse();
    }
    let mut previous = Value::Null;
    for mut plugin in plugins {
        plugin["name"] = list["name"].clone();
        plugin["cniVersion"] = list["cniVersion"].clone();
        if !previous.is_null() {
            plugin["prevResult"] = previous.clone();
        }
        let kind = plugin["type"].as_str().unwrap_or_default().to_owned();
        let bin = node.network.bin_dir();
        let out = call(&bin, &kind, command, id, namespace, &plugin)?;
        if command == "ADD" {
            previous = serde_json::from_slice(&out).with_context(|| kind.clone())?;
        }
    }
    Ok(())
}

fn call(
    bin: &Path,
    kind: &str,
    command: &str,
    id: &str,
    namespace: &str,
    plugin: &Value,
) -> Result<Vec<u8>> {
    let mut child = Command::new(bin.join(kind))
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", id)
        .env("CNI_NETNS", namespace)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", bin)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().context("stdin is piped")?;
    stdin.write_all(json!(plugin).to_string().as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    anyhow::ensure!(output.status.success(), "{kind} {command}: {text}");
    Ok(output.stdout)
}

/// Time from a process's end to the event that tells of it.
async fn events(all: &[Contender]) -> Result {
    let row = "exit until its event";
    measure(all, name, row, "ms", 20, async |c, round| {
        let cri = &c.node.cri;
        let request = api::GetEventsRequest {};
        let Ok(stream) = cri.runtime().get_container_events(request).await else {
            return Ok(f64::NAN);
        };
        let mut stream = stream.into_inner();
        let pod = without_network(&c.node, &format!("event{round}"));
        let pod = cri.run_pod(&pod).await?;
        let id = cri
            .run(&pod, &c.node.container("main", &["sleep", "1000"]))
            .await?;
        let info: Value = serde_json::from_str(&cri.full_status(&id).await?.info["info"])?;
        let pid = Pid::from_raw(i32::try_from(info["pid"].as_i64().unwrap_or(0))?);
        anyhow::ensure!(pid.as_raw() > 1, "no pid in {info}");
        // Nobody waits in a row: what came before is read first.
        let wanted = api::ContainerEventType::ContainerStartedEvent;
        told(&mut stream, &id, wanted).await;
        let begun = Instant::now();
        kill(pid, Signal::SIGKILL)?;
        let wanted = api::ContainerEventType::ContainerStoppedEvent;
        let told = told(&mut stream, &id, wanted).await;
        let taken = millis(begun);
        cri.end_pod(&pod.id).await?;
        Ok(if told { taken } else { f64::NAN })
    })
    .await
}

/// Reads until this event came; false when it did not.
async fn told(
    stream: &mut tonic::Streaming<api::ContainerEventResponse>,
    id: &str,
    kind: api::ContainerEventType,
) -> bool {
    let limit = Duration::from_secs(5);
    while let Ok(Some(Ok(event))) = tokio::time::timeout(limit, stream.next()).await {
        if event.container_id == id && event.container_event_type() == kind {
            return true;
        }
    }
    false
}

/// Time on the processors that a process has had, in milliseconds.
fn processor_time(pid: i32) -> Result<f64> {
    let mut nanos = 0.0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        nanos += text
            .split(' ')
            .next()
            .and_then(|n| n.parse::<f64>().ok())
            .unwrap_or(0.0);
    }
    Ok(nanos / 1e6)
}

async fn crowd(all: &[Contender]) -> Result {
    let rows = [
        "daemon with 100 idle pods",
        "memory with 100 idle pods",
        "ListPodSandbox of 200",
        "ListContainers of 200",
    ];
    if !rows.iter().any(|row| wanted(row)) {
        return Ok(());
    }
    for c in all {
        let mut pods: Vec<Pod> = Vec::new();
        for n in 0..PODS {
            let config = without_network(&c.node, &format!("crowd{n}"));
            let pod = c.node.cri.run_pod(&config).await?;
            c.node.cri.run(&pod, &c.node.idle("main")).await?;
            pods.push(pod);
        }
    }
    say(&format!(
        "{PODS} pods with a container each; polled as a kubelet does from here"
    ));
    measure(all, name, rows[0], "ms of CPU per s", 1, async |c, _| {
        let pid = c.node.daemon.pid()?;
        polled(&c.node, Duration::from_secs(5)).await?;
        let (begun, before) = (Instant::now(), processor_time(pid)?);
        polled(&c.node, Duration::from_secs(20)).await?;
        Ok((processor_time(pid)? - before) / begun.elapsed().as_secs_f64())
    })
    .await?;
    measure(all, name, rows[1], "MB RSS", 1, async |c, _| {
        report::memory(c.node.daemon.pid()?, "Rss:")
    })
    .await?;
    for c in all {
        for n in PODS..2 * PODS {
            let config = without_network(&c.node, &format!("crowd{n}"));
            let pod = c.node.cri.run_pod(&config).await?;
            c.node.cri.run(&pod, &c.node.idle("main")).await?;
        }
    }
    // The answers are counted once, by a client that reads them.
    for c in all {
        let (pods, containers) = (c.node.cri.pods(None), c.node.cri.containers(None));
        let (pods, containers) = (pods.await?.len(), containers.await?.len());
        anyhow::ensure!(
            (pods, containers) == (200, 200),
            "{pods} pods, {containers} containers"
        );
    }
    measure(all, name, rows[2], "ms", 50, async |c, _| {
        listed(
            c,
            "ListPodSandbox",
            &api::ListPodSandboxRequest { filter: None },
        )
    })
    .await?;
    measure(all, name, rows[3], "ms", 50, async |c, _| {
        listed(
            c,
            "ListContainers",
            &api::ListContainersRequest { filter: None },
        )
    })
    .await
}

/// Milliseconds of ten calls of a list that nobody takes apart, divided by ten.
fn listed(c: &Contender, method: &str, request: &impl prost::Message) -> Result<f64> {
    const CALLS: u8 = 10;
    let method = format!("/runtime.v1.RuntimeService/{method}");
    let mut lean = Lean::connect(&c.node.daemon.address(), "k8s.io")?;
    lean.call(&method, request)?;
    let begun = Instant::now();
    for _ in 0..CALLS {
        lean.call(&method, request)?;
    }
    Ok(millis(begun) / f64::from(CALLS))
}

/// Calls the lists as often as a kubelet does, and the stats now and then.
async fn polled(node: &Node, time: Duration) -> Result {
    let begun = Instant::now();
    let mut pause = tokio::time::interval(Duration::from_secs_f64(1.0 / POLLS_PER_SECOND));
    let mut measured = Instant::now();
    while begun.elapsed() < time {
        pause.tick().await;
        node.cri.pods(None).await?;
        node.cri.containers(None).await?;
        if measured.elapsed() >= STATS_PERIOD {
            measured = Instant::now();
            let request = api::ListContainerStatsRequest { filter: None };
            node.cri.runtime().list_container_stats(request).await?;
        }
    }
    Ok(())
}

async fn run() -> Result {
    let all = contenders().await?;
    plugins(&all).await?;
    life(&all).await?;
    events(&all).await?;
    crowd(&all).await?;
    for contender in all {
        for pod in contender.node.cri.pods(None).await? {
            contender.node.cri.end_pod(&pod.id).await?;
        }
    }
    Ok(())
}

fn main() -> Result {
    report::as_booted()?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(run())
}
