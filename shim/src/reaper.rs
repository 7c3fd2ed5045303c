//! Reaping: every child of this process, also the orphans it inherits as a subreaper.
//!
//! One loop waits for SIGCHLD and hands each exit to whoever claimed the pid. A runtime reports the
//! pid of a container only after the process exists, perhaps after it ended; so before a runtime is
//! called a [`Window`] is opened, which remembers the exits of unclaimed pids while it is open.
//! Everything runs on one thread: between a spawn and its registration nothing can be reaped.

use std::collections::HashMap;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::process::WaitOptions;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::error::{Error, Result};
use crate::process::{Exit, UNKNOWN_STATUS};

/// Exits of unclaimed pids remembered per window; a fork bomb's orphans must not fill the memory.
const REMEMBERED_EXITS: usize = 4096;

#[derive(Debug, Default)]
struct Table {
    claims: HashMap<u32, oneshot::Sender<Exit>>,
    /// Open windows, and the exits each has seen.
    windows: HashMap<u64, HashMap<u32, Exit>>,
    next_window: u64,
}

/// Hands out exits of children.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reaper {
    table: Arc<Mutex<Table>>,
}

/// The exit of one process, some day.
#[derive(Debug)]
pub(crate) struct Pending(oneshot::Receiver<Exit>);

impl Pending {
    /// Waits for the exit.
    pub(crate) async fn exit(self) -> Exit {
        self.0.await.unwrap_or_else(|_| Exit {
            status: UNKNOWN_STATUS,
            at: SystemTime::now(),
        })
    }
}

/// Remembers exits of unclaimed pids while it lives.
#[derive(Debug)]
pub(crate) struct Window {
    reaper: Reaper,
    key: u64,
}

impl Reaper {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reaps until the runtime ends.
    ///
    /// # Errors
    /// When SIGCHLD cannot be listened to.
    pub(crate) async fn run(self) -> Result<()> {
        let mut children =
            signal(SignalKind::child()).map_err(Error::system("listen to SIGCHLD"))?;
        loop {
            self.reap();
            if children.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    fn reap(&self) {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let code = match (status.exit_status(), status.terminating_signal()) {
                        (Some(code), _) => code,
                        (None, Some(signal)) => 128 + signal,
                        // Stopped or continued: not asked for, and not an exit.
                        (None, None) => continue,
                    };
                    let exit = Exit {
                        status: u32::try_from(code).unwrap_or(UNKNOWN_STATUS),
                        at: SystemTime::now(),
                    };
                    let pid = u32::try_from(pid.as_raw_nonzero().get()).unwrap_or(0);
                    self.deliver(pid, exit);
                }
                Err(rustix::io::Errno::INTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn deliver(&self, pid: u32, exit: Exit) {
        let mut table = self.table();
        if let Some(claim) = table.claims.remove(&pid) {
            // A claimant that lost interest is none of the reaper's business.
            let _ = claim.send(exit);
            return;
        }
        for seen in table.windows.values_mut() {
            if seen.len() < REMEMBERED_EXITS {
                seen.insert(pid, exit);
            }
        }
    }

    /// Spawns a command whose exit this reaper will hand out.
    ///
    /// # Errors
    /// What the spawn said.
    pub(crate) fn spawn(&self, command: &mut Command) -> std::io::Result<(Child, Pending)> {
        let child = command.spawn()?;
        let pending = self.claim(child.id());
        Ok((child, pending))
    }

    /// Claims a child that was made just now, with no await in between.
    pub(crate) fn claim(&self, pid: u32) -> Pending {
        let (sender, receiver) = oneshot::channel();
        self.table().claims.insert(pid, sender);
        Pending(receiver)
    }

    /// Starts to remember exits of unclaimed pids.
    pub(crate) fn window(&self) -> Window {
        let mut table = self.table();
        let key = table.next_window;
        table.next_window += 1;
        table.windows.insert(key, HashMap::new());
        Window {
            reaper: self.clone(),
            key,
        }
    }
}

impl Window {
    /// Claims a pid that appeared since the window was opened, dead or alive.
    pub(crate) fn claim(&self, pid: u32) -> Pending {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.reaper.table();
        let seen = table
            .windows
            .get_mut(&self.key)
            .and_then(|seen| seen.remove(&pid));
        match seen {
            Some(exit) => {
                let _ = sender.send(exit);
            }
            None => {
                table.claims.insert(pid, sender);
            }
        }
        Pending(receiver)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.reaper.table().windows.remove(&self.key);
    }
}
