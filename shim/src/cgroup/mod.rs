//! A container's cgroup as the shim sees it: where it is, its metrics, its OOM kills.
//!
//! The place is what our own runtime says, or is read from `/proc/PID/cgroup` once, while init is surely
//! alive. A process whose
//! only entry is the unified hierarchy is on version 2; a hybrid host counts as version 1, since
//! that is where the controllers are.

mod oom;
mod v1;
mod v2;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use lighter_oci::Group;
use prost_types::Any;

pub(crate) use self::oom::OomWatch;
use crate::error::{Error, Result};

/// Largest statistics file that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Directories of one container's cgroup.
#[derive(Debug, Clone)]
pub(crate) enum Cgroup {
    /// Version 1: one directory per controller.
    V1(BTreeMap<String, PathBuf>),
    /// Version 2.
    V2(PathBuf),
}

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    /// Which part of the hierarchy is mounted.
    root: PathBuf,
    mount_point: PathBuf,
    /// Controllers of a version 1 hierarchy; empty for version 2.
    controllers: Vec<String>,
    unified: bool,
}

/// The mounted hierarchies; they do not change while a shim lives.
fn hierarchies() -> &'static [Hierarchy] {
    static TABLE: OnceLock<Vec<Hierarchy>> = OnceLock::new();
    TABLE.get_or_init(|| {
        parse_mounts(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
    })
}

/// Finds the cgroup mounts in a `mountinfo` table.
fn parse_mounts(table: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in table.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let mut right = right.split(' ');
        let unified = match right.next() {
            Some("cgroup") => false,
            Some("cgroup2") => true,
            _ => continue,
        };
        let options = right.nth(1).unwrap_or_default();
        let mut left = left.split(' ').skip(3);
        let (Some(root), Some(mount_point)) = (left.next(), left.next()) else {
            continue;
        };
        let controllers = if unified {
            Vec::new()
        } else {
            options.split(',').map(str::to_owned).collect()
        };
        found.push(Hierarchy {
            root: root.into(),
            mount_point: mount_point.into(),
            controllers,
            unified,
        });
    }
    found
}

/// The directory of `path` in a hierarchy.
fn locate(hierarchy: &Hierarchy, path: &str) -> PathBuf {
    let path = Path::new(path);
    let below = path.strip_prefix(&hierarchy.root).unwrap_or(path);
    hierarchy
        .mount_point
        .join(below.strip_prefix("/").unwrap_or(below))
}

/// A cgroup, and the watch on it.
#[derive(Debug)]
pub(crate) struct Followed {
    pub(crate) cgroup: Cgroup,
    /// OOM kills, if the kernel tells of them here.
    pub(crate) oom: Result<OomWatch>,
}

impl From<Cgroup> for Followed {
    fn from(cgroup: Cgroup) -> Self {
        Self {
            oom: cgroup.watch_oom(),
            cgroup,
        }
    }
}

impl Cgroup {
    /// The cgroup that our own runtime made.
    pub(crate) fn of_group(group: &Group) -> Self {
        match group {
            Group::Unified { path } => Self::V2(path.clone()),
            Group::Legacy { directories, .. } => {
                let controllers = directories.iter().flat_map(|directory| {
                    let names = directory.controllers.iter();
                    names
                        .filter(|name| !name.starts_with("name="))
                        .map(|name| (name.clone(), directory.path.clone()))
                });
                Self::V1(controllers.collect())
            }
        }
    }

    /// The cgroup of a process.
    ///
    /// # Errors
    /// `Io` when the process is gone, `NotFound` when no hierarchy is mounted.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        Self::usual(&text, Path::new("/sys/fs/cgroup"))
            .or_else(|| Self::parse(&text, hierarchies()))
            .ok_or_else(|| Error::NotFound("cgroup does not exist".to_owned()))
    }

    /// The directories where nearly every host has them; `None` unless all are there. The table of
    /// mounts, which grows with the containers of the host, need not be read then.
    fn usual(text: &str, root: &Path) -> Option<Self> {
        let mut controllers = BTreeMap::new();
        let mut unified = None;
        for line in text.lines() {
            let mut parts = line.splitn(3, ':');
            let (_, names, path) = (parts.next()?, parts.next()?, parts.next()?);
            let below = path.trim_start_matches('/');
            if names.is_empty() {
                unified = Some(root.join(below));
                continue;
            }
            for name in names.split(',').filter(|name| !name.starts_with("name=")) {
                let dir = root.join(name).join(below);
                if !dir.is_dir() {
                    return None;
                }
                controllers.insert(name.to_owned(), dir);
            }
        }
        if !controllers.is_empty() {
            return Some(Self::V1(controllers));
        }
        unified
            .filter(|dir| dir.join("cgroup.procs").exists())
            .map(Self::V2)
    }

    fn parse(text: &str, hierarchies: &[Hierarchy]) -> Option<Self> {
        let mut controllers = BTreeMap::new();
        let mut unified = None;
        for line in text.lines() {
            let mut parts = line.splitn(3, ':');
            let (_, names, path) = (parts.next()?, parts.next()?, parts.next()?);
            if names.is_empty() {
                let hierarchy = hierarchies.iter().find(|h| h.unified);
                unified = hierarchy.map(|hierarchy| locate(hierarchy, path));
                continue;
            }
            for name in names.split(',').filter(|name| !name.starts_with("name=")) {
                let mounted = hierarchies
                    .iter()
                    .find(|h| h.controllers.iter().any(|c| c == name));
                if let Some(hierarchy) = mounted {
                    controllers.insert(name.to_owned(), locate(hierarchy, path));
                }
            }
        }
        if controllers.is_empty() {
            unified.map(Self::V2)
        } else {
            Some(Self::V1(controllers))
        }
    }

    /// The metrics, as the message that belongs to the version.
    ///
    /// # Errors
    /// `NotFound` once the cgroup is gone.
    pub(crate) fn stats(&self) -> Result<Any> {
        let gone = || Error::NotFound("cgroup does not exist".to_owned());
        match self {
            Self::V1(controllers) => {
                if !controllers.values().any(|dir| dir.exists()) {
                    return Err(gone());
                }
                Ok(lighter_proto::any::pack(&v1::metrics(controllers)))
            }
            Self::V2(dir) => {
                if !dir.exists() {
                    return Err(gone());
                }
                Ok(lighter_proto::any::pack(&v2::metrics(dir)))
            }
        }
    }

    /// Watches for OOM kills in this cgroup.
    ///
    /// # Errors
    /// `Io` or `System` when the kernel offers no such thing here.
    pub(crate) fn watch_oom(&self) -> Result<OomWatch> {
        match self {
            Self::V1(controllers) => {
                let dir = controllers
                    .get("memory")
                    .ok_or_else(|| Error::NotFound("no memory controller".to_owned()))?;
                OomWatch::v1(dir)
            }
            Self::V2(dir) => OomWatch::v2(dir),
        }
    }
}

