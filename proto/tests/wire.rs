//! Our `.proto` files against the ones that published crates ship.
//!
//! Both sides are compiled to descriptors and flattened to facts: `package.Message#number` → name,
//! cardinality, type, oneof, presence; `package.Enum#number` → name; `package.Service/Method` →
//! input, output, streaming. Every fact of a crate must be one of ours, unchanged, but for the
//! differences listed below. The crates are older than what we implement, so ours may say more.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use prost_reflect::prost::Message;
use prost_reflect::{
    Cardinality, DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor,
    ReflectMessage, Value,
};

/// What differs on purpose: fact, and why.
const DIFFERENT: [(&str, &str); 1] = [(
    "runtime.v1.KeyValue#2",
    "bytes in Kubernetes, string in the crate; same for any UTF-8",
)];

type Facts = BTreeMap<String, String>;

fn ours() -> DescriptorPool {
    DescriptorPool::decode(lighter_proto::FILE_DESCRIPTOR_SET).expect("our own descriptors")
}

/// Source folder of a package of the lock file.
fn source_of(package: &str) -> PathBuf {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version=1",
            "--locked",
            "--manifest-path",
        ])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .output()
        .expect("cargo metadata runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let found = packages.iter().find(|p| p["name"] == package);
    let manifest = found.unwrap_or_else(|| panic!("{package} is not locked"))["manifest_path"]
        .as_str()
        .expect("a path");
    Path::new(manifest).parent().expect("a folder").to_owned()
}

fn protos_below(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            protos_below(&path, found);
        } else if path.extension().is_some_and(|e| e == "proto") {
            found.push(path);
        }
    }
}

/// Everything below `folder` of a package, compiled with `root` as include path.
fn theirs(package: &str, root: &str, folder: &str) -> DescriptorPool {
    let root = source_of(package).join(root);
    let mut files = Vec::new();
    protos_below(&root.join(folder), &mut files);
    assert!(
        !files.is_empty(),
        "{package} ships no .proto below {folder}"
    );
    let set = protox::compile(&files, [&root]).expect("the crate's files compile");
    DescriptorPool::from_file_descriptor_set(set).expect("the crate's descriptors")
}

fn kind_name(kind: &Kind) -> String {
    match kind {
        Kind::Message(message) => message.full_name().to_owned(),
        Kind::Enum(enumeration) => enumeration.full_name().to_owned(),
        other => format!("{other:?}"),
    }
}

fn field_fact(field: &FieldDescriptor) -> String {
    let cardinality = match field.cardinality() {
        Cardinality::Repeated if field.is_map() => "map",
        Cardinality::Repeated => "repeated",
        Cardinality::Optional | Cardinality::Required => "one",
    };
    let oneof = field
        .containing_oneof()
        .map(|o| o.name().to_owned())
        .unwrap_or_default();
    let presence = field.supports_presence();
    format!(
        "{} {cardinality} {} {oneof} {presence}",
        field.name(),
        kind_name(&field.kind())
    )
}

fn facts_of(pool: &DescriptorPool) -> Facts {
    let mut facts = Facts::new();
    for message in pool.all_messages() {
        facts.insert(message.full_name().to_owned(), "message".to_owned());
        for field in message.fields() {
            facts.insert(
                format!("{}#{}", message.full_name(), field.number()),
                field_fact(&field),
            );
        }
    }
    for enumeration in pool.all_enums() {
        for value in enumeration.values() {
            let key = format!("{}#{}", enumeration.full_name(), value.number());
            facts.insert(key, value.name().to_owned());
        }
    }
    for service in pool.services() {
        for method in service.methods() {
            let key = format!("{}/{}", service.full_name(), method.name());
            let (input, output) = (method.input(), method.output());
            let streams = (method.is_client_streaming(), method.is_server_streaming());
            facts.insert(
                key,
                format!("{} {} {streams:?}", input.full_name(), output.full_name()),
            );
        }
    }
    facts
}

/// Facts of `theirs` in `packages` that ours lacks or has otherwise.
fn missing(theirs: &DescriptorPool, packages: &[&str]) -> Vec<String> {
    let ours = facts_of(&ours());
    let mut wrong = Vec::new();
    let mut compared = 0;
    for (key, value) in facts_of(theirs) {
        if !packages.iter().any(|p| key.starts_with(p)) {
            continue;
        }
        compared += 1;
        if ours.get(&key) != Some(&value) && !DIFFERENT.iter().any(|(known, _)| *known == key) {
            wrong.push(format!(
                "{key}: theirs {value:?}, ours {:?}",
                ours.get(&key)
            ));
        }
    }
    assert!(compared > 100, "only {compared} facts compared");
    wrong
}

