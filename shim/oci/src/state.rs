//! What is remembered of a container between invocations: one directory per container.
//!
//! | entry | content |
//! |---|---|
//! | the directory | mode 0700; its `flock` is the container's lock |
//! | `state.json` | [`Record`] and what runc needs, replaced by rename; absent until the process exists |
//! | `exec.fifo` | init reads its process id (4 bytes) from it to start; absent once started |
//! | `start.err` | why init failed after the start; empty if it did not |
//!
//! A record of another version is refused: a machine that is upgraded keeps its containers because versions only
//! change with an incompatible record, and fields added later have defaults.

use std::collections::HashMap;
use std::fs;
use std::io::{Read as _, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::cgroup::Group;
use crate::error::{Context, Error, Result};
use crate::seccomp::Program;
use crate::spec::linux::{MemoryPolicy, Personality};
use crate::spec::{Hooks, Spec};

/// Version of [`Record`].
const VERSION: u32 = 1;

const STATE_FILE: &str = "state.json";
const START_FIFO: &str = "exec.fifo";
const FAILURE_FILE: &str = "start.err";

/// Bytes of a start failure that are read.
const MAX_FAILURE: usize = 8192;

/// What a container is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being created (or its creator died meanwhile).
    Creating,
    /// Waits for its start.
    Created,
    /// Runs.
    Running,
    /// Runs, but is frozen.
    Paused,
    /// Its init has ended.
    Stopped,
}

impl Status {
    /// The word of the specification.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

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

impl Record {
    /// Version that records of this build carry.
    pub(crate) const VERSION: u32 = VERSION;
}

/// State of a container, as `state` prints it.
/// Spec: OCI runtime-spec, runtime.md, "State"; Differs: `rootfs`, `created` and `owner` as runc adds them.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(
    missing_docs,
    reason = "properties carry the names and meaning of the specification"
)]
pub struct State {
    pub oci_version: String,
    pub id: String,
    pub pid: i32,
    pub status: Status,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    /// RFC 3339.
    pub created: String,
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    pub annotations: HashMap<String, String>,
    pub owner: String,
}

/// The state that hooks and seccomp agents get, one line of JSON.
pub(crate) fn hook_state(spec: &Spec, id: &str, bundle: &Path, pid: i32, status: &str) -> String {
    state_text(
        &spec.oci_version,
        id,
        bundle,
        &spec.annotations,
        pid,
        status,
    )
}

fn state_text(
    version: &str,
    id: &str,
    bundle: &Path,
    annotations: &HashMap<String, String>,
    pid: i32,
    status: &str,
) -> String {
    let mut state = serde_json::json!({
        "ociVersion": version,
        "id": id,
        "status": status,
        "pid": pid,
        "bundle": bundle,
    });
    if !annotations.is_empty() {
        state["annotations"] = serde_json::json!(annotations);
    }
    state.to_string()
}

impl Record {
    /// As [`hook_state`], from the record.
    pub(crate) fn hook_state(&self, status: Status) -> String {
        let pid = if status == Status::Stopped {
            0
        } else {
            self.pid
        };
        state_text(
            &self.oci_version,
            &self.id,
            &self.bundle,
            &self.annotations,
            pid,
            status.as_str(),
        )
    }
}

/// Checks a container id.
///
/// # Errors
/// `Spec` if it is empty, too long or not made of letters, digits and `_+-.`.
pub(crate) fn check_id(id: &str) -> Result<()> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
    if id.is_empty() || id.len() > 1024 || !id.bytes().all(fine) || id == "." || id == ".." {
        return Err(Error::Spec(format!("invalid container ID format: {id:?}")));
    }
    Ok(())
}

/// A container's directory.
#[derive(Debug)]
pub(crate) struct Directory {
    pub(crate) path: PathBuf,
    fd: OwnedFd,
}

