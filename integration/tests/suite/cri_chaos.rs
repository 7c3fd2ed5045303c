//! CRI: the daemon is killed again and again while pods are made and removed; clients that repeat
//! what failed get where they want, and nothing is left over.
//!
//! `LIGHTER_CHAOS_PODS`, `LIGHTER_CHAOS_KILLS` and `LIGHTER_CHAOS_PAUSE` (the shortest time between
//! a start of the daemon and its next death, in milliseconds) scale it up from what a test run can
//! afford.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use lighter_integration::Result;
use lighter_integration::cri::{Cri, Node, Pod, newer};
use lighter_proto::runtime::v1 as api;

/// Containers in each pod.
const CONTAINERS: usize = 3;
/// How long one step is tried before it counts as one that never works: many lives of the daemon.
const LIMIT: Duration = Duration::from_secs(300);
/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest wait for one answer.
const PATIENCE: Duration = Duration::from_secs(60);

fn scale(variable: &str, default: usize) -> usize {
    let asked = std::env::var(variable).ok();
    asked.and_then(|n| n.parse().ok()).unwrap_or(default)
}

/// One client with a pod of its own.
struct Worker {
    address: PathBuf,
    pod: api::PodSandboxConfig,
    containers: Vec<api::ContainerConfig>,
}

fn is_away(error: &anyhow::Error) -> bool {
    let status = error.downcast_ref::<tonic::Status>();
    status.is_some_and(|s| s.code() == tonic::Code::Unavailable)
}

/// Tries `step` until it works; a daemon that is away or has just come back refuses.
async fn again<T>(
    address: &Path,
    what: &str,
    mut step: impl AsyncFnMut(&Cri) -> Result<Option<T>>,
) -> Result<T> {
    let mut last = None;
    let begun = Instant::now();
    while begun.elapsed() < LIMIT {
        if let Ok(cri) = Cri::connect(address).await {
            match tokio::time::timeout(PATIENCE, step(&cri)).await {
                Ok(Ok(Some(done))) => return Ok(done),
                Ok(Ok(None)) => {}
                // Of a daemon that is away nothing is learnt.
                Ok(Err(error)) if last.is_some() && is_away(&error) => {}
                Ok(Err(error)) => last = Some(error.to_string()),
                Err(_) => anyhow::bail!("{what}: a call hangs"),
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
    anyhow::bail!("{what} never works; at last: {last:?}")
}

impl Worker {
    /// A pod under the worker's name that is ready: the one made, or one that was made without
    /// the answer reaching us. One that is not ready is removed first, as a kubelet does.
    async fn run(&self) -> Result<Pod> {
        let metadata = self.pod.metadata.clone().unwrap_or_default();
        again(&self.address, "RunPodSandbox", async |cri| {
            for known in cri.pods(None).await? {
                if known.metadata.as_ref() != Some(&metadata) {
                    continue;
                }
                if known.state() == api::PodSandboxState::SandboxReady {
                    return Ok(Some(Pod {
                        id: known.id,
                        config: self.pod.clone(),
                    }));
                }
                cri.end_pod(&known.id).await?;
            }
            Ok(Some(cri.run_pod(&self.pod).await?))
        })
        .await
    }

    async fn start(&self, pod: &Pod, config: &api::ContainerConfig) -> Result<String> {
        again(&self.address, "a container that runs", async |cri| {
            let all = cri.containers(None).await?;
            let same =
                |c: &&api::Container| c.pod_sandbox_id == pod.id && c.metadata == config.metadata;
            let id = match all.iter().find(same) {
                Some(known) => known.id.clone(),
                None => cri.create(pod, config).await?,
            };
            let status = cri.status(&id).await?;
            match status.state() {
                api::ContainerState::ContainerRunning => Ok(Some(id)),
                api::ContainerState::ContainerCreated => {
                    cri.start(&id).await?;
                    Ok(Some(id))
                }
                other => anyhow::bail!("it is {other:?}: {} {}", status.reason, status.message),
            }
        })
        .await
    }

    async fn remove(&self, pod: &Pod) -> Result {
        again(&self.address, "RemovePodSandbox", async |cri| {
            cri.end_pod(&pod.id).await?;
            let left = cri.pods(None).await?;
            Ok((!left.iter().any(|p| p.id == pod.id)).then_some(()))
        })
        .await
    }

    /// Makes and removes the pod until told to stop; leaves it running then. How many lives it had.
    async fn live(&self, stop: &AtomicBool) -> Result<(Pod, Vec<String>, u32)> {
        for lives in 1.. {
            let pod = self.run().await?;
            let mut ids = Vec::new();
            for config in &self.containers {
                ids.push(self.start(&pod, config).await?);
            }
            if stop.load(Ordering::Relaxed) {
                return Ok((pod, ids, lives));
            }
            self.remove(&pod).await?;
        }
        unreachable!("it lives until it is told to stop")
    }
}

#[tokio::test]
async fn pods_converge_while_the_daemon_is_killed() -> Result {
    if newer("state that converges") {
        return Ok(());
    }
    let mut node = Node::with_network().await?;
    let stop = AtomicBool::new(false);
    let worker = |n| Worker {
        address: node.daemon.address(),
        pod: node.pod(&format!("chaos{n}")),
        containers: (0..CONTAINERS)
            .map(|c| node.idle(&format!("c{c}")))
            .collect(),
    };
    let workers: Vec<_> = (0..scale("LIGHTER_CHAOS_PODS", 3)).map(worker).collect();
    let living = futures::future::join_all(workers.iter().map(|w| w.live(&stop)));
    let pause = u32::try_from(scale("LIGHTER_CHAOS_PAUSE", 700))?;
    let killing = async {
        for _ in 0..scale("LIGHTER_CHAOS_KILLS", 5) {
            // As long again at random, and half of that.
            let random = 1.0 + f64::from(rand::random::<u8>()) / 170.0;
            let pause = Duration::from_millis(pause.into());
            tokio::time::sleep(pause.mul_f64(random)).await;
            node.daemon.kill()?;
            node.boot().await?;
        }
        Ok::<_, anyhow::Error>(())
    };
    let killing = async {
        let killed = killing.await;
        stop.store(true, Ordering::Relaxed);
        killed
    };
    let (ended, killed) = tokio::join!(living, killing);
    killed?;
    let mut lives = 0;
    let mut kept = Vec::new();
    for (n, ended) in ended.into_iter().enumerate() {
        let (pod, ids, count) = ended.with_context(|| format!("pod {n}"))?;
        lives += count;
        kept.push((pod, ids));
    }
    eprintln!("{lives} pods lived");
    // What the last of them asked for stands, and answers.
    for (pod, ids) in &kept {
        let state = node.cri.pod_state(&pod.id).await?;
        assert_eq!(state, api::PodSandboxState::SandboxReady);
        for id in ids {
            assert_eq!(node.cri.shell(id, "echo here").await?, "here\n");
        }
    }
    assert_eq!(node.cri.pods(None).await?.len(), kept.len());
    let all = node.cri.containers(None).await?;
    assert_eq!(all.len(), kept.len() * CONTAINERS, "{all:#?}");
    for (pod, _) in &kept {
        node.cri.end_pod(&pod.id).await?;
    }
    assert!(node.network.held().is_empty(), "addresses are given back");
    node.finish().await
}
