//! Figures of a group, in the shape `events --stats` prints them.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::{Directory, fs, v1};
use crate::error::{Error, Result};

/// Figures of one group. Times in nanoseconds, sizes in bytes.
#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs, reason = "fields are named after the kernel's own")]
pub struct Stats {
    pub cpu: CpuStats,
    pub memory: MemoryStats,
    pub pids: PidsStats,
    pub blkio: BTreeMap<String, Vec<BlkioEntry>>,
    pub hugetlb: BTreeMap<String, HugetlbStats>,
}

/// Processor time.
#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs, reason = "fields are named after the kernel's own")]
pub struct CpuStats {
    pub total: u64,
    pub per_cpu: Vec<u64>,
    pub user: u64,
    pub kernel: u64,
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled_time: u64,
    pub pressure: Option<PressureStats>,
}

/// Memory.
#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs, reason = "fields are named after the kernel's own")]
pub struct MemoryStats {
    pub usage: u64,
    pub max: u64,
    pub limit: u64,
    pub failcnt: u64,
    pub swap_usage: u64,
    pub swap_limit: u64,
    pub kernel_usage: u64,
    pub kernel_tcp_usage: u64,
    pub raw: BTreeMap<String, u64>,
    pub pressure: Option<PressureStats>,
}

/// Processes.
#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs, reason = "fields are named after the kernel's own")]
pub struct PidsStats {
    pub current: u64,
    /// 0 = no limit.
    pub limit: u64,
}

/// One line of a blkio file.
#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs, reason = "fields are named after the kernel's own")]
pub struct BlkioEntry {
    pub major: u64,
    pub minor: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub op: String,
    pub value: u64,
}

/// Huge pages of one size.
#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs, reason = "fields are named after the kernel's own")]
pub struct HugetlbStats {
    pub usage: u64,
    pub max: u64,
    pub failcnt: u64,
}

/// Pressure stall information of one resource.
#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs, reason = "fields are named after the kernel's own")]
pub struct PressureStats {
    pub some: PressureLine,
    pub full: PressureLine,
}

/// One line of a pressure file: averages in percent, total in microseconds.
#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs, reason = "fields are named after the kernel's own")]
pub struct PressureLine {
    pub avg10: f64,
    pub avg60: f64,
    pub avg300: f64,
    pub total: u64,
}

/// Nanoseconds in one of the clock ticks of cpuacct.stat (USER_HZ is 100 on every architecture we build for).
const TICK_NS: u64 = 10_000_000;

fn limit_or_zero(directory: &Path, file: &str) -> u64 {
    fs::number(directory, file)
        .filter(|limit| *limit != u64::MAX)
        .unwrap_or(0)
}

pub(super) fn read_v1(directories: &[Directory]) -> Result<Stats> {
    if !directories.iter().any(|directory| directory.path.is_dir()) {
        return Err(Error::State("cgroup does not exist".into()));
    }
    let mut stats = Stats {
        cpu: cpu_v1(directories),
        ..Stats::default()
    };
    if let Some(path) = v1::find(directories, "memory") {
        let number = |file| fs::number(path, file).unwrap_or(0);
        stats.memory = MemoryStats {
            usage: number("memory.usage_in_bytes"),
            max: number("memory.max_usage_in_bytes"),
            limit: number("memory.limit_in_bytes"),
            failcnt: number("memory.failcnt"),
            swap_usage: number("memory.memsw.usage_in_bytes"),
            swap_limit: number("memory.memsw.limit_in_bytes"),
            kernel_usage: number("memory.kmem.usage_in_bytes"),
            kernel_tcp_usage: number("memory.kmem.tcp.usage_in_bytes"),
            raw: fs::pairs(path, "memory.stat").into_iter().collect(),
            pressure: None,
        };
    }
    if let Some(path) = v1::find(directories, "pids") {
        stats.pids.current = fs::number(path, "pids.current").unwrap_or(0);
        stats.pids.limit = limit_or_zero(path, "pids.max");
    }
    if let Some(path) = v1::find(directories, "blkio") {
        let files = [
            (
                "ioServiceBytesRecursive",
                "blkio.throttle.io_service_bytes_recursive",
            ),
            (
                "ioServicedRecursive",
                "blkio.throttle.io_serviced_recursive",
            ),
            ("ioQueueRecursive", "blkio.bfq.io_queued_recursive"),
            (
                "ioServiceTimeRecursive",
                "blkio.bfq.io_service_time_recursive",
            ),
            ("ioWaitTimeRecursive", "blkio.bfq.io_wait_time_recursive"),
            ("ioMergedRecursive", "blkio.bfq.io_merged_recursive"),
        ];
        for (name, file) in files {
            stats.blkio.insert(
                name.into(),
                blkio_v1(&fs::read(path, file).unwrap_or_default()),
            );
        }
    }
    if let Some(path) = v1::find(directories, "hugetlb") {
        for size in huge_page_sizes() {
            let number =
                |kind: &str| fs::number(path, &format!("hugetlb.{size}.{kind}")).unwrap_or(0);
            let figures = HugetlbStats {
                usage: number("usage_in_bytes"),
                max: number("max_usage_in_bytes"),
                failcnt: number("failcnt"),
            };
            stats.hugetlb.insert(size, figures);
        }
    }
    Ok(stats)
}

