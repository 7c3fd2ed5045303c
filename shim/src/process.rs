//! The state machine of one container: its init process and its execs. Pure: no I/O, no clock.
//!
//! It decides which calls a state allows, and the order of events that clients rely on:
//!
//! ```text
//! init:  Created ──Start──▶ Starting ──Started──▶ Running ⇄ Pausing/Paused
//!           │                  │ StartFailed ▶ Created       │
//!           └──────exit────────┴────────(held)───────────────┴──▶ Stopped ──Delete──▶ gone
//! exec:  Created ──Start──▶ Starting ──Started──▶ Running ──exit──▶ Stopped ──Delete──▶ gone
//!                              └─StartFailed ▶ Failed ──Delete───────────────────────────▲
//! ```
//!
//! * An exec whose start failed never ran: it still counts as created, as with containerd's shims, but
//!   who waits for it is answered.
//! * An exit that arrives while its start is under way is held until the start is announced.
//! * The exit of init is held until every exec that runs or starts has ended; from the moment init
//!   is known to be gone nothing more starts in the container.
//! * A process is `Stopped`, with its status readable, before its exit is announced.

use std::collections::BTreeMap;
use std::time::SystemTime;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Exit code, or 128 + signal.
    pub(crate) status: u32,
    /// When it was reaped.
    pub(crate) at: SystemTime,
}

/// Exit status of a process whose real one is unknown.
pub(crate) const UNKNOWN_STATUS: u32 = 255;

/// Which process of a container: `None` is init, else an exec id.
pub(crate) type Who = Option<String>;

/// Where one process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Made, not running.
    Created,
    /// A start is under way.
    Starting,
    /// Running (or paused, see [`Container::freeze`]).
    Running,
    /// Ended; the exit is readable and announced.
    Stopped,
    /// An exec that could not be started; `exit` is for those who wait.
    Failed,
}

/// Whether the container's processes are frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Freeze {
    /// They run.
    No,
    /// Being frozen.
    Pausing,
    /// Frozen.
    Paused,
}

/// What a client sees as status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// Not started.
    Created,
    /// Running.
    Running,
    /// Being paused.
    Pausing,
    /// Paused.
    Paused,
    /// Ended.
    Stopped,
}

/// One process.
#[derive(Debug, Clone)]
pub(crate) struct Process {
    /// Where it is in its life.
    pub(crate) phase: Phase,
    /// Pid on the host; 0 before there is one.
    pub(crate) pid: u32,
    /// How it ended, once `Stopped` or `Failed`.
    pub(crate) exit: Option<Exit>,
    /// An exit seen but not announced yet.
    held: Option<Exit>,
}

impl Process {
    fn new(pid: u32) -> Self {
        Self {
            phase: Phase::Created,
            pid,
            exit: None,
            held: None,
        }
    }
}

/// What happened, or is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Input {
    /// An exec is registered.
    ExecAdd(String),
    /// A start is asked for.
    Start(Who),
    /// The start succeeded, with this pid.
    Started(Who, u32),
    /// The start failed.
    StartFailed(Who, SystemTime),
    /// The process was reaped.
    Exited(Who, Exit),
    /// A pause is asked for.
    Pause,
    /// The pause ended, well or not.
    PauseDone {
        /// Whether the container is frozen now.
        frozen: bool,
    },
    /// A resume is asked for.
    Resume,
    /// The resume ended.
    ResumeDone {
        /// Whether the container runs now.
        thawed: bool,
    },
    /// A delete is asked for; on success the process is forgotten (init stays until the owner
    /// drops the container).
    Delete(Who),
}

/// What the owner must do, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Announce that an exec was registered.
    ExecAdded(String),
    /// Announce a start.
    Started(Who, u32),
    /// Announce an exit; the state shows it already.
    Exited(Who, u32, Exit),
    /// Init is gone: kill what still shares its namespaces, and thaw the cgroup if `thaw`.
    InitGone {
        /// Whether the cgroup is frozen.
        thaw: bool,
    },
    /// Announce a pause.
    Paused,
    /// Announce a resume.
    Resumed,
}

/// Why an input is not allowed now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// No exec of this id.
    NoExec(String),
    /// An exec of this id exists.
    ExecExists(String),
    /// The state forbids it; the text says so.
    State(String),
    /// The process ended.
    Finished,
}

fn refuse<T>(text: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::State(text.into()))
}

/// One container: init and execs.
#[derive(Debug, Clone)]
pub(crate) struct Container {
    id: String,
    init: Process,
    execs: BTreeMap<String, Process>,
    freeze: Freeze,
}

