//! One measurement of a container or pod, whichever cgroup version or shim it came from.

use lighter_proto::any;
use lighter_proto::io::containerd::cgroups::{v1, v2};
use lighter_proto::runtime::v1 as api;
use prost_types::Any;

use crate::error::{Error, Result};

/// From this number of bytes on a memory limit is none: version 1 rounds its largest one down.
const UNLIMITED_BYTES: u64 = 1 << 62;

/// Reads and writes of one block device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct DeviceIo {
    pub(crate) major: u64,
    pub(crate) minor: u64,
    pub(crate) read_bytes: u64,
    pub(crate) write_bytes: u64,
    pub(crate) reads: u64,
    pub(crate) writes: u64,
}

/// Huge pages of one size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HugePages {
    /// As the kernel writes it: `2MB`.
    pub(crate) page_size: String,
    pub(crate) usage_bytes: u64,
    pub(crate) max_bytes: u64,
}

/// What a cgroup used. Counters only grow while the cgroup lives.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Sample {
    pub(crate) cpu: Option<Cpu>,
    pub(crate) memory: Option<Memory>,
    pub(crate) swap: Option<Swap>,
    pub(crate) io_pressure: Option<api::PsiStats>,
    pub(crate) pids: Option<Pids>,
    pub(crate) devices: Vec<DeviceIo>,
    pub(crate) huge_pages: Vec<HugePages>,
}

/// Processor time, in nanoseconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Cpu {
    pub(crate) usage_ns: u64,
    pub(crate) user_ns: u64,
    pub(crate) system_ns: u64,
    pub(crate) periods: u64,
    pub(crate) throttled_periods: u64,
    pub(crate) throttled_ns: u64,
    pub(crate) pressure: Option<api::PsiStats>,
}

/// Memory, in bytes.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Memory {
    pub(crate) usage: u64,
    pub(crate) max_usage: u64,
    /// `None` when there is none.
    pub(crate) limit: Option<u64>,
    pub(crate) rss: u64,
    pub(crate) cache: u64,
    pub(crate) mapped_file: u64,
    pub(crate) active_file: u64,
    pub(crate) inactive_file: u64,
    pub(crate) kernel: u64,
    pub(crate) limit_hits: u64,
    pub(crate) page_faults: u64,
    pub(crate) major_page_faults: u64,
    pub(crate) oom_kills: u64,
    pub(crate) pressure: Option<api::PsiStats>,
}

/// Swap, in bytes; only where the kernel accounts it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Swap {
    pub(crate) usage: u64,
    /// `None` when there is none.
    pub(crate) limit: Option<u64>,
}

/// Tasks of the kernel: threads, not processes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Pids {
    pub(crate) current: u64,
    /// 0 when there is none.
    pub(crate) limit: u64,
}

/// A limit that is none when it is as large as the kernel writes it.
pub(super) fn bounded(bytes: u64) -> Option<u64> {
    (bytes < UNLIMITED_BYTES).then_some(bytes)
}

impl Memory {
    /// What cannot be given back at once: usage without inactive page cache.
    pub(crate) fn working_set(&self) -> u64 {
        self.usage.saturating_sub(self.inactive_file)
    }

    /// What is left below the limit; 0 without one.
    pub(crate) fn available(&self) -> u64 {
        self.limit
            .map_or(0, |limit| limit.saturating_sub(self.working_set()))
    }
}

impl Sample {
    /// Reads what a shim answered.
    ///
    /// # Errors
    /// For statistics of another kind, such as a virtual machine's.
    pub(crate) fn decode(stats: &Any) -> Result<Self> {
        let broken = |e: any::Error| Error::unknown(format!("failed to decode metrics: {e}"));
        if any::is(stats, "io.containerd.cgroups.v1.Metrics") {
            return Ok(Self::from_v1(any::unpack(stats).map_err(broken)?));
        }
        if any::is(stats, "io.containerd.cgroups.v2.Metrics") {
            return Ok(Self::from_v2(any::unpack(stats).map_err(broken)?));
        }
        Err(Error::unknown(format!(
            "unexpected metrics type {:?}",
            stats.type_url
        )))
    }

