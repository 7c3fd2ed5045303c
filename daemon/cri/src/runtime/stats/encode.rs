//! Measurements as CRI writes them.

use std::sync::Arc;
use std::time::SystemTime;

use lighter_proto::runtime::v1 as api;
use lighter_proto::time;

use super::{Detail, Interface, Measured, Sample, interfaces};
use crate::plugin::Plugin;
use crate::store::{Container, Pod};

/// Interface that a pod's traffic is told of by.
const MAIN_INTERFACE: &str = "eth0";

fn value(value: u64) -> Option<api::UInt64Value> {
    Some(api::UInt64Value { value })
}

fn cpu(sample: &Sample, rate: Option<u64>, timestamp: i64) -> Option<api::CpuUsage> {
    let cpu = sample.cpu.as_ref()?;
    Some(api::CpuUsage {
        timestamp,
        usage_core_nano_seconds: value(cpu.usage_ns),
        usage_nano_cores: rate.and_then(value),
        psi: cpu.pressure,
    })
}

fn memory(sample: &Sample, timestamp: i64) -> Option<api::MemoryUsage> {
    let memory = sample.memory.as_ref()?;
    Some(api::MemoryUsage {
        timestamp,
        working_set_bytes: value(memory.working_set()),
        available_bytes: value(memory.available()),
        usage_bytes: value(memory.usage),
        rss_bytes: value(memory.rss),
        page_faults: value(memory.page_faults),
        major_page_faults: value(memory.major_page_faults),
        psi: memory.pressure,
    })
}

fn io(sample: &Sample, timestamp: i64) -> Option<api::IoUsage> {
    let psi = Some(sample.io_pressure?);
    Some(api::IoUsage { timestamp, psi })
}

fn network(interfaces: &[Interface], timestamp: i64) -> api::NetworkUsage {
    let encoded: Vec<_> = interfaces
        .iter()
        .map(|interface| api::NetworkInterfaceUsage {
            name: interface.name.clone(),
            rx_bytes: value(interface.received.bytes),
            rx_errors: value(interface.received.errors),
            tx_bytes: value(interface.sent.bytes),
            tx_errors: value(interface.sent.errors),
        })
        .collect();
    let main = encoded.iter().find(|i| i.name == MAIN_INTERFACE);
    api::NetworkUsage {
        timestamp,
        default_interface: main.or(encoded.first()).cloned(),
        interfaces: encoded,
    }
}

impl Plugin {
    async fn writable_layer(self: &Arc<Self>, container: &Arc<Container>) -> api::FilesystemUsage {
        let layer = self.layer(container).await;
        let root = self.db.snapshots(&container.snapshotter).ok();
        let root = root.and_then(|s| s.driver().root().map(|r| r.display().to_string()));
        api::FilesystemUsage {
            timestamp: layer.map_or(0, |l| time::to_nanos(l.at)),
            fs_id: Some(api::FilesystemIdentifier {
                mountpoint: root.unwrap_or_default(),
            }),
            used_bytes: value(layer.map_or(0, |l| l.usage.size_bytes)),
            inodes_used: value(layer.map_or(0, |l| l.usage.inodes)),
        }
    }

    /// One container's statistics; only attributes and layer when it does not run.
    pub(super) async fn encode_container(
        self: &Arc<Self>,
        measured: &Measured,
    ) -> api::ContainerStats {
        let container = &measured.container;
        let timestamp = time::to_nanos(SystemTime::now());
        let sample = measured.sample.as_ref();
        let swap = sample.and_then(|s| s.swap.as_ref());
        api::ContainerStats {
            attributes: Some(api::ContainerAttributes {
                id: container.id.clone(),
                metadata: container.config.metadata.clone(),
                labels: container.config.labels.clone(),
                annotations: container.config.annotations.clone(),
            }),
            cpu: sample.and_then(|s| cpu(s, self.stats.rate(&container.id), timestamp)),
            memory: sample.and_then(|s| memory(s, timestamp)),
            writable_layer: Some(self.writable_layer(container).await),
            swap: swap.map(|swap| api::SwapUsage {
                timestamp,
                swap_available_bytes: swap
                    .limit
                    .and_then(|limit| value(limit.saturating_sub(swap.usage))),
                swap_usage_bytes: value(swap.usage),
            }),
            io: sample.and_then(|s| io(s, timestamp)),
        }
    }

    /// One pod's statistics, with those of its containers.
    pub(super) async fn encode_pod(self: &Arc<Self>, pod: &Arc<Pod>) -> api::PodSandboxStats {
        let sample = self
            .measure_pod(pod, Detail::Usage)
            .await
            .unwrap_or_default();
        let timestamp = time::to_nanos(SystemTime::now());
        let pid = pod.state().pid;
        let network =
            (pod.netns.is_some() && pid != 0).then(|| network(&interfaces(pid), timestamp));
        let mut containers = Vec::new();
        let mut tasks = 0;
        let own = self.store.containers_of(&pod.id);
        for measured in self.measure(own, Detail::Usage).await {
            let pids = measured.sample.as_ref().and_then(|s| s.pids.as_ref());
            tasks += pids.map_or(0, |p| p.current);
            containers.push(self.encode_container(&measured).await);
        }
        api::PodSandboxStats {
            attributes: Some(api::PodSandboxAttributes {
                id: pod.id.clone(),
                metadata: pod.config.metadata.clone(),
                labels: pod.config.labels.clone(),
                annotations: pod.config.annotations.clone(),
            }),
            linux: Some(api::LinuxPodSandboxStats {
                cpu: cpu(&sample, self.stats.rate(&pod.id), timestamp),
                memory: memory(&sample, timestamp),
                network,
                process: Some(api::ProcessUsage {
                    timestamp,
                    process_count: value(tasks),
                }),
                containers,
                io: io(&sample, timestamp),
            }),
            windows: None,
        }
    }
}
