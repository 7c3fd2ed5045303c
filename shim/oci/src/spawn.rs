//! Making the new process: the clone itself, and the parent's side of the conversation.

use std::os::fd::{AsFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

use crate::channel::{Channel, Message};
use crate::error::{Context, Error, Result};
use crate::init;
use crate::sys::{self, CloneRequest, Fork};

/// How a process is cloned.
pub(crate) struct Birth<'a> {
    pub(crate) request: CloneRequest<'a>,
    /// The namespaces to join belong to a user namespace that is joined, so a helper joins them and clones.
    pub(crate) through_helper: bool,
}

/// A process that has not been handed to the caller yet: killed and, if it is ours, reaped when dropped.
#[derive(Debug)]
pub(crate) struct Newborn {
    pub(crate) pid: i32,
    pidfd: Option<OwnedFd>,
}

impl Newborn {
    pub(crate) fn pidfd(&self) -> &OwnedFd {
        self.pidfd.as_ref().expect("present until kept")
    }

    /// The process lives on.
    pub(crate) fn keep(mut self) -> OwnedFd {
        self.pidfd.take().expect("present until kept")
    }
}

impl Drop for Newborn {
    fn drop(&mut self) {
        if let Some(pidfd) = &self.pidfd {
            rustix::process::pidfd_send_signal(pidfd, Signal::KILL).ok();
            // A sibling is not ours to reap: wait only until it has ended.
            if rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED).is_err()
            {
                let mut poll = [rustix::event::PollFd::new(
                    pidfd,
                    rustix::event::PollFlags::IN,
                )];
                rustix::event::poll(
                    &mut poll,
                    Some(&rustix::event::Timespec {
                        tv_sec: 5,
                        tv_nsec: 0,
                    }),
                )
                .ok();
            }
        }
    }
}

/// Clones. `join` runs in the helper, `child` in the new process (told whether a helper has joined its namespaces);
/// neither returns.
pub(crate) fn spawn(
    birth: &Birth<'_>,
    parent_end: &Channel,
    child_end: Channel,
    join: impl FnOnce() -> Result<()>,
    child: impl FnOnce(Channel, bool),
) -> Result<Newborn> {
    if !birth.through_helper {
        return match sys::clone3(&birth.request).context(|| "clone the container's process")? {
            Fork::Child => {
                child(child_end, false);
                sys::exit_now(1)
            }
            Fork::Parent { pid, pidfd } => Ok(Newborn {
                pid,
                pidfd: Some(pidfd),
            }),
        };
    }
    let plain = CloneRequest {
        namespaces: 0,
        sibling: birth.request.sibling,
        cgroup: None,
    };
    let (helper, pidfd) = match sys::clone3(&plain).context(|| "clone a helper")? {
        Fork::Parent { pid, pidfd } => (pid, pidfd),
        Fork::Child => help(birth, child_end, join, child),
    };
    drop(child_end);
    let told = parent_end.receive();
    // Ours unless siblings were asked for, whose parent reaps it.
    rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED).ok();
    match told? {
        Some(Message::Spawned(pid)) => {
            let found = Pid::from_raw(pid)
                .ok_or_else(|| Error::Process("no process id from the helper".into()))?;
            let pidfd =
                rustix::process::pidfd_open(found, PidfdFlags::empty()).context(|| "pidfd_open")?;
            Ok(Newborn {
                pid,
                pidfd: Some(pidfd),
            })
        }
        Some(Message::Failed(text)) => Err(Error::Process(text)),
        _ => Err(Error::Process(format!("helper process {helper} died"))),
    }
}

/// The helper: joins, clones the real process as its own sibling, tells its id, ends.
fn help(
    birth: &Birth<'_>,
    channel: Channel,
    join: impl FnOnce() -> Result<()>,
    child: impl FnOnce(Channel, bool),
) -> ! {
    let told = channel.as_fd().try_clone_to_owned();
    let Ok(told) = told else { sys::exit_now(1) };
    init::never_return(told.as_fd(), || {
        sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).context(|| "prctl PR_SET_DUMPABLE")?;
        join()?;
        init::become_root()?;
        let request = CloneRequest {
            sibling: true,
            cgroup: None,
            ..birth.request
        };
        match sys::clone3(&request).context(|| "clone the container's process")? {
            Fork::Child => {
                child(channel, true);
                sys::exit_now(1)
            }
            Fork::Parent { pid, .. } => {
                channel.send(Message::Spawned(pid))?;
                sys::exit_now(0)
            }
        }
    })
}

/// What the conversation brought.
#[derive(Debug, Default)]
pub(crate) struct Conversation {
    pub(crate) console: Option<OwnedFd>,
    /// Init said that it is ready; otherwise the line was closed by an exec.
    pub(crate) ready: bool,
}

/// Answers the child until it is ready, has executed its program, or fails.
pub(crate) fn converse(
    channel: &Channel,
    child: &Newborn,
    mut mounted: impl FnMut() -> Result<()>,
    mut listener: impl FnMut(OwnedFd) -> Result<()>,
) -> Result<Conversation> {
    let mut conversation = Conversation::default();
    loop {
        match channel.receive()? {
            None => return Ok(conversation),
            Some(Message::Ready) => {
                conversation.ready = true;
                return Ok(conversation);
            }
            Some(Message::Failed(text)) => return Err(Error::Process(text)),
            Some(Message::Console(fd)) => conversation.console = Some(fd),
            Some(Message::Mounted) => {
                mounted()?;
                channel.send(Message::Go(child.pid))?;
            }
            Some(Message::Listener(number)) => {
                let fd = rustix::process::pidfd_getfd(
                    child.pidfd(),
                    number,
                    rustix::process::PidfdGetfdFlags::empty(),
                )
                .context(|| "take the seccomp listener")?;
                listener(fd)?;
                channel.send(Message::ListenerTaken)?;
            }
            Some(other) => return Err(Error::Process(format!("unexpected message {other:?}"))),
        }
    }
}
