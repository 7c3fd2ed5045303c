//! The runtime: where containers are recorded, and what was found out about the machine.

use std::cell::RefCell;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::cgroup::Host;
use crate::container::Container;
use crate::directory::{Directory, check_id};
use crate::error::{Context, Error, Result};
use crate::seccomp::{self, Program};
use crate::spec::Seccomp;
use crate::{seal, spec};

/// Compiled profiles that are kept: containers of one machine use one or two.
const MAX_PROFILES: usize = 4;

/// Who manages control groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CgroupDriver {
    /// This runtime, by files.
    #[default]
    Files,
    /// systemd, by transient scopes (`--systemd-cgroup`).
    Systemd,
}

/// What to do when containers could write to this process's executable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExePolicy {
    /// Refuse to create containers.
    #[default]
    RequireProtected,
    /// Create them; for tests and for executables that nobody shares.
    Any,
}

/// How a runtime works.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory of the containers' records, made when needed.
    pub root: PathBuf,
    /// Control group management.
    pub driver: CgroupDriver,
    /// Protection of the executable.
    pub exe: ExePolicy,
}

impl Options {
    /// Usual choices, with records in `root`.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            driver: CgroupDriver::default(),
            exe: ExePolicy::default(),
        }
    }
}

/// A runtime. Cheap to keep, not shareable between threads.
#[derive(Debug)]
pub struct Runtime {
    pub(crate) options: Options,
    /// `None` where no control groups are mounted: containers then get none.
    pub(crate) host: Option<Host>,
    profiles: RefCell<Vec<(String, Program)>>,
}

impl Runtime {
    /// Looks at the machine's control groups.
    ///
    /// # Errors
    /// `Io` if /proc cannot be read.
    pub fn open(options: Options) -> Result<Self> {
        let host = match Host::detect() {
            Ok(host) => Some(host),
            Err(Error::Unsupported(_)) => None,
            Err(error) => return Err(error),
        };
        Ok(Self::on(options, host))
    }

    /// A runtime on a machine that was looked at before, by a process in the same control groups as this one.
    #[must_use]
    pub fn on(options: Options, host: Option<Host>) -> Self {
        Self {
            options,
            host,
            profiles: RefCell::default(),
        }
    }

    /// A container that exists.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn container(&self, id: &str) -> Result<Container<'_>> {
        check_id(id)?;
        Container::open(self, Directory::open(&self.options.root, id)?, id)
    }

    /// Ids of all containers, sorted.
    ///
    /// # Errors
    /// `Io` if the root cannot be read; no root means no containers.
    pub fn list(&self) -> Result<Vec<String>> {
        let entries = match std::fs::read_dir(&self.options.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                return Err(error).context(|| format!("read {}", self.options.root.display()));
            }
        };
        let mut ids: Vec<String> = entries
            .filter_map(std::result::Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|id| check_id(id).is_ok())
            .collect();
        ids.sort();
        Ok(ids)
    }

    /// Compiles a profile, or returns it from an earlier time.
    pub(crate) fn seccomp_program(&self, profile: &Seccomp) -> Result<Program> {
        let key = serde_json::to_string(profile).expect("a profile is plain data");
        let mut profiles = self.profiles.borrow_mut();
        if let Some((_, program)) = profiles.iter().find(|(known, _)| *known == key) {
            return Ok(program.clone());
        }
        let program = seccomp::compile(profile)?;
        if profiles.len() >= MAX_PROFILES {
            profiles.remove(0);
        }
        profiles.push((key, program.clone()));
        Ok(program)
    }

    /// Refuses processes that must not clone containers.
    pub(crate) fn check_process(&self) -> Result<()> {
        let threads = std::fs::metadata("/proc/self/task")
            .context(|| "stat /proc/self/task")?
            .nlink();
        // Two links of the directory itself, one per thread.
        if threads != 3 {
            return Err(Error::State(
                "containers are created by a process with one thread".into(),
            ));
        }
        if self.options.exe == ExePolicy::RequireProtected && !seal::is_protected()? {
            return Err(Error::State(
                "the runtime's executable is not protected from containers (see seal::reexecute)"
                    .into(),
            ));
        }
        Ok(())
    }
}

/// Whether labels of a kind can be used here.
pub(crate) fn check_labels(process: &spec::Process, mount_label: &str) -> Result<()> {
    if !process.apparmor_profile.is_empty() && process.apparmor_profile != "unconfined" {
        let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
        if !enabled.is_ok_and(|text| text.starts_with('Y')) {
            return Err(Error::Unsupported(
                "apparmor: config provided but apparmor not supported by the kernel".into(),
            ));
        }
    }
    if (!process.selinux_label.is_empty() || !mount_label.is_empty())
        && !std::path::Path::new("/sys/fs/selinux/enforce").exists()
    {
        return Err(Error::Unsupported(
            "selinux label is specified in config, but selinux is disabled or not supported".into(),
        ));
    }
    Ok(())
}