#[test]
fn containerd_client_agrees() {
    let theirs = theirs(
        "containerd-client",
        "vendor",
        "github.com/containerd/containerd/api",
    );
    let wrong = missing(&theirs, &["containerd.", "runtimeoptions."]);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn shim_protos_agree() {
    let root = "vendor/github.com/containerd/containerd/api";
    let wrong = missing(
        &theirs("containerd-shim-protos", root, ""),
        &["containerd.", "runtimeoptions."],
    );
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn k8s_cri_agrees() {
    let source = source_of("k8s-cri");
    let mut files = Vec::new();
    protos_below(&source, &mut files);
    let is_v1 = |f: &PathBuf| {
        std::fs::read_to_string(f).is_ok_and(|text| text.contains("package runtime.v1;"))
    };
    let file = files
        .iter()
        .find(|f| is_v1(f))
        .expect("the crate ships CRI v1");
    let includes: Vec<_> = file
        .ancestors()
        .skip(1)
        .take_while(|a| a.starts_with(&source))
        .collect();
    // Its options of another library resolve from the include folders, innermost first.
    let set = protox::compile([file], includes).expect("the crate's file compiles");
    let pool = DescriptorPool::from_file_descriptor_set(set).expect("descriptors");
    let wrong = missing(&pool, &["runtime.v1."]);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A message with every field set (of a oneof the first); nested messages to a bounded depth.
fn filled(descriptor: &MessageDescriptor, depth: u32) -> DynamicMessage {
    let mut message = DynamicMessage::new(descriptor.clone());
    for field in descriptor.fields() {
        let taken = field
            .containing_oneof()
            .is_some_and(|oneof| oneof.fields().any(|f| f.number() < field.number()));
        if taken {
            continue;
        }
        if let Some(value) = field_value(&field, depth) {
            message.set_field(&field, value);
        }
    }
    message
}

fn field_value(field: &FieldDescriptor, depth: u32) -> Option<Value> {
    use prost_reflect::MapKey;
    if let (true, Kind::Message(entry)) = (field.is_map(), field.kind()) {
        let value = value_of(&entry.map_entry_value_field().kind(), depth)?;
        let key = match entry.map_entry_key_field().kind() {
            Kind::String => MapKey::String("key".to_owned()),
            Kind::Uint32 => MapKey::U32(7),
            Kind::Int32 => MapKey::I32(7),
            other => panic!("{}: no sample key for {other:?}", field.full_name()),
        };
        return Some(Value::Map([(key, value)].into()));
    }
    let value = value_of(&field.kind(), depth)?;
    Some(if field.is_list() {
        Value::List(vec![value.clone(), value])
    } else {
        value
    })
}

fn value_of(kind: &Kind, depth: u32) -> Option<Value> {
    Some(match kind {
        Kind::Message(_) if depth == 0 => return None,
        Kind::Message(inner) => Value::Message(filled(inner, depth - 1)),
        Kind::Enum(inner) => Value::EnumNumber(inner.values().last()?.number()),
        Kind::String => Value::String("text ☂".to_owned()),
        Kind::Bytes => Value::Bytes(vec![0, 1, 0xfe, 0xff].into()),
        Kind::Bool => Value::Bool(true),
        Kind::Double => Value::F64(1.5),
        Kind::Float => Value::F32(1.5),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(-3),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(-3),
        Kind::Uint32 | Kind::Fixed32 => Value::U32(3),
        Kind::Uint64 | Kind::Fixed64 => Value::U64(1 << 40),
    })
}

#[test]
fn bytes_written_by_one_side_are_the_other_sides_message() {
    let theirs = theirs(
        "containerd-client",
        "vendor",
        "github.com/containerd/containerd/api",
    );
    let pool = ours();
    let mut compared = 0;
    for message in theirs
        .all_messages()
        .filter(|m| m.full_name().starts_with("containerd."))
    {
        if message.is_map_entry() {
            continue;
        }
        let name = message.full_name();
        let ours = pool
            .get_message_by_name(name)
            .unwrap_or_else(|| panic!("{name} is missing"));
        let whole = filled(&message, 3);
        let read = DynamicMessage::decode(ours, whole.encode_to_vec().as_slice()).expect(name);
        assert_eq!(
            read.unknown_fields().count(),
            0,
            "{name} has fields we do not know"
        );
        let back = DynamicMessage::decode(message.clone(), read.encode_to_vec().as_slice());
        assert_eq!(back.expect(name), whole, "{name}");
        compared += 1;
    }
    assert!(compared > 150, "only {compared} messages compared");
}

#[test]
fn our_rust_types_read_what_the_descriptors_write() {
    // The generated types and the descriptors come from the same files by two paths.
    let name = "containerd.services.tasks.v1.CreateTaskRequest";
    let filled = filled(&ours().get_message_by_name(name).expect("exists"), 3);
    let request = lighter_proto::containerd::services::tasks::v1::CreateTaskRequest::decode(
        filled.encode_to_vec().as_slice(),
    )
    .expect("decodes");
    assert_eq!(
        (request.container_id.as_str(), request.terminal),
        ("text ☂", true)
    );
    assert_eq!((request.rootfs.len(), request.task_api_version), (2, 3));
    let again = DynamicMessage::decode(filled.descriptor(), request.encode_to_vec().as_slice());
    assert_eq!(again.expect("decodes"), filled);
}
