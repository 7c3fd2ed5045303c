//! Which metrics there are, what they mean, and the keys of their labels.

use lighter_proto::runtime::v1::MetricDescriptor;

/// Keys that every metric has.
const BASE: [&str; 5] = ["pod", "namespace", "container", "id", "image"];

/// Name, meaning, and keys beyond [`BASE`].
type Row = (&'static str, &'static str, &'static [&'static str]);

const NONE: &[&str] = &[];
const DEVICE: &[&str] = &["device"];
const INTERFACE: &[&str] = &["interface"];

const CPU: [Row; 6] = [
    (
        "container_cpu_usage_seconds_total",
        "Processor time used, in seconds.",
        NONE,
    ),
    (
        "container_cpu_user_seconds_total",
        "Processor time used in user mode, in seconds.",
        NONE,
    ),
    (
        "container_cpu_system_seconds_total",
        "Processor time used in the kernel, in seconds.",
        NONE,
    ),
    (
        "container_cpu_cfs_periods_total",
        "Enforcement periods that have passed.",
        NONE,
    ),
    (
        "container_cpu_cfs_throttled_periods_total",
        "Enforcement periods in which the container was throttled.",
        NONE,
    ),
    (
        "container_cpu_cfs_throttled_seconds_total",
        "Time spent throttled, in seconds.",
        NONE,
    ),
];

const MEMORY: [Row; 13] = [
    (
        "container_memory_usage_bytes",
        "Memory charged to the container, in bytes.",
        NONE,
    ),
    (
        "container_memory_working_set_bytes",
        "Memory in use without inactive page cache, in bytes.",
        NONE,
    ),
    (
        "container_memory_max_usage_bytes",
        "Most memory ever charged, in bytes.",
        NONE,
    ),
    ("container_memory_rss", "Anonymous memory, in bytes.", NONE),
    ("container_memory_cache", "Page cache, in bytes.", NONE),
    (
        "container_memory_mapped_file",
        "Mapped files, in bytes.",
        NONE,
    ),
    (
        "container_memory_kernel_usage",
        "Kernel memory, in bytes.",
        NONE,
    ),
    ("container_memory_swap", "Swap in use, in bytes.", NONE),
    (
        "container_memory_total_active_file_bytes",
        "Active page cache, in bytes.",
        NONE,
    ),
    (
        "container_memory_total_inactive_file_bytes",
        "Inactive page cache, in bytes.",
        NONE,
    ),
    (
        "container_memory_failcnt",
        "Times the memory limit was hit.",
        NONE,
    ),
    (
        "container_memory_failures_total",
        "Page faults, by type.",
        &["failure_type", "scope"],
    ),
    (
        "container_oom_events_total",
        "Processes killed for want of memory.",
        NONE,
    ),
];

const PRESSURE: [Row; 6] = [
    (
        "container_pressure_cpu_waiting_seconds_total",
        "Time in which some task waited for a processor, in seconds.",
        NONE,
    ),
    (
        "container_pressure_cpu_stalled_seconds_total",
        "Time in which all tasks waited for a processor, in seconds.",
        NONE,
    ),
    (
        "container_pressure_memory_waiting_seconds_total",
        "Time in which some task waited for memory, in seconds.",
        NONE,
    ),
    (
        "container_pressure_memory_stalled_seconds_total",
        "Time in which all tasks waited for memory, in seconds.",
        NONE,
    ),
    (
        "container_pressure_io_waiting_seconds_total",
        "Time in which some task waited for a device, in seconds.",
        NONE,
    ),
    (
        "container_pressure_io_stalled_seconds_total",
        "Time in which all tasks waited for a device, in seconds.",
        NONE,
    ),
];

