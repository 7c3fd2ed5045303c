//! Which namespaces a container gets: new ones, joined ones, and the identity mappings of a new user namespace.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;

use rustix::fs::{Mode, OFlags};

use crate::error::{Context, Error, Result};
use crate::mount::idmap::map_text;
use crate::spec::Linux;
use crate::spec::linux::{IdMapping, TimeOffset};
use crate::sys;

/// (name in the specification, clone flag, file in /proc/PID/ns)
pub(crate) const KINDS: &[(&str, i32, &str)] = &[
    ("user", libc::CLONE_NEWUSER, "user"),
    ("mount", libc::CLONE_NEWNS, "mnt"),
    ("uts", libc::CLONE_NEWUTS, "uts"),
    ("ipc", libc::CLONE_NEWIPC, "ipc"),
    ("network", libc::CLONE_NEWNET, "net"),
    ("pid", libc::CLONE_NEWPID, "pid"),
    ("cgroup", libc::CLONE_NEWCGROUP, "cgroup"),
    ("time", TIME, "time"),
];

const TIME: i32 = sys::CLONE_NEWTIME;

/// The namespaces of one container.
#[derive(Debug, Default)]
pub(crate) struct Namespaces {
    /// `CLONE_NEW*` bits of new namespaces.
    pub(crate) new: i32,
    /// Namespaces to join, opened: (`CLONE_NEW*` bit, path for messages, descriptor).
    pub(crate) joined: Vec<(i32, String, OwnedFd)>,
    /// Bits of new ones that exist already, for the process to enter.
    ready: i32,
}

impl Namespaces {
    /// Reads the configuration and opens the namespaces to join.
    pub(crate) fn plan(linux: &Linux) -> Result<Self> {
        let mut plan = Self::default();
        let mut seen = 0;
        for namespace in &linux.namespaces {
            let (_, flag, _) = KINDS
                .iter()
                .find(|(name, _, _)| *name == namespace.kind)
                .ok_or_else(|| {
                    Error::Spec(format!("namespace {:?} does not exist", namespace.kind))
                })?;
            if seen & flag != 0 {
                return Err(Error::Spec(format!(
                    "malformed spec file: duplicated ns {:?}",
                    namespace.kind
                )));
            }
            seen |= flag;
            if namespace.path.is_empty() {
                plan.new |= flag;
                continue;
            }
            let fd = rustix::fs::open(
                namespace.path.as_str(),
                OFlags::RDONLY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .context(|| format!("lstat {}", namespace.path))?;
            plan.joined.push((*flag, namespace.path.clone(), fd));
        }
        if plan.has_new(libc::CLONE_NEWUSER)
            && (linux.uid_mappings.is_empty() || linux.gid_mappings.is_empty())
        {
            return Err(Error::Spec(
                "user namespaces enabled, but no uid or gid mappings found".into(),
            ));
        }
        Ok(plan)
    }

    pub(crate) fn has_new(&self, flag: i32) -> bool {
        self.new & flag != 0
    }

    pub(crate) fn joins(&self, flag: i32) -> Option<&OwnedFd> {
        self.joined
            .iter()
            .find(|(kind, _, _)| *kind == flag)
            .map(|(_, _, fd)| fd)
    }

    /// New or joined, anyhow not the runtime's.
    pub(crate) fn separate(&self, flag: i32) -> bool {
        self.has_new(flag) || self.joins(flag).is_some()
    }

    /// Bits for the clone itself. The cgroup namespace comes after the process is in its group; the time namespace is
    /// made by the parent, because its clocks are set before anybody is in it.
    pub(crate) fn clone_flags(&self) -> i32 {
        self.new & !(libc::CLONE_NEWCGROUP | TIME | self.ready)
    }

    /// A new network namespace that was made before is there to be entered. It belongs to the machine's user namespace,
    /// so one that is made together with a user namespace it cannot replace.
    pub(crate) fn take_network(&mut self) {
        if !self.separate(libc::CLONE_NEWUSER) {
            self.ready = self.new & libc::CLONE_NEWNET;
        }
    }

    /// Whether the new network namespace is one that was made before.
    pub(crate) fn has_ready_network(&self) -> bool {
        self.ready & libc::CLONE_NEWNET != 0
    }

    /// Joins everything but pid, which the parent did. What needs the privileges of the user namespace comes after it.
    pub(crate) fn join(&self) -> Result<()> {
        let mut refused = Vec::new();
        let user = self.joins(libc::CLONE_NEWUSER);
        for (flag, path, fd) in &self.joined {
            if matches!(*flag, libc::CLONE_NEWPID | libc::CLONE_NEWUSER) {
                continue;
            }
            match sys::setns(fd.as_fd(), *flag) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EPERM) && user.is_some() => {
                    refused.push((flag, path, fd));
                }
                Err(error) => return Err(error).context(|| format!("join namespace {path}")),
            }
        }
        if let Some(user) = user {
            sys::setns(user.as_fd(), libc::CLONE_NEWUSER).context(|| "join the user namespace")?;
        }
        for (flag, path, fd) in refused {
            sys::setns(fd.as_fd(), *flag).context(|| format!("join namespace {path}"))?;
        }
        Ok(())
    }
}