fn cpu_v1(directories: &[Directory]) -> CpuStats {
    let mut stats = CpuStats::default();
    if let Some(path) = v1::find(directories, "cpuacct") {
        stats.total = fs::number(path, "cpuacct.usage").unwrap_or(0);
        stats.per_cpu = fs::read(path, "cpuacct.usage_percpu")
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|value| value.parse().ok())
            .collect();
        for (key, value) in fs::pairs(path, "cpuacct.stat") {
            match key.as_str() {
                "user" => stats.user = value * TICK_NS,
                "system" => stats.kernel = value * TICK_NS,
                _ => {}
            }
        }
    }
    if let Some(path) = v1::find(directories, "cpu") {
        for (key, value) in fs::pairs(path, "cpu.stat") {
            match key.as_str() {
                "nr_periods" => stats.periods = value,
                "nr_throttled" => stats.throttled_periods = value,
                "throttled_time" => stats.throttled_time = value,
                _ => {}
            }
        }
    }
    stats
}

fn blkio_v1(text: &str) -> Vec<BlkioEntry> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (major, minor) = words.next()?.split_once(':')?;
            let (op, value) = match (words.next()?, words.next()) {
                (op, Some(value)) => (op, value),
                (value, None) => ("", value),
            };
            Some(BlkioEntry {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                op: op.to_owned(),
                value: value.parse().ok()?,
            })
        })
        .collect()
}

/// Sizes as the controller names them (`2MB`, `1GB`).
fn huge_page_sizes() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/sys/kernel/mm/hugepages") else {
        return Vec::new();
    };
    entries
        .filter_map(std::result::Result::ok)
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let kib: u64 = name
                .strip_prefix("hugepages-")?
                .strip_suffix("kB")?
                .parse()
                .ok()?;
            Some(match kib {
                kib if kib >= 1 << 20 => format!("{}GB", kib >> 20),
                kib if kib >= 1 << 10 => format!("{}MB", kib >> 10),
                kib => format!("{kib}KB"),
            })
        })
        .collect()
}

pub(super) fn read_v2(path: &Path) -> Result<Stats> {
    if !path.is_dir() {
        return Err(Error::State("cgroup does not exist".into()));
    }
    let mut stats = Stats::default();
    for (key, value) in fs::pairs(path, "cpu.stat") {
        match key.as_str() {
            "usage_usec" => stats.cpu.total = value * 1000,
            "user_usec" => stats.cpu.user = value * 1000,
            "system_usec" => stats.cpu.kernel = value * 1000,
            "nr_periods" => stats.cpu.periods = value,
            "nr_throttled" => stats.cpu.throttled_periods = value,
            "throttled_usec" => stats.cpu.throttled_time = value * 1000,
            _ => {}
        }
    }
    stats.cpu.pressure = pressure(path, "cpu.pressure");
    let number = |file| fs::number(path, file).unwrap_or(0);
    stats.memory = MemoryStats {
        usage: number("memory.current"),
        max: number("memory.peak"),
        limit: number("memory.max"),
        swap_usage: number("memory.swap.current"),
        swap_limit: number("memory.swap.max"),
        raw: fs::pairs(path, "memory.stat").into_iter().collect(),
        pressure: pressure(path, "memory.pressure"),
        ..MemoryStats::default()
    };
    let events = fs::pairs(path, "memory.events");
    stats.memory.failcnt = events
        .iter()
        .find(|(key, _)| key == "max")
        .map_or(0, |(_, value)| *value);
    stats.memory.kernel_usage = stats.memory.raw.get("kernel").copied().unwrap_or(0);
    stats.pids = PidsStats {
        current: number("pids.current"),
        limit: limit_or_zero(path, "pids.max"),
    };
    let (bytes, counts) = io_v2(path);
    stats.blkio.insert("ioServiceBytesRecursive".into(), bytes);
    stats.blkio.insert("ioServicedRecursive".into(), counts);
    for size in huge_page_sizes() {
        if let Some(usage) = fs::number(path, &format!("hugetlb.{size}.current")) {
            let events = fs::pairs(path, &format!("hugetlb.{size}.events"));
            let failcnt = events
                .iter()
                .find(|(key, _)| key == "max")
                .map_or(0, |(_, value)| *value);
            stats.hugetlb.insert(
                size,
                HugetlbStats {
                    usage,
                    max: 0,
                    failcnt,
                },
            );
        }
    }
    Ok(stats)
}

/// Bytes and operations by device.
fn io_v2(path: &Path) -> (Vec<BlkioEntry>, Vec<BlkioEntry>) {
    let (mut bytes, mut counts) = (Vec::new(), Vec::new());
    for line in fs::read(path, "io.stat").unwrap_or_default().lines() {
        let mut words = line.split(' ');
        let Some((major, minor)) = words.next().and_then(|number| number.split_once(':')) else {
            continue;
        };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else {
            continue;
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let (list, op) = match key {
                "rbytes" => (&mut bytes, "Read"),
                "wbytes" => (&mut bytes, "Write"),
                "rios" => (&mut counts, "Read"),
                "wios" => (&mut counts, "Write"),
                _ => continue,
            };
            list.push(BlkioEntry {
                major,
                minor,
                op: op.into(),
                value: value.parse().unwrap_or(0),
            });
        }
    }
    (bytes, counts)
}

fn pressure(path: &Path, file: &str) -> Option<PressureStats> {
    let text = fs::read(path, file).ok()?;
    let mut stats = PressureStats::default();
    for line in text.lines() {
        let (kind, values) = line.split_once(' ')?;
        let mut parsed = PressureLine::default();
        for (key, value) in values.split(' ').filter_map(|word| word.split_once('=')) {
            match key {
                "avg10" => parsed.avg10 = value.parse().ok()?,
                "avg60" => parsed.avg60 = value.parse().ok()?,
                "avg300" => parsed.avg300 = value.parse().ok()?,
                "total" => parsed.total = value.parse().ok()?,
                _ => {}
            }
        }
        match kind {
            "some" => stats.some = parsed,
            "full" => stats.full = parsed,
            _ => {}
        }
    }
    Some(stats)
}
