//! Control groups of containers: where they are, what is written into them, who is in them.
//!
//! [`Host`] is what this machine offers and is looked at once; [`Group`] is one container's place on it and is stored
//! with the container's state. cgroup v1 (also hybrid) is in `v1`, v2 in `v2`.

mod dbus;
pub(crate) mod devices;
mod fs;
mod host;
mod stats;
pub(crate) mod systemd;
mod v1;
mod v2;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::spec::Resources;

pub use host::Host;
pub use stats::{
    BlkioEntry, CpuStats, HugetlbStats, MemoryStats, PidsStats, PressureLine, PressureStats, Stats,
};
pub use v1::Hierarchy;

/// One container's control group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// cgroup v1: a directory per hierarchy.
    Legacy {
        /// The directories.
        directories: Vec<Directory>,
        /// The v2 directory of a hybrid host, for controllers that are only there. Exists only if they are used.
        unified: Option<PathBuf>,
    },
    /// cgroup v2: one directory.
    Unified {
        /// The directory.
        path: PathBuf,
    },
}

/// A group's directory in one v1 hierarchy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// Controllers of the hierarchy (`cpu`, `name=systemd` …).
    pub controllers: Vec<String>,
    /// The directory.
    pub path: PathBuf,
    /// Where the hierarchy is mounted.
    pub mount: PathBuf,
}

/// What goes into `pids.max`, of either version; `None` where no limit is asked for.
fn pids_max(resources: &Resources) -> Option<String> {
    let limit = resources.pids.as_ref()?.limit?;
    match limit {
        0 => None,
        1.. => Some(limit.to_string()),
        _ => Some("max".to_owned()),
    }
}

/// What `cgroup` mounts inside a container show.
#[derive(Clone, Debug)]
pub(crate) enum CgroupView {
    Unified { path: PathBuf },
    Legacy { hierarchies: Vec<HierarchyView> },
}

impl CgroupView {
    /// Nothing to show.
    pub(crate) fn none() -> Self {
        Self::Legacy {
            hierarchies: Vec::new(),
        }
    }
}

/// One v1 hierarchy as a container sees it.
#[derive(Clone, Debug)]
pub(crate) struct HierarchyView {
    /// Name of the directory under the cgroup mount (`cpu,cpuacct`).
    pub(crate) name: String,
    pub(crate) controllers: Vec<String>,
    /// The container's own directory on the host.
    pub(crate) path: PathBuf,
}

/// How a new process gets into a group.
#[derive(Debug)]
pub(crate) enum Entry {
    /// Born there (`CLONE_INTO_CGROUP`).
    Born(OwnedFd),
    /// Writes `0` into each of these itself before it does anything else.
    Writes(Vec<OwnedFd>),
}

impl Group {
    /// The group of a container: `cgroups_path` as in the specification (empty: named after the container).
    ///
    /// # Errors
    /// `Spec` if the path is not usable.
    pub fn plan(host: &Host, cgroups_path: &str, id: &str) -> Result<Self> {
        let wanted = if cgroups_path.is_empty() {
            Path::new(id)
        } else {
            Path::new(cgroups_path)
        };
        if wanted
            .components()
            .any(|part| part == std::path::Component::ParentDir)
        {
            return Err(Error::Spec(format!(
                "linux.cgroupsPath {cgroups_path:?} must not contain \"..\""
            )));
        }
        let group = host.place(wanted);
        if group.is_root() {
            return Err(Error::Spec(format!(
                "linux.cgroupsPath {cgroups_path:?} is the root of the hierarchy, which is everybody's"
            )));
        }
        Ok(group)
    }

    /// The group that this process is in.
    pub(crate) fn of_this_process(host: &Host) -> Self {
        host.own_place()
    }

    fn is_root(&self) -> bool {
        match self {
            Self::Legacy { directories, .. } => directories
                .iter()
                .any(|directory| directory.path.components().eq(directory.mount.components())),
            Self::Unified { path } => path.components().eq(Path::new(host::ROOT).components()),
        }
    }

    /// Refuses a group in which somebody is: limits would fall on them, and removing the container would kill them.
    pub(crate) fn check_unused(&self) -> Result<()> {
        let Some(path) = self.members_directory().filter(|path| path.exists()) else {
            return Ok(());
        };
        if self.is_frozen() {
            return Err(Error::State(format!(
                "container's cgroup unexpectedly frozen: {}",
                path.display()
            )));
        }
        match fs::processes(path)?.len() {
            0 => Ok(()),
            found => Err(Error::State(format!(
                "container's cgroup is not empty: {found} process(es) found in {}",
                path.display()
            ))),
        }
    }

