//! CRI: the daemon is killed; pods and containers do not notice, and nothing of them is lost.

use std::time::Duration;

use lighter_integration::cri::stream::Transport;
use lighter_integration::cri::{Node, Pod, newer};
use lighter_integration::{Result, eventually, parent_of};
use lighter_proto::runtime::v1 as api;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

async fn pid_of(node: &Node, id: &str) -> Result<i32> {
    let full = node.cri.full_status(id).await?;
    let info: Value = serde_json::from_str(&full.info["info"])?;
    Ok(i32::try_from(info["pid"].as_i64().unwrap_or(0))?)
}

/// What must be the same after a restart.
async fn picture(node: &Node) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for pod in node.cri.pods(None).await? {
        let status = node
            .cri
            .pod_status(&pod.id)
            .await?
            .status
            .unwrap_or_default();
        let address = status.network.clone().unwrap_or_default().ip;
        let (name, state) = (pod.metadata.clone().unwrap_or_default().name, pod.state());
        lines.push(format!(
            "{} {name} {state:?} {} {address} {:?}",
            pod.id, pod.created_at, pod.labels
        ));
    }
    for container in node.cri.containers(None).await? {
        let status = node.cri.status(&container.id).await?;
        lines.push(format!(
            "{} {:?} {:?} {} {} {} {} {} {}",
            container.id,
            container.metadata,
            status.state(),
            status.created_at,
            status.started_at,
            status.finished_at,
            status.exit_code,
            status.reason,
            status.log_path
        ));
    }
    lines.sort();
    Ok(lines)
}

#[tokio::test]
async fn everything_is_there_after_a_kill() -> Result {
    let mut node = Node::with_network().await?;
    let (pod, main) = node.run_idle("steady").await?;
    let done = node
        .cri
        .run(&pod, &node.container("done", &["sh", "-c", "exit 3"]))
        .await?;
    node.cri.exited(&done).await?;
    let created = node.cri.create(&pod, &node.idle("created")).await?;
    let (stopped, _) = node.run_idle("stopped").await?;
    node.cri.stop_pod(&stopped.id).await?;
    let pid = pid_of(&node, &main).await?;
    let before = picture(&node).await?;
    for _ in 0..2 {
        node.daemon.kill()?;
        kill(Pid::from_raw(pid), None)?;
        node.boot().await?;
        assert_eq!(picture(&node).await?, before);
    }
    assert_eq!(pid_of(&node, &main).await?, pid);
    assert_eq!(node.cri.shell(&main, "echo here").await?, "here\n");
    let session = crate::cri_exec::exec(
        &node,
        &main,
        &["sh", "-c", "echo streamed; exit 4"],
        crate::cri_exec::OUT,
        Transport::SPDY,
    )
    .await?;
    let ended = session.finish().await?;
    assert_eq!((ended.text().as_str(), ended.code()?), ("streamed\n", 4));
    // What was only created can be started still; names are still taken.
    node.cri.start(&created).await?;
    let taken = node.cri.run_pod(&pod.config).await.unwrap_err();
    assert!(
        taken.message().contains("failed to reserve sandbox name"),
        "{taken}"
    );
    let taken = node.cri.create(&pod, &node.idle("main")).await.unwrap_err();
    assert!(
        taken.message().contains("failed to reserve container name"),
        "{taken}"
    );
    let late = node
        .cri
        .run(&pod, &node.container("late", &["true"]))
        .await?;
    assert_eq!(node.cri.exited(&late).await?.exit_code, 0);
    node.cri.stop(&main, 10).await?;
    assert_eq!(node.cri.status(&main).await?.exit_code, 0);
    for id in [&main, &done, &created, &late] {
        node.cri.remove(id).await?;
    }
    node.cri.end_pod(&stopped.id).await?;
    node.finish().await
}

