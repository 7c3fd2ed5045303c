//! Running another process in a container: the parent's side.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use crate::cgroup::Entry;
use crate::channel::{Channel, Message};
use crate::check::check_stdio;
use crate::container::Container;
use crate::error::{Context, Error, Result};
use crate::init::join::{Join, cpu_list};
use crate::init::{identity, never_return};
use crate::init_process::open_init;
use crate::listener::pass_listener;
use crate::namespaces::{ForChildren, KINDS};
use crate::record::Record;
use crate::request::{Created, ExecRequest, Parentage};
use crate::runtime::check_labels;
use crate::spawn::{self, Birth, Newborn};
use crate::state::Status;
use crate::sys::CloneRequest;

impl Container<'_> {
    /// Runs a process in the container. Returns when its program has been executed.
    ///
    /// # Errors
    /// `State` if the container does not run; `Process` with the reason if the program could not be executed.
    pub fn exec(&self, request: &ExecRequest<'_>) -> Result<Created> {
        self.runtime.check_process()?;
        request.process.validate()?;
        check_stdio(request.process, &request.stdio)?;
        check_labels(request.process, "")?;
        let record = self.lock()?.record.clone();
        match self.status(&record) {
            Status::Stopped => {
                return Err(Error::State("cannot exec in a stopped container".into()));
            }
            Status::Paused if !request.ignore_paused => {
                return Err(Error::State(
                    "cannot exec in a paused container (use --ignore-paused to override)".into(),
                ));
            }
            _ => {}
        }
        if request.cgroup.contains("..") {
            return Err(Error::Spec(format!(
                "cgroup {:?} must not contain \"..\"",
                request.cgroup
            )));
        }
        let init = open_init(&record)?;
        Joining {
            request,
            record: &record,
        }
        .run(init)
    }
}

struct Joining<'a> {
    request: &'a ExecRequest<'a>,
    record: &'a Record,
}

impl Joining<'_> {
    fn run(&self, init: OwnedFd) -> Result<Created> {
        let (parent_end, child_end) = Channel::pair()?;
        let process = self.request.process;
        let namespaces = self.foreign_namespaces()?;
        let user_namespace = namespaces & libc::CLONE_NEWUSER != 0;
        let child = self.clone_process(init, namespaces, &parent_end, child_end)?;
        if user_namespace {
            identity::set_rlimits(child.pid, process)?;
            parent_end.send(Message::Go(child.pid))?;
        }
        let listener = |fd| self.pass_listener(&fd, child.pid);
        let conversation = spawn::converse(&parent_end, &child, || Ok(()), listener)?;
        let pid = child.pid;
        Ok(Created {
            pid,
            pidfd: child.keep(),
            console: conversation.console,
        })
    }

    /// Namespaces of init that are not ours. Joining one's own user namespace is an error, hence the look.
    fn foreign_namespaces(&self) -> Result<i32> {
        let mut foreign = 0;
        for (_, flag, file) in KINDS
            .iter()
            .filter(|(_, flag, _)| self.record.namespaces & flag != 0)
        {
            let name = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{file}"));
            let theirs = match name(&self.record.pid.to_string()) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    return Err(Error::NotRunning);
                }
                other => other.context(|| format!("look at the container's {file} namespace"))?,
            };
            if name("self").is_ok_and(|ours| ours != theirs) {
                foreign |= flag;
            }
        }
        Ok(foreign)
    }

    fn clone_process(
        &self,
        init: OwnedFd,
        namespaces: i32,
        parent_end: &Channel,
        child_end: Channel,
    ) -> Result<Newborn> {
        let pid = self.record.pid;
        let open = |name: &str, flags: OFlags| {
            rustix::fs::open(
                format!("/proc/{pid}/{name}"),
                flags | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .context(|| format!("open {name} of the container's init"))
        };
        let joined_pid = if namespaces & libc::CLONE_NEWPID == 0 {
            None
        } else {
            Some(ForChildren::pid(&open("ns/pid", OFlags::RDONLY)?)?)
        };
        let root = self
            .record
            .chrooted
            .then(|| open("root", OFlags::PATH | OFlags::DIRECTORY))
            .transpose()?;
        let entry = match &self.record.group {
            Some(group) if self.request.cgroup.is_empty() => group.entry_beside(pid)?,
            Some(group) => group.entry(self.request.cgroup)?,
            None => Entry::Writes(Vec::new()),
        };
        let (born, writes) = match entry {
            Entry::Born(directory) => (Some(directory), Vec::new()),
            Entry::Writes(files) => (None, files),
        };
        let affinity = self.request.process.exec_cpu_affinity.as_ref();
        let list = |text: &str| (!text.is_empty()).then(|| cpu_list(text)).transpose();
        let (first, last) = match affinity {
            Some(affinity) => (list(&affinity.initial)?, list(&affinity.last)?),
            None => (None, None),
        };
        let birth = Birth {
            request: CloneRequest {
                namespaces: 0,
                sibling: self.request.parentage == Parentage::Sibling,
                cgroup: born.as_ref().map(AsFd::as_fd),
            },
            through_helper: false,
        };
        let user_namespace = namespaces & libc::CLONE_NEWUSER != 0;
        let child = |channel: Channel, _joined: bool| {
            let join = Join {
                id: &self.record.id,
                process: self.request.process,
                personality: self.record.personality.as_ref(),
                memory_policy: self.record.memory_policy.as_ref(),
                init,
                namespaces: namespaces & !libc::CLONE_NEWPID,
                user_namespace,
                root,
                cgroup: Entry::Writes(writes),
                stdio: &self.request.stdio,
                seccomp: self.record.seccomp.as_ref(),
                channel: &channel,
                setgroups_allowed: self.record.setgroups_allowed,
                preserve_fds: self.request.preserve_fds,
                wait_go: user_namespace,
                keyring: self.request.keyring,
                initial_affinity: first,
                final_affinity: last,
            };
            never_return(channel.as_fd(), || join.run())
        };
        let newborn = spawn::spawn(&birth, parent_end, child_end, || Ok(()), child)?;
        drop(joined_pid);
        Ok(newborn)
    }

    fn pass_listener(&self, listener: &OwnedFd, pid: i32) -> Result<()> {
        let Some(program) = &self.record.seccomp else {
            return Ok(());
        };
        pass_listener(
            program,
            listener,
            &self.record.oci_version,
            pid,
            &self.record.hook_state(Status::Running),
        )
    }
}
