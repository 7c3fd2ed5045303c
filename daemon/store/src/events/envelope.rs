//! What filters see of an envelope: namespace, topic, and the text fields of its event.
//!
//! An event is looked into on the wire, by a table of field numbers, so that an unknown event costs
//! nothing and a known one is not decoded for fields that nobody asks for.

use std::borrow::Cow;

use lighter_proto::containerd::types::Envelope;

use crate::filter::Fields;

impl Fields for ByFilter<'_> {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path.split_first()? {
            (first, []) if first == "namespace" => present(&self.0.namespace),
            (first, []) if first == "topic" => present(&self.0.topic),
            (first, rest) if first == "event" => {
                let event = self.0.event.as_ref()?;
                let name = event.type_url.rsplit('/').next()?;
                let (_, fields) = EVENTS.iter().find(|(known, _)| *known == name)?;
                look(&event.value, fields, rest).map(Cow::Owned)
            }
            _ => None,
        }
    }
}

/// An envelope as filters see it.
pub(super) struct ByFilter<'a>(pub(super) &'a Envelope);

fn present(text: &str) -> Option<Cow<'_, str>> {
    (!text.is_empty()).then_some(Cow::Borrowed(text))
}

/// A field that filters know: name, number, form.
type Field = (&'static str, u64, Form);

#[derive(Clone, Copy)]
enum Form {
    Text,
    Flag,
    Map,
    Message(&'static [Field]),
}

use Form::{Flag, Map, Message, Text};

const ID: &[Field] = &[("id", 1, Text)];
const NAME: &[Field] = &[("name", 1, Text)];
const NAME_LABELS: &[Field] = &[("name", 1, Text), ("labels", 2, Map)];
const CONTAINER_ID: &[Field] = &[("container_id", 1, Text)];
const EXEC: &[Field] = &[("container_id", 1, Text), ("exec_id", 2, Text)];
const RUNTIME: &[Field] = &[("name", 1, Text)];
const IO: &[Field] = &[
    ("stdin", 1, Text),
    ("stdout", 2, Text),
    ("stderr", 3, Text),
    ("terminal", 4, Flag),
];

/// Fields of every event that has any; sandbox events have none.
const EVENTS: &[(&str, &[Field])] = &[
    ("containerd.events.NamespaceCreate", NAME_LABELS),
    ("containerd.events.NamespaceUpdate", NAME_LABELS),
    ("containerd.events.NamespaceDelete", NAME),
    (
        "containerd.events.ContainerCreate",
        &[
            ("id", 1, Text),
            ("image", 2, Text),
            ("runtime", 3, Message(RUNTIME)),
        ],
    ),
    (
        "containerd.events.ContainerUpdate",
        &[
            ("id", 1, Text),
            ("image", 2, Text),
            ("labels", 3, Map),
            ("snapshot_key", 4, Text),
        ],
    ),
    ("containerd.events.ContainerDelete", ID),
    ("containerd.services.images.v1.ImageCreate", NAME_LABELS),
    ("containerd.services.images.v1.ImageUpdate", NAME_LABELS),
    ("containerd.services.images.v1.ImageDelete", NAME),
    ("containerd.events.ContentCreate", &[("digest", 1, Text)]),
    ("containerd.events.ContentDelete", &[("digest", 1, Text)]),
    (
        "containerd.events.SnapshotPrepare",
        &[
            ("key", 1, Text),
            ("parent", 2, Text),
            ("snapshotter", 5, Text),
        ],
    ),
    (
        "containerd.events.SnapshotCommit",
        &[
            ("key", 1, Text),
            ("name", 2, Text),
            ("snapshotter", 5, Text),
        ],
    ),
    (
        "containerd.events.SnapshotRemove",
        &[("key", 1, Text), ("snapshotter", 5, Text)],
    ),
    (
        "containerd.events.TaskCreate",
        &[
            ("container_id", 1, Text),
            ("bundle", 2, Text),
            ("io", 4, Message(IO)),
            ("checkpoint", 5, Text),
        ],
    ),
    ("containerd.events.TaskStart", CONTAINER_ID),
    (
        "containerd.events.TaskDelete",
        &[("container_id", 1, Text), ("id", 5, Text)],
    ),
    (
        "containerd.events.TaskExit",
        &[("container_id", 1, Text), ("id", 2, Text)],
    ),
    ("containerd.events.TaskOOM", CONTAINER_ID),
    ("containerd.events.TaskExecAdded", EXEC),
    ("containerd.events.TaskExecStarted", EXEC),
    ("containerd.events.TaskPaused", CONTAINER_ID),
    ("containerd.events.TaskResumed", CONTAINER_ID),
    (
        "containerd.events.TaskCheckpointed",
        &[("container_id", 1, Text), ("checkpoint", 2, Text)],
    ),
];

/// The value at `path` in message `bytes`.
fn look(bytes: &[u8], fields: &[Field], path: &[String]) -> Option<String> {
    let (first, rest) = path.split_first()?;
    let (_, number, form) = fields.iter().find(|(name, ..)| name == first)?;
    match form {
        Text if rest.is_empty() => {
            let value = last(bytes, *number)?;
            let text = String::from_utf8_lossy(value.bytes()?);
            (!text.is_empty()).then(|| text.into_owned())
        }
        // A flag is always there.
        Flag if rest.is_empty() => {
            let set = matches!(last(bytes, *number), Some(Wire::Number(n)) if n != 0);
            Some(set.to_string())
        }
        Map => {
            let key = rest.join(".");
            let mut found = None;
            for (at, value) in WireFields(bytes) {
                let Some(pair) = value.bytes().filter(|_| at == *number) else {
                    continue;
                };
                let text = |n| Some(String::from_utf8_lossy(last(pair, n)?.bytes()?).into_owned());
                if text(1).unwrap_or_default() == key {
                    found = text(2);
                }
            }
            found
        }
        Message(inner) => look(last(bytes, *number)?.bytes()?, inner, rest),
        Text | Flag => None,
    }
}

#[derive(Clone, Copy)]
enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Fixed,
}

impl<'a> Wire<'a> {
    fn bytes(self) -> Option<&'a [u8]> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            Self::Number(_) | Self::Fixed => None,
        }
    }
}