    /// Makes the directories and writes the limits. Device rules of the specification are joined by those for the
    /// devices every container gets.
    pub(crate) fn create(&self, resources: Option<&Resources>, devices: bool) -> Result<()> {
        let default = Resources::default();
        let resources = resources.unwrap_or(&default);
        match self {
            Self::Legacy {
                directories,
                unified,
            } => {
                v1::create(directories)?;
                v1::apply(directories, resources)?;
                v1::apply_unified(unified.as_deref(), directories, resources)?;
                if devices {
                    v1::allow_devices(directories, &devices::rules(resources))?;
                }
            }
            Self::Unified { path } => {
                v2::create(path)?;
                v2::apply(path, resources)?;
                if devices {
                    devices::attach_filter(path, &devices::rules(resources))?;
                }
            }
        }
        Ok(())
    }

    /// Changes limits of a group that exists.
    ///
    /// # Errors
    /// `Io` naming the file that refused.
    pub fn update(&self, resources: &Resources) -> Result<()> {
        match self {
            Self::Legacy {
                directories,
                unified,
            } => {
                v1::apply(directories, resources)?;
                v1::apply_unified(unified.as_deref(), directories, resources)?;
                if !resources.devices.is_empty() {
                    v1::allow_devices(directories, &devices::rules(resources))?;
                }
            }
            Self::Unified { path } => {
                v2::apply(path, resources)?;
                if !resources.devices.is_empty() {
                    devices::replace_filter(path, &devices::rules(resources))?;
                }
            }
        }
        Ok(())
    }

    /// What a process needs to get in.
    pub(crate) fn entry(&self, sub: &str) -> Result<Entry> {
        match self {
            Self::Legacy {
                directories,
                unified,
            } => v1::entry(directories, unified.as_deref(), sub).map(Entry::Writes),
            Self::Unified { path } => {
                v2::entry(&path.join(sub.trim_start_matches('/'))).map(Entry::Born)
            }
        }
    }

    /// What a process needs to get in beside process `pid`. On v2 a container may have handed controllers down to groups
    /// of its own; its group then takes no processes, and the newcomer goes where init went.
    pub(crate) fn entry_beside(&self, pid: i32) -> Result<Entry> {
        let Self::Unified { path } = self else {
            return self.entry("");
        };
        if fs::read(path, "cgroup.subtree_control")
            .unwrap_or_default()
            .is_empty()
        {
            return self.entry("");
        }
        let own = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let own = own
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .unwrap_or_default();
        let moved = Path::new("/sys/fs/cgroup").join(own);
        v2::entry(if moved.starts_with(path) {
            &moved
        } else {
            path
        })
        .map(Entry::Born)
    }

    /// Moves an existing process in.
    pub(crate) fn add(&self, pid: i32) -> Result<()> {
        match self {
            Self::Legacy { directories, .. } => directories.iter().try_for_each(|directory| {
                fs::write(&directory.path, "cgroup.procs", &pid.to_string())
            }),
            Self::Unified { path } => fs::write(path, "cgroup.procs", &pid.to_string()),
        }
    }

    /// Where it is, in the words of CRIU's `--cgroup-root`: its path, on v1 behind the name of each controller.
    pub(crate) fn criu_roots(&self) -> Vec<String> {
        let inside = |path: &Path, mount: &Path| {
            let path = path.strip_prefix(mount).unwrap_or(path);
            Path::new("/").join(path).display().to_string()
        };
        match self {
            Self::Unified { path } => vec![inside(path, Path::new(host::ROOT))],
            Self::Legacy { directories, .. } => directories
                .iter()
                .flat_map(|directory| {
                    let path = inside(&directory.path, &directory.mount);
                    let names = directory.controllers.iter();
                    names.map(move |name| format!("{name}:{path}"))
                })
                .collect(),
        }
    }

    /// What a `cgroup` mount shows.
    pub(crate) fn view(&self) -> CgroupView {
        match self {
            Self::Unified { path } => CgroupView::Unified { path: path.clone() },
            Self::Legacy { directories, .. } => CgroupView::Legacy {
                hierarchies: directories
                    .iter()
                    .map(|directory| HierarchyView {
                        name: directory
                            .mount
                            .file_name()
                            .unwrap_or_default()
                            .to_string_lossy()
                            .into_owned(),
                        controllers: directory.controllers.clone(),
                        path: directory.path.clone(),
                    })
                    .collect(),
            },
        }
    }

