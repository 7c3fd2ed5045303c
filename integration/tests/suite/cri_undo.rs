//! CRI: a pod whose making a kill of the daemon cut short is shown, can be had again, and goes by
//! itself.

use std::time::{Duration, Instant};

use lighter_integration::cri::{Node, faults, newer};
use lighter_integration::{Result, eventually};
use lighter_proto::runtime::v1 as api;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cri_network::faulty;

/// Pods that a kill interrupts.
const PODS: usize = 12;
/// Longest until a daemon serves again, whatever it has to undo.
const SERVES: Duration = Duration::from_secs(5);

/// Plugins of the node that are at an ADD.
fn adding(node: &Node) -> Result<Vec<Pid>> {
    let bin = node.network.bin_dir().display().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        let text = String::from_utf8_lossy(&environment);
        if text.contains("CNI_COMMAND=ADD")
            && text.contains(&bin)
            && let Ok(pid) = entry.file_name().to_string_lossy().parse()
        {
            found.push(Pid::from_raw(pid));
        }
    }
    Ok(found)
}

#[tokio::test]
async fn half_made_pods_are_shown_and_go_by_themselves() -> Result {
    if newer("half-made pods that go by themselves") {
        return Ok(());
    }
    let mut node = faulty(faults::HANGS).await?;
    let name = |n: usize| format!("half{n}");
    let mut work = tokio::task::JoinSet::new();
    for n in 0..PODS {
        let (cri, config) = (node.cri.clone(), node.pod(&name(n)));
        work.spawn(async move { cri.run_pod(&config).await });
    }
    eventually("all are at their network", async || {
        Ok((adding(&node)?.len() >= PODS).then_some(()))
    })
    .await?;
    node.daemon.kill()?;
    work.shutdown().await;
    for pid in adding(&node)? {
        // One may be gone with the daemon.
        let _ = kill(pid, Signal::SIGKILL);
    }
    // Nor does taking down answer: nobody who is served waits for it.
    let stuck = "cat >/dev/null\n[ $CNI_COMMAND = DEL ] && exec sleep 7\nexit 0";
    node.network.plugin("fault", stuck)?;
    let begun = Instant::now();
    node.boot().await?;
    assert!(begun.elapsed() < SERVES, "{:?}", begun.elapsed());
    let pods = node.cri.pods(None).await?;
    assert_eq!(pods.len(), PODS, "{pods:#?}");
    let not_ready = api::PodSandboxState::SandboxNotready;
    assert!(pods.iter().all(|pod| pod.state() == not_ready));
    let status = node.cri.pod_status(&pods[0].id).await?.status;
    assert_eq!(status.unwrap_or_default().state(), not_ready);
    node.network.plugin("fault", &faults::good("10.99.0.7"))?;
    // Stopped and removed like any other, or had again at once.
    node.cri.end_pod(&pods[0].id).await?;
    let again = node.cri.run_pod(&node.pod(&name(3))).await?;
    eventually("the others go by themselves", async || {
        let left = node.cri.pods(None).await?;
        Ok((left.len() == 1 && left[0].id == again.id).then_some(()))
    })
    .await?;
    for n in 0..PODS {
        if n != 3 {
            let pod = node.run_pod(&name(n)).await?;
            node.cri.end_pod(&pod.id).await?;
        }
    }
    node.cri.end_pod(&again.id).await?;
    node.finish().await
}