impl Container {
    /// A container whose init was created with `pid` (0 for a checkpoint not restored yet).
    pub(crate) fn created(id: impl Into<String>, pid: u32) -> Self {
        Self {
            id: id.into(),
            init: Process::new(pid),
            execs: BTreeMap::new(),
            freeze: Freeze::No,
        }
    }

    /// The process, if it is known.
    pub(crate) fn process(&self, who: Option<&str>) -> Option<&Process> {
        match who {
            None => Some(&self.init),
            Some(id) => self.execs.get(id),
        }
    }

    /// Execs, by id.
    pub(crate) fn execs(&self) -> impl Iterator<Item = (&str, &Process)> {
        self.execs
            .iter()
            .map(|(id, process)| (id.as_str(), process))
    }

    /// What a client sees.
    pub(crate) fn status(&self, who: Option<&str>) -> Option<Status> {
        let process = self.process(who)?;
        Some(match (process.phase, self.freeze) {
            (Phase::Created | Phase::Starting | Phase::Failed, _) => Status::Created,
            (Phase::Stopped, _) => Status::Stopped,
            (Phase::Running, Freeze::No) => Status::Running,
            (Phase::Running, Freeze::Pausing) => Status::Pausing,
            (Phase::Running, Freeze::Paused) => Status::Paused,
        })
    }

    /// Whether init was reaped, announced or not.
    pub(crate) fn init_gone(&self) -> bool {
        self.init.held.is_some() || self.init.phase == Phase::Stopped
    }

    /// Whether a process was reaped, announced or not.
    pub(crate) fn gone(&self, who: Option<&str>) -> bool {
        self.process(who)
            .is_some_and(|p| p.held.is_some() || p.phase == Phase::Stopped)
    }

    /// Feeds one input. On a refusal nothing changed.
    pub(crate) fn apply(&mut self, input: Input) -> Result<Vec<Effect>, Refusal> {
        match input {
            Input::ExecAdd(id) => self.exec_add(id),
            Input::Start(None) => self.start_init(),
            Input::Start(Some(id)) => self.start_exec(&id),
            Input::Started(who, pid) => {
                let process = self.known(&who)?;
                if process.phase != Phase::Starting {
                    return refuse("no start is under way");
                }
                process.phase = Phase::Running;
                process.pid = pid;
                let mut effects = vec![Effect::Started(who, pid)];
                self.settle(&mut effects);
                Ok(effects)
            }
            Input::StartFailed(who, at) => {
                let is_init = who.is_none();
                let process = self.known(&who)?;
                if process.phase != Phase::Starting {
                    return refuse("no start is under way");
                }
                if is_init {
                    process.phase = Phase::Created;
                } else {
                    // It never ran: nothing is announced.
                    process.phase = Phase::Failed;
                    process.exit = Some(process.held.take().unwrap_or(Exit {
                        status: UNKNOWN_STATUS,
                        at,
                    }));
                }
                let mut effects = Vec::new();
                self.settle(&mut effects);
                Ok(effects)
            }
            Input::Exited(who, exit) => self.exited(&who, exit),
            Input::Pause => self.pause(),
            Input::PauseDone { frozen } => {
                if self.freeze != Freeze::Pausing {
                    return Ok(Vec::new());
                }
                self.freeze = if frozen { Freeze::Paused } else { Freeze::No };
                Ok(if frozen {
                    vec![Effect::Paused]
                } else {
                    Vec::new()
                })
            }
            Input::Resume => self.resume(),
            Input::ResumeDone { thawed } => {
                if !thawed || self.freeze == Freeze::No {
                    return Ok(Vec::new());
                }
                self.freeze = Freeze::No;
                Ok(vec![Effect::Resumed])
            }
            Input::Delete(who) => self.delete(&who),
        }
    }

    fn known(&mut self, who: &Who) -> Result<&mut Process, Refusal> {
        match who {
            None => Ok(&mut self.init),
            Some(id) => self
                .execs
                .get_mut(id)
                .ok_or_else(|| Refusal::NoExec(id.clone())),
        }
    }

    fn exec_add(&mut self, id: String) -> Result<Vec<Effect>, Refusal> {
        // Until its exit is announced init counts as running; a start is refused then.
        if self.init.phase == Phase::Stopped {
            return refuse("cannot exec in a stopped state");
        }
        if self.freeze != Freeze::No {
            return refuse("cannot exec in a paused state");
        }
        if self.execs.contains_key(&id) {
            return Err(Refusal::ExecExists(id));
        }
        self.execs.insert(id.clone(), Process::new(0));
        Ok(vec![Effect::ExecAdded(id)])
    }

