//! Container records as messages of the API, copied field by field.
//!
//! Fields 2 to 7 of a `ContainerRecord` have the numbers and the types of those of the API's
//! `Container` (`containerd.services.containers.v1`), so a list is made of what is stored without
//! taking it apart: the largest part, the spec, is only ever copied.
//!
//! | record | API | |
//! |---|---|---|
//! | key | 1 `id` | |
//! | 1 stamps | 8 `created_at`, 9 `updated_at` | taken apart |
//! | 2 labels … 7 snapshot key | the same | copied with their tags |
//! | 8 extensions | 10 `extensions` | copied |
//! | 9 sandbox id | 11 `sandbox` | copied |

use bytes::Bytes;
use lighter_proto::time::to_timestamp;
use prost::Message as _;
use prost::encoding::{
    DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, skip_field,
};

use super::records::Stamps;

/// Field in which every answer of the API has its containers.
const CONTAINER: u32 = 1;

/// Messages that each have one container, one after the other: joined they are the answer that has
/// all of them.
#[derive(Debug, Clone, Default)]
pub struct EncodedContainers {
    bytes: Vec<u8>,
    /// Where each message ends.
    ends: Vec<usize>,
}

impl EncodedContainers {
    /// One message with all containers.
    #[must_use]
    pub fn joined(self) -> Bytes {
        self.bytes.into()
    }

    /// Messages with one container each.
    pub fn split(self) -> impl Iterator<Item = Bytes> + Send + 'static {
        let bytes = Bytes::from(self.bytes);
        let mut start = 0;
        self.ends.into_iter().map(move |end| {
            let message = bytes.slice(start..end);
            start = end;
            message
        })
    }

    /// Appends the container of a stored record; `None`, and nothing, for a damaged one.
    pub(crate) fn push(&mut self, id: &[u8], record: &[u8]) -> Option<()> {
        let start = self.bytes.len();
        // The record's length is that of the message but for the id, the times and a few tags.
        self.bytes.reserve(record.len() + id.len() + 64);
        let mut body = Vec::with_capacity(record.len() + id.len() + 48);
        bytes_field(&mut body, 1, id);
        if copy_fields(&mut body, record).is_none() {
            self.bytes.truncate(start);
            return None;
        }
        bytes_field(&mut self.bytes, CONTAINER, &body);
        self.ends.push(self.bytes.len());
        Some(())
    }
}

fn copy_fields(out: &mut Vec<u8>, mut record: &[u8]) -> Option<()> {
    while !record.is_empty() {
        let field = record;
        let (number, wire) = decode_key(&mut record).ok()?;
        if wire != WireType::LengthDelimited {
            skip_field(wire, number, &mut record, DecodeContext::default()).ok()?;
            continue;
        }
        let length = usize::try_from(decode_varint(&mut record).ok()?).ok()?;
        let (value, rest) = record.split_at_checked(length)?;
        record = rest;
        match number {
            1 => {
                let stamps = Stamps::decode(value).ok()?;
                let times = [(8, stamps.created_at()), (9, stamps.updated_at())];
                for (number, time) in times {
                    message_field(out, number, &to_timestamp(time));
                }
            }
            2..=7 => out.extend_from_slice(&field[..field.len() - rest.len()]),
            8 => bytes_field(out, 10, value),
            9 => bytes_field(out, 11, value),
            _ => {}
        }
    }
    Some(())
}

fn bytes_field(out: &mut Vec<u8>, number: u32, value: &[u8]) {
    encode_key(number, WireType::LengthDelimited, out);
    encode_varint(value.len() as u64, out);
    out.extend_from_slice(value);
}

fn message_field(out: &mut Vec<u8>, number: u32, message: &impl prost::Message) {
    encode_key(number, WireType::LengthDelimited, out);
    encode_varint(message.encoded_len() as u64, out);
    message.encode_raw(out);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lighter_proto::containerd::services::containers::v1 as wire;
    use prost_types::Any;

    use super::super::records::{ContainerRecord, RuntimeRecord};
    use super::*;

    fn any(value: &[u8]) -> Any {
        Any {
            type_url: "type".to_owned(),
            value: value.to_vec(),
        }
    }

    fn record() -> ContainerRecord {
        ContainerRecord {
            stamps: Stamps {
                created: 1_700_000_000_123_456_789,
                updated: -5,
            },
            labels: BTreeMap::from([("a".into(), "b".into()), ("c".into(), String::new())]),
            image: "image".into(),
            runtime: RuntimeRecord {
                name: "runtime".into(),
                options: Some(any(b"options")),
            },
            spec: any(&[7; 300]),
            snapshotter: "overlayfs".into(),
            snapshot_key: "key".into(),
            extensions: BTreeMap::from([("e".into(), any(b"extension"))]),
            sandbox_id: "sandbox".into(),
        }
    }

    #[test]
    fn a_record_becomes_the_message_that_its_fields_say() {
        let record = record();
        let mut encoded = EncodedContainers::default();
        encoded.push(b"id", &record.encode_to_vec()).unwrap();
        encoded
            .push(b"second", &ContainerRecord::default().encode_to_vec())
            .unwrap();
        let messages: Vec<_> = encoded.clone().split().collect();
        let second = wire::ListContainerMessage::decode(messages[1].clone()).unwrap();
        assert_eq!(second.container.unwrap().id, "second");
        let answer = wire::ListContainersResponse::decode(encoded.joined()).unwrap();
        let expected = wire::Container {
            id: "id".into(),
            labels: record.labels.into_iter().collect(),
            image: record.image,
            runtime: Some(wire::container::Runtime {
                name: record.runtime.name,
                options: record.runtime.options,
            }),
            spec: Some(record.spec),
            snapshotter: record.snapshotter,
            snapshot_key: record.snapshot_key,
            created_at: Some(to_timestamp(record.stamps.created_at())),
            updated_at: Some(to_timestamp(record.stamps.updated_at())),
            extensions: record.extensions.into_iter().collect(),
            sandbox: record.sandbox_id,
        };
        assert_eq!(answer.containers[0], expected);
        assert_eq!(answer.containers.len(), 2);
        assert!(answer.containers[1].runtime.is_some());
    }

    #[test]
    fn a_damaged_record_is_refused_whole() {
        let record = record().encode_to_vec();
        let mut encoded = EncodedContainers::default();
        assert!(encoded.push(b"id", &record[..record.len() - 1]).is_none());
        assert!(encoded.bytes.is_empty() && encoded.ends.is_empty());
    }
}