    fn from_v1(stats: v1::Metrics) -> Self {
        let cpu = stats.cpu.map(|cpu| {
            let (usage, throttling) = (
                cpu.usage.unwrap_or_default(),
                cpu.throttling.unwrap_or_default(),
            );
            Cpu {
                usage_ns: usage.total,
                user_ns: usage.user,
                system_ns: usage.kernel,
                periods: throttling.periods,
                throttled_periods: throttling.throttled_periods,
                throttled_ns: throttling.throttled_time,
                pressure: None,
            }
        });
        let oom_kills = stats.memory_oom_control.map_or(0, |oom| oom.oom_kill);
        let swap = stats.memory.as_ref().and_then(|m| m.swap);
        let memory = stats.memory.map(|memory| {
            let usage = memory.usage.unwrap_or_default();
            Memory {
                usage: usage.usage,
                max_usage: usage.max,
                limit: bounded(usage.limit),
                rss: memory.total_rss,
                cache: memory.total_cache,
                mapped_file: memory.total_mapped_file,
                active_file: memory.total_active_file,
                inactive_file: memory.total_inactive_file,
                kernel: memory.kernel.map_or(0, |k| k.usage),
                limit_hits: usage.failcnt,
                page_faults: memory.total_pg_fault,
                major_page_faults: memory.total_pg_maj_fault,
                oom_kills,
                pressure: None,
            }
        });
        // The entry counts memory and swap together.
        let swap = swap.zip(memory.as_ref()).map(|(both, memory)| Swap {
            usage: both.usage.saturating_sub(memory.usage),
            limit: bounded(both.limit)
                .zip(memory.limit)
                .map(|(both, memory)| both.saturating_sub(memory)),
        });
        let blkio = stats.blkio.unwrap_or_default();
        let mut devices = Vec::new();
        for entry in &blkio.io_service_bytes_recursive {
            let device = device(&mut devices, entry.major, entry.minor);
            match entry.op.to_ascii_lowercase().as_str() {
                "read" => device.read_bytes = entry.value,
                "write" => device.write_bytes = entry.value,
                _ => {}
            }
        }
        for entry in &blkio.io_serviced_recursive {
            let device = device(&mut devices, entry.major, entry.minor);
            match entry.op.to_ascii_lowercase().as_str() {
                "read" => device.reads = entry.value,
                "write" => device.writes = entry.value,
                _ => {}
            }
        }
        let huge_pages = stats.hugetlb.into_iter().map(|pages| HugePages {
            page_size: pages.pagesize,
            usage_bytes: pages.usage,
            max_bytes: pages.max,
        });
        Self {
            cpu,
            memory,
            swap,
            io_pressure: None,
            pids: stats.pids.map(|p| Pids {
                current: p.current,
                limit: p.limit,
            }),
            devices,
            huge_pages: huge_pages.collect(),
        }
    }

    fn from_v2(stats: v2::Metrics) -> Self {
        let cpu = stats.cpu.map(|cpu| Cpu {
            usage_ns: cpu.usage_usec.saturating_mul(1000),
            user_ns: cpu.user_usec.saturating_mul(1000),
            system_ns: cpu.system_usec.saturating_mul(1000),
            periods: cpu.nr_periods,
            throttled_periods: cpu.nr_throttled,
            throttled_ns: cpu.throttled_usec.saturating_mul(1000),
            pressure: cpu.psi.map(pressure),
        });
        let events = stats.memory_events.unwrap_or_default();
        let swap = stats.memory.as_ref().map(|memory| Swap {
            usage: memory.swap_usage,
            limit: bounded(memory.swap_limit),
        });
        let memory = stats.memory.map(|memory| Memory {
            usage: memory.usage,
            max_usage: memory.max_usage,
            limit: bounded(memory.usage_limit),
            rss: memory.anon,
            cache: memory.file,
            mapped_file: memory.file_mapped,
            active_file: memory.active_file,
            inactive_file: memory.inactive_file,
            kernel: memory.kernel_stack.saturating_add(memory.slab),
            limit_hits: events.max,
            page_faults: memory.pgfault,
            major_page_faults: memory.pgmajfault,
            oom_kills: events.oom_kill,
            pressure: memory.psi.map(pressure),
        });
        let io = stats.io.unwrap_or_default();
        let devices = io.usage.iter().map(|entry| DeviceIo {
            major: entry.major,
            minor: entry.minor,
            read_bytes: entry.rbytes,
            write_bytes: entry.wbytes,
            reads: entry.rios,
            writes: entry.wios,
        });
        let huge_pages = stats.hugetlb.into_iter().map(|pages| HugePages {
            page_size: pages.pagesize,
            usage_bytes: pages.current,
            max_bytes: pages.max,
        });
        Self {
            cpu,
            memory,
            swap,
            io_pressure: io.psi.map(pressure),
            pids: stats.pids.map(|p| Pids {
                current: p.current,
                limit: p.limit,
            }),
            devices: devices.collect(),
            huge_pages: huge_pages.collect(),
        }
    }

