//! Metrics of a version 1 cgroup.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lighter_proto::io::containerd::cgroups::v1 as message;

use super::{huge_page_sizes, lookup, number, rdma_lines, read};

/// Nanoseconds per tick of `cpuacct.stat`; the kernel counts there in USER_HZ, which is 100.
const TICK_NANOS: u64 = 1_000_000_000 / 100;

/// Reads everything that the mounted controllers offer.
pub(super) fn metrics(controllers: &BTreeMap<String, PathBuf>) -> message::Metrics {
    let dir = |name: &str| controllers.get(name).filter(|dir| dir.exists());
    message::Metrics {
        hugetlb: dir("hugetlb").map(|dir| hugetlb(dir)).unwrap_or_default(),
        pids: dir("pids").map(|dir| message::PidsStat {
            current: number(dir, "pids.current").unwrap_or(0),
            limit: number(dir, "pids.max").unwrap_or(0),
        }),
        cpu: cpu(
            dir("cpuacct").map(PathBuf::as_path),
            dir("cpu").map(PathBuf::as_path),
        ),
        memory: dir("memory").map(|dir| memory(dir)),
        blkio: dir("blkio").map(|dir| blkio(dir)),
        rdma: dir("rdma").map(|dir| message::RdmaStat {
            current: rdma(dir, "rdma.current"),
            limit: rdma(dir, "rdma.max"),
        }),
        memory_oom_control: dir("memory").map(|dir| {
            let table = read(dir, "memory.oom_control");
            message::MemoryOomControl {
                oom_kill_disable: lookup(&table, "oom_kill_disable").unwrap_or(0),
                under_oom: lookup(&table, "under_oom").unwrap_or(0),
                oom_kill: lookup(&table, "oom_kill").unwrap_or(0),
            }
        }),
        ..message::Metrics::default()
    }
}

fn hugetlb(dir: &Path) -> Vec<message::HugetlbStat> {
    huge_page_sizes()
        .into_iter()
        .filter_map(|pagesize| {
            let file = |what: &str| format!("hugetlb.{pagesize}.{what}");
            Some(message::HugetlbStat {
                usage: number(dir, &file("usage_in_bytes"))?,
                max: number(dir, &file("max_usage_in_bytes")).unwrap_or(0),
                failcnt: number(dir, &file("failcnt")).unwrap_or(0),
                pagesize,
            })
        })
        .collect()
}

fn cpu(cpuacct: Option<&Path>, cpu: Option<&Path>) -> Option<message::CpuStat> {
    if cpuacct.is_none() && cpu.is_none() {
        return None;
    }
    let usage = cpuacct.map(|dir| {
        let table = read(dir, "cpuacct.stat");
        let ticks = |key| lookup(&table, key).unwrap_or(0).saturating_mul(TICK_NANOS);
        message::CpuUsage {
            total: number(dir, "cpuacct.usage").unwrap_or(0),
            kernel: ticks("system"),
            user: ticks("user"),
            per_cpu: read(dir, "cpuacct.usage_percpu")
                .split_whitespace()
                .filter_map(|value| value.parse().ok())
                .collect(),
        }
    });
    let throttling = cpu.map(|dir| {
        let table = read(dir, "cpu.stat");
        message::Throttle {
            periods: lookup(&table, "nr_periods").unwrap_or(0),
            throttled_periods: lookup(&table, "nr_throttled").unwrap_or(0),
            throttled_time: lookup(&table, "throttled_time").unwrap_or(0),
        }
    });
    Some(message::CpuStat { usage, throttling })
}

fn memory(dir: &Path) -> message::MemoryStat {
    let table = read(dir, "memory.stat");
    let field = |key| lookup(&table, key).unwrap_or(0);
    let entry = |module: &str| {
        let file = |what: &str| format!("memory{module}.{what}");
        Some(message::MemoryEntry {
            usage: number(dir, &file("usage_in_bytes"))?,
            max: number(dir, &file("max_usage_in_bytes")).unwrap_or(0),
            failcnt: number(dir, &file("failcnt")).unwrap_or(0),
            limit: number(dir, &file("limit_in_bytes")).unwrap_or(0),
        })
    };
    message::MemoryStat {
        cache: field("cache"),
        rss: field("rss"),
        rss_huge: field("rss_huge"),
        mapped_file: field("mapped_file"),
        dirty: field("dirty"),
        writeback: field("writeback"),
        pg_pg_in: field("pgpgin"),
        pg_pg_out: field("pgpgout"),
        pg_fault: field("pgfault"),
        pg_maj_fault: field("pgmajfault"),
        inactive_anon: field("inactive_anon"),
        active_anon: field("active_anon"),
        inactive_file: field("inactive_file"),
        active_file: field("active_file"),
        unevictable: field("unevictable"),
        hierarchical_memory_limit: field("hierarchical_memory_limit"),
        hierarchical_swap_limit: field("hierarchical_memsw_limit"),
        total_cache: field("total_cache"),
        total_rss: field("total_rss"),
        total_rss_huge: field("total_rss_huge"),
        total_mapped_file: field("total_mapped_file"),
        total_dirty: field("total_dirty"),
        total_writeback: field("total_writeback"),
        total_pg_pg_in: field("total_pgpgin"),
        total_pg_pg_out: field("total_pgpgout"),
        total_pg_fault: field("total_pgfault"),
        total_pg_maj_fault: field("total_pgmajfault"),
        total_inactive_anon: field("total_inactive_anon"),
        total_active_anon: field("total_active_anon"),
        total_inactive_file: field("total_inactive_file"),
        total_active_file: field("total_active_file"),
        total_unevictable: field("total_unevictable"),
        usage: entry(""),
        swap: entry(".memsw"),
        kernel: entry(".kmem"),
        kernel_tcp: entry(".kmem.tcp"),
    }
}

