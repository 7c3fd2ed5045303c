//! Reaching into an OCI spec kept as JSON, which also has the fields that no typed form knows yet.

use serde_json::{Map, Value};

/// The object at `path`, made where it is missing. What stands in the way is replaced.
pub(crate) fn object<'a>(spec: &'a mut Value, path: &[&str]) -> &'a mut Map<String, Value> {
    let mut current = spec;
    for key in path {
        current = as_object(current)
            .entry((*key).to_owned())
            .or_insert(Value::Null);
    }
    as_object(current)
}

fn as_object(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().expect("it was just made an object")
}

/// The array at `path`, made where it is missing. What stands in the way is replaced.
pub(crate) fn array<'a>(spec: &'a mut Value, path: &[&str]) -> &'a mut Vec<Value> {
    let (last, parents) = path.split_last().expect("a path has at least one key");
    let value = object(spec, parents)
        .entry((*last).to_owned())
        .or_insert(Value::Null);
    if !value.is_array() {
        *value = Value::Array(Vec::new());
    }
    value.as_array_mut().expect("it was just made an array")
}

/// Sets a variable of the process in place, or removes it.
pub(crate) fn set_env(spec: &mut Value, name: &str, value: Option<&str>) {
    let env = array(spec, &["process", "env"]);
    let is_it = |entry: &Value| {
        let pair = entry.as_str().and_then(|text| text.split_once('='));
        pair.is_some_and(|(key, _)| key == name)
    };
    let Some(value) = value else {
        env.retain(|entry| !is_it(entry));
        return;
    };
    let pair = Value::String(format!("{name}={value}"));
    match env.iter_mut().find(|entry| is_it(entry)) {
        Some(entry) => *entry = pair,
        None => env.push(pair),
    }
}
