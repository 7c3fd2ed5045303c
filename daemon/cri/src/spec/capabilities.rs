//! Which capabilities a container gets.

use std::collections::BTreeSet;

pub use lighter_floor::capabilities::DEFAULT;
use serde_json::{Value, json};

/// What this daemon itself may do: a privileged container gets no more.
#[must_use]
pub fn own() -> Vec<String> {
    let mut own: Vec<_> = caps::read(None, caps::CapSet::Effective)
        .unwrap_or_default()
        .into_iter()
        .collect();
    own.sort_unstable_by_key(caps::Capability::index);
    own.iter().map(ToString::to_string).collect()
}

/// What a container has unless it asks otherwise: a configured base spec's set, else [`DEFAULT`].
#[must_use]
pub fn of_base(base: &Value) -> Vec<String> {
    let configured = base["process"]["capabilities"]["bounding"].as_array();
    let named = |list: &Vec<Value>| {
        let names = list.iter().filter_map(|name| name.as_str());
        names.map(str::to_owned).collect()
    };
    configured.map_or_else(|| DEFAULT.iter().map(|c| (*c).to_owned()).collect(), named)
}

/// The set after adding to and dropping from `base`; `ALL` is taken first. Names are as the kubelet writes them,
/// without prefix.
#[must_use]
pub fn adjusted(base: Vec<String>, add: &[String], drop: &[String]) -> Vec<String> {
    let is_all = |names: &[String]| names.iter().any(|n| n.eq_ignore_ascii_case("ALL"));
    let full = |name: &String| format!("CAP_{}", name.to_ascii_uppercase());
    let mut set: BTreeSet<String> = base.into_iter().collect();
    if is_all(add) {
        set = own().into_iter().collect();
    }
    if is_all(drop) {
        set.clear();
    }
    set.extend(
        add.iter()
            .filter(|n| !n.eq_ignore_ascii_case("ALL"))
            .map(full),
    );
    for name in drop.iter().filter(|n| !n.eq_ignore_ascii_case("ALL")) {
        set.remove(&full(name));
    }
    set.into_iter().collect()
}

/// The spec's object: bounding, effective and permitted; never inheritable or ambient.
#[must_use]
pub fn object(set: &[String]) -> Value {
    if set.is_empty() {
        return json!({});
    }
    json!({ "bounding": set, "effective": set, "permitted": set })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn dropping_all_leaves_what_is_added() {
        let base = || of_base(&Value::Null);
        let set = adjusted(base(), &names(&["net_admin"]), &names(&["ALL"]));
        assert_eq!(set, ["CAP_NET_ADMIN"]);
        assert!(adjusted(base(), &[], &names(&["all"])).is_empty());
    }

    #[test]
    fn drops_come_after_adds() {
        let base = of_base(&Value::Null);
        let set = adjusted(base, &names(&["SYS_TIME"]), &names(&["KILL", "SYS_TIME"]));
        assert_eq!(set.len(), DEFAULT.len() - 1);
        assert!(!set.contains(&"CAP_KILL".to_owned()));
    }
}
