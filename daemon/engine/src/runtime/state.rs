//! The state of a task, and how each input changes it: pure, no I/O.
//!
//! Inputs reach the daemon on different ways (answers, events, a wait that returns) and in any
//! order, so every transition is monotonic: what stopped stays stopped, and an exit is taken once.

use std::collections::BTreeMap;
use std::time::SystemTime;

use lighter_proto::containerd::v1::types::Status as WireStatus;
use lighter_proto::time::from_timestamp;
use prost_types::Timestamp;

/// Exit status of a process of which nobody knows how it ended.
const UNKNOWN_EXIT: u32 = 255;

/// What a process is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Made, not started.
    Created,
    /// Runs.
    Running,
    /// Being frozen.
    Pausing,
    /// Frozen.
    Paused,
    /// Ended.
    Stopped,
}

impl Status {
    /// The wire's number of it.
    #[must_use]
    pub fn wire(self) -> WireStatus {
        match self {
            Self::Created => WireStatus::Created,
            Self::Running => WireStatus::Running,
            Self::Pausing => WireStatus::Pausing,
            Self::Paused => WireStatus::Paused,
            Self::Stopped => WireStatus::Stopped,
        }
    }

    /// The status behind the wire's number; `None` for unknown ones.
    #[must_use]
    pub fn from_wire(status: i32) -> Option<Self> {
        match WireStatus::try_from(status).ok()? {
            WireStatus::Unknown => None,
            WireStatus::Created => Some(Self::Created),
            WireStatus::Running => Some(Self::Running),
            WireStatus::Stopped => Some(Self::Stopped),
            WireStatus::Paused => Some(Self::Paused),
            WireStatus::Pausing => Some(Self::Pausing),
        }
    }
}

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Its code, or 128 and the signal.
    pub status: u32,
    /// When.
    pub at: SystemTime,
    /// Whether nobody saw it: a process may as well have exited with the code that stands for that.
    pub lost: bool,
}

impl Exit {
    /// Ended nobody knows how, now.
    #[must_use]
    pub fn unknown() -> Self {
        Self {
            status: UNKNOWN_EXIT,
            at: SystemTime::now(),
            lost: true,
        }
    }

    /// As a shim tells it; now, where it gives no time.
    #[must_use]
    pub(super) fn from_wire(status: u32, at: Option<Timestamp>) -> Self {
        Self {
            status,
            at: at.and_then(from_timestamp).unwrap_or_else(SystemTime::now),
            lost: false,
        }
    }
}

/// Where a process reads and writes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// URI or path; empty for none.
    pub stdin: String,
    /// URI or path; empty for none.
    pub stdout: String,
    /// URI or path; empty for none.
    pub stderr: String,
    /// Whether a terminal is in between.
    pub terminal: bool,
}

/// One process of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Pid on the host; 0 before it is started.
    pub pid: u32,
    /// What it is doing.
    pub status: Status,
    /// Where it reads and writes.
    pub stdio: Stdio,
    /// How it ended.
    pub exit: Option<Exit>,
    /// What those are told who wait for an exec that could not be started: it never ran, and
    /// counts as created.
    pub failed: Option<Exit>,
    /// Whether subscribers were told of the end.
    pub announced: bool,
}

impl Process {
    /// A process that was made and not started.
    #[must_use]
    pub fn created(pid: u32, stdio: Stdio) -> Self {
        Self {
            pid,
            status: Status::Created,
            stdio,
            exit: None,
            failed: None,
            announced: false,
        }
    }

    fn started(&mut self, pid: u32) {
        if pid != 0 {
            self.pid = pid;
        }
        if self.status == Status::Created {
            self.status = Status::Running;
            // A start that was refused for a moment, of a paused task, leaves nothing behind.
            self.failed = None;
        }
    }

    fn ended(&mut self, exit: Exit) {
        if self.exit.is_none() {
            self.exit = Some(exit);
            self.status = Status::Stopped;
        }
    }
}

/// A task: its first process and the others in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskState {
    /// First process.
    pub init: Process,
    /// Other processes by exec id.
    pub execs: BTreeMap<String, Process>,
    /// Set when the task is no more; waiters take what is known.
    pub gone: bool,
}

