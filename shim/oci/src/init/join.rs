//! A process that joins a running container (`exec`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use super::{
    SeccompLoad, become_root, exec, expect, given, identity, own_keyring, rootfs, seclude,
};
use crate::cgroup::Entry;
use crate::channel::{Channel, Message};
use crate::error::{Context, Error, Result};
use crate::request::{KeyringMode, Stdio};
use crate::seccomp::Program;
use crate::spec::Process;
use crate::spec::linux::{MemoryPolicy, Personality};
use crate::sys;

/// Everything a joining process knows.
pub(crate) struct Join<'a> {
    pub(crate) id: &'a str,
    pub(crate) process: &'a Process,
    pub(crate) personality: Option<&'a Personality>,
    pub(crate) memory_policy: Option<&'a MemoryPolicy>,
    /// Descriptor of the container's init.
    pub(crate) init: OwnedFd,
    /// Namespaces of init that differ from ours, without pid.
    pub(crate) namespaces: i32,
    pub(crate) user_namespace: bool,
    /// Init's root, for containers whose root is not that of their mount namespace.
    pub(crate) root: Option<OwnedFd>,
    pub(crate) cgroup: Entry,
    pub(crate) stdio: &'a Stdio,
    pub(crate) seccomp: Option<&'a Program>,
    pub(crate) channel: &'a Channel,
    pub(crate) setgroups_allowed: bool,
    pub(crate) preserve_fds: u32,
    pub(crate) wait_go: bool,
    pub(crate) keyring: KeyringMode,
    pub(crate) initial_affinity: Option<rustix::thread::CpuSet>,
    pub(crate) final_affinity: Option<rustix::thread::CpuSet>,
}

impl Join<'_> {
    fn kept(&self) -> Vec<BorrowedFd<'_>> {
        let mut kept = vec![self.channel.as_fd(), self.init.as_fd()];
        kept.extend(self.root.iter().map(AsFd::as_fd));
        kept.extend(given(self.stdio, self.preserve_fds));
        kept
    }

    /// The life of the process until its program.
    pub(crate) fn run(self) -> Result<std::convert::Infallible> {
        if let Some(affinity) = &self.initial_affinity {
            rustix::thread::sched_setaffinity(None, affinity).context(|| "set CPU affinity")?;
        }
        seclude(&self.kept(), &self.cgroup)?;
        if self.wait_go {
            expect(self.channel)?;
        }
        if let Some(affinity) = &self.final_affinity {
            rustix::thread::sched_setaffinity(None, affinity).context(|| "set CPU affinity")?;
        }
        // Through procfs while it is the host's: labels are written now, in force at the exec.
        identity::set_labels(self.process)?;
        if self.keyring == KeyringMode::Own {
            identity::label_keys(self.process)?;
        }
        // Not by the parent, who does not hold the program back: it may run, and end, before it is written.
        if let Some(adjustment) = self.process.oom_score_adj {
            identity::set_oom_score("self", adjustment)?;
        }
        if self.namespaces != 0 {
            sys::setns(self.init.as_fd(), self.namespaces)
                .context(|| "join the container's namespaces")?;
        }
        if self.user_namespace {
            become_root()?;
        }
        if let Some(root) = &self.root {
            rustix::process::fchdir(root)
                .and_then(|()| rustix::process::chroot("."))
                .context(|| "enter the container's root")?;
        }
        rustix::process::setsid().context(|| "setsid")?;
        if self.keyring == KeyringMode::Own {
            own_keyring(self.id)?;
        }
        self.use_stdio()?;
        if let Some(personality) = self.personality {
            identity::set_personality(personality)?;
        }
        if let Some(policy) = self.memory_policy {
            super::memory::set(policy)?;
        }
        identity::set_priorities(self.process)?;
        if !self.user_namespace {
            identity::set_rlimits(0, self.process)?;
        }
        let mut seccomp = SeccompLoad::new(self.seccomp, self.process.no_new_privileges);
        if self.process.no_new_privileges {
            sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).context(|| "set nonewprivileges")?;
        }
        seccomp.before_user(self.channel)?;
        identity::assume(self.process, self.setgroups_allowed)?;
        let program = identity::find_program(self.process)?;
        seccomp.before_ready(self.channel)?;
        sys::cloexec_from(3 + self.preserve_fds).context(|| "mark descriptors close-on-exec")?;
        seccomp.before_exec()?;
        Err(exec(&program))
    }

    fn use_stdio(&self) -> Result<()> {
        match self.stdio {
            Stdio::Terminal { size } => {
                let devpts = rustix::fs::openat2(
                    rustix::fs::CWD,
                    "/dev/pts",
                    OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                    Mode::empty(),
                    rustix::fs::ResolveFlags::NO_SYMLINKS,
                )
                .context(|| "a terminal needs devpts at /dev/pts in the container")?;
                let (master, other) = rootfs::open_terminal(devpts.as_fd())?;
                self.channel.send(Message::Console(master))?;
                identity::take_terminal(other.as_fd(), size.map(|size| (size.columns, size.rows)))
            }
            Stdio::Fds {
                stdin,
                stdout,
                stderr,
            } => sys::renumber_stdio([stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])
                .context(|| "set standard streams"),
            Stdio::Inherit => Ok(()),
        }
    }
}

/// A list such as `0-3,7` as a set of processors.
pub(crate) fn cpu_list(text: &str) -> Result<rustix::thread::CpuSet> {
    let wrong = || {
        Error::Spec(format!(
            "execCPUAffinity: {text:?} is not a list of processors such as 0-3,7"
        ))
    };
    let mut set = rustix::thread::CpuSet::new();
    for part in text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (
            first.trim().parse().map_err(|_| wrong())?,
            last.trim().parse().map_err(|_| wrong())?,
        );
        if first > last || last >= rustix::thread::CpuSet::MAX_CPU {
            return Err(wrong());
        }
        (first..=last).for_each(|cpu| set.set(cpu));
    }
    if set.count() == 0 {
        Err(wrong())
    } else {
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_lists_are_read() {
        let set = cpu_list("0-2, 5").unwrap();
        assert_eq!(set.count(), 4);
        assert!(set.is_set(5) && !set.is_set(4));
        for wrong in ["", "3-1", "a", "0-99999"] {
            assert!(cpu_list(wrong).is_err(), "{wrong}");
        }
    }
}