    /// Adds what another cgroup used: a pod without a cgroup of its own is its containers.
    pub(crate) fn add(&mut self, other: &Self) {
        if let Some(more) = &other.cpu {
            let cpu = self.cpu.get_or_insert_default();
            cpu.usage_ns += more.usage_ns;
            cpu.user_ns += more.user_ns;
            cpu.system_ns += more.system_ns;
        }
        if let Some(more) = &other.memory {
            let memory = self.memory.get_or_insert_default();
            memory.usage += more.usage;
            memory.rss += more.rss;
            memory.cache += more.cache;
            memory.inactive_file += more.inactive_file;
            memory.page_faults += more.page_faults;
            memory.major_page_faults += more.major_page_faults;
        }
        if let Some(more) = &other.swap {
            self.swap.get_or_insert_default().usage += more.usage;
        }
        if let Some(more) = &other.pids {
            self.pids.get_or_insert_default().current += more.current;
        }
    }
}

/// The entry of a device, made where it is missing.
pub(super) fn device(devices: &mut Vec<DeviceIo>, major: u64, minor: u64) -> &mut DeviceIo {
    let at = devices
        .iter()
        .position(|d| (d.major, d.minor) == (major, minor));
    let at = at.unwrap_or_else(|| {
        devices.push(DeviceIo {
            major,
            minor,
            ..DeviceIo::default()
        });
        devices.len() - 1
    });
    &mut devices[at]
}

/// Pressure in CRI's units: nanoseconds, where the kernel has microseconds.
fn pressure(stats: v2::PsiStats) -> api::PsiStats {
    let line = |data: v2::PsiData| api::PsiData {
        total: data.total.saturating_mul(1000),
        avg10: data.avg10,
        avg60: data.avg60,
        avg300: data.avg300,
    };
    api::PsiStats {
        full: stats.full.map(line),
        some: stats.some.map(line),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shims_statistics_are_read() {
        let stats = v1::Metrics {
            cpu: Some(v1::CpuStat {
                usage: Some(v1::CpuUsage {
                    total: 7,
                    ..Default::default()
                }),
                throttling: None,
            }),
            memory: Some(v1::MemoryStat {
                total_inactive_file: 30,
                usage: Some(v1::MemoryEntry {
                    usage: 100,
                    limit: 200,
                    ..Default::default()
                }),
                swap: Some(v1::MemoryEntry {
                    usage: 110,
                    limit: u64::MAX >> 1,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let sample = Sample::decode(&any::pack(&stats)).unwrap();
        assert_eq!(sample.cpu.unwrap().usage_ns, 7);
        let memory = sample.memory.unwrap();
        assert_eq!((memory.working_set(), memory.available()), (70, 130));
        let swap = Swap {
            usage: 10,
            limit: None,
        };
        assert_eq!(sample.swap.unwrap(), swap);
    }

    #[test]
    fn other_statistics_are_refused() {
        let other = Any {
            type_url: "io.example.Machine".into(),
            value: Vec::new(),
        };
        let error = Sample::decode(&other).unwrap_err().to_string();
        assert!(error.contains("unexpected metrics type"), "{error}");
    }
}
