//! A container that exists: its state, and what can be done with it.

use std::fs;
use std::os::fd::OwnedFd;

use rustix::event::PollFlags;
use rustix::process::{Pid, Signal};

use crate::cgroup::{Group, Stats, systemd};
use crate::directory::Directory;
use crate::error::{Context, Error, Result};
use crate::hooks;
use crate::init_process::{end_init, ends_soon, is_alive, signal_from, signal_init, wait_for};
use crate::kept::Kept;
use crate::record::Record;
use crate::runtime::Runtime;
use crate::spec::Resources;
use crate::state::{State, Status};

/// Whom a signal reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KillScope {
    /// The container's first process.
    Init,
    /// Every process of the container's control group.
    All,
}

/// Which containers may be deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deletion {
    /// Stopped ones; one that was never started is killed.
    Stopped,
    /// Any: what runs is killed.
    Forced,
}

/// A container that exists.
#[derive(Debug)]
pub struct Container<'a> {
    pub(crate) runtime: &'a Runtime,
    pub(crate) directory: Directory,
    pub(crate) id: String,
}

/// The container's lock, held.
pub(crate) struct Locked<'a> {
    container: &'a Container<'a>,
    pub(crate) record: Record,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.container.directory.unlock();
    }
}

impl<'a> Container<'a> {
    pub(crate) fn open(runtime: &'a Runtime, directory: Directory, id: &str) -> Result<Self> {
        Ok(Self {
            runtime,
            directory,
            id: id.to_owned(),
        })
    }

    pub(crate) fn lock(&self) -> Result<Locked<'_>> {
        self.directory.lock()?;
        let record = self
            .directory
            .read(&self.id)
            .inspect_err(|_| self.directory.unlock())?;
        Ok(Locked {
            container: self,
            record,
        })
    }

    /// The container's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Keeps its record at hand, for the parent of its first process.
    ///
    /// # Errors
    /// `NotFound` if it was deleted meanwhile.
    pub fn keep(self) -> Result<Kept> {
        let record = self.directory.read(&self.id)?;
        Ok(Kept::new(self.directory, record))
    }

    /// Its state at this moment.
    ///
    /// # Errors
    /// `NotFound` if it was deleted meanwhile.
    pub fn state(&self) -> Result<State> {
        let record = self.directory.read(&self.id)?;
        let status = self.status(&record);
        Ok(State {
            oci_version: record.oci_version,
            id: record.id,
            pid: if status == Status::Stopped {
                0
            } else {
                record.pid
            },
            status,
            bundle: record.bundle,
            rootfs: record.rootfs,
            created: record.created,
            annotations: record.annotations,
            owner: owner_name(record.owner),
        })
    }

    pub(crate) fn status(&self, record: &Record) -> Status {
        if is_alive(record) {
            status_alive(&self.directory, record)
        } else {
            Status::Stopped
        }
    }

    /// The container's control group, for statistics and out-of-memory events. `None` if it has none.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn group(&self) -> Result<Option<Group>> {
        Ok(self.directory.read(&self.id)?.group)
    }

    /// Runs the program. Returns when it has been executed and the poststart hooks are done.
    ///
    /// # Errors
    /// `State` if it is not waiting for its start; `NotRunning` if it died; `Process` with the reason if the program
    /// could not be executed or a hook failed.
    pub fn start(&self) -> Result<()> {
        let locked = self.lock()?;
        let status = self.status(&locked.record);
        let start = tell_start(&self.directory, &locked.record, status)?;
        wait_for(&start, PollFlags::empty(), None)?;
        self.started(&locked.record)
    }

    fn started(&self, record: &Record) -> Result<()> {
        started(&self.directory)?;
        if let Some(hooks) = record
            .hooks
            .as_ref()
            .filter(|hooks| !hooks.poststart.is_empty())
        {
            let state = record.hook_state(Status::Running);
            hooks::run("poststart", &hooks.poststart, &state).inspect_err(|_| {
                signal_init(record, Signal::KILL).ok();
            })?;
        }
        Ok(())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `NotRunning` if there is nobody to get it; `Spec` for a number that is no signal.
    pub fn kill(&self, signal: i32, scope: KillScope) -> Result<()> {
        // Not locked: a signal must reach a container whose start hangs in a hook.
        let record = self.directory.read(&self.id)?;
        let number = signal;
        let signal = signal_from(number)?;
        let shares_pids = record.namespaces & libc::CLONE_NEWPID == 0;
        let all = scope == KillScope::All || (shares_pids && number == libc::SIGKILL);
        if !all {
            if !is_alive(&record) {
                return Err(Error::NotRunning);
            }
            signal_init(&record, signal)?;
            // A frozen process takes SIGKILL on v2; on v1 only when thawed, which stays the caller's decision.
            return Ok(());
        }
        let Some(group) = &record.group else {
            return if is_alive(&record) {
                signal_init(&record, signal)
            } else {
                Err(Error::NotRunning)
            };
        };
        if number == libc::SIGKILL {
            return group.kill_all();
        }
        for pid in group.processes()? {
            if let Some(pid) = Pid::from_raw(pid) {
                rustix::process::kill_process(pid, signal).ok();
            }
        }
        Ok(())
    }

    /// Ids of all its processes, in the caller's pid namespace.
    ///
    /// # Errors
    /// `Io` if the control group cannot be read.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let record = self.directory.read(&self.id)?;
        match &record.group {
            Some(group) => group.processes(),
            None if is_alive(&record) => Ok(vec![record.pid]),
            None => Ok(Vec::new()),
        }
    }

    /// Freezes its processes.
    ///
    /// # Errors
    /// `State` if it does not run; `Unsupported` without a freezer.
    pub fn pause(&self) -> Result<()> {
        let locked = self.lock()?;
        match self.status(&locked.record) {
            Status::Running | Status::Created => locked.group()?.freeze(),
            status => Err(Error::State(format!(
                "container not running or created: {}",
                status.as_str()
            ))),
        }
    }

    /// Thaws its processes.
    ///
    /// # Errors
    /// `State` if it is not paused.
    pub fn resume(&self) -> Result<()> {
        let locked = self.lock()?;
        match self.status(&locked.record) {
            Status::Paused => locked.group()?.thaw(),
            _ => Err(Error::State("container not paused".into())),
        }
    }

    /// Changes its limits.
    ///
    /// # Errors
    /// `State` if it is stopped; `Io` naming the file that refused.
    pub fn update(&self, resources: &Resources) -> Result<()> {
        let locked = self.lock()?;
        if self.status(&locked.record) == Status::Stopped {
            return Err(Error::NotRunning);
        }
        if let Some(unit) = &locked.record.systemd_unit {
            systemd::set_properties(unit, resources)?;
        }
        locked.group()?.update(resources)
    }

    /// Figures of its control group.
    ///
    /// # Errors
    /// `State` if it has none.
    pub fn stats(&self) -> Result<Stats> {
        let record = self.directory.read(&self.id)?;
        record
            .group
            .ok_or_else(|| Error::State("cgroup does not exist".into()))?
            .stats()
    }

    /// Removes everything the runtime made for it, and runs the poststop hooks.
    ///
    /// # Errors
    /// `State` if it runs and deletion is not forced; `Io` if a control group stays, and then the record does as well;
    /// `Process` if a poststop hook failed: the container is gone then, and the failure is only worth a warning.
    pub fn delete(&self, deletion: Deletion) -> Result<()> {
        let locked = match self.lock() {
            // A creation that never got to its record.
            Err(Error::NotFound { .. })
                if deletion == Deletion::Forced && self.directory.path.exists() =>
            {
                return self.directory.remove();
            }
            other => other?,
        };
        let record = &locked.record;
        match (self.status(record), deletion) {
            (Status::Stopped, _) => {}
            (Status::Created | Status::Creating, _) | (_, Deletion::Forced) => end_init(record)?,
            (Status::Running, Deletion::Stopped) if ends_soon(record) => {}
            (status, Deletion::Stopped) => {
                return Err(Error::State(format!(
                    "cannot delete container {} that is not stopped: {}",
                    self.id,
                    status.as_str()
                )));
            }
        }
        destroy(record)?;
        self.directory.remove()?;
        let hooks = record
            .hooks
            .as_ref()
            .map(|hooks| hooks.poststop.as_slice())
            .unwrap_or_default();
        if !hooks.is_empty() {
            // The container is gone whatever they say; spec: a failing poststop hook is a warning.
            let state = record.hook_state(Status::Stopped);
            if let Some(first) = hooks::run_all("poststop", hooks, &state).into_iter().next() {
                return Err(first);
            }
        }
        Ok(())
    }
}