/// Which files the block controller has depends on the I/O scheduler: the recursive ones of a
/// proportional scheduler, else the throttling layer's own.
fn blkio(dir: &Path) -> message::BlkIoStat {
    let first = |names: &[&str]| {
        names
            .iter()
            .map(|name| entries(dir, name))
            .find(|found| !found.is_empty())
    };
    message::BlkIoStat {
        io_service_bytes_recursive: first(&[
            "blkio.bfq.io_service_bytes_recursive",
            "blkio.io_service_bytes_recursive",
            "blkio.throttle.io_service_bytes_recursive",
            "blkio.throttle.io_service_bytes",
        ])
        .unwrap_or_default(),
        io_serviced_recursive: first(&[
            "blkio.bfq.io_serviced_recursive",
            "blkio.io_serviced_recursive",
            "blkio.throttle.io_serviced_recursive",
            "blkio.throttle.io_serviced",
        ])
        .unwrap_or_default(),
        io_queued_recursive: entries(dir, "blkio.io_queued_recursive"),
        io_service_time_recursive: entries(dir, "blkio.io_service_time_recursive"),
        io_wait_time_recursive: entries(dir, "blkio.io_wait_time_recursive"),
        io_merged_recursive: entries(dir, "blkio.io_merged_recursive"),
        io_time_recursive: entries(dir, "blkio.time_recursive"),
        sectors_recursive: entries(dir, "blkio.sectors_recursive"),
    }
}

/// Lines `major:minor [operation] value`; the closing total names no device and is left out.
fn entries(dir: &Path, name: &str) -> Vec<message::BlkIoEntry> {
    read(dir, name)
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (device, op, value) = match fields[..] {
                [device, op, value] => (device, op, value),
                [device, value] => (device, "", value),
                _ => return None,
            };
            let (major, minor) = device.split_once(':')?;
            Some(message::BlkIoEntry {
                op: op.to_owned(),
                device: device_path(device),
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                value: value.parse().ok()?,
            })
        })
        .collect()
}

/// Path of a block device below `/dev`; empty when it is not known.
fn device_path(numbers: &str) -> String {
    read(&Path::new("/sys/dev/block").join(numbers), "uevent")
        .lines()
        .find_map(|line| {
            line.strip_prefix("DEVNAME=")
                .map(|name| format!("/dev/{name}"))
        })
        .unwrap_or_default()
}

fn rdma(dir: &Path, name: &str) -> Vec<message::RdmaEntry> {
    rdma_lines(&read(dir, name))
        .into_iter()
        .map(|(device, hca_handles, hca_objects)| message::RdmaEntry {
            device,
            hca_handles,
            hca_objects,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_end_up_in_their_fields() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("cpuacct.usage", "1234\n");
        write("cpuacct.usage_percpu", "1000 234 \n");
        write("cpuacct.stat", "user 5\nsystem 7\n");
        write(
            "cpu.stat",
            "nr_periods 1\nnr_throttled 2\nthrottled_time 3\n",
        );
        write(
            "memory.stat",
            "cache 10\nrss 20\npgpgin 3\nhierarchical_memsw_limit 99\ntotal_rss 21\n",
        );
        write("memory.usage_in_bytes", "30\n");
        write("memory.limit_in_bytes", "40\n");
        write(
            "memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n",
        );
        write("pids.current", "2\n");
        write("pids.max", "max\n");
        write(
            "blkio.throttle.io_service_bytes",
            "254:0 Read 8\n254:0 Write 9\nTotal 17\n",
        );
        let all = ["cpu", "cpuacct", "memory", "pids", "blkio"];
        let controllers = all
            .iter()
            .map(|name| ((*name).to_owned(), dir.path().to_owned()))
            .collect();
        let metrics = metrics(&controllers);
        let cpu = metrics.cpu.unwrap();
        let usage = cpu.usage.unwrap();
        assert_eq!(
            (usage.total, usage.per_cpu.as_slice()),
            (1234, &[1000, 234][..])
        );
        assert_eq!((usage.user, usage.kernel), (50_000_000, 70_000_000));
        assert_eq!(cpu.throttling.unwrap().throttled_time, 3);
        let memory = metrics.memory.unwrap();
        assert_eq!((memory.cache, memory.rss, memory.pg_pg_in), (10, 20, 3));
        assert_eq!((memory.hierarchical_swap_limit, memory.total_rss), (99, 21));
        let usage = memory.usage.unwrap();
        assert_eq!((usage.usage, usage.limit), (30, 40));
        assert_eq!(memory.swap, None);
        assert_eq!(metrics.memory_oom_control.unwrap().oom_kill, 4);
        let pids = metrics.pids.unwrap();
        assert_eq!((pids.current, pids.limit), (2, 0));
        let io = metrics.blkio.unwrap().io_service_bytes_recursive;
        assert_eq!(io.len(), 2);
        assert_eq!(
            (io[1].op.as_str(), io[1].major, io[1].value),
            ("Write", 254, 9)
        );
    }
}
