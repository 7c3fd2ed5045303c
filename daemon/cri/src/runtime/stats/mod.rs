//! Statistics of containers and pods.
//!
//! Processes that are in a cgroup of this machine are measured by their cgroup's files; those of
//! other runtimes, such as virtual machines, by asking their shim. Rates come from samples that a
//! background task takes while somebody asks for statistics.

mod cgroup;
mod encode;
mod history;
mod network;
mod sample;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use lighter_proto::errdefs::ErrorKind;
use lighter_proto::runtime::v1 as api;
use lighter_proto::runtime::v1::ContainerState;

pub(super) use cgroup::{Cgroup, Detail};
pub(crate) use history::History;
use history::Layer;
pub(super) use network::{Interface, interfaces};
pub(super) use sample::Sample;

use crate::error::{Error, Result};
use crate::plugin::Plugin;
use crate::store::{Container, Pod};

/// How long a shim may take to answer.
const SHIM_LIMIT: Duration = Duration::from_secs(2);
/// How long a layer may take to be measured while somebody waits; it goes on in the background.
const LAYER_LIMIT: Duration = Duration::from_secs(2);
/// Runtimes that keep a container's processes in its own cgroup of this machine.
const ON_THIS_MACHINE: [&str; 2] = ["io.containerd.lighter.v2", "io.containerd.runc.v2"];

/// One container and what it used; nothing when it does not run.
#[derive(Debug)]
pub(super) struct Measured {
    pub(super) container: Arc<Container>,
    pub(super) sample: Option<Sample>,
}

/// How one is measured.
enum Source {
    /// By the files of its cgroup.
    Cgroup(Arc<Cgroup>),
    /// By asking its shim.
    Shim,
    /// It does not run.
    None,
}

impl Plugin {
    fn source(&self, id: &str, pod_handler: &str, pid: u32) -> Source {
        if pid == 0 {
            return Source::None;
        }
        let runtime = self.handler(pod_handler).map(super::task_runtime);
        if runtime.is_ok_and(|name| ON_THIS_MACHINE.contains(&name.as_str())) {
            let cgroup = self.stats.cgroup(id, pid);
            return cgroup.map_or(Source::None, Source::Cgroup);
        }
        Source::Shim
    }

    pub(super) async fn ask_shim(&self, id: &str) -> Result<Sample> {
        let handle = self.tasks.get(&self.scope.namespace, id).await?;
        Sample::decode(&handle.stats(SHIM_LIMIT).await?)
    }

    /// Measures by each source, in order; those that cannot be are `None`.
    async fn measure_all(
        &self,
        sources: Vec<(String, Source)>,
        detail: Detail,
    ) -> Vec<Option<Sample>> {
        let mut samples = Vec::with_capacity(sources.len());
        let mut cgroups = Vec::new();
        for (at, (id, source)) in sources.into_iter().enumerate() {
            samples.push(None);
            match source {
                Source::Cgroup(cgroup) => cgroups.push((at, cgroup)),
                Source::None => {}
                Source::Shim => match self.ask_shim(&id).await {
                    Ok(sample) => samples[at] = Some(sample),
                    Err(error) => tracing::debug!(%id, %error, "not measured"),
                },
            }
        }
        let read = tokio::task::spawn_blocking(move || {
            let read = cgroups
                .iter()
                .map(|(at, cgroup)| (*at, cgroup.measure(detail)));
            read.collect::<Vec<_>>()
        });
        // It panics only when a bug does.
        for (at, sample) in read.await.unwrap_or_default() {
            samples[at] = sample;
        }
        samples
    }

    /// Measures containers.
    pub(super) async fn measure(
        &self,
        containers: Vec<Arc<Container>>,
        detail: Detail,
    ) -> Vec<Measured> {
        let mut handlers: HashMap<&str, String> = HashMap::new();
        let mut sources = Vec::with_capacity(containers.len());
        for container in &containers {
            let status = container.status();
            let running = status.state == ContainerState::ContainerRunning;
            let pid = if running { status.pid } else { 0 };
            let handler = handlers.entry(&container.pod_id).or_insert_with(|| {
                let pod = self.store.pods.find(&container.pod_id).ok().flatten();
                pod.map(|p| p.handler.clone()).unwrap_or_default()
            });
            sources.push((
                container.id.clone(),
                self.source(&container.id, handler, pid),
            ));
        }
        let samples = self.measure_all(sources, detail).await;
        let measured = containers.into_iter().zip(samples);
        measured
            .map(|(container, sample)| Measured { container, sample })
            .collect()
    }

    /// What a pod used: its own cgroup, or the sum over its processes when it shares one.
    pub(super) async fn measure_pod(&self, pod: &Pod, detail: Detail) -> Option<Sample> {
        let source = self.source(&pod.id, &pod.handler, pod.state().pid);
        let parent = pod.config.linux.as_ref().map(|l| l.cgroup_parent.as_str());
        let own = parent.is_some_and(|p| !p.is_empty());
        let source = match source {
            Source::Cgroup(pause) if own => pause
                .parent()
                .map_or(Source::None, |p| Source::Cgroup(Arc::new(p))),
            other => other,
        };
        let summed = !own || matches!(source, Source::Shim);
        let samples = self
            .measure_all(vec![(pod.id.clone(), source)], detail)
            .await;
        let mut total = samples.into_iter().next().flatten();
        if summed {
            let containers = self.store.containers_of(&pod.id);
            for measured in self.measure(containers, detail).await {
                if let Some(sample) = &measured.sample {
                    total.get_or_insert_default().add(sample);
                }
            }
        }
        total
    }

