//! Metrics of a version 2 cgroup.

use std::path::Path;

use lighter_proto::io::containerd::cgroups::v2 as message;

use super::{huge_page_sizes, lookup, number, rdma_lines, read};

/// Reads everything that the enabled controllers offer.
pub(super) fn metrics(dir: &Path) -> message::Metrics {
    message::Metrics {
        pids: number(dir, "pids.current").map(|current| message::PidsStat {
            current,
            limit: limit(dir, "pids.max"),
        }),
        cpu: Some(cpu(dir)),
        memory: Some(memory(dir)),
        rdma: Some(message::RdmaStat {
            current: rdma(dir, "rdma.current"),
            limit: rdma(dir, "rdma.max"),
        }),
        io: Some(message::IoStat {
            usage: io(dir),
            psi: pressure(dir, "io.pressure"),
        }),
        hugetlb: hugetlb(dir),
        memory_events: memory_events(dir),
        network: Vec::new(),
    }
}

/// A limit; `max` is the largest number, a missing file is 0.
fn limit(dir: &Path, name: &str) -> u64 {
    let text = read(dir, name);
    match text.trim() {
        "max" => u64::MAX,
        value => value.parse().unwrap_or(0),
    }
}

fn cpu(dir: &Path) -> message::CpuStat {
    let table = read(dir, "cpu.stat");
    let field = |key| lookup(&table, key).unwrap_or(0);
    message::CpuStat {
        usage_usec: field("usage_usec"),
        user_usec: field("user_usec"),
        system_usec: field("system_usec"),
        nr_periods: field("nr_periods"),
        nr_throttled: field("nr_throttled"),
        throttled_usec: field("throttled_usec"),
        psi: pressure(dir, "cpu.pressure"),
        nr_bursts: field("nr_bursts"),
        burst_usec: field("burst_usec"),
    }
}

fn memory(dir: &Path) -> message::MemoryStat {
    let table = read(dir, "memory.stat");
    let field = |key| lookup(&table, key).unwrap_or(0);
    message::MemoryStat {
        anon: field("anon"),
        file: field("file"),
        kernel_stack: field("kernel_stack"),
        slab: field("slab"),
        sock: field("sock"),
        shmem: field("shmem"),
        file_mapped: field("file_mapped"),
        file_dirty: field("file_dirty"),
        file_writeback: field("file_writeback"),
        anon_thp: field("anon_thp"),
        inactive_anon: field("inactive_anon"),
        active_anon: field("active_anon"),
        inactive_file: field("inactive_file"),
        active_file: field("active_file"),
        unevictable: field("unevictable"),
        slab_reclaimable: field("slab_reclaimable"),
        slab_unreclaimable: field("slab_unreclaimable"),
        pgfault: field("pgfault"),
        pgmajfault: field("pgmajfault"),
        // Newer kernels count anonymous and file pages apart.
        workingset_refault: field("workingset_refault")
            + field("workingset_refault_anon")
            + field("workingset_refault_file"),
        workingset_activate: field("workingset_activate")
            + field("workingset_activate_anon")
            + field("workingset_activate_file"),
        workingset_nodereclaim: field("workingset_nodereclaim"),
        pgrefill: field("pgrefill"),
        pgscan: field("pgscan"),
        pgsteal: field("pgsteal"),
        pgactivate: field("pgactivate"),
        pgdeactivate: field("pgdeactivate"),
        pglazyfree: field("pglazyfree"),
        pglazyfreed: field("pglazyfreed"),
        thp_fault_alloc: field("thp_fault_alloc"),
        thp_collapse_alloc: field("thp_collapse_alloc"),
        usage: number(dir, "memory.current").unwrap_or(0),
        usage_limit: limit(dir, "memory.max"),
        swap_usage: number(dir, "memory.swap.current").unwrap_or(0),
        swap_limit: limit(dir, "memory.swap.max"),
        max_usage: number(dir, "memory.peak").unwrap_or(0),
        swap_max_usage: number(dir, "memory.swap.peak").unwrap_or(0),
        psi: pressure(dir, "memory.pressure"),
    }
}