    /// Where a controller's files of this group are, if the controller is there.
    #[must_use]
    pub fn directory(&self, controller: &str) -> Option<&Path> {
        match self {
            Self::Unified { path } => Some(path),
            Self::Legacy { directories, .. } => v1::find(directories, controller),
        }
    }

    /// The directory whose process list is the group's: v2, or the first v1 hierarchy that tells members reliably.
    fn members_directory(&self) -> Option<&Path> {
        match self {
            Self::Unified { path } => Some(path),
            Self::Legacy { directories, .. } => ["pids", "devices", "freezer", "memory"]
                .iter()
                .find_map(|name| v1::find(directories, name))
                .or_else(|| {
                    directories
                        .first()
                        .map(|directory| directory.path.as_path())
                }),
        }
    }

    /// All processes in the group and the groups below it.
    ///
    /// # Errors
    /// `Io` if the group cannot be read; a group that is gone has no processes.
    pub fn processes(&self) -> Result<Vec<i32>> {
        self.members_directory()
            .map_or_else(|| Ok(Vec::new()), fs::processes)
    }

    /// Stops the group's processes and waits until they stand.
    ///
    /// # Errors
    /// `Io` or `Unsupported` if the freezer is not there or does not succeed within 2 s.
    pub fn freeze(&self) -> Result<()> {
        match self {
            Self::Legacy { directories, .. } => v1::freeze(directories),
            Self::Unified { path } => v2::freeze(path, true),
        }
    }

    /// Lets the group's processes run again.
    ///
    /// # Errors
    /// As [`freeze`](Self::freeze).
    pub fn thaw(&self) -> Result<()> {
        match self {
            Self::Legacy { directories, .. } => v1::thaw(directories),
            Self::Unified { path } => v2::freeze(path, false),
        }
    }

    /// Whether the group is frozen. A group that cannot be read is not.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        match self {
            Self::Legacy { directories, .. } => v1::is_frozen(directories),
            Self::Unified { path } => v2::is_frozen(path),
        }
    }

    /// Kills every process in the group, frozen or not, and those they fork meanwhile.
    ///
    /// # Errors
    /// `Io` if the group cannot be read.
    pub fn kill_all(&self) -> Result<()> {
        if let Self::Unified { path } = self
            && fs::write(path, "cgroup.kill", "1").is_ok()
        {
            return Ok(());
        }
        // Frozen, nobody forks while we count; processes die when thawed.
        let frozen = self.freeze().is_ok();
        for pid in self.processes()? {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
            }
        }
        if frozen || self.is_frozen() {
            self.thaw()?;
        }
        Ok(())
    }

    /// Removes the directories and those below. Retries while dead processes are still being cleared away.
    ///
    /// # Errors
    /// `Io` if one stays, after about a second.
    pub fn remove(&self) -> Result<()> {
        match self {
            Self::Legacy {
                directories,
                unified,
            } => {
                let paths = directories.iter().map(|directory| directory.path.as_path());
                paths.chain(unified.as_deref()).try_for_each(fs::remove)
            }
            Self::Unified { path } => fs::remove(path),
        }
    }

    /// Removes the directories without waiting; `false` if one is busy. Those removed by then stay so.
    pub(crate) fn remove_at_once(&self) -> Result<bool> {
        let mut paths: Vec<&Path> = match self {
            Self::Legacy { directories, .. } => directories
                .iter()
                .map(|directory| directory.path.as_path())
                .collect(),
            Self::Unified { path } => vec![path],
        };
        if let Self::Legacy {
            unified: Some(path),
            ..
        } = self
        {
            paths.push(path);
        }
        for path in paths {
            match rustix::fs::rmdir(path) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                // Processes, or groups below.
                Err(rustix::io::Errno::BUSY | rustix::io::Errno::NOTEMPTY) => return Ok(false),
                Err(error) => {
                    return Err(error).context(|| format!("remove cgroup {}", path.display()));
                }
            }
        }
        Ok(true)
    }

    /// Current figures.
    ///
    /// # Errors
    /// `Io` if the group is gone.
    pub fn stats(&self) -> Result<Stats> {
        match self {
            Self::Legacy { directories, .. } => stats::read_v1(directories),
            Self::Unified { path } => stats::read_v2(path),
        }
    }

    /// How many of the group's processes the kernel has killed for want of memory.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let file = match self {
            Self::Legacy { .. } => "memory.oom_control",
            Self::Unified { .. } => "memory.events",
        };
        let figures = self
            .directory("memory")
            .map(|path| fs::pairs(path, file))
            .unwrap_or_default();
        figures
            .iter()
            .find(|(key, _)| key == "oom_kill")
            .map_or(0, |(_, count)| *count)
    }
}