/// What changes a task. An empty `exec_id` is the first process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Input {
    /// A process runs.
    Started { exec_id: String, pid: u32 },
    /// A process ended.
    Exited { exec_id: String, exit: Exit },
    /// An exec could not be started.
    Failed { exec_id: String, exit: Exit },
    /// An exec was made.
    ExecAdded { exec_id: String, stdio: Stdio },
    /// An exec was deleted.
    ExecDeleted { exec_id: String },
    /// The shim was asked, and says this of the first process.
    Seen { status: Status },
    /// The task is no more; whatever still ran ended like this.
    Gone { exit: Exit },
}

impl TaskState {
    /// A task whose first process was made.
    #[must_use]
    pub fn created(pid: u32, stdio: Stdio) -> Self {
        Self {
            init: Process::created(pid, stdio),
            execs: BTreeMap::new(),
            gone: false,
        }
    }

    /// The process; an empty `exec_id` is the first one. An exec of a paused task is paused.
    #[must_use]
    pub fn process(&self, exec_id: &str) -> Option<Process> {
        if exec_id.is_empty() {
            return Some(self.init.clone());
        }
        let mut process = self.execs.get(exec_id)?.clone();
        let frozen = matches!(self.init.status, Status::Paused | Status::Pausing);
        if frozen && process.status == Status::Running {
            process.status = self.init.status;
        }
        Some(process)
    }

    /// What who waits for the process is told, once there is something to tell.
    #[must_use]
    pub fn exit(&self, exec_id: &str) -> Option<Exit> {
        self.raw(exec_id).and_then(|p| p.exit.or(p.failed))
    }

    fn raw(&self, exec_id: &str) -> Option<&Process> {
        if exec_id.is_empty() {
            Some(&self.init)
        } else {
            self.execs.get(exec_id)
        }
    }

    fn raw_mut(&mut self, exec_id: &str) -> Option<&mut Process> {
        if exec_id.is_empty() {
            Some(&mut self.init)
        } else {
            self.execs.get_mut(exec_id)
        }
    }

    /// Takes an input; whether anything changed.
    pub(super) fn apply(&mut self, input: Input) -> bool {
        let before = self.clone();
        match input {
            Input::Started { exec_id, pid } => {
                if let Some(process) = self.raw_mut(&exec_id) {
                    process.started(pid);
                }
            }
            Input::Exited { exec_id, exit } => {
                if let Some(process) = self.raw_mut(&exec_id) {
                    process.ended(exit);
                }
            }
            Input::Failed { exec_id, exit } => {
                if let Some(process) = self.execs.get_mut(&exec_id)
                    && process.status == Status::Created
                {
                    process.failed.get_or_insert(exit);
                }
            }
            Input::ExecAdded { exec_id, stdio } => {
                // The answer and the event both say so; the one that knows the stdio wins.
                let process = self
                    .execs
                    .entry(exec_id)
                    .or_insert_with(|| Process::created(0, Stdio::default()));
                if stdio != Stdio::default() {
                    process.stdio = stdio;
                }
            }
            Input::ExecDeleted { exec_id } => {
                self.execs.remove(&exec_id);
            }
            Input::Seen { status } => {
                if self.init.exit.is_none() && status != Status::Stopped {
                    self.init.status = status;
                }
            }
            Input::Gone { exit } => {
                for process in self.execs.values_mut() {
                    process.ended(exit);
                }
                self.init.ended(exit);
                self.gone = true;
            }
        }
        *self != before
    }