#[tokio::test]
async fn what_ends_while_the_daemon_is_away_is_told_after() -> Result {
    let mut node = Node::with_network().await?;
    let (pod, main) = node.run_idle("away").await?;
    let script = "trap 'exit 5' TERM; while :; do sleep 0.05; done";
    let five = node
        .cri
        .run(&pod, &node.container("five", &["sh", "-c", script]))
        .await?;
    let (other, inner) = node.run_idle("other").await?;
    let pid = pid_of(&node, &five).await?;
    let info = crate::cri_pods::info(&node, &other.id).await?;
    let pause = i32::try_from(info["pid"].as_i64().unwrap_or(0))?;
    node.daemon.kill()?;
    // A signal before the trap is set would kill: the daemon was asked for pids since.
    kill(Pid::from_raw(pid), Signal::SIGTERM)?;
    kill(Pid::from_raw(pause), Signal::SIGKILL)?;
    let gone = async |pid: i32| {
        eventually("the process is gone", async || {
            Ok(kill(Pid::from_raw(pid), None).is_err().then_some(()))
        })
        .await
    };
    gone(pid).await?;
    gone(pause).await?;
    node.boot().await?;
    let status = node.cri.exited(&five).await?;
    let told = (status.exit_code, status.reason.as_str()) == (5, "Error");
    assert!(told || newer("exits meanwhile are told"), "{status:?}");
    assert!(status.finished_at > 0);
    let state = node.cri.status(&main).await?.state();
    assert_eq!(state, api::ContainerState::ContainerRunning);
    let state = node.cri.pod_state(&other.id).await?;
    assert_eq!(state, api::PodSandboxState::SandboxNotready);
    node.cri.stop(&inner, 0).await?;
    node.cri.end_pod(&other.id).await?;
    node.finish().await
}

#[tokio::test]
async fn logs_go_on_without_the_daemon() -> Result {
    if newer("a log that does not need the daemon") {
        return Ok(());
    }
    let mut node = Node::start().await?;
    let pod = node.run_pod("chatty").await?;
    let script = "n=0; while [ $n -lt 20000 ]; do n=$((n+1)); echo line $n; [ $((n % 100)) = 0 ] && sleep 0.01; done; exit 2";
    let id = node
        .cri
        .run(&pod, &node.container("main", &["sh", "-c", script]))
        .await?;
    let length = || node.log(&pod, "main").map_or(0, |l| l.len());
    eventually("it talks", async || Ok((length() > 100).then_some(()))).await?;
    node.daemon.kill()?;
    let length = || node.log(&pod, "main").map_or(0, |l| l.len());
    eventually("it talks to the end", async || {
        Ok((length() >= 20000).then_some(()))
    })
    .await?;
    node.boot().await?;
    assert_eq!(node.cri.exited(&id).await?.exit_code, 2);
    let lines = node.log(&pod, "main")?;
    assert_eq!(lines.len(), 20000);
    for (n, line) in lines.iter().enumerate() {
        assert_eq!(line.text, format!("line {}", n + 1));
    }
    node.finish().await
}

#[tokio::test]
async fn logs_are_reopened_and_input_arrives_after_a_kill() -> Result {
    let mut node = Node::start().await?;
    let pod = node.run_pod("io").await?;
    let mut config = node.container("main", &["sh", "-c", "while read l; do echo got $l; done"]);
    config.stdin = true;
    let id = node.cri.run(&pod, &config).await?;
    node.daemon.kill()?;
    node.boot().await?;
    let mut session =
        crate::cri_attach::attach(&node, &id, crate::cri_exec::IN_OUT, Transport::SPDY).await?;
    session.write(b"word\n").await?;
    session.until("got word").await?;
    let path = node.logs("io").join("main.log");
    std::fs::rename(&path, node.logs("io").join("old"))?;
    let request = api::ReopenContainerLogRequest {
        container_id: id.clone(),
    };
    node.cri.runtime().reopen_container_log(request).await?;
    session.write(b"more\n").await?;
    session.until("got more").await?;
    let lines = eventually("the new file has it", async || {
        Ok(node.log(&pod, "main").ok().filter(|l| !l.is_empty()))
    })
    .await?;
    assert_eq!(lines[0].text, "got more");
    node.finish().await
}

