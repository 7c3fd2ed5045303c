//! Every method of the API with requests that no client of ours would send.

use std::collections::HashMap;

use bytes::Bytes;
use lighter_integration::raw::{Method, call, methods};
use lighter_integration::{Client, Daemon, Result, Subject};
use prost::Message as _;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, MessageDescriptor, Value};
use tonic::{Code, Status};

/// Messages within messages that are filled in.
const DEPTH: usize = 5;
/// What the API takes in one message.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// A message with something in every field: `text`, and the numbers at the ends of their ranges.
fn filled(of: &MessageDescriptor, text: &str, depth: usize) -> DynamicMessage {
    let mut message = DynamicMessage::new(of.clone());
    for field in of.fields() {
        if let Some(value) = field_of(&field, text, depth) {
            message.set_field(&field, value);
        }
    }
    message
}

fn field_of(field: &FieldDescriptor, text: &str, depth: usize) -> Option<Value> {
    let kind = field.kind();
    if field.is_map() {
        let entry = kind.as_message()?.clone();
        let value = value(&entry.map_entry_value_field().kind(), text, depth)?;
        return Some(Value::Map(HashMap::from([(
            MapKey::String(text.to_owned()),
            value,
        )])));
    }
    let value = value(&kind, text, depth)?;
    Some(if field.is_list() {
        Value::List(vec![value])
    } else {
        value
    })
}

fn value(kind: &Kind, text: &str, depth: usize) -> Option<Value> {
    Some(match kind {
        Kind::Double => Value::F64(f64::NAN),
        Kind::Float => Value::F32(f32::NAN),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(i32::MIN),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(i64::MIN),
        Kind::Uint32 | Kind::Fixed32 => Value::U32(u32::MAX),
        Kind::Uint64 | Kind::Fixed64 => Value::U64(u64::MAX),
        Kind::Bool => Value::Bool(true),
        Kind::String => Value::String(text.to_owned()),
        Kind::Bytes => Value::Bytes(Bytes::from_static(&[0xff; 16])),
        Kind::Enum(_) => Value::EnumNumber(99),
        Kind::Message(_) if depth == 0 => return None,
        Kind::Message(inner) => Value::Message(filled(inner, text, depth - 1)),
    })
}

/// Sends `body` to every method; what the answers must not be is told by `bad`.
async fn sweep(
    client: &Client,
    methods: &[Method],
    what: &str,
    body: impl Fn(&Method) -> Bytes,
    bad: impl Fn(&Result<(), Status>) -> bool,
) -> Result {
    let mut wrong = Vec::new();
    for method in methods {
        // A stream that waits for what happens next has nothing to say.
        let Some(answer) = call(client, &method.name, body(method)).await? else {
            continue;
        };
        if bad(&answer) {
            wrong.push(format!("{}: {answer:?}", method.name));
        }
        anyhow::ensure!(
            client.version().await.is_ok(),
            "{what}: {} ends the daemon",
            method.name
        );
    }
    anyhow::ensure!(wrong.is_empty(), "{what}:\n{}", wrong.join("\n"));
    Ok(())
}

/// Only ours: the reference panics on some of these, and gives others no code of their own.
#[tokio::test]
async fn every_method_bears_every_message() -> Result {
    if Subject::of_run() != Subject::Lighter {
        return Ok(());
    }
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let mut methods = methods()?;
    // CRI has tests of its own, on a node.
    methods.retain(|method| !method.name.starts_with("runtime.v1."));
    assert!(methods.len() > 80, "{} methods", methods.len());

    let internal = |answer: &Result<(), Status>| {
        let Err(status) = answer else { return false };
        // Whether a mount can be made is the kernel's to say.
        matches!(status.code(), Code::Internal | Code::Unknown)
            && !status.message().starts_with("failed to mount")
    };
    let empty = |_: &Method| Bytes::new();
    sweep(&client, &methods, "an empty message", empty, internal).await?;

    let noise = |_: &Method| Bytes::from_static(&[0xff; 64]);
    // The codec's own answer to what is no message.
    let accepted = |answer: &Result<(), Status>| !matches!(answer, Err(s) if matches!(s.code(), Code::Internal | Code::InvalidArgument));
    let typed = methods.iter().filter(|method| {
        // One without fields of its own skips whatever there is, if it can be skipped.
        method.input.full_name() != "google.protobuf.Empty"
    });
    let typed: Vec<_> = typed.cloned().collect();
    sweep(&client, &typed, "no message", noise, accepted).await?;

    let zeros = Bytes::from(vec![0; MAX_MESSAGE_BYTES + 1]);
    let large = |_: &Method| zeros.clone();
    let taken = |answer: &Result<(), Status>| !matches!(answer, Err(s) if s.code() == Code::ResourceExhausted);
    sweep(&client, &methods, "a message too large", large, taken).await?;

    for text in ["../../etc", "a\0b", "sha256:zz"] {
        let full = |method: &Method| filled(&method.input, text, DEPTH).encode_to_vec().into();
        let what = format!("{:?} everywhere", text);
        sweep(&client, &methods, &what, full, internal).await?;
    }
    daemon.finish().await
}