/// Makes a network namespace that nobody is in, with its loopback device up, for
/// [`CreateRequest::network`](crate::CreateRequest::network). `None` if none can be had. The process, which must have
/// one thread, is in its own again afterwards.
///
/// # Errors
/// `Io` if it is not: it must end then.
pub fn spare_network() -> Result<Option<OwnedFd>> {
    const NETWORK: &str = "/proc/self/ns/net";
    let open = || rustix::fs::open(NETWORK, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let Ok(own) = open() else {
        return Ok(None);
    };
    if sys::unshare(libc::CLONE_NEWNET).is_err() {
        return Ok(None);
    }
    let made = sys::loopback_up().ok().and_then(|()| open().ok());
    sys::setns(own.as_fd(), libc::CLONE_NEWNET)
        .context(|| "return to the own network namespace")?;
    Ok(made)
}

/// Holds this process's own pid or time namespace while children are made for another.
pub(crate) struct ForChildren {
    own: OwnedFd,
    flag: i32,
}

impl ForChildren {
    fn remember(flag: i32, file: &str) -> Result<Self> {
        let own = rustix::fs::open(
            format!("/proc/self/ns/{file}"),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .context(|| format!("open own {file} namespace"))?;
        Ok(Self { own, flag })
    }

    /// Children are born in this pid namespace until the value is dropped.
    pub(crate) fn pid(target: &OwnedFd) -> Result<Self> {
        let guard = Self::remember(libc::CLONE_NEWPID, "pid")?;
        sys::setns(target.as_fd(), libc::CLONE_NEWPID).context(|| "join the pid namespace")?;
        Ok(guard)
    }

    /// Children are born in a new time namespace with these offsets until the value is dropped.
    pub(crate) fn time<'a>(
        offsets: impl Iterator<Item = (&'a String, &'a TimeOffset)>,
    ) -> Result<Self> {
        let guard = Self::remember(TIME, "time")?;
        sys::unshare(TIME).context(|| "make a time namespace")?;
        let mut text = String::new();
        for (clock, offset) in offsets {
            if clock != "monotonic" && clock != "boottime" {
                return Err(Error::Spec(format!(
                    "timeOffsets: no clock {clock:?}: monotonic or boottime"
                )));
            }
            text.push_str(&format!("{clock} {} {}\n", offset.secs, offset.nanosecs));
        }
        if !text.is_empty() {
            fs::write("/proc/self/timens_offsets", text)
                .context(|| "set time namespace offsets")?;
        }
        Ok(guard)
    }
}

impl Drop for ForChildren {
    fn drop(&mut self) {
        // Own namespaces can always be returned to; if not, the next child fails visibly in its own checks.
        sys::setns(self.own.as_fd(), self.flag).ok();
    }
}

/// Writes the identity maps of a process in a new user namespace.
pub(crate) fn write_id_maps(pid: i32, uids: &[IdMapping], gids: &[IdMapping]) -> Result<()> {
    let privileged = rustix::process::geteuid().is_root();
    if !privileged {
        let own = |mappings: &[IdMapping], id: u32| {
            mappings.len() == 1 && mappings[0].size == 1 && mappings[0].host_id == id
        };
        if own(gids, rustix::process::getegid().as_raw()) {
            fs::write(format!("/proc/{pid}/setgroups"), "deny").context(|| "deny setgroups")?;
            write_map(pid, "gid_map", gids)?;
        } else {
            run_map_helper("newgidmap", pid, gids)?;
        }
        return if own(uids, rustix::process::geteuid().as_raw()) {
            write_map(pid, "uid_map", uids)
        } else {
            run_map_helper("newuidmap", pid, uids)
        };
    }
    write_map(pid, "gid_map", gids)?;
    write_map(pid, "uid_map", uids)
}

fn write_map(pid: i32, file: &str, mappings: &[IdMapping]) -> Result<()> {
    fs::write(format!("/proc/{pid}/{file}"), map_text(mappings)).context(|| format!("write {file}"))
}

/// The set-uid helpers of shadow, which let users map the ranges of /etc/subuid and /etc/subgid.
fn run_map_helper(helper: &str, pid: i32, mappings: &[IdMapping]) -> Result<()> {
    let mut command = Command::new(helper);
    command.arg(pid.to_string());
    for map in mappings {
        command.args([
            map.container_id.to_string(),
            map.host_id.to_string(),
            map.size.to_string(),
        ]);
    }
    let output = command
        .output()
        .context(|| format!("run {helper} (package uidmap)"))?;
    if output.status.success() {
        Ok(())
    } else {
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(Error::Process(format!("{helper} failed: {text}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linux(text: &str) -> Linux {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn namespaces_are_new_or_joined() {
        let plan = Namespaces::plan(&linux(
            r#"{"namespaces":[{"type":"pid"},{"type":"cgroup"},{"type":"network","path":"/proc/self/ns/net"}]}"#,
        ))
        .unwrap();
        assert_eq!(plan.clone_flags(), libc::CLONE_NEWPID);
        assert!(plan.separate(libc::CLONE_NEWNET) && !plan.has_new(libc::CLONE_NEWNET));
    }

    #[test]
    fn wrong_lists_are_refused() {
        for text in [
            r#"{"namespaces":[{"type":"pid"},{"type":"pid"}]}"#,
            r#"{"namespaces":[{"type":"moon"}]}"#,
            r#"{"namespaces":[{"type":"network","path":"/nowhere/at/all"}]}"#,
            r#"{"namespaces":[{"type":"user"}]}"#,
        ] {
            assert!(Namespaces::plan(&linux(text)).is_err(), "{text}");
        }
    }
}