impl Directory {
    /// Makes the directory of a new container.
    pub(crate) fn make(root: &Path, id: &str) -> Result<Self> {
        let path = root.join(id);
        let mode = Mode::from_raw_mode(0o700);
        match rustix::fs::mkdir(&path, mode) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => return Err(Error::Exists { id: id.to_owned() }),
            Err(rustix::io::Errno::NOENT) => {
                fs::create_dir_all(root).context(|| format!("mkdir {}", root.display()))?;
                rustix::fs::chmod(root, mode).context(|| format!("chmod {}", root.display()))?;
                rustix::fs::mkdir(&path, mode).context(|| format!("mkdir {}", path.display()))?;
            }
            Err(error) => return Err(error).context(|| format!("mkdir {}", path.display())),
        }
        Self::open_path(path, id)
    }

    /// Opens the directory of an existing container.
    pub(crate) fn open(root: &Path, id: &str) -> Result<Self> {
        check_id(id)?;
        Self::open_path(root.join(id), id)
    }

    fn open_path(path: PathBuf, id: &str) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(fd) => Ok(Self { path, fd }),
            Err(rustix::io::Errno::NOENT) => Err(Error::NotFound { id: id.to_owned() }),
            Err(error) => Err(error).context(|| format!("open {}", path.display())),
        }
    }

    /// Waits for the container's lock; it is held until the directory is dropped or [`unlock`](Self::unlock)ed.
    pub(crate) fn lock(&self) -> Result<()> {
        rustix::fs::flock(&self.fd, FlockOperation::LockExclusive)
            .context(|| format!("lock {}", self.path.display()))
    }

    /// As [`lock`](Self::lock) without waiting; `false` if somebody else has it.
    pub(crate) fn try_lock(&self) -> Result<bool> {
        match rustix::fs::flock(&self.fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error).context(|| format!("lock {}", self.path.display())),
        }
    }

    pub(crate) fn unlock(&self) {
        rustix::fs::flock(&self.fd, FlockOperation::Unlock).ok();
    }

    pub(crate) fn read(&self, id: &str) -> Result<Record> {
        let path = self.path.join(STATE_FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::NotFound { id: id.to_owned() });
            }
            Err(error) => return Err(error).context(|| format!("read {}", path.display())),
        };
        let record: Record = serde_json::from_slice(&text)
            .map_err(|error| Error::State(format!("{}: {error}", path.display())))?;
        if record.version != VERSION {
            return Err(Error::State(format!(
                "{} is of version {}, this runtime knows {VERSION}",
                path.display(),
                record.version
            )));
        }
        Ok(record)
    }

    /// Replaces the record. Not synced to disk: containers do not outlive a power cut either.
    pub(crate) fn write(&self, record: &Record) -> Result<()> {
        let shared = Shared {
            record,
            runc: RuncState::of(record),
        };
        let text = serde_json::to_vec(&shared).expect("a record is plain data");
        let what = || format!("write {}", self.path.join(STATE_FILE).display());
        let temporary = self.path.join("state.new");
        let mut options = fs::File::options();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .context(what)?;
        file.write_all(&text).context(what)?;
        rustix::fs::rename(&temporary, self.path.join(STATE_FILE)).context(what)
    }

    /// Makes the fifo and opens it for init.
    pub(crate) fn make_start(&self) -> Result<OwnedFd> {
        let what = || format!("make {}", self.path.join(START_FIFO).display());
        rustix::fs::mknodat(
            &self.fd,
            START_FIFO,
            rustix::fs::FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .context(what)?;
        rustix::fs::openat(
            &self.fd,
            START_FIFO,
            OFlags::RDWR | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .context(what)
    }

    pub(crate) fn make_failure(&self) -> Result<fs::File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        rustix::fs::openat(&self.fd, FAILURE_FILE, flags, Mode::RUSR | Mode::WUSR)
            .context(|| format!("make {}", self.path.join(FAILURE_FILE).display()))
            .map(fs::File::from)
    }

    /// Why init failed after its start, if it did.
    pub(crate) fn failure(&self) -> Option<String> {
        let file = rustix::fs::openat(
            &self.fd,
            FAILURE_FILE,
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .ok()?;
        let mut text = vec![0; MAX_FAILURE];
        let length = rustix::io::read(&file, &mut text).ok()?;
        text.truncate(length);
        (!text.is_empty()).then(|| String::from_utf8_lossy(&text).into_owned())
    }

    pub(crate) fn has_record(&self) -> bool {
        rustix::fs::statat(&self.fd, STATE_FILE, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    pub(crate) fn waits_for_start(&self) -> bool {
        rustix::fs::statat(&self.fd, START_FIFO, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// The writing end towards init. `None` if nobody reads.
    pub(crate) fn open_start(&self) -> Result<Option<OwnedFd>> {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match rustix::fs::openat(self.fd.as_fd(), START_FIFO, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(fd)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(error) => {
                Err(error).context(|| format!("open {}", self.path.join(START_FIFO).display()))
            }
        }
    }

    pub(crate) fn remove_start(&self) {
        rustix::fs::unlinkat(&self.fd, START_FIFO, rustix::fs::AtFlags::empty()).ok();
    }

    /// Removes the directory with everything in it.
    pub(crate) fn remove(&self) -> Result<()> {
        for name in [STATE_FILE, START_FIFO, FAILURE_FILE] {
            rustix::fs::unlinkat(&self.fd, name, rustix::fs::AtFlags::empty()).ok();
        }
        match rustix::fs::rmdir(&self.path) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(_) => {
                fs::remove_dir_all(&self.path).context(|| format!("remove {}", self.path.display()))
            }
        }
    }
}

/// A process as /proc/PID/stat shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProcessStat {
    pub(crate) state: char,
    /// Clock ticks after boot.
    pub(crate) start: u64,
}

/// Looks at a process; `None` if there is none.
pub(crate) fn process_stat(pid: i32) -> Option<ProcessStat> {
    // One line of numbers and a short name.
    let mut text = [0; 1024];
    let mut file = fs::File::open(format!("/proc/{pid}/stat")).ok()?;
    let length = file.read(&mut text).ok()?;
    parse_stat(&String::from_utf8_lossy(&text[..length]))
}

fn parse_stat(text: &str) -> Option<ProcessStat> {
    // The name in parentheses may contain anything: fields are counted from the last one.
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some(ProcessStat { state, start })
}

/// The time as RFC 3339 in UTC with nanoseconds.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days since 0000-03-01, counted in eras of 400 years (146 097 days).
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let shifted = (5 * day + 2) / 153;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let day = day - (153 * shifted + 2) / 5 + 1;
    let year = year + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        since.subsec_nanos()
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn ids_cannot_be_paths() {
        for wrong in ["", ".", "..", "a/b", "a b", "ü", "a\n"] {
            assert!(check_id(wrong).is_err(), "{wrong:?}");
        }
        check_id("abc_1.2-3+x").unwrap();
    }

    #[test]
    fn times_are_written_as_in_the_calendar() {
        let at = |seconds| rfc3339(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(at(951_827_696), "2000-02-29T12:34:56.000000000Z");
        assert_eq!(at(1_735_689_599), "2024-12-31T23:59:59.000000000Z");
    }

    #[test]
    fn process_names_cannot_forge_fields() {
        let text = "7 (a) Z 1 (x)) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        assert_eq!(
            parse_stat(text),
            Some(ProcessStat {
                state: 'S',
                start: 4711
            })
        );
        assert!(process_stat(i32::MAX).is_none());
    }
}
