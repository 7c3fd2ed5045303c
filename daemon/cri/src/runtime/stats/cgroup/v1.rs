//! A cgroup of version 1: one directory for each controller.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::super::sample::{Cpu, Sample, Swap, bounded, device};
use super::{Detail, device_id, fields, huge_pages, number, pids, text};

/// Nanoseconds of one tick of `cpuacct.stat`: `USER_HZ` is 100 for every program.
const TICK_NS: u64 = 10_000_000;

/// Measures a group by its directory in each hierarchy.
pub(super) fn measure(dirs: &BTreeMap<String, PathBuf>, detail: Detail) -> Sample {
    let dir = |name: &str| dirs.get(name).map(PathBuf::as_path);
    let mut sample = Sample::default();
    if let Some(usage_ns) = dir("cpuacct").and_then(|d| number(d, "cpuacct.usage")) {
        let mut cpu = Cpu {
            usage_ns,
            ..Cpu::default()
        };
        if detail == Detail::All {
            let ticks = dir("cpuacct").and_then(|d| text(d, "cpuacct.stat"));
            let [user, system] = fields(&ticks.unwrap_or_default(), ["user", "system"]);
            cpu.user_ns = user.saturating_mul(TICK_NS);
            cpu.system_ns = system.saturating_mul(TICK_NS);
            let stat = dir("cpu").and_then(|d| text(d, "cpu.stat"));
            let keys = ["nr_periods", "nr_throttled", "throttled_time"];
            [cpu.periods, cpu.throttled_periods, cpu.throttled_ns] =
                fields(&stat.unwrap_or_default(), keys);
        }
        sample.cpu = Some(cpu);
    }
    if detail == Detail::Cpu {
        return sample;
    }
    if let Some(dir) = dir("memory") {
        memory(dir, detail, &mut sample);
    }
    sample.pids = dir("pids").and_then(pids);
    if detail == Detail::All {
        if let Some(blkio) = dir("blkio") {
            devices(blkio, &mut sample);
        }
        if let Some(dir) = dir("hugetlb") {
            huge_pages(dir, "usage_in_bytes", "max_usage_in_bytes", &mut sample);
        }
    }
    sample
}

fn memory(dir: &Path, detail: Detail, sample: &mut Sample) {
    let files = ("memory.usage_in_bytes", "memory.limit_in_bytes");
    let Some(mut memory) = super::memory(dir, files.0, files.1) else {
        return;
    };
    let stat = text(dir, "memory.stat").unwrap_or_default();
    let swapped;
    [
        memory.rss,
        memory.cache,
        memory.mapped_file,
        memory.active_file,
        memory.inactive_file,
        memory.page_faults,
        memory.major_page_faults,
        swapped,
    ] = fields(
        &stat,
        [
            "total_rss",
            "total_cache",
            "total_mapped_file",
            "total_active_file",
            "total_inactive_file",
            "total_pgfault",
            "total_pgmajfault",
            "total_swap",
        ],
    );
    if let Some(both) = number(dir, "memory.memsw.limit_in_bytes") {
        let both = bounded(both);
        sample.swap = Some(Swap {
            usage: swapped,
            limit: both
                .zip(memory.limit)
                .map(|(both, memory)| both.saturating_sub(memory)),
        });
    }
    if detail == Detail::All {
        memory.max_usage = number(dir, "memory.max_usage_in_bytes").unwrap_or(0);
        memory.limit_hits = number(dir, "memory.failcnt").unwrap_or(0);
        memory.kernel = number(dir, "memory.kmem.usage_in_bytes").unwrap_or(0);
        let oom = text(dir, "memory.oom_control").unwrap_or_default();
        [memory.oom_kills] = fields(&oom, ["oom_kill"]);
    }
    sample.memory = Some(memory);
}

fn devices(dir: &Path, sample: &mut Sample) {
    let files = [
        ("blkio.throttle.io_service_bytes", true),
        ("blkio.throttle.io_serviced", false),
    ];
    for (name, bytes) in files {
        let recursive = text(dir, &format!("{name}_recursive"));
        let table = recursive.or_else(|| text(dir, name)).unwrap_or_default();
        for line in table.lines() {
            let mut words = line.split(' ');
            let (Some(id), Some(operation), Some(value)) =
                (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let Some((major, minor)) = device_id(id) else {
                continue;
            };
            let value = value.parse().unwrap_or(0);
            let entry = device(&mut sample.devices, major, minor);
            match (operation, bytes) {
                ("Read", true) => entry.read_bytes = value,
                ("Write", true) => entry.write_bytes = value,
                ("Read", false) => entry.reads = value,
                ("Write", false) => entry.writes = value,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cgroup, write};
    use super::*;

    #[test]
    fn version_one_files_are_measured() {
        let dir = tempfile::tempdir().unwrap();
        write(
            dir.path(),
            &[
                ("cpuacct.usage", "77\n"),
                ("cpuacct.stat", "user 2\nsystem 1\n"),
                (
                    "cpu.stat",
                    "nr_periods 4\nnr_throttled 1\nthrottled_time 99\n",
                ),
                ("memory.usage_in_bytes", "1000\n"),
                ("memory.limit_in_bytes", "4000\n"),
                (
                    "memory.stat",
                    "total_rss 11\ntotal_inactive_file 200\ntotal_swap 5\n",
                ),
                ("memory.memsw.limit_in_bytes", "9223372036854771712\n"),
                ("memory.oom_control", "oom_kill_disable 0\noom_kill 3\n"),
                ("pids.current", "2\n"),
                (
                    "blkio.throttle.io_serviced",
                    "8:0 Read 6\n8:0 Write 7\nTotal 13\n",
                ),
            ],
        );
        let names = ["cpu", "cpuacct", "memory", "pids", "blkio"];
        let dirs = names.map(|name| (name.to_owned(), dir.path().to_owned()));
        let cgroup = Cgroup::V1(dirs.into_iter().collect());
        let sample = cgroup.measure(Detail::All).unwrap();
        let cpu = sample.cpu.unwrap();
        assert_eq!(
            (cpu.usage_ns, cpu.user_ns, cpu.throttled_ns),
            (77, 2 * TICK_NS, 99)
        );
        let memory = sample.memory.unwrap();
        assert_eq!(
            (memory.available(), memory.rss, memory.oom_kills),
            (3200, 11, 3)
        );
        assert_eq!(
            sample.swap,
            Some(Swap {
                usage: 5,
                limit: None
            })
        );
        assert_eq!((sample.devices[0].reads, sample.devices[0].writes), (6, 7));
        assert!(cgroup.measure(Detail::Cpu).unwrap().memory.is_none());
    }
}
