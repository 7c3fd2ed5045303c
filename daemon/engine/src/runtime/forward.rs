//! Events of shims, as far as they change what we say of a task.

use lighter_proto::any;
use lighter_proto::containerd::events;
use lighter_proto::containerd::types::Envelope;
use lighter_proto::time::from_timestamp;

use super::state::{Exit, Input, Stdio};

/// What an event means for its task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Meaning {
    /// An input of the state.
    Input(Input),
    /// Frozen or thawed: the shim is asked which, since the answer to a request may be older.
    Freezer,
}

/// The container an event is about and what it means; `None` for those that change nothing.
pub(super) fn read(envelope: &Envelope) -> Option<(String, Meaning)> {
    let event = envelope.event.as_ref()?;
    match envelope.topic.as_str() {
        "/tasks/start" => {
            let event: events::TaskStart = any::unpack(event).ok()?;
            Some((
                event.container_id,
                Meaning::Input(Input::Started {
                    exec_id: String::new(),
                    pid: event.pid,
                }),
            ))
        }
        "/tasks/exec-added" => {
            let event: events::TaskExecAdded = any::unpack(event).ok()?;
            Some((
                event.container_id,
                Meaning::Input(Input::ExecAdded {
                    exec_id: event.exec_id,
                    stdio: Stdio::default(),
                }),
            ))
        }
        "/tasks/exec-started" => {
            let event: events::TaskExecStarted = any::unpack(event).ok()?;
            Some((
                event.container_id,
                Meaning::Input(Input::Started {
                    exec_id: event.exec_id,
                    pid: event.pid,
                }),
            ))
        }
        "/tasks/exit" => {
            let event: events::TaskExit = any::unpack(event).ok()?;
            // The first process goes by the container's id, others by their own.
            let exec_id = if event.id == event.container_id {
                String::new()
            } else {
                event.id
            };
            let at = event.exited_at.and_then(from_timestamp);
            let exit = Exit {
                status: event.exit_status,
                at: at.unwrap_or_else(|| Exit::unknown().at),
                lost: false,
            };
            Some((
                event.container_id,
                Meaning::Input(Input::Exited { exec_id, exit }),
            ))
        }
        "/tasks/paused" => {
            let event: events::TaskPaused = any::unpack(event).ok()?;
            Some((event.container_id, Meaning::Freezer))
        }
        "/tasks/resumed" => {
            let event: events::TaskResumed = any::unpack(event).ok()?;
            Some((event.container_id, Meaning::Freezer))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_is_the_first_processes_or_an_execs_by_its_id() {
        let envelope = |id: &str| Envelope {
            topic: "/tasks/exit".to_owned(),
            event: Some(any::pack(&events::TaskExit {
                container_id: "c".to_owned(),
                id: id.to_owned(),
                exit_status: 5,
                ..events::TaskExit::default()
            })),
            ..Envelope::default()
        };
        for (id, want) in [("c", ""), ("e", "e")] {
            let Some((container, Meaning::Input(Input::Exited { exec_id, exit }))) =
                read(&envelope(id))
            else {
                panic!("no exit");
            };
            assert_eq!(
                (container.as_str(), exec_id.as_str(), exit.status),
                ("c", want, 5)
            );
        }
    }

    #[test]
    fn an_event_of_another_type_than_its_topic_changes_nothing() {
        let envelope = Envelope {
            topic: "/tasks/exit".to_owned(),
            event: Some(any::pack(&events::TaskStart::default())),
            ..Envelope::default()
        };
        assert_eq!(read(&envelope), None);
    }
}
