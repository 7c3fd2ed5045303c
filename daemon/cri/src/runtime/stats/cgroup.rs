//! Measuring a cgroup from its files, version 1 and version 2.
//!
//! The daemon reads them itself for every runtime that puts a container's processes into a cgroup
//! of this machine: a kubelet asks for all of them again and again, and asking as many shims costs
//! many times more. Files that are not there leave their numbers out.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use lighter_proto::runtime::v1 as api;

use super::sample::{Cpu, HugePages, Memory, Pids, Sample, Swap, bounded, device};

/// Largest statistics file that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Nanoseconds of one tick of `cpuacct.stat`: `USER_HZ` is 100 for every program.
const TICK_NS: u64 = 10_000_000;
/// How far down the processes of a container are counted, in levels and groups.
const MAX_LEVELS: usize = 16;
/// See [`MAX_LEVELS`].
const MAX_GROUPS: usize = 4096;

/// How much of it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Detail {
    /// Processor time alone.
    Cpu,
    /// What the statistics calls answer.
    Usage,
    /// What the metrics call answers.
    All,
}

/// The directories of one cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cgroup {
    /// Version 1: one directory per controller.
    V1(BTreeMap<String, PathBuf>),
    /// Version 2.
    V2(PathBuf),
}

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    root: String,
    mount_point: PathBuf,
    /// Controllers of version 1; empty for version 2.
    controllers: Vec<String>,
}

/// The mounted hierarchies; they do not change while the daemon runs.
fn hierarchies() -> &'static [Hierarchy] {
    static TABLE: OnceLock<Vec<Hierarchy>> = OnceLock::new();
    TABLE.get_or_init(|| {
        parse_mounts(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
    })
}

fn parse_mounts(table: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in table.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let (mut left, mut right) = (left.split(' ').skip(3), right.split(' '));
        let controllers: Vec<String> = match right.next() {
            Some("cgroup") => {
                let options = right.nth(1).unwrap_or_default();
                options.split(',').map(str::to_owned).collect()
            }
            Some("cgroup2") => Vec::new(),
            _ => continue,
        };
        let (Some(root), Some(mount_point)) = (left.next(), left.next()) else {
            continue;
        };
        // Bind mounts of a hierarchy come after the hierarchy itself.
        if found.iter().all(|known| known.controllers != controllers) {
            found.push(Hierarchy {
                root: root.to_owned(),
                mount_point: mount_point.into(),
                controllers,
            });
        }
    }
    found
}

/// The part of a cgroup path up to the component that names `id`: a container may have made
/// groups of its own below.
fn own_part<'a>(path: &'a str, id: &str) -> &'a str {
    let Some(at) = path.find(id).filter(|_| !id.is_empty()) else {
        return path;
    };
    let end = path[at..].find('/').map_or(path.len(), |next| at + next);
    &path[..end]
}