fn memory_events(dir: &Path) -> Option<message::MemoryEvents> {
    let table = read(dir, "memory.events");
    let field = |key| lookup(&table, key).unwrap_or(0);
    (!table.is_empty()).then(|| message::MemoryEvents {
        low: field("low"),
        high: field("high"),
        max: field("max"),
        oom: field("oom"),
        oom_kill: field("oom_kill"),
        oom_group_kill: field("oom_group_kill"),
    })
}

fn io(dir: &Path) -> Vec<message::IoEntry> {
    read(dir, "io.stat")
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let (major, minor) = fields.next()?.split_once(':')?;
            let mut entry = message::IoEntry {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                ..message::IoEntry::default()
            };
            for (key, value) in fields.filter_map(|field| field.split_once('=')) {
                let value = value.parse().unwrap_or(0);
                match key {
                    "rbytes" => entry.rbytes = value,
                    "wbytes" => entry.wbytes = value,
                    "rios" => entry.rios = value,
                    "wios" => entry.wios = value,
                    _ => {}
                }
            }
            Some(entry)
        })
        .collect()
}

fn hugetlb(dir: &Path) -> Vec<message::HugeTlbStat> {
    huge_page_sizes()
        .into_iter()
        .filter_map(|pagesize| {
            let file = |what: &str| format!("hugetlb.{pagesize}.{what}");
            Some(message::HugeTlbStat {
                current: number(dir, &file("current"))?,
                max: limit(dir, &file("max")),
                failcnt: lookup(&read(dir, &file("events")), "max").unwrap_or(0),
                pagesize,
            })
        })
        .collect()
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

/// Pressure stall information; `None` where the kernel has none.
fn pressure(dir: &Path, name: &str) -> Option<message::PsiStats> {
    let text = read(dir, name);
    let line = |kind: &str| {
        text.lines().find_map(|line| {
            let mut fields = line.split(' ');
            if fields.next() != Some(kind) {
                return None;
            }
            let mut data = message::PsiData::default();
            for (key, value) in fields.filter_map(|field| field.split_once('=')) {
                match key {
                    "avg10" => data.avg10 = value.parse().unwrap_or(0.0),
                    "avg60" => data.avg60 = value.parse().unwrap_or(0.0),
                    "avg300" => data.avg300 = value.parse().unwrap_or(0.0),
                    "total" => data.total = value.parse().unwrap_or(0),
                    _ => {}
                }
            }
            Some(data)
        })
    };
    (!text.is_empty()).then(|| message::PsiStats {
        some: line("some"),
        full: line("full"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_end_up_in_their_fields() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write(
            "cpu.stat",
            "usage_usec 9\nuser_usec 5\nsystem_usec 4\nnr_bursts 1\n",
        );
        write(
            "cpu.pressure",
            "some avg10=1.50 avg60=0.00 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=5\n",
        );
        write("memory.current", "100\n");
        write("memory.max", "max\n");
        write("memory.peak", "120\n");
        write(
            "memory.stat",
            "anon 1\nfile 2\nworkingset_refault_anon 3\nworkingset_refault_file 4\n",
        );
        write("memory.events", "low 0\nhigh 0\nmax 6\noom 2\noom_kill 1\n");
        write(
            "io.stat",
            "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n",
        );
        write("pids.current", "3\n");
        write("pids.max", "10\n");
        let metrics = metrics(dir.path());
        let cpu = metrics.cpu.unwrap();
        assert_eq!((cpu.usage_usec, cpu.nr_bursts), (9, 1));
        assert_eq!(cpu.psi.unwrap().some.unwrap().total, 77);
        let memory = metrics.memory.unwrap();
        assert_eq!(
            (memory.usage, memory.usage_limit, memory.max_usage),
            (100, u64::MAX, 120)
        );
        assert_eq!(memory.workingset_refault, 7);
        assert_eq!(metrics.memory_events.unwrap().oom_kill, 1);
        let io = &metrics.io.unwrap().usage[0];
        assert_eq!((io.major, io.rbytes, io.wios), (254, 1, 4));
        assert_eq!(metrics.pids.unwrap().limit, 10);
    }
}
