//! Measuring a cgroup from its files, version 1 and version 2.
//!
//! The daemon reads them itself for every runtime that puts a container's processes into a cgroup
//! of this machine: a kubelet asks for all of them again and again, and asking as many shims costs
//! many times more. Files that are not there leave their numbers out.

mod v1;
mod v2;

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::sample::{HugePages, Memory, Pids, Sample, bounded};

/// Largest statistics file that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;
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
            Self::V1(dirs) => v1::measure(dirs, detail),
            Self::V2(dir) => v2::measure(dir, detail),
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

fn device_id(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A group's use of memory and its limit, by the files that tell them; the rest is left at nothing.
fn memory(dir: &Path, used: &str, most: &str) -> Option<Memory> {
    Some(Memory {
        usage: number(dir, used)?,
        limit: limit(dir, most),
        ..Memory::default()
    })
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

#[cfg(test)]
fn write(dir: &Path, files: &[(&str, &str)]) {
    for (name, text) in files {
        std::fs::write(dir.join(name), text).unwrap();
    }
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

    #[test]
    fn a_cgroup_that_is_gone_has_no_measure() {
        let gone = Cgroup::V2("/nonexistent".into());
        assert!(gone.measure(Detail::All).is_none() && gone.processes().is_empty());
    }
}
