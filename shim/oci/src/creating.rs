//! A container under way, between its first process's birth and its being ready.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use crate::cgroup::Group;
use crate::channel::{Channel, Message, Polled};
use crate::directory::Directory;
use crate::error::{Error, Result};
use crate::kept::Kept;
use crate::record::Record;
use crate::request::Created;
use crate::spawn::Newborn;

/// What was made so far, undone when creating fails.
#[derive(Debug)]
pub(crate) struct Made {
    /// `None` once it is decided what becomes of it all.
    pub(crate) directory: Option<Directory>,
    pub(crate) group: Option<Group>,
    pub(crate) resctrl: Option<PathBuf>,
    pub(crate) child: Option<Newborn>,
}

impl Made {
    pub(crate) fn directory(&self) -> &Directory {
        self.directory.as_ref().expect("present until decided")
    }

    fn undo(&mut self) {
        let Some(directory) = self.directory.take() else {
            return;
        };
        // The first failure is what the caller hears; what is left here is found by the next `delete --force`.
        drop(self.child.take());
        if let Some(group) = &self.group {
            group.kill_all().ok();
            group.remove().ok();
        }
        if let Some(resctrl) = &self.resctrl {
            fs::remove_dir(resctrl).ok();
        }
        directory.remove().ok();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        self.undo();
    }
}

/// A container under way: on record, and its first process sets itself up. Whoever drops it undoes it, which may
/// take its time.
#[derive(Debug)]
pub struct Creating {
    pub(crate) made: Made,
    pub(crate) record: Record,
    pub(crate) line: Channel,
    pub(crate) console: Option<OwnedFd>,
}

impl AsFd for Creating {
    /// Readable when [`advance`](Creating::advance) has something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.line.as_fd()
    }
}

impl Creating {
    fn child(&self) -> &Newborn {
        self.made.child.as_ref().expect("present until kept")
    }

    /// Id of the first process in the caller's pid namespace.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child().pid
    }

    /// Its control group.
    #[must_use]
    pub fn group(&self) -> Option<&Group> {
        self.made.group.as_ref()
    }

    /// Takes what the first process has said, without waiting; whether it is ready.
    ///
    /// # Errors
    /// `Process` with the reason if it failed.
    pub fn advance(&mut self) -> Result<bool> {
        loop {
            match self.line.poll()? {
                Polled::Nothing => return Ok(false),
                Polled::Message(Message::Ready) => return Ok(true),
                Polled::Message(Message::Console(fd)) => self.console = Some(fd),
                Polled::Message(Message::Failed(text)) => return Err(Error::Process(text)),
                Polled::Message(other) => {
                    return Err(Error::Process(format!("unexpected message {other:?}")));
                }
                Polled::Closed => return Err(died_early()),
            }
        }
    }

    /// The container is made.
    #[must_use]
    pub fn finish(mut self) -> (Created, Kept) {
        let directory = self.made.directory.take().expect("present until decided");
        directory.unlock();
        let child = self.made.child.take().expect("present until kept");
        let created = Created {
            pid: child.pid,
            pidfd: child.keep(),
            console: self.console.take(),
        };
        (created, Kept::new(directory, self.record))
    }

    /// Undoes everything. May wait, and wants to be called where that harms nobody: in a child of the creator, say,
    /// which then forgets its own copy.
    pub fn undo(&mut self) {
        self.made.undo();
    }

    /// Somebody else has undone it.
    pub fn forget(mut self) {
        drop(self.made.directory.take());
        if let Some(child) = self.made.child.take() {
            drop(child.keep());
        }
    }
}

pub(crate) fn died_early() -> Error {
    Error::Process("init died before it was ready (killed, or out of memory)".into())
}