impl Cgroup {
    /// The cgroup that process `pid` of container `id` is in; `None` when the process is gone.
    pub(crate) fn of(pid: u32, id: &str) -> Option<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        Self::parse(&text, id, hierarchies())
    }

    fn parse(text: &str, id: &str, table: &[Hierarchy]) -> Option<Self> {
        let mut controllers = BTreeMap::new();
        let mut unified = None;
        for line in text.lines() {
            let mut parts = line.splitn(3, ':');
            let (_, names, path) = (parts.next()?, parts.next()?, parts.next()?);
            let names: Vec<&str> = names.split(',').filter(|n| !n.is_empty()).collect();
            let hierarchy = table.iter().find(|h| match names.first() {
                None => h.controllers.is_empty(),
                Some(name) => h.controllers.iter().any(|c| c == name),
            });
            let Some(hierarchy) = hierarchy else { continue };
            let own = own_part(path, id);
            let below = own.strip_prefix(&hierarchy.root).unwrap_or(own);
            let dir = hierarchy.mount_point.join(below.trim_start_matches('/'));
            if names.is_empty() {
                unified = Some(dir.clone());
            }
            for name in names.iter().filter(|name| !name.starts_with("name=")) {
                controllers.insert((*name).to_owned(), dir.clone());
            }
        }
        // A hybrid machine has its controllers in version 1.
        if controllers.is_empty() {
            unified.map(Self::V2)
        } else {
            Some(Self::V1(controllers))
        }
    }

    /// The cgroup above this one: a pod's, of its pause container's.
    pub(crate) fn parent(&self) -> Option<Self> {
        let above = |dir: &PathBuf| dir.parent().map(Path::to_owned);
        match self {
            Self::V2(dir) => above(dir).map(Self::V2),
            Self::V1(dirs) => {
                let dirs = dirs
                    .iter()
                    .map(|(name, dir)| Some((name.clone(), above(dir)?)));
                dirs.collect::<Option<_>>().map(Self::V1)
            }
        }
    }

    /// Measures it; `None` when it is gone.
    pub(crate) fn measure(&self, detail: Detail) -> Option<Sample> {
        let sample = match self {
            Self::V1(dirs) => v1(dirs, detail),
            Self::V2(dir) => v2(dir, detail),
        };
        sample.cpu.is_some().then_some(sample)
    }

    /// Its processes, with those of groups below it.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let dir = match self {
            Self::V2(dir) => Some(dir),
            Self::V1(dirs) => ["pids", "memory", "cpuacct"]
                .iter()
                .find_map(|name| dirs.get(*name)),
        };
        let mut found = Vec::new();
        let mut groups = 0;
        if let Some(dir) = dir {
            collect_processes(dir, 0, &mut groups, &mut found);
        }
        found
    }
}

fn collect_processes(dir: &Path, level: usize, groups: &mut usize, found: &mut Vec<u32>) {
    *groups += 1;
    if level > MAX_LEVELS || *groups > MAX_GROUPS {
        return;
    }
    let listed = text(dir, "cgroup.procs").unwrap_or_default();
    found.extend(listed.lines().filter_map(|line| line.parse::<u32>().ok()));
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_processes(&entry.path(), level + 1, groups, found);
        }
    }
}

fn text(dir: &Path, name: &str) -> Option<String> {
    let file = std::fs::File::open(dir.join(name)).ok()?;
    let mut text = String::new();
    file.take(MAX_FILE_BYTES).read_to_string(&mut text).ok()?;
    Some(text)
}

fn number(dir: &Path, name: &str) -> Option<u64> {
    text(dir, name)?.trim().parse().ok()
}

/// A number that may be `max`, which is none.
fn limit(dir: &Path, name: &str) -> Option<u64> {
    number(dir, name).and_then(bounded)
}

/// The value of each of `keys` in lines of `key value`, 0 for those that are missing.
fn fields<const N: usize>(text: &str, keys: [&str; N]) -> [u64; N] {
    let mut values = [0; N];
    for line in text.lines() {
        let Some((key, value)) = line.split_once(' ') else {
            continue;
        };
        if let Some(at) = keys.iter().position(|k| *k == key) {
            values[at] = value.trim().parse().unwrap_or(0);
        }
    }
    values
}

fn v1(dirs: &BTreeMap<String, PathBuf>, detail: Detail) -> Sample {
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
    if let Some(memory) = dir("memory") {
        v1_memory(memory, detail, &mut sample);
    }
    sample.pids = dir("pids").and_then(pids);
    if detail == Detail::All {
        if let Some(blkio) = dir("blkio") {
            v1_devices(blkio, &mut sample);
        }
        if let Some(dir) = dir("hugetlb") {
            huge_pages(dir, "usage_in_bytes", "max_usage_in_bytes", &mut sample);
        }
    }
    sample
}

