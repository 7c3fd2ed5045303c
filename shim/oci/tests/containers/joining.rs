//! Containers that share namespaces, as the containers of a pod do.

use std::fs;

use serde_json::json;

use crate::bundle::{Bundle, bundle};

/// Makes `member` join namespaces of the running `sandbox`.
fn join(mut member: Bundle, sandbox: &Bundle, kinds: &[(&str, &str)]) -> Bundle {
    let namespaces = member.config["linux"]["namespaces"].as_array_mut().unwrap();
    for (kind, file) in kinds {
        namespaces.retain(|one| one["type"] != *kind);
        namespaces
            .push(json!({"type": kind, "path": format!("/proc/{}/ns/{file}", sandbox.pid())}));
    }
    member
}

const POD: &[(&str, &str)] = &[("network", "net"), ("ipc", "ipc"), ("uts", "uts")];

#[test]
fn a_pods_containers_share_network_and_names() {
    let Some(sandbox) = bundle(&["sleep", "60"]) else {
        return;
    };
    sandbox.up();
    let Some(member) = bundle(&["sh", "-c", "hostname; readlink /proc/self/ns/net"]) else {
        return;
    };
    let member = join(member, &sandbox, POD).set("/hostname", json!(""));
    let net = fs::read_link(format!("/proc/{}/ns/net", sandbox.pid())).unwrap();
    assert_eq!(member.output(), format!("lighter\n{}", net.display()));
}

#[test]
fn a_pid_namespace_can_be_shared() {
    let Some(sandbox) = bundle(&["sleep", "60"]) else {
        return;
    };
    sandbox.up();
    let Some(member) = bundle(&["sh", "-c", "cat /proc/1/comm; echo $$"]) else {
        return;
    };
    let member = join(member, &sandbox, &[("pid", "pid")]);
    assert_eq!(member.output().lines().next(), Some("sleep"));
    assert_eq!(sandbox.status(), "running");
}

#[test]
fn a_pod_with_a_user_namespace_is_joined_as_its_root() {
    let maps = json!([{"containerID": 0, "hostID": 200_000, "size": 65_536}]);
    let mapped = |bundle: Bundle| {
        bundle
            .set("/linux/uidMappings", maps.clone())
            .set("/linux/gidMappings", maps.clone())
    };
    let Some(sandbox) = bundle(&["sleep", "60"]) else {
        return;
    };
    let sandbox = mapped(sandbox.namespace("user"));
    sandbox.up();
    let script = "id -u; cat /proc/self/uid_map; readlink /proc/self/ns/user; hostname; mount -t tmpfs none /tmp && echo may mount";
    let Some(member) = bundle(&["sh", "-c", script]) else {
        return;
    };
    let mut kinds = POD.to_vec();
    kinds.push(("user", "user"));
    let all = json!({"bounding": ["CAP_SYS_ADMIN"], "permitted": ["CAP_SYS_ADMIN"], "effective": ["CAP_SYS_ADMIN"]});
    let member = join(mapped(member), &sandbox, &kinds)
        .set("/hostname", json!(""))
        .set("/process/capabilities", all);
    let out = member.output();
    let lines: Vec<&str> = out.lines().collect();
    let user = fs::read_link(format!("/proc/{}/ns/user", sandbox.pid())).unwrap();
    assert_eq!(lines[0], "0");
    assert!(lines[1].contains("200000"), "{out}");
    assert_eq!(
        &lines[2..],
        [user.to_str().unwrap(), "lighter", "may mount"]
    );
}

#[test]
fn a_namespace_that_is_gone_is_named() {
    let Some(member) = bundle(&["true"]) else {
        return;
    };
    let mut member = member;
    member.config["linux"]["namespaces"][1]["path"] = json!("/proc/999999999/ns/net");
    let said = member.create();
    assert_eq!(said.code, 1);
    assert!(
        said.err
            .contains("/proc/999999999/ns/net: no such file or directory"),
        "{}",
        said.err
    );
}