/// The last occurrence of a field counts.
fn last(bytes: &[u8], number: u64) -> Option<Wire<'_>> {
    WireFields(bytes)
        .filter(|(at, _)| *at == number)
        .map(|(_, value)| value)
        .last()
}

/// The fields of a message; ends at the first that is malformed.
struct WireFields<'a>(&'a [u8]);

impl<'a> Iterator for WireFields<'a> {
    type Item = (u64, Wire<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Wire::Number(self.varint()?),
            1 => self.take(8).map(|_| Wire::Fixed)?,
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Wire::Bytes(self.take(length)?)
            }
            5 => self.take(4).map(|_| Wire::Fixed)?,
            _ => return None,
        };
        Some((tag >> 3, value))
    }
}

impl<'a> WireFields<'a> {
    fn varint(&mut self) -> Option<u64> {
        prost::encoding::decode_varint(&mut self.0).ok()
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use lighter_proto::any;
    use lighter_proto::containerd::events::{
        ContainerCreate, NamespaceCreate, TaskCreate, TaskExit, TaskIo, container_create,
    };
    use prost_types::Any;

    use super::*;
    use crate::filter::Filter;

    fn matches(event: Any, filter: &str) -> bool {
        let envelope = Envelope {
            timestamp: None,
            namespace: "n".to_owned(),
            topic: "/t".to_owned(),
            event: Some(event),
        };
        Filter::parse(&[filter])
            .expect(filter)
            .matches(&ByFilter(&envelope))
    }

    #[test]
    fn filters_see_text_fields_of_events() {
        let exit = any::pack(&TaskExit {
            container_id: "c".to_owned(),
            id: "e".to_owned(),
            pid: 7,
            ..Default::default()
        });
        assert!(matches(
            exit.clone(),
            "event.container_id==c,event.id==e,topic==\"/t\""
        ));
        assert!(!matches(exit, "event.pid"));
        let create = any::pack(&TaskCreate {
            io: Some(TaskIo {
                stdout: "x".to_owned(),
                terminal: true,
                ..Default::default()
            }),
            ..Default::default()
        });
        assert!(matches(
            create.clone(),
            "event.io.stdout==x,event.io.terminal==true"
        ));
        assert!(!matches(create, "event.io"));
        let namespace = any::pack(&NamespaceCreate {
            name: "n".to_owned(),
            labels: [("a.b".to_owned(), "v".to_owned())].into(),
        });
        assert!(matches(namespace, "event.labels.a.b==v"));
        let container = any::pack(&ContainerCreate {
            runtime: Some(container_create::Runtime {
                name: "r".to_owned(),
                options: None,
            }),
            ..Default::default()
        });
        assert!(matches(container, "event.runtime.name==r"));
    }

    #[test]
    fn malformed_events_have_no_fields() {
        for value in [&[0xff][..], &[10, 200, 1], &[8], &[15], &[10, 1, 0xff]] {
            let event = Any {
                type_url: "containerd.events.TaskExit".to_owned(),
                value: value.to_vec(),
            };
            assert!(!matches(event, "event.id==x"));
        }
    }
}