    fn start_init(&mut self) -> Result<Vec<Effect>, Refusal> {
        if self.init_gone() {
            return refuse("cannot start a stopped process");
        }
        match (self.init.phase, self.freeze) {
            (Phase::Created, _) => self.init.phase = Phase::Starting,
            (_, Freeze::Paused) => return refuse("cannot start a paused process"),
            _ => return refuse("cannot start a running process"),
        }
        Ok(Vec::new())
    }

    fn start_exec(&mut self, id: &str) -> Result<Vec<Effect>, Refusal> {
        let init_runs = self.init.phase == Phase::Running && !self.init_gone();
        let freeze = self.freeze;
        let container = self.id.clone();
        let process = self
            .execs
            .get_mut(id)
            .ok_or_else(|| Refusal::NoExec(id.to_owned()))?;
        match process.phase {
            Phase::Created => {}
            Phase::Starting | Phase::Running => return refuse("cannot start a running process"),
            Phase::Stopped | Phase::Failed => return refuse("cannot start a stopped process"),
        }
        if !init_runs {
            return refuse(format!("container {container} init process is not running"));
        }
        if freeze != Freeze::No {
            return refuse("cannot exec in a paused state");
        }
        process.phase = Phase::Starting;
        Ok(Vec::new())
    }

    fn exited(&mut self, who: &Who, exit: Exit) -> Result<Vec<Effect>, Refusal> {
        let is_init = who.is_none();
        let frozen = self.freeze != Freeze::No;
        let process = self.known(who)?;
        if process.held.is_some() || matches!(process.phase, Phase::Stopped | Phase::Failed) {
            return Err(Refusal::Finished);
        }
        process.held = Some(exit);
        let mut effects = Vec::new();
        if is_init {
            self.freeze = Freeze::No;
            effects.push(Effect::InitGone { thaw: frozen });
        }
        self.settle(&mut effects);
        Ok(effects)
    }

    /// Announces every held exit whose turn has come: execs first, init when no exec is left.
    fn settle(&mut self, effects: &mut Vec<Effect>) {
        for (id, process) in &mut self.execs {
            if process.phase == Phase::Running
                && let Some(exit) = process.held.take()
            {
                process.phase = Phase::Stopped;
                process.exit = Some(exit);
                effects.push(Effect::Exited(Some(id.clone()), process.pid, exit));
            }
        }
        let busy = self
            .execs
            .values()
            .any(|exec| matches!(exec.phase, Phase::Starting | Phase::Running));
        if !busy
            && self.init.phase != Phase::Starting
            && let Some(exit) = self.init.held.take()
        {
            self.init.phase = Phase::Stopped;
            self.init.exit = Some(exit);
            effects.push(Effect::Exited(None, self.init.pid, exit));
        }
    }

    fn pause(&mut self) -> Result<Vec<Effect>, Refusal> {
        if self.init_gone() {
            return refuse("cannot pause a stopped container");
        }
        match (self.init.phase, self.freeze) {
            (Phase::Running, Freeze::No) => {
                self.freeze = Freeze::Pausing;
                Ok(Vec::new())
            }
            (Phase::Running, _) => refuse("cannot pause a paused container"),
            _ => refuse("cannot pause task in created state"),
        }
    }

    fn resume(&mut self) -> Result<Vec<Effect>, Refusal> {
        if self.init_gone() {
            return refuse("cannot resume a stopped container");
        }
        match (self.init.phase, self.freeze) {
            (Phase::Running, Freeze::Paused) => Ok(Vec::new()),
            (Phase::Running, _) => refuse("cannot resume a running process"),
            _ => refuse("cannot resume task in created state"),
        }
    }

    fn delete(&mut self, who: &Who) -> Result<Vec<Effect>, Refusal> {
        let freeze = self.freeze;
        let process = self.known(who)?;
        match process.phase {
            Phase::Created | Phase::Stopped | Phase::Failed => {}
            Phase::Starting => return refuse("cannot delete a running process"),
            Phase::Running if freeze == Freeze::Paused => {
                return refuse("cannot delete a paused process");
            }
            Phase::Running => return refuse("cannot delete a running process"),
        }
        if let Some(id) = who {
            self.execs.remove(id);
        }
        Ok(Vec::new())
    }
}

#[cfg(test)]
#[path = "process/tests.rs"]
mod tests;
