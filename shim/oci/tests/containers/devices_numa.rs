//! Network interfaces and memory policies of the configuration.

use std::process::Command;

use serde_json::json;

use crate::bundle::bundle;

fn ip(words: &[&str]) -> bool {
    Command::new("ip").args(words).status().unwrap().success()
}

#[test]
fn an_interface_moves_in_with_its_address_and_a_new_name() {
    let script = "cat /sys/class/net/inside0/flags; cat /proc/net/fib_trie /proc/net/if_inet6; ls /sys/class/net";
    let Some(bundle) = bundle(&["sh", "-c", script]) else {
        return;
    };
    let name = format!("lt{}", std::process::id());
    let peer = format!("{name}p");
    assert!(ip(&[
        "link", "add", &name, "type", "veth", "peer", "name", &peer
    ]));
    assert!(ip(&["addr", "add", "10.99.7.1/24", "dev", &name]));
    assert!(ip(&["addr", "add", "fd00:99::7/64", "nodad", "dev", &name]));
    let bundle = bundle.set(
        "/linux/netDevices",
        json!({ name.as_str(): {"name": "inside0"} }),
    );
    let said = bundle.run();
    let gone = !ip(&["link", "show", &name]);
    if !gone {
        ip(&["link", "del", &name]);
    }
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(gone, "it moved, and ended with the container");
    let flags = said.out.lines().next().unwrap().trim_start_matches("0x");
    assert_eq!(u32::from_str_radix(flags, 16).unwrap() & 1, 1, "it is up");
    assert!(said.out.contains("10.99.7.1"), "{}", said.out);
    assert!(
        said.out.contains("fd000099000000000000000000000007"),
        "{}",
        said.out
    );
}

#[test]
fn an_interface_that_cannot_move_fails_create_by_name() {
    for (devices, namespace, text) in [
        (
            json!({"nowhere0": {}}),
            true,
            "\"nowhere0\": there is no such interface",
        ),
        (json!({"lo": {}}), true, "\"lo\""),
        (
            json!({"eth0": {"name": "a/b"}}),
            true,
            "no name of a network interface",
        ),
        (json!({"nowhere0": {}}), false, "need a network namespace"),
    ] {
        let Some(bundle) = bundle(&["true"]) else {
            return;
        };
        let bundle = if namespace {
            bundle
        } else {
            bundle.without_namespace("network")
        };
        let bundle = bundle.set("/linux/netDevices", devices);
        let said = bundle.create();
        assert_eq!(said.code, 1);
        assert!(said.err.contains(text), "{}", said.err);
    }
}

#[test]
fn memory_policies_are_set_for_init_and_execs() {
    let Some(bundle) = bundle(&["sleep", "60"]) else {
        return;
    };
    if !std::path::Path::new("/proc/self/numa_maps").exists() {
        let bundle = bundle.set(
            "/linux/memoryPolicy",
            json!({"mode": "MPOL_BIND", "nodes": "0"}),
        );
        assert!(
            bundle.create().err.contains("set memory policy"),
            "a kernel without NUMA says so"
        );
        return;
    }
    let bundle = bundle.set(
        "/linux/memoryPolicy",
        json!({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]}),
    );
    bundle.up();
    for process in ["/proc/1/numa_maps", "/proc/self/numa_maps"] {
        let said = bundle.exec(&["head", "-n", "1", process]);
        assert!(
            said.out.contains("bind=static:0"),
            "{process}: {} {}",
            said.out,
            said.err
        );
    }
    let wrong = bundle.set(
        "/linux/memoryPolicy",
        json!({"mode": "MPOL_BIND", "nodes": "0-9876543210"}),
    );
    wrong.say(&["delete", "--force", &wrong.id]);
    assert!(wrong.create().err.contains("memoryPolicy"));
}