fn v1_memory(dir: &Path, detail: Detail, sample: &mut Sample) {
    let Some(usage) = number(dir, "memory.usage_in_bytes") else {
        return;
    };
    let mut memory = Memory {
        usage,
        limit: limit(dir, "memory.limit_in_bytes"),
        ..Memory::default()
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

fn v1_devices(dir: &Path, sample: &mut Sample) {
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

fn device_id(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn pids(dir: &Path) -> Option<Pids> {
    Some(Pids {
        current: number(dir, "pids.current")?,
        limit: number(dir, "pids.max").unwrap_or(0),
    })
}

/// `hugetlb.2MB.<usage>` and its maximum, for every size there is.
fn huge_pages(dir: &Path, usage: &str, max: &str, sample: &mut Sample) {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let parts: Vec<&str> = name.split('.').collect();
        if let ["hugetlb", size, file] = parts.as_slice()
            && *file == usage
        {
            sample.huge_pages.push(HugePages {
                page_size: (*size).to_owned(),
                usage_bytes: number(dir, name).unwrap_or(0),
                max_bytes: number(dir, &format!("hugetlb.{size}.{max}")).unwrap_or(0),
            });
        }
    }
}

fn v2(dir: &Path, detail: Detail) -> Sample {
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
    v2_memory(dir, detail, &mut sample);
    sample.pids = pids(dir);
    if detail == Detail::All {
        v2_devices(dir, &mut sample);
        huge_pages(dir, "current", "peak", &mut sample);
    }
    sample
}

fn v2_memory(dir: &Path, detail: Detail, sample: &mut Sample) {
    let Some(usage) = number(dir, "memory.current") else {
        return;
    };
    let mut memory = Memory {
        usage,
        limit: limit(dir, "memory.max"),
        pressure: pressure(dir, "memory.pressure"),
        ..Memory::default()
    };
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
        memory.max_usage = number(dir, "memory.peak").unwrap_or(usage);
        let events = text(dir, "memory.events").unwrap_or_default();
        [memory.limit_hits, memory.oom_kills] = fields(&events, ["max", "oom_kill"]);
    }
    sample.memory = Some(memory);
}

fn v2_devices(dir: &Path, sample: &mut Sample) {
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
    use super::*;

    const MOUNTS: &str = "\
30 20 0:26 / /sys/fs/cgroup/memory rw - cgroup none rw,memory
31 20 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup none rw,cpu,cpuacct
32 20 0:28 / /sys/fs/cgroup/unified rw - cgroup2 none rw
33 20 0:28 / /run/bind rw - cgroup2 none rw
";

    #[test]
    fn a_container_keeps_its_cgroup_whatever_it_makes_below() {
        let table = parse_mounts(MOUNTS);
        let text = "3:memory:/kubepods/pod1/abc/inner\n2:cpu,cpuacct:/kubepods/pod1/abc\n0::/x\n";
        let cgroup = Cgroup::parse(text, "abc", &table).unwrap();
        let Cgroup::V1(dirs) = &cgroup else {
            panic!("{cgroup:?}")
        };
        let memory = "/sys/fs/cgroup/memory/kubepods/pod1/abc";
        assert_eq!(dirs["memory"], Path::new(memory));
        assert_eq!(dirs["cpuacct"], dirs["cpu"]);
        let Some(Cgroup::V1(parent)) = cgroup.parent() else {
            panic!("no parent")
        };
        assert_eq!(
            parent["memory"],
            Path::new("/sys/fs/cgroup/memory/kubepods/pod1")
        );
    }

    #[test]
    fn one_hierarchy_is_version_two() {
        let table = parse_mounts("32 20 0:28 / /sys/fs/cgroup rw - cgroup2 none rw\n");
        let text = "0::/kubepods.slice/pod.slice/cri-containerd-abc.scope/init.scope\n";
        let cgroup = Cgroup::parse(text, "abc", &table);
        let dir = "/sys/fs/cgroup/kubepods.slice/pod.slice/cri-containerd-abc.scope";
        assert_eq!(cgroup, Some(Cgroup::V2(dir.into())));
    }

    fn write(dir: &Path, files: &[(&str, &str)]) {
        for (name, text) in files {
            std::fs::write(dir.join(name), text).unwrap();
        }
    }

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

    #[test]
    fn a_cgroup_that_is_gone_has_no_measure() {
        let gone = Cgroup::V2("/nonexistent".into());
        assert!(gone.measure(Detail::All).is_none() && gone.processes().is_empty());
    }
}