    /// Takes samples while somebody asks for statistics; does not return.
    pub(crate) async fn sample(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(self.stats.period);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if self.stats.is_asked() {
                self.sample_once().await;
            }
        }
    }

    async fn sample_once(&self) {
        let containers = self.store.all_containers();
        let pods = self.store.visible_pods();
        let ids = containers.iter().map(|c| c.id.clone());
        let ids: HashSet<String> = ids.chain(pods.iter().map(|p| p.id.clone())).collect();
        self.stats.keep(&ids);
        for measured in self.measure(containers, Detail::Cpu).await {
            self.note(&measured.container.id, measured.sample.as_ref());
        }
        for pod in pods.iter().filter(|p| p.is_ready()) {
            let sample = self.measure_pod(pod, Detail::Cpu).await;
            self.note(&pod.id, sample.as_ref());
        }
        for container in self.store.all_containers() {
            if self.stats.layer(&container.id).is_some() && self.stats.layer_is_due(&container.id) {
                self.measure_layer(&container).await;
            }
        }
    }

    fn note(&self, id: &str, sample: Option<&Sample>) {
        if let Some(cpu) = sample.and_then(|s| s.cpu.as_ref()) {
            self.stats.note(id, cpu.usage_ns);
        }
    }

    async fn measure_layer(&self, container: &Container) -> Option<Layer> {
        let snapshots = self.db.snapshots(&container.snapshotter).ok()?;
        match snapshots.usage(&self.scope, &container.id).await {
            Ok(usage) => Some(self.stats.note_layer(&container.id, usage)),
            Err(error) => {
                tracing::debug!(container_id = %container.id, %error, "layer not measured");
                None
            }
        }
    }

    /// The size of a container's layer: as last measured, or measured now when it never was.
    pub(super) async fn layer(self: &Arc<Self>, container: &Arc<Container>) -> Option<Layer> {
        if let Some(layer) = self.stats.layer(&container.id) {
            return Some(layer);
        }
        let (this, owned) = (Arc::clone(self), Arc::clone(container));
        // Goes on when it takes too long, so that the next question has its answer.
        let measured = self
            .tracker
            .spawn(async move { this.measure_layer(&owned).await });
        let measured = tokio::time::timeout(LAYER_LIMIT, measured).await;
        measured.ok().and_then(std::result::Result::ok).flatten()
    }

    /// Statistics of one container that runs.
    pub(super) async fn container_stats(self: &Arc<Self>, id: &str) -> Result<api::ContainerStats> {
        self.stats.ask();
        let container = self.store.containers.get(id)?;
        let measured = self.measure(vec![container], Detail::Usage).await;
        match measured.into_iter().next() {
            Some(measured) if measured.sample.is_some() => {
                Ok(self.encode_container(&measured).await)
            }
            _ => Err(Error::unknown(format!(
                "unexpected metrics response: container {id:?} is not running"
            ))),
        }
    }

    /// Statistics of containers that match, running or not.
    pub(super) async fn list_container_stats(
        self: &Arc<Self>,
        filter: Option<api::ContainerStatsFilter>,
    ) -> Vec<api::ContainerStats> {
        self.stats.ask();
        let filter = filter.unwrap_or_default();
        let matches = |container: &Arc<Container>| {
            container.id.starts_with(&filter.id)
                && container.pod_id.starts_with(&filter.pod_sandbox_id)
                && super::encode::selected(&container.config.labels, &filter.label_selector)
        };
        let containers = self
            .store
            .all_containers()
            .into_iter()
            .filter(matches)
            .collect();
        let mut stats = Vec::new();
        for measured in self.measure(containers, Detail::Usage).await {
            stats.push(self.encode_container(&measured).await);
        }
        stats
    }

    /// Statistics of one pod that is ready.
    pub(super) async fn pod_stats(self: &Arc<Self>, id: &str) -> Result<api::PodSandboxStats> {
        self.stats.ask();
        let pod = self.store.pods.get(id)?;
        if !pod.is_ready() {
            return Err(Error::new(
                ErrorKind::Unavailable,
                format!(
                    "failed to get pod sandbox stats since sandbox container {:?} is not in ready \
                     state: unavailable",
                    pod.id
                ),
            ));
        }
        Ok(self.encode_pod(&pod).await)
    }

    /// Statistics of pods that match and are ready.
    pub(super) async fn list_pod_stats(
        self: &Arc<Self>,
        filter: Option<api::PodSandboxStatsFilter>,
    ) -> Vec<api::PodSandboxStats> {
        self.stats.ask();
        let filter = filter.unwrap_or_default();
        let mut stats = Vec::new();
        for pod in self.store.visible_pods() {
            if pod.is_ready()
                && pod.id.starts_with(&filter.id)
                && super::encode::selected(&pod.config.labels, &filter.label_selector)
            {
                stats.push(self.encode_pod(&pod).await);
            }
        }
        stats
    }
}

/// A measurement with every part in it.
#[cfg(test)]
pub(super) fn sample_of_everything() -> Sample {
    use sample::{Cpu, DeviceIo, HugePages, Memory, Pids, Swap};
    let pressure = Some(api::PsiStats::default());
    Sample {
        cpu: Some(Cpu {
            pressure,
            ..Cpu::default()
        }),
        memory: Some(Memory {
            pressure,
            ..Memory::default()
        }),
        swap: Some(Swap::default()),
        io_pressure: pressure,
        pids: Some(Pids::default()),
        devices: vec![DeviceIo::default()],
        huge_pages: vec![HugePages::default()],
    }
}
