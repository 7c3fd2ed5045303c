//! What is remembered of a container, and what runc finds of it.
//!
//! A record of another version is refused: a machine that is upgraded keeps its containers because versions only
//! change with an incompatible record, and fields added later have defaults.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cgroup::Group;
use crate::seccomp::Program;
use crate::spec::Hooks;
use crate::spec::linux::{MemoryPolicy, Personality};

/// state.json.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) version: u32,
    pub(crate) id: String,
    pub(crate) oci_version: String,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: PathBuf,
    pub(crate) pid: i32,
    /// Clock ticks after boot: tells the process from a later one with the same id.
    pub(crate) pid_start: u64,
    /// RFC 3339.
    pub(crate) created: String,
    pub(crate) owner: u32,
    pub(crate) annotations: HashMap<String, String>,
    pub(crate) group: Option<Group>,
    /// The transient unit that systemd made for the container.
    #[serde(default)]
    pub(crate) systemd_unit: Option<String>,
    /// Directory in resctrl that is removed with the container.
    #[serde(default)]
    pub(crate) resctrl: Option<PathBuf>,
    /// `CLONE_NEW*` bits of namespaces that are not the runtime's.
    pub(crate) namespaces: i32,
    pub(crate) setgroups_allowed: bool,
    /// The root is not that of the mount namespace.
    pub(crate) chrooted: bool,
    #[serde(default)]
    pub(crate) hooks: Option<Hooks>,
    #[serde(default)]
    pub(crate) seccomp: Option<Program>,
    #[serde(default)]
    pub(crate) personality: Option<Personality>,
    #[serde(default)]
    pub(crate) memory_policy: Option<MemoryPolicy>,
}

impl Record {
    /// Version that records of this build carry.
    pub(crate) const VERSION: u32 = 1;

    /// The record as `state.json` has it.
    pub(crate) fn text(&self) -> Vec<u8> {
        let shared = Shared {
            record: self,
            runc: RuncState::of(self),
        };
        serde_json::to_vec(&shared).expect("a record is plain data")
    }
}

/// The record with what runc keeps in the file of the same name beside it.
#[derive(Serialize)]
struct Shared<'a> {
    #[serde(flatten)]
    record: &'a Record,
    #[serde(flatten)]
    runc: RuncState<'a>,
}

/// As much of runc's state as its `list`, `state`, `kill`, `pause`, `resume`, `ps` and `delete` need: who
/// cleans up below a root with runc can do so whichever of both made the container.
/// Upstream: opencontainers/runc, libcontainer, `State`
#[derive(Serialize)]
struct RuncState<'a> {
    init_process_pid: i32,
    init_process_start: u64,
    config: RuncConfig<'a>,
    cgroup_paths: HashMap<&'a str, &'a Path>,
}

#[derive(Serialize)]
struct RuncConfig<'a> {
    rootfs: &'a Path,
    namespaces: Vec<RuncNamespace>,
    cgroups: RuncCgroup<'a>,
    labels: Vec<String>,
}

#[derive(Serialize)]
struct RuncNamespace {
    #[serde(rename = "type")]
    kind: &'static str,
    path: &'static str,
}

/// `memory` belongs to the limits, of which runc wants to see at least one.
#[derive(Serialize)]
struct RuncCgroup<'a> {
    path: &'a str,
    memory: i64,
}

/// runc's names of namespaces.
const RUNC_NAMESPACES: [(i32, &str); 8] = [
    (libc::CLONE_NEWNS, "NEWNS"),
    (libc::CLONE_NEWPID, "NEWPID"),
    (libc::CLONE_NEWNET, "NEWNET"),
    (libc::CLONE_NEWIPC, "NEWIPC"),
    (libc::CLONE_NEWUTS, "NEWUTS"),
    (libc::CLONE_NEWUSER, "NEWUSER"),
    (libc::CLONE_NEWCGROUP, "NEWCGROUP"),
    (libc::CLONE_NEWTIME, "NEWTIME"),
];

impl<'a> RuncState<'a> {
    fn of(record: &'a Record) -> Self {
        let cgroup_paths = match &record.group {
            Some(Group::Legacy { directories, .. }) => directories
                .iter()
                .flat_map(|directory| {
                    let names = directory.controllers.iter();
                    names.map(|name| (name.as_str(), directory.path.as_path()))
                })
                .collect(),
            Some(Group::Unified { path }) => HashMap::from([("", path.as_path())]),
            None => HashMap::new(),
        };
        let namespaces = RUNC_NAMESPACES
            .iter()
            .filter(|(flag, _)| record.namespaces & flag != 0)
            .map(|&(_, kind)| RuncNamespace { kind, path: "" })
            .collect();
        let annotations = record.annotations.iter();
        let labels = annotations
            .map(|(key, value)| format!("{key}={value}"))
            .chain([format!("bundle={}", record.bundle.display())])
            .collect();
        Self {
            init_process_pid: record.pid,
            init_process_start: record.pid_start,
            config: RuncConfig {
                rootfs: &record.rootfs,
                namespaces,
                cgroups: RuncCgroup {
                    path: "",
                    memory: 0,
                },
                labels,
            },
            cgroup_paths,
        }
    }
}
