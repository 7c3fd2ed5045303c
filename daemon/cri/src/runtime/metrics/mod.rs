//! The metrics of pods and containers that CRI serves in place of cAdvisor's: same names and
//! meanings, values as whole numbers.

mod descriptors;

use std::io::Read as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lighter_proto::runtime::v1 as api;
use lighter_proto::runtime::v1::MetricType;
use lighter_proto::time;

pub(super) use self::descriptors::descriptors;
use super::stats::{Cgroup, Detail, Interface, Measured, Sample, interfaces};
use crate::plugin::Plugin;
use crate::store::{Container, Pod};

/// Nanoseconds in a second.
const SECOND_NS: u64 = 1_000_000_000;
/// Most processes of one container whose descriptors are counted.
const MAX_PROCESSES: usize = 10_000;
/// Largest `/proc/PID/limits` that is read.
const MAX_LIMITS_BYTES: u64 = 64 << 10;

/// Collects metrics that share their labels.
struct Collection {
    labels: Vec<String>,
    timestamp: i64,
    metrics: Vec<api::Metric>,
}

impl Collection {
    /// Labels are pod, namespace, container, id and image.
    fn new(pod: &Pod, container: &str, id: &str, image: &str) -> Self {
        let metadata = pod.config.metadata.clone().unwrap_or_default();
        let labels = [&metadata.name, &metadata.namespace, container, id, image];
        Self {
            labels: labels.iter().map(|l| (*l).to_owned()).collect(),
            timestamp: time::to_nanos(SystemTime::now()),
            metrics: Vec::new(),
        }
    }

    fn add(&mut self, kind: MetricType, name: &str, more: &[&str], value: u64) {
        let more = more.iter().map(|l| (*l).to_owned());
        self.metrics.push(api::Metric {
            name: name.to_owned(),
            timestamp: self.timestamp,
            metric_type: kind.into(),
            label_values: self.labels.iter().cloned().chain(more).collect(),
            value: Some(api::UInt64Value { value }),
        });
    }

    fn counter(&mut self, name: &str, value: u64) {
        self.add(MetricType::Counter, name, &[], value);
    }

    fn gauge(&mut self, name: &str, value: u64) {
        self.add(MetricType::Gauge, name, &[], value);
    }
}

/// What is found in `/proc` of a container's processes.
#[derive(Debug, Default)]
struct Processes {
    count: u64,
    threads: u64,
    descriptors: u64,
    sockets: u64,
    /// Soft limit of open files of the first one; `u64::MAX` is none.
    open_files: Option<u64>,
    /// Size and free space of the root filesystem, in bytes and inodes.
    root: Option<[u64; 4]>,
}

fn inspect(pid: u32, id: &str) -> Processes {
    let mut found = Processes::default();
    let Some(cgroup) = Cgroup::of(pid, id) else {
        return found;
    };
    for process in cgroup.processes().into_iter().take(MAX_PROCESSES) {
        found.count += 1;
        let proc = format!("/proc/{process}");
        if let Ok(threads) = std::fs::read_dir(format!("{proc}/task")) {
            found.threads += u64::try_from(threads.count()).unwrap_or(0);
        }
        let Ok(open) = std::fs::read_dir(format!("{proc}/fd")) else {
            continue;
        };
        for entry in open.flatten() {
            found.descriptors += 1;
            let target = std::fs::read_link(entry.path());
            let socket =
                target.is_ok_and(|t| t.as_os_str().as_encoded_bytes().starts_with(b"socket"));
            found.sockets += u64::from(socket);
        }
    }
    found.open_files = open_files(pid);
    found.root = rustix::fs::statvfs(format!("/proc/{pid}/root"))
        .ok()
        .map(|stat| {
            [
                stat.f_blocks.saturating_mul(stat.f_frsize),
                stat.f_bavail.saturating_mul(stat.f_frsize),
                stat.f_files,
                stat.f_ffree,
            ]
        });
    found
}