    /// Whether the exit of this process has yet to be told to subscribers; marks it as told.
    pub(super) fn announce(&mut self, exec_id: &str) -> bool {
        match self.raw_mut(exec_id) {
            Some(process) => !std::mem::replace(&mut process.announced, true),
            // A process nobody knows here: its event goes through as it is.
            None => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn exit(status: u32) -> Exit {
        Exit {
            status,
            at: SystemTime::UNIX_EPOCH,
            lost: false,
        }
    }

    #[test]
    fn an_exit_that_overtakes_the_start_stays() {
        let mut task = TaskState::created(7, Stdio::default());
        task.apply(Input::Exited {
            exec_id: String::new(),
            exit: exit(3),
        });
        task.apply(Input::Started {
            exec_id: String::new(),
            pid: 7,
        });
        assert_eq!(task.init.status, Status::Stopped);
        assert_eq!(task.exit(""), Some(exit(3)));
    }

    #[test]
    fn the_exit_of_an_exec_leaves_the_task_running() {
        let mut task = TaskState::created(7, Stdio::default());
        task.apply(Input::Started {
            exec_id: String::new(),
            pid: 7,
        });
        task.apply(Input::ExecAdded {
            exec_id: "e".to_owned(),
            stdio: Stdio::default(),
        });
        task.apply(Input::Exited {
            exec_id: "e".to_owned(),
            exit: exit(1),
        });
        assert_eq!(task.init.status, Status::Running);
        assert_eq!(task.process("e").unwrap().status, Status::Stopped);
    }

    #[test]
    fn an_exec_that_could_not_be_started_stays_created_and_answers_who_waits() {
        let mut task = TaskState::created(7, Stdio::default());
        task.apply(Input::ExecAdded {
            exec_id: "e".to_owned(),
            stdio: Stdio::default(),
        });
        task.apply(Input::Failed {
            exec_id: "e".to_owned(),
            exit: exit(255),
        });
        let process = task.process("e").unwrap();
        assert_eq!((process.status, process.exit), (Status::Created, None));
        assert_eq!(task.exit("e"), Some(exit(255)));
        assert_eq!(task.exit(""), None);
    }

    #[test]
    fn an_exec_of_a_paused_task_is_paused_and_runs_again_with_it() {
        let mut task = TaskState::created(7, Stdio::default());
        for exec_id in ["", "e"] {
            task.apply(Input::ExecAdded {
                exec_id: "e".to_owned(),
                stdio: Stdio::default(),
            });
            task.apply(Input::Started {
                exec_id: exec_id.to_owned(),
                pid: 8,
            });
        }
        task.apply(Input::Seen {
            status: Status::Paused,
        });
        assert_eq!(task.process("e").unwrap().status, Status::Paused);
        task.apply(Input::Seen {
            status: Status::Running,
        });
        assert_eq!(task.process("e").unwrap().status, Status::Running);
    }

    #[test]
    fn an_exit_is_announced_once() {
        let mut task = TaskState::created(7, Stdio::default());
        assert!(task.announce(""));
        assert!(!task.announce(""));
    }

    fn inputs() -> impl Strategy<Value = Input> {
        let id = prop_oneof![
            Just(String::new()),
            Just("e".to_owned()),
            Just("f".to_owned())
        ];
        let status = prop_oneof![
            Just(Status::Created),
            Just(Status::Running),
            Just(Status::Paused),
            Just(Status::Pausing),
            Just(Status::Stopped)
        ];
        prop_oneof![
            (id.clone(), 0..9u32).prop_map(|(exec_id, pid)| Input::Started { exec_id, pid }),
            (id.clone(), 0..9u32).prop_map(|(exec_id, n)| Input::Exited {
                exec_id,
                exit: exit(n)
            }),
            (id.clone(), 0..9u32).prop_map(|(exec_id, n)| Input::Failed {
                exec_id,
                exit: exit(n)
            }),
            prop_oneof![Just("e".to_owned()), Just("f".to_owned())].prop_map(|exec_id| {
                Input::ExecAdded {
                    exec_id,
                    stdio: Stdio::default(),
                }
            }),
            id.prop_map(|exec_id| Input::ExecDeleted { exec_id }),
            status.prop_map(|status| Input::Seen { status }),
            (0..9u32).prop_map(|n| Input::Gone { exit: exit(n) }),
        ]
    }

    proptest! {
        #[test]
        fn no_sequence_revives_what_stopped_or_stops_without_an_exit(
            sequence in proptest::collection::vec(inputs(), 0..40)
        ) {
            let mut task = TaskState::created(7, Stdio::default());
            let mut ended: Option<Exit> = None;
            for input in sequence {
                task.apply(input);
                if let Some(exit) = ended {
                    prop_assert_eq!(task.init.exit, Some(exit));
                }
                ended = task.init.exit;
                for process in task.execs.values().chain([&task.init]) {
                    prop_assert_eq!(process.status == Status::Stopped, process.exit.is_some());
                }
            }
        }
    }
}