#[tokio::test]
async fn what_a_kill_interrupts_is_cleaned_up_and_can_be_done_again() -> Result {
    if newer("cleaning up what a kill interrupted") {
        return Ok(());
    }
    let mut node = Node::with_network().await?;
    for (round, after) in [0, 15, 40, 80, 150, 250, 400].into_iter().enumerate() {
        let mut work = tokio::task::JoinSet::new();
        for n in 0..3 {
            let cri = node.cri.clone();
            let (pod, container) = (node.pod(&format!("p{n}")), node.idle("main"));
            work.spawn(async move {
                let pod = cri.run_pod(&pod).await?;
                let id = cri.run(&pod, &container).await?;
                cri.stop(&id, 5).await?;
                cri.end_pod(&pod.id).await
            });
        }
        tokio::time::sleep(Duration::from_millis(after)).await;
        node.daemon.kill()?;
        work.shutdown().await;
        node.boot().await?;
        // As a kubelet does: what is there is stopped and removed; it must always work.
        for pod in node.cri.pods(None).await? {
            node.cri.end_pod(&pod.id).await?;
        }
        let left = node.cri.containers(None).await?;
        assert!(left.is_empty(), "round {round}: {left:?}");
        let left = node.cri.pods(None).await?;
        assert!(left.is_empty(), "round {round}: {left:?}");
        eventually("the network holds nothing", async || {
            let held = node.network.held();
            Ok(held.is_empty().then_some(()))
        })
        .await
        .map_err(|e| e.context(format!("round {round}: {:?}", node.network.held())))?;
    }
    let (pod, id) = node.run_idle("p0").await?;
    assert_eq!(node.cri.shell(&id, "echo well").await?, "well\n");
    node.cri.end_pod(&pod.id).await?;
    node.finish().await
}

#[tokio::test]
async fn records_that_cannot_be_read_are_shown_and_removed() -> Result {
    use lighter_proto::containerd::services::containers::v1 as records;
    if newer("records that cannot be read are shown") {
        return Ok(());
    }
    let mut node = Node::with_network().await?;
    let (pod, id) = node.run_idle("torn").await?;
    let client = node.client().await?;
    for (id, extension) in [
        (&pod.id, "io.cri-containerd.sandbox.metadata"),
        (&id, "io.cri-containerd.container.metadata"),
    ] {
        let request = records::GetContainerRequest { id: id.clone() };
        let found = client.containers().get(request).await?.into_inner();
        let mut record = found.container.unwrap_or_default();
        if let Some(value) = record.extensions.get_mut(extension) {
            value.value = b"{\"Version\":\"v1\",\"Metadata\":[]}".to_vec();
        }
        let request = records::UpdateContainerRequest {
            container: Some(record),
            update_mask: Some(prost_types::FieldMask {
                paths: vec!["extensions".to_owned()],
            }),
        };
        client.containers().update(request).await?;
    }
    node.daemon.kill()?;
    node.boot().await?;
    let pods = node.cri.pods(None).await?;
    assert_eq!(pods.len(), 1, "{pods:?}");
    assert_eq!(pods[0].state(), api::PodSandboxState::SandboxReady);
    assert_eq!(pods[0].metadata.clone().unwrap_or_default().name, "torn");
    let containers = node.cri.containers(None).await?;
    assert_eq!(containers.len(), 1, "{containers:?}");
    assert_eq!(containers[0].pod_sandbox_id, pod.id);
    assert_eq!(
        containers[0].metadata.clone().unwrap_or_default().name,
        "main"
    );
    assert_eq!(node.cri.shell(&id, "echo here").await?, "here\n");
    node.cri.end_pod(&pod.id).await?;
    assert!(node.network.held().is_empty(), "{:?}", node.network.held());
    // The name is free.
    let (again, _) = node.run_idle("torn").await?;
    node.cri.end_pod(&again.id).await?;
    node.finish().await
}

