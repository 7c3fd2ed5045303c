//! A cgroup of version 2.

use std::path::Path;

use lighter_proto::runtime::v1 as api;

use super::super::sample::{Cpu, Sample, Swap, device};
use super::{Detail, device_id, fields, huge_pages, limit, number, pids, text};

/// Measures a group by its directory.
pub(super) fn measure(dir: &Path, detail: Detail) -> Sample {
    let mut sample = Sample::default();
    let Some(stat) = text(dir, "cpu.stat") else {
        return sample;
    };
    let keys = [
        "usage_usec",
        "user_usec",
        "system_usec",
        "nr_periods",
        "nr_throttled",
        "throttled_usec",
    ];
    let [usage, user, system, periods, throttled_periods, throttled] = fields(&stat, keys);
    let mut cpu = Cpu {
        usage_ns: usage.saturating_mul(1000),
        user_ns: user.saturating_mul(1000),
        system_ns: system.saturating_mul(1000),
        periods,
        throttled_periods,
        throttled_ns: throttled.saturating_mul(1000),
        pressure: None,
    };
    if detail == Detail::Cpu {
        sample.cpu = Some(cpu);
        return sample;
    }
    cpu.pressure = pressure(dir, "cpu.pressure");
    sample.cpu = Some(cpu);
    sample.io_pressure = pressure(dir, "io.pressure");
    memory(dir, detail, &mut sample);
    sample.pids = pids(dir);
    if detail == Detail::All {
        devices(dir, &mut sample);
        huge_pages(dir, "current", "peak", &mut sample);
    }
    sample
}

fn memory(dir: &Path, detail: Detail, sample: &mut Sample) {
    let Some(mut memory) = super::memory(dir, "memory.current", "memory.max") else {
        return;
    };
    memory.pressure = pressure(dir, "memory.pressure");
    let stat = text(dir, "memory.stat").unwrap_or_default();
    let (stack, slab);
    [
        memory.rss,
        memory.cache,
        memory.mapped_file,
        memory.active_file,
        memory.inactive_file,
        memory.page_faults,
        memory.major_page_faults,
        memory.kernel,
        stack,
        slab,
    ] = fields(
        &stat,
        [
            "anon",
            "file",
            "file_mapped",
            "active_file",
            "inactive_file",
            "pgfault",
            "pgmajfault",
            "kernel",
            "kernel_stack",
            "slab",
        ],
    );
    // Kernels before 5.18 have no sum.
    if memory.kernel == 0 {
        memory.kernel = stack + slab;
    }
    if let Some(usage) = number(dir, "memory.swap.current") {
        sample.swap = Some(Swap {
            usage,
            limit: limit(dir, "memory.swap.max"),
        });
    }
    if detail == Detail::All {
        memory.max_usage = number(dir, "memory.peak").unwrap_or(memory.usage);
        let events = text(dir, "memory.events").unwrap_or_default();
        [memory.limit_hits, memory.oom_kills] = fields(&events, ["max", "oom_kill"]);
    }
    sample.memory = Some(memory);
}

fn devices(dir: &Path, sample: &mut Sample) {
    for line in text(dir, "io.stat").unwrap_or_default().lines() {
        let mut words = line.split(' ');
        let Some((major, minor)) = words.next().and_then(device_id) else {
            continue;
        };
        let entry = device(&mut sample.devices, major, minor);
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let value = value.parse().unwrap_or(0);
            match key {
                "rbytes" => entry.read_bytes = value,
                "wbytes" => entry.write_bytes = value,
                "rios" => entry.reads = value,
                "wios" => entry.writes = value,
                _ => {}
            }
        }
    }
}

/// Pressure of one resource; `None` on kernels without it.
fn pressure(dir: &Path, name: &str) -> Option<api::PsiStats> {
    let mut stats = api::PsiStats::default();
    for line in text(dir, name)?.lines() {
        let mut words = line.split(' ');
        let kind = words.next();
        let mut data = api::PsiData::default();
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            match key {
                "avg10" => data.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => data.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => data.avg300 = value.parse().unwrap_or(0.0),
                // Microseconds, where CRI wants nanoseconds.
                "total" => data.total = value.parse::<u64>().unwrap_or(0).saturating_mul(1000),
                _ => {}
            }
        }
        match kind {
            Some("some") => stats.some = Some(data),
            Some("full") => stats.full = Some(data),
            _ => {}
        }
    }
    Some(stats)
}

#[cfg(test)]
mod tests {
    use super::super::{Cgroup, write};
    use super::*;

    #[test]
    fn version_two_files_are_measured() {
        let dir = tempfile::tempdir().unwrap();
        let psi = "some avg10=1.50 avg60=0.00 avg300=0.00 total=7\nfull avg10=0.00 total=2\n";
        write(
            dir.path(),
            &[
                ("cpu.stat", "usage_usec 5\nuser_usec 3\nsystem_usec 2\n"),
                ("cpu.pressure", psi),
                ("memory.current", "1000\n"),
                ("memory.max", "max\n"),
                (
                    "memory.stat",
                    "anon 10\nfile 20\ninactive_file 300\nkernel_stack 4\nslab 5\n",
                ),
                ("memory.swap.current", "6\n"),
                ("memory.swap.max", "60\n"),
                ("memory.events", "low 0\nmax 3\noom_kill 2\n"),
                ("pids.current", "9\n"),
                ("pids.max", "max\n"),
                ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4\nbad\n"),
                ("hugetlb.2MB.current", "4096\n"),
            ],
        );
        let sample = Cgroup::V2(dir.path().into()).measure(Detail::All).unwrap();
        let cpu = sample.cpu.unwrap();
        assert_eq!(
            (cpu.usage_ns, cpu.user_ns, cpu.system_ns),
            (5000, 3000, 2000)
        );
        let some = cpu.pressure.unwrap().some.unwrap();
        assert!((some.avg10 - 1.5).abs() < f64::EPSILON && some.total == 7000);
        let memory = sample.memory.unwrap();
        assert_eq!((memory.working_set(), memory.limit), (700, None));
        assert_eq!(
            (memory.kernel, memory.oom_kills, memory.limit_hits),
            (9, 2, 3)
        );
        assert_eq!(sample.swap.unwrap().limit, Some(60));
        assert_eq!(
            (sample.devices[0].reads, sample.devices[0].write_bytes),
            (3, 2)
        );
        assert_eq!(sample.huge_pages[0].page_size, "2MB");
        assert_eq!(sample.pids.unwrap().limit, 0);
    }
}
