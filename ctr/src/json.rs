//! Protobuf payloads as JSON, by the descriptors of the whole API.

use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MapKey, ReflectMessage, Value as Field,
};
use prost_types::{Any, Timestamp};
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Messages nested deeper than this are cut: they come from whoever published an event.
const MAX_DEPTH: usize = 32;

/// Turns `Any` values into JSON: JSON payloads as they are, known messages field by field.
#[derive(Debug, Clone)]
pub(crate) struct Decoder {
    pool: DescriptorPool,
}

impl Decoder {
    /// A decoder of everything in `lighter-proto`.
    pub(crate) fn new() -> Self {
        let pool = DescriptorPool::decode(lighter_proto::FILE_DESCRIPTOR_SET)
            .expect("the built-in descriptor set is valid");
        Self { pool }
    }

    /// The payload as JSON; an unknown type keeps its URL and its bytes in hex.
    pub(crate) fn decode(&self, value: &Any) -> Value {
        self.payload(&value.type_url, &value.value, 0)
    }

    /// A message of the type `name` as JSON.
    pub(crate) fn typed(&self, name: &str, bytes: &[u8]) -> Value {
        self.payload(name, bytes, 0)
    }

    fn payload(&self, type_url: &str, bytes: &[u8], depth: usize) -> Value {
        let name = type_url.rsplit('/').next().unwrap_or_default();
        let known = self
            .pool
            .get_message_by_name(name)
            .and_then(|descriptor| DynamicMessage::decode(descriptor, bytes).ok())
            .map(|message| self.message(&message, depth));
        known
            .or_else(|| serde_json::from_slice(bytes).ok())
            .unwrap_or_else(|| json!({ "type_url": type_url, "hex": hex::encode(bytes) }))
    }

    fn message(&self, message: &DynamicMessage, depth: usize) -> Value {
        if depth > MAX_DEPTH {
            return Value::Null;
        }
        let descriptor = message.descriptor();
        match descriptor.full_name() {
            "google.protobuf.Any" => {
                let (url, bytes) = (
                    message.get_field_by_number(1),
                    message.get_field_by_number(2),
                );
                let url = url
                    .as_deref()
                    .and_then(Field::as_str)
                    .unwrap_or_default()
                    .to_owned();
                let bytes = bytes
                    .as_deref()
                    .and_then(Field::as_bytes)
                    .cloned()
                    .unwrap_or_default();
                self.payload(&url, &bytes, depth + 1)
            }
            "google.protobuf.Timestamp" => {
                let seconds = message.get_field_by_number(1).and_then(|f| f.as_i64());
                let nanos = message.get_field_by_number(2).and_then(|f| f.as_i32());
                let at = Timestamp {
                    seconds: seconds.unwrap_or_default(),
                    nanos: nanos.unwrap_or_default(),
                };
                Value::String(time(Some(&at)))
            }
            _ => {
                let set = descriptor.fields().filter(|field| message.has_field(field));
                let pair = |field: FieldDescriptor| {
                    let value = self.field(&field, &message.get_field(&field), depth + 1);
                    (field.name().to_owned(), value)
                };
                Value::Object(set.map(pair).collect())
            }
        }
    }

    fn field(&self, descriptor: &FieldDescriptor, value: &Field, depth: usize) -> Value {
        match value {
            Field::Bool(flag) => json!(flag),
            Field::I32(number) => json!(number),
            Field::I64(number) => json!(number),
            Field::U32(number) => json!(number),
            Field::U64(number) => json!(number),
            Field::F32(number) => json!(number),
            Field::F64(number) => json!(number),
            Field::String(text) => json!(text),
            Field::Bytes(bytes) => json!(hex::encode(bytes)),
            Field::EnumNumber(number) => match descriptor.kind() {
                Kind::Enum(kind) => kind
                    .get_value(*number)
                    .map_or(json!(number), |value| json!(value.name())),
                _ => json!(number),
            },
            Field::Message(message) => self.message(message, depth),
            Field::List(items) => items
                .iter()
                .map(|item| self.field(descriptor, item, depth))
                .collect(),
            Field::Map(entries) => {
                let kind = descriptor.kind();
                let values = kind.as_message().map(|entry| entry.map_entry_value_field());
                let values = values.as_ref().unwrap_or(descriptor);
                let mut sorted: Vec<_> = entries
                    .iter()
                    .map(|(key, item)| (map_key(key), self.field(values, item, depth)))
                    .collect();
                sorted.sort_by(|a, b| a.0.cmp(&b.0));
                Value::Object(sorted.into_iter().collect::<Map<_, _>>())
            }
        }
    }
}

fn map_key(key: &MapKey) -> String {
    match key {
        MapKey::Bool(flag) => flag.to_string(),
        MapKey::I32(number) => number.to_string(),
        MapKey::I64(number) => number.to_string(),
        MapKey::U32(number) => number.to_string(),
        MapKey::U64(number) => number.to_string(),
        MapKey::String(text) => text.clone(),
    }
}

/// RFC 3339 in UTC; the empty string for none.
pub(crate) fn time(timestamp: Option<&Timestamp>) -> String {
    timestamp
        .and_then(|t| {
            OffsetDateTime::from_unix_timestamp(t.seconds)
                .ok()
                .map(|at| (at, t.nanos))
        })
        .and_then(|(at, nanos)| at.replace_nanosecond(u32::try_from(nanos).ok()?).ok())
        .and_then(|at| at.format(&Rfc3339).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use lighter_proto::any;
    use lighter_proto::containerd::events::{ContainerCreate, TaskExit, container_create};
    use lighter_proto::containerd::runc::v1::Options;

    use super::*;

    #[test]
    fn an_event_becomes_json_with_proto_names() {
        let at = Timestamp {
            seconds: 1,
            nanos: 0,
        };
        let event = TaskExit {
            container_id: "c".to_owned(),
            exit_status: 7,
            exited_at: Some(at),
            ..Default::default()
        };
        let value = Decoder::new().decode(&any::pack(&event));
        assert_eq!(
            value,
            json!({ "container_id": "c", "exit_status": 7, "exited_at": "1970-01-01T00:00:01Z" })
        );
    }

    #[test]
    fn a_payload_within_a_payload_is_decoded() {
        let options = Options {
            binary_name: "crun".to_owned(),
            ..Default::default()
        };
        let runtime = container_create::Runtime {
            name: "r".to_owned(),
            options: Some(any::pack(&options)),
        };
        let event = ContainerCreate {
            runtime: Some(runtime),
            ..Default::default()
        };
        let value = Decoder::new().decode(&any::pack(&event));
        assert_eq!(value["runtime"]["options"]["binary_name"], "crun");
    }

    #[test]
    fn an_unknown_type_keeps_its_bytes() {
        let value = Any {
            type_url: "x.Y".to_owned(),
            value: vec![0xff, 1],
        };
        assert_eq!(
            Decoder::new().decode(&value),
            json!({ "type_url": "x.Y", "hex": "ff01" })
        );
    }

    #[test]
    fn times_are_rfc_3339() {
        let at = Timestamp {
            seconds: 0,
            nanos: 500_000_000,
        };
        assert_eq!(time(Some(&at)), "1970-01-01T00:00:00.5Z");
        assert_eq!(time(None), "");
    }
}