/// A statistics file; empty when it is missing, as files of absent controllers are.
fn read(dir: &Path, name: &str) -> String {
    use std::io::Read as _;
    let mut text = String::new();
    if let Ok(file) = std::fs::File::open(dir.join(name)) {
        // A file that cannot be read to its end gives what was read.
        let _ = file.take(MAX_FILE_BYTES).read_to_string(&mut text);
    }
    text
}

/// A file of one number; `max` and anything else is `None`.
fn number(dir: &Path, name: &str) -> Option<u64> {
    read(dir, name).trim().parse().ok()
}

/// The value of `key` in a table of `key value` lines.
fn lookup(table: &str, key: &str) -> Option<u64> {
    table
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.trim().parse().ok())
}

/// Huge page sizes of the host, as their files name them: `2MB`, `1GB`.
fn huge_page_sizes() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/sys/kernel/mm/hugepages") else {
        return Vec::new();
    };
    let mut sizes: Vec<u64> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            name.strip_prefix("hugepages-")?
                .strip_suffix("kB")?
                .parse()
                .ok()
        })
        .collect();
    sizes.sort_unstable();
    sizes
        .into_iter()
        .map(|kib| match kib {
            kib if kib >= 1 << 20 => format!("{}GB", kib >> 20),
            kib if kib >= 1 << 10 => format!("{}MB", kib >> 10),
            kib => format!("{kib}KB"),
        })
        .collect()
}

/// A line of `rdma.current` or `rdma.max`: device, handles, objects (`max` reads as the largest).
fn rdma_lines(table: &str) -> Vec<(String, u32, u32)> {
    let value = |field: &str, key: &str| {
        let value = field.strip_prefix(key)?.strip_prefix('=')?;
        if value == "max" {
            Some(u32::MAX)
        } else {
            value.parse().ok()
        }
    };
    table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let device = fields.next()?.to_owned();
            let handles = value(fields.next()?, "hca_handle")?;
            let objects = value(fields.next()?, "hca_object")?;
            Some((device, handles, objects))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
25 21 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw
26 25 0:23 / /sys/fs/cgroup/cpu,cpuacct rw shared:1 - cgroup cgroup rw,cpu,cpuacct
27 25 0:24 /docker/x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
28 25 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";

    #[test]
    fn a_hybrid_host_is_version_one() {
        let mounts = parse_mounts(HYBRID);
        let text = "3:memory:/docker/x/c1\n2:cpu,cpuacct:/c1\n1:name=systemd:/c1\n0::/c1\n";
        let Some(Cgroup::V1(controllers)) = Cgroup::parse(text, &mounts) else {
            panic!()
        };
        assert_eq!(controllers["memory"], Path::new("/sys/fs/cgroup/memory/c1"));
        assert_eq!(
            controllers["cpuacct"],
            Path::new("/sys/fs/cgroup/cpu,cpuacct/c1")
        );
        assert_eq!(controllers.len(), 3);
    }

    #[test]
    fn a_unified_host_is_version_two() {
        let mounts = parse_mounts("28 25 0:25 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
        let Some(Cgroup::V2(dir)) = Cgroup::parse("0::/a/b\n", &mounts) else {
            panic!()
        };
        assert_eq!(dir, Path::new("/sys/fs/cgroup/a/b"));
    }

    #[test]
    fn the_usual_places_are_used_only_when_all_are_there() {
        let root = tempfile::tempdir().unwrap();
        let text = "3:memory:/c\n2:cpu,cpuacct:/c\n0::/c\n";
        std::fs::create_dir_all(root.path().join("memory/c")).unwrap();
        std::fs::create_dir_all(root.path().join("cpu/c")).unwrap();
        assert!(Cgroup::usual(text, root.path()).is_none());
        std::fs::create_dir_all(root.path().join("cpuacct/c")).unwrap();
        assert!(
            matches!(Cgroup::usual(text, root.path()), Some(Cgroup::V1(all)) if all.len() == 3)
        );
        assert!(Cgroup::usual("0::/c\n", root.path()).is_none());
        std::fs::create_dir_all(root.path().join("c")).unwrap();
        std::fs::write(root.path().join("c/cgroup.procs"), "").unwrap();
        assert!(matches!(
            Cgroup::usual("0::/c\n", root.path()),
            Some(Cgroup::V2(_))
        ));
    }

    #[test]
    fn rdma_limits_are_read() {
        assert_eq!(
            rdma_lines("mlx4_0 hca_handle=2 hca_object=max\n"),
            [("mlx4_0".to_owned(), 2, u32::MAX)]
        );
    }
}