impl Locked<'_> {
    fn group(&self) -> Result<&Group> {
        self.record
            .group
            .as_ref()
            .ok_or_else(|| Error::State("the container has no cgroup".into()))
    }
}

/// Status of a container whose init lives.
pub(crate) fn status_alive(directory: &Directory, record: &Record) -> Status {
    if record.group.as_ref().is_some_and(Group::is_frozen) {
        return Status::Paused;
    }
    if directory.waits_for_start() {
        Status::Created
    } else {
        Status::Running
    }
}

/// Lets init go on. Its end of the returned fifo closes when it executes its program, and when it dies.
pub(crate) fn tell_start(
    directory: &Directory,
    record: &Record,
    status: Status,
) -> Result<OwnedFd> {
    match status {
        Status::Created | Status::Creating => {}
        Status::Stopped => {
            return Err(Error::State(
                "cannot start a container that has stopped".into(),
            ));
        }
        Status::Running => {
            return Err(Error::State(
                "cannot start an already running container".into(),
            ));
        }
        Status::Paused => {
            return Err(Error::State(
                "cannot start a paused container: resume it first".into(),
            ));
        }
    }
    let Some(start) = directory.open_start()? else {
        return Err(Error::NotRunning);
    };
    rustix::io::write(&start, &record.pid.to_ne_bytes()).context(|| "start the container")?;
    directory.remove_start();
    Ok(start)
}

/// Why a start failed, if it did.
pub(crate) fn started(directory: &Directory) -> Result<()> {
    match directory.failure() {
        Some(text) => Err(Error::Process(text)),
        None => Ok(()),
    }
}

fn destroy(record: &Record) -> Result<()> {
    if let Some(group) = &record.group {
        // Without a pid namespace of its own, init's end leaves the others alive; with one they are dying already,
        // unless frozen. Processes that joined from outside (exec into a shared pid namespace) die here as well.
        let shares_pids = record.namespaces & libc::CLONE_NEWPID == 0;
        if shares_pids || group.is_frozen() || group.processes().is_ok_and(|left| !left.is_empty())
        {
            group.kill_all()?;
        }
        group.remove()?;
    }
    if let Some(unit) = &record.systemd_unit {
        systemd::stop(unit)?;
    }
    if let Some(resctrl) = &record.resctrl {
        match fs::remove_dir(resctrl) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context(|| format!("remove {}", resctrl.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// A user's name by /etc/passwd, or the number.
fn owner_name(uid: u32) -> String {
    if uid == 0 {
        return "root".into();
    }
    let table = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let named = table.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    });
    named.unwrap_or_else(|| format!("#{uid}"))
}