const DISK: [Row; 11] = [
    (
        "container_fs_usage_bytes",
        "Size of the writable layer, in bytes.",
        DEVICE,
    ),
    (
        "container_fs_limit_bytes",
        "Size of the filesystem below it, in bytes.",
        DEVICE,
    ),
    (
        "container_fs_inodes_total",
        "Inodes of the filesystem below it.",
        DEVICE,
    ),
    (
        "container_fs_inodes_free",
        "Free inodes of the filesystem below it.",
        DEVICE,
    ),
    (
        "container_fs_reads_bytes_total",
        "Bytes read from a device.",
        DEVICE,
    ),
    ("container_fs_reads_total", "Reads from a device.", DEVICE),
    (
        "container_fs_writes_bytes_total",
        "Bytes written to a device.",
        DEVICE,
    ),
    ("container_fs_writes_total", "Writes to a device.", DEVICE),
    (
        "container_blkio_device_usage_total",
        "Bytes moved from and to a device, by operation.",
        &["device", "major", "minor", "operation"],
    ),
    (
        "container_hugetlb_usage_bytes",
        "Huge pages in use, in bytes.",
        &["pagesize"],
    ),
    (
        "container_hugetlb_max_usage_bytes",
        "Most huge pages ever in use, in bytes.",
        &["pagesize"],
    ),
];

const NETWORK: [Row; 8] = [
    (
        "container_network_receive_bytes_total",
        "Bytes received.",
        INTERFACE,
    ),
    (
        "container_network_receive_packets_total",
        "Packets received.",
        INTERFACE,
    ),
    (
        "container_network_receive_packets_dropped_total",
        "Packets dropped on receipt.",
        INTERFACE,
    ),
    (
        "container_network_receive_errors_total",
        "Errors on receipt.",
        INTERFACE,
    ),
    (
        "container_network_transmit_bytes_total",
        "Bytes sent.",
        INTERFACE,
    ),
    (
        "container_network_transmit_packets_total",
        "Packets sent.",
        INTERFACE,
    ),
    (
        "container_network_transmit_packets_dropped_total",
        "Packets dropped on sending.",
        INTERFACE,
    ),
    (
        "container_network_transmit_errors_total",
        "Errors on sending.",
        INTERFACE,
    ),
];

const PROCESSES: [Row; 8] = [
    ("container_processes", "Processes in the container.", NONE),
    ("container_threads", "Threads in the container.", NONE),
    (
        "container_threads_max",
        "Most threads allowed; 0 is without limit.",
        NONE,
    ),
    ("container_file_descriptors", "Open file descriptors.", NONE),
    ("container_sockets", "Open sockets.", NONE),
    (
        "container_ulimits_soft",
        "Soft limits of the first process.",
        &["ulimit"],
    ),
    (
        "container_last_seen",
        "When it was measured, in seconds since 1970.",
        NONE,
    ),
    (
        "container_start_time_seconds",
        "When it was started, in seconds since 1970.",
        NONE,
    ),
];

const LIMITS: [Row; 6] = [
    (
        "container_spec_cpu_period",
        "Enforcement period, in microseconds.",
        NONE,
    ),
    (
        "container_spec_cpu_quota",
        "Processor time in each period, in microseconds.",
        NONE,
    ),
    ("container_spec_cpu_shares", "Weight among others.", NONE),
    (
        "container_spec_memory_limit_bytes",
        "Memory limit, in bytes; 0 is none.",
        NONE,
    ),
    (
        "container_spec_memory_reservation_limit_bytes",
        "Memory reservation, in bytes; 0 is none.",
        NONE,
    ),
    (
        "container_spec_memory_swap_limit_bytes",
        "Limit of memory and swap together, in bytes; 0 is none.",
        NONE,
    ),
];

/// All metrics.
pub(in crate::runtime) fn descriptors() -> Vec<MetricDescriptor> {
    let groups: [&[Row]; 7] = [
        &CPU, &MEMORY, &PRESSURE, &DISK, &NETWORK, &PROCESSES, &LIMITS,
    ];
    let rows = groups.into_iter().flatten();
    rows.map(|(name, help, more)| MetricDescriptor {
        name: (*name).to_owned(),
        help: (*help).to_owned(),
        label_keys: BASE.iter().chain(*more).map(|k| (*k).to_owned()).collect(),
    })
    .collect()
}