/// Pid of the shim of a container.
async fn shim_of(node: &Node, id: &str) -> Result<Pid> {
    Ok(Pid::from_raw(parent_of(pid_of(node, id).await?)?))
}

async fn state_of(node: &Node, id: &str) -> Result<api::ContainerState> {
    Ok(node.cri.status(id).await?.state())
}

/// As [`eventually`], for what is looked after at least twice a minute.
async fn patiently<F>(what: &str, mut condition: F) -> Result
where
    F: AsyncFnMut() -> Result<Option<()>>,
{
    let mut found = Err(anyhow::anyhow!("not looked yet"));
    for _ in 0..3 {
        found = eventually(what, async || condition().await).await;
        if found.is_ok() {
            break;
        }
    }
    found
}

/// Two pods, the daemon started anew while the shim of the first stands still.
async fn with_a_hanging_shim() -> Result<(Node, [(Pod, String); 2], Pid)> {
    let mut node = Node::start().await?;
    let hung = node.run_idle("hung").await?;
    let well = node.run_idle("well").await?;
    let shim = shim_of(&node, &hung.1).await?;
    kill(shim, Signal::SIGSTOP)?;
    node.daemon.kill()?;
    // Answers while nobody knows what became of the container.
    node.boot().await?;
    assert_eq!(
        state_of(&node, &hung.1).await?,
        api::ContainerState::ContainerUnknown
    );
    assert_eq!(
        node.cri.pod_state(&hung.0.id).await?,
        api::PodSandboxState::SandboxNotready
    );
    assert_eq!(
        state_of(&node, &well.1).await?,
        api::ContainerState::ContainerRunning
    );
    assert_eq!(node.cri.shell(&well.1, "echo well").await?, "well\n");
    assert_eq!(node.cri.containers(None).await?.len(), 2);
    // Others come and go beside it.
    let (other, _) = node.run_idle("other").await?;
    node.cri.end_pod(&other.id).await?;
    Ok((node, [hung, well], shim))
}

#[tokio::test]
async fn a_shim_that_hangs_holds_up_nobody_else_and_is_found_again() -> Result {
    if newer("shims that hang are asked again") {
        return Ok(());
    }
    let (node, [(pod, id), _], shim) = with_a_hanging_shim().await?;
    // Its caller is answered in time, and told that it is not stopped.
    let mut request = tonic::Request::new(api::StopContainerRequest {
        container_id: id.clone(),
        timeout: 1,
    });
    request.set_timeout(Duration::from_secs(5));
    let stop = async { node.cri.runtime().stop_container(request).await };
    let stopped = tokio::time::timeout(Duration::from_secs(60), stop).await?;
    let refused = stopped.unwrap_err();
    assert!(!refused.message().is_empty());
    kill(shim, Signal::SIGCONT)?;
    // It is asked more and more seldom.
    patiently("the container is found", async || {
        let runs = state_of(&node, &id).await? == api::ContainerState::ContainerRunning;
        let ready = node.cri.pod_state(&pod.id).await? == api::PodSandboxState::SandboxReady;
        Ok((runs && ready).then_some(()))
    })
    .await?;
    assert_eq!(node.cri.shell(&id, "echo back").await?, "back\n");
    node.cri.stop(&id, 10).await?;
    assert_eq!(node.cri.status(&id).await?.exit_code, 0);
    node.finish().await
}

#[tokio::test]
async fn what_a_shim_that_hung_and_died_leaves_can_be_removed() -> Result {
    if newer("shims that hang are asked again") {
        return Ok(());
    }
    let (node, [(pod, id), _], shim) = with_a_hanging_shim().await?;
    kill(shim, Signal::SIGKILL)?;
    patiently("the container can be removed", async || {
        Ok(node.cri.remove(&id).await.ok())
    })
    .await?;
    patiently("the pod can be removed", async || {
        Ok(node.cri.end_pod(&pod.id).await.ok())
    })
    .await?;
    // The names are free.
    let (again, _) = node.run_idle("hung").await?;
    node.cri.end_pod(&again.id).await?;
    node.finish().await
}