fn open_files(pid: u32) -> Option<u64> {
    let file = std::fs::File::open(format!("/proc/{pid}/limits")).ok()?;
    let mut text = String::new();
    file.take(MAX_LIMITS_BYTES).read_to_string(&mut text).ok()?;
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix("Max open files"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

fn network(to: &mut Collection, interfaces: &[Interface]) {
    for interface in interfaces {
        for (direction, counters) in [
            ("receive", interface.received),
            ("transmit", interface.sent),
        ] {
            for (what, value) in [
                ("bytes", counters.bytes),
                ("packets", counters.packets),
                ("packets_dropped", counters.dropped),
                ("errors", counters.errors),
            ] {
                let name = format!("container_network_{direction}_{what}_total");
                to.add(MetricType::Counter, &name, &[&interface.name], value);
            }
        }
    }
}

fn cpu(to: &mut Collection, sample: &Sample) {
    let Some(cpu) = &sample.cpu else { return };
    to.counter(
        "container_cpu_usage_seconds_total",
        cpu.usage_ns / SECOND_NS,
    );
    to.counter("container_cpu_user_seconds_total", cpu.user_ns / SECOND_NS);
    to.counter(
        "container_cpu_system_seconds_total",
        cpu.system_ns / SECOND_NS,
    );
    to.counter("container_cpu_cfs_periods_total", cpu.periods);
    to.counter(
        "container_cpu_cfs_throttled_periods_total",
        cpu.throttled_periods,
    );
    let throttled = cpu.throttled_ns / SECOND_NS;
    to.counter("container_cpu_cfs_throttled_seconds_total", throttled);
}

fn memory(to: &mut Collection, sample: &Sample) {
    let Some(memory) = &sample.memory else { return };
    to.gauge("container_memory_usage_bytes", memory.usage);
    to.gauge("container_memory_working_set_bytes", memory.working_set());
    to.gauge("container_memory_max_usage_bytes", memory.max_usage);
    to.gauge("container_memory_rss", memory.rss);
    to.gauge("container_memory_cache", memory.cache);
    to.gauge("container_memory_mapped_file", memory.mapped_file);
    to.gauge("container_memory_kernel_usage", memory.kernel);
    to.gauge(
        "container_memory_total_active_file_bytes",
        memory.active_file,
    );
    to.gauge(
        "container_memory_total_inactive_file_bytes",
        memory.inactive_file,
    );
    let swapped = sample.swap.as_ref().map_or(0, |s| s.usage);
    to.gauge("container_memory_swap", swapped);
    to.counter("container_memory_failcnt", memory.limit_hits);
    for (kind, value) in [
        ("pgfault", memory.page_faults),
        ("pgmajfault", memory.major_page_faults),
    ] {
        let name = "container_memory_failures_total";
        to.add(MetricType::Counter, name, &[kind, "container"], value);
    }
    to.counter("container_oom_events_total", memory.oom_kills);
}

fn pressure(to: &mut Collection, sample: &Sample) {
    let resources = [
        ("cpu", sample.cpu.as_ref().and_then(|c| c.pressure.as_ref())),
        (
            "memory",
            sample.memory.as_ref().and_then(|m| m.pressure.as_ref()),
        ),
        ("io", sample.io_pressure.as_ref()),
    ];
    for (resource, stats) in resources {
        let Some(stats) = stats else { continue };
        for (word, data) in [("waiting", &stats.some), ("stalled", &stats.full)] {
            let seconds = data.as_ref().map_or(0, |d| d.total / SECOND_NS);
            to.counter(
                &format!("container_pressure_{resource}_{word}_seconds_total"),
                seconds,
            );
        }
    }
}

/// The name of a block device, else its numbers.
fn device_name(major: u64, minor: u64) -> String {
    let link = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}"));
    let name = link
        .ok()
        .and_then(|l| l.file_name().map(|n| n.to_string_lossy().into_owned()));
    name.map_or_else(|| format!("{major}:{minor}"), |name| format!("/dev/{name}"))
}

fn devices(to: &mut Collection, sample: &Sample) {
    for device in &sample.devices {
        let name = device_name(device.major, device.minor);
        for (metric, value) in [
            ("container_fs_reads_bytes_total", device.read_bytes),
            ("container_fs_reads_total", device.reads),
            ("container_fs_writes_bytes_total", device.write_bytes),
            ("container_fs_writes_total", device.writes),
        ] {
            to.add(MetricType::Counter, metric, &[&name], value);
        }
        let (major, minor) = (device.major.to_string(), device.minor.to_string());
        for (operation, value) in [("Read", device.read_bytes), ("Write", device.write_bytes)] {
            let metric = "container_blkio_device_usage_total";
            to.add(
                MetricType::Counter,
                metric,
                &[&name, &major, &minor, operation],
                value,
            );
        }
    }
    for pages in &sample.huge_pages {
        for (metric, value) in [
            ("container_hugetlb_usage_bytes", pages.usage_bytes),
            ("container_hugetlb_max_usage_bytes", pages.max_bytes),
        ] {
            to.add(MetricType::Gauge, metric, &[&pages.page_size], value);
        }
    }
}

fn limits(to: &mut Collection, resources: Option<&api::LinuxContainerResources>) {
    let Some(resources) = resources else { return };
    let positive = |number: i64| u64::try_from(number).unwrap_or(0);
    for (name, value) in [
        ("container_spec_cpu_period", resources.cpu_period),
        ("container_spec_cpu_quota", resources.cpu_quota),
        ("container_spec_cpu_shares", resources.cpu_shares),
    ] {
        if value > 0 {
            to.gauge(name, positive(value));
        }
    }
    let memory = resources.memory_limit_in_bytes;
    let swap = match resources.memory_swap_limit_in_bytes {
        0 => memory,
        other => other,
    };
    to.gauge("container_spec_memory_limit_bytes", positive(memory));
    // CRI has no reservation.
    to.gauge("container_spec_memory_reservation_limit_bytes", 0);
    to.gauge("container_spec_memory_swap_limit_bytes", positive(swap));
}

impl Plugin {
    async fn container_metrics(
        self: &Arc<Self>,
        pod: &Pod,
        measured: &Measured,
    ) -> Option<api::ContainerMetrics> {
        let (container, sample) = (&measured.container, measured.sample.as_ref()?);
        let status = container.status();
        let name = container.config.metadata.as_ref().map_or("", |m| &m.name);
        let image = container.config.image.as_ref();
        let image = image.map_or("", |i| match i.user_specified_image.as_str() {
            "" => &i.image,
            name => name,
        });
        let mut to = Collection::new(pod, name, &container.id, image);
        let now = SystemTime::now();
        to.gauge("container_last_seen", seconds(now));
        let started = status.started_at.unwrap_or(now);
        to.gauge("container_start_time_seconds", seconds(started));
        cpu(&mut to, sample);
        memory(&mut to, sample);
        pressure(&mut to, sample);
        devices(&mut to, sample);
        self.container_processes(&mut to, container, status.pid, sample)
            .await;
        limits(&mut to, status.resources.as_ref());
        Some(api::ContainerMetrics {
            container_id: container.id.clone(),
            metrics: to.metrics,
        })
    }

    async fn container_processes(
        self: &Arc<Self>,
        to: &mut Collection,
        container: &Arc<Container>,
        pid: u32,
        sample: &Sample,
    ) {
        let id = container.id.clone();
        let found = tokio::task::spawn_blocking(move || inspect(pid, &id)).await;
        let found = found.unwrap_or_default();
        let pids = sample.pids.clone().unwrap_or_default();
        to.gauge("container_processes", found.count);
        // Without a pids controller the threads are counted one by one.
        to.gauge("container_threads", pids.current.max(found.threads));
        to.gauge("container_threads_max", pids.limit);
        to.gauge("container_file_descriptors", found.descriptors);
        to.gauge("container_sockets", found.sockets);
        if let Some(most) = found.open_files {
            to.add(
                MetricType::Gauge,
                "container_ulimits_soft",
                &["max_open_files"],
                most,
            );
        }
        let used = self
            .layer(container)
            .await
            .map_or(0, |l| l.usage.size_bytes);
        let [limit, _, inodes, free] = found.root.unwrap_or_default();
        for (name, value) in [
            ("container_fs_usage_bytes", used),
            ("container_fs_limit_bytes", limit),
            ("container_fs_inodes_total", inodes),
            ("container_fs_inodes_free", free),
        ] {
            to.add(MetricType::Gauge, name, &["/"], value);
        }
    }

    async fn pod_metrics(self: &Arc<Self>, pod: &Arc<Pod>) -> api::PodSandboxMetrics {
        let mut to = Collection::new(pod, "", &pod.id, "");
        let pid = pod.state().pid;
        if pod.netns.is_some() && pid != 0 {
            network(&mut to, &interfaces(pid));
        }
        let mut containers = Vec::new();
        let own = self.store.containers_of(&pod.id);
        for measured in self.measure(own, Detail::All).await {
            containers.extend(self.container_metrics(pod, &measured).await);
        }
        api::PodSandboxMetrics {
            pod_sandbox_id: pod.id.clone(),
            metrics: to.metrics,
            container_metrics: containers,
        }
    }

    /// Metrics of all pods that are ready, with those of their containers that run.
    pub(super) async fn list_metrics(self: &Arc<Self>) -> Vec<api::PodSandboxMetrics> {
        let mut metrics = Vec::new();
        for pod in self.store.visible_pods() {
            if pod.is_ready() {
                metrics.push(self.pod_metrics(&pod).await);
            }
        }
        metrics
    }
}

fn seconds(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or(Duration::ZERO).as_secs()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::super::stats::sample_of_everything;
    use super::*;

    fn pod() -> Pod {
        let config = api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: "p".into(),
                namespace: "n".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        Pod::new("id".into(), "p".into(), config, String::new(), None)
    }

    #[test]
    fn every_sample_has_as_many_values_as_its_descriptor_has_keys() {
        let keys: HashMap<String, usize> = descriptors()
            .into_iter()
            .map(|d| (d.name, d.label_keys.len()))
            .collect();
        let mut to = Collection::new(&pod(), "c", "id", "image");
        let sample = sample_of_everything();
        cpu(&mut to, &sample);
        memory(&mut to, &sample);
        pressure(&mut to, &sample);
        devices(&mut to, &sample);
        network(&mut to, &[Interface::default()]);
        let resources = api::LinuxContainerResources {
            cpu_period: 1,
            cpu_quota: 1,
            cpu_shares: 1,
            ..Default::default()
        };
        limits(&mut to, Some(&resources));
        assert!(to.metrics.len() > 40);
        for metric in &to.metrics {
            let count = keys.get(&metric.name).copied();
            assert_eq!(count, Some(metric.label_values.len()), "{}", metric.name);
        }
    }

    #[test]
    fn this_process_is_found_in_proc() {
        let open = open_files(std::process::id()).unwrap();
        assert!(open > 0);
    }
}
