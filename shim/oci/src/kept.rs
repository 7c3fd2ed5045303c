//! A container at hand of whoever made it.

use std::os::fd::OwnedFd;

use crate::container::{started, status_alive, tell_start};
use crate::directory::Directory;
use crate::error::Result;
use crate::init_process::is_alive;
use crate::record::Record;
use crate::spec::{Hook, Hooks};

/// A container whose creator still has its record at hand, and is the parent of its first process: starting and deleting
/// are a handful of system calls then.
#[derive(Debug)]
pub struct Kept {
    directory: Directory,
    record: Record,
}

/// The lock of a [`Kept`] container, held.
struct Turn<'a>(&'a Directory);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.unlock();
    }
}

impl Kept {
    pub(crate) fn new(directory: Directory, record: Record) -> Self {
        Self { directory, record }
    }

    fn turn(&self) -> Result<Option<Turn<'_>>> {
        let taken = self.directory.try_lock()?;
        Ok(taken.then_some(Turn(&self.directory)))
    }

    fn has_hooks(&self, kind: impl Fn(&Hooks) -> &Vec<Hook>) -> bool {
        let hooks = self.record.hooks.as_ref();
        hooks.is_some_and(|hooks| !kind(hooks).is_empty())
    }

    /// The first half of [`Container::start`], which waits for nothing: the program runs, or could not be executed,
    /// when the returned descriptor shows an error to poll(2); [`finish_start`](Self::finish_start) then says which.
    /// `None`, and nothing done, if the container is busy or has poststart hooks: those take [`Container::start`].
    ///
    /// # Errors
    /// As [`Container::start`].
    ///
    /// [`Container::start`]: crate::Container::start
    pub fn begin_start(&self) -> Result<Option<OwnedFd>> {
        if self.has_hooks(|hooks| &hooks.poststart) {
            return Ok(None);
        }
        let Some(_turn) = self.turn()? else {
            return Ok(None);
        };
        // One that has ended does not read its fifo any more.
        let status = status_alive(&self.directory, &self.record);
        tell_start(&self.directory, &self.record, status).map(Some)
    }

    /// The second half of a start.
    ///
    /// # Errors
    /// `Process` with the reason if the program could not be executed.
    pub fn finish_start(&self) -> Result<()> {
        started(&self.directory)
    }

    /// Whether somebody else deleted the container.
    #[must_use]
    pub fn is_deleted(&self) -> bool {
        !self.directory.has_record()
    }

    /// [`Container::delete`] of a stopped container, if that takes no waiting: `false` if it would (its control group is
    /// still busy, or it has poststop hooks, or systemd is to be asked). What was removed until then stays so.
    ///
    /// # Errors
    /// As [`Container::delete`].
    ///
    /// [`Container::delete`]: crate::Container::delete
    pub fn delete_at_once(&self) -> Result<bool> {
        let record = &self.record;
        let waits = self.has_hooks(|hooks| &hooks.poststop)
            || record.systemd_unit.is_some()
            || record.resctrl.is_some()
            || record.namespaces & libc::CLONE_NEWPID == 0;
        if waits {
            return Ok(false);
        }
        let Some(_turn) = self.turn()? else {
            return Ok(false);
        };
        if is_alive(record) {
            return Ok(false);
        }
        if let Some(group) = &record.group
            && !group.remove_at_once()?
        {
            return Ok(false);
        }
        self.directory.remove()?;
        Ok(true)
    }
}
