//! What only cgroup v2 has: one directory, BPF device filters, `cgroup.kill`, birth in the group, delegation.
//! On a machine without it these tests have nothing to look at; `make test-vm` runs them on one that has.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::bundle::{Bundle, bundle, eventually};

/// A bundle, where the machine has cgroup v2 alone.
fn unified(args: &[&str]) -> Option<Bundle> {
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        eprintln!("skipped: no cgroup v2 at /sys/fs/cgroup");
        return None;
    }
    bundle(args)
}

fn read(bundle: &Bundle, file: &str) -> String {
    let path = bundle.cgroup("").join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    text.trim().to_owned()
}

/// A figure of a `key value` file.
fn figure(bundle: &Bundle, file: &str, key: &str) -> u64 {
    let text = read(bundle, file);
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let value = line.unwrap_or_else(|| panic!("no {key} in {text}"));
    value.trim().parse().unwrap()
}

#[test]
fn every_limit_ends_in_its_file() {
    let Some(bundle) = unified(&["sleep", "60"]) else {
        return;
    };
    let bundle = bundle.set(
        "/linux/resources",
        json!({
            "memory": {"limit": 67_108_864, "swap": 100_663_296, "reservation": 33_554_432},
            "pids": {"limit": 20},
            "cpu": {"shares": 1024, "quota": 20_000, "period": 50_000, "burst": 10_000, "cpus": "0", "mems": "0"},
            "unified": {"memory.high": "50331648", "cgroup.max.depth": "3", "io.weight": "default 50"},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4_194_304}],
        }),
    );
    bundle.up();
    for (file, value) in [
        ("memory.max", "67108864"),
        ("memory.swap.max", "33554432"),
        ("memory.low", "33554432"),
        ("memory.high", "50331648"),
        ("pids.max", "20"),
        ("cpu.weight", "39"),
        ("cpu.max", "20000 50000"),
        ("cpu.max.burst", "10000"),
        ("cpuset.cpus", "0"),
        ("cpuset.mems", "0"),
        ("cgroup.max.depth", "3"),
        ("hugetlb.2MB.max", "4194304"),
    ] {
        assert_eq!(read(&bundle, file), value, "{file}");
    }
    let said = bundle.say(&["update", "--cpu-period", "100000", &bundle.id]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert_eq!(read(&bundle, "cpu.max"), "20000 100000", "the quota stays");
    let said = bundle.say(&[
        "update",
        "--memory",
        "-1",
        "--memory-swap",
        "-1",
        &bundle.id,
    ]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert_eq!(read(&bundle, "memory.max"), "max");
    assert_eq!(read(&bundle, "memory.swap.max"), "max");
}

#[test]
fn unified_resources_are_files_of_controllers_only() {
    for (file, text) in [
        ("cgroup.procs", "must be a controller's file name"),
        ("../memory.max", "must be a controller's file name"),
        ("memory.nonsense", "memory.nonsense"),
    ] {
        let Some(bundle) = unified(&["true"]) else {
            return;
        };
        let bundle = bundle.set("/linux/resources", json!({"unified": {file: "1"}}));
        let said = bundle.create();
        assert_eq!(said.code, 1, "{file}");
        assert!(said.err.contains(text), "{}", said.err);
    }
}

#[test]
fn a_process_is_born_in_its_group() {
    // The group counts one process from the first moment: nobody was moved in, which would show as a migration of memory
    // charged elsewhere. What can be seen from here is that the first process to look is already inside.
    let Some(bundle) = unified(&["cat", "/proc/self/cgroup"]) else {
        return;
    };
    let expected = format!("0::/{}", bundle.id);
    assert_eq!(bundle.without_namespace("cgroup").output(), expected);
    let Some(bundle) = unified(&["sleep", "60"]) else {
        return;
    };
    let bundle = bundle.without_namespace("cgroup");
    bundle.up();
    let said = bundle.exec(&["cat", "/proc/self/cgroup"]);
    assert_eq!(said.out, format!("0::/{}", bundle.id), "{}", said.err);
    assert_eq!(read(&bundle, "cgroup.procs"), bundle.pid().to_string());
}

#[test]
fn memory_beyond_the_limit_kills_and_is_counted() {
    let script = "tail -c 150000000 /dev/zero; sleep 60";
    let Some(bundle) = unified(&["sh", "-c", script]) else {
        return;
    };
    let bundle = bundle.set(
        "/linux/resources",
        json!({"memory": {"limit": 33_554_432, "swap": 33_554_432}}),
    );
    bundle.up();
    eventually("tail is killed for want of memory", || {
        figure(&bundle, "memory.events", "oom_kill ") > 0
    });
    assert!(figure(&bundle, "memory.peak", "") <= 33_554_432 + 4096 * 64);
    assert_eq!(bundle.status(), "running", "the shell was not the victim");
}

#[test]
fn the_processor_is_shared_as_told() {
    let Some(bundle) = unified(&["sh", "-c", "while :; do :; done"]) else {
        return;
    };
    let bundle = bundle.set(
        "/linux/resources",
        json!({"cpu": {"quota": 10_000, "period": 100_000}}),
    );
    bundle.up();
    let before = figure(&bundle, "cpu.stat", "usage_usec ");
    let start = std::time::Instant::now();
    std::thread::sleep(std::time::Duration::from_secs(3));
    let used = figure(&bundle, "cpu.stat", "usage_usec ") - before;
    let elapsed = u64::try_from(start.elapsed().as_micros()).unwrap();
    assert!(used < elapsed / 5, "{used} of {elapsed} us at a tenth");
    assert!(figure(&bundle, "cpu.stat", "nr_throttled ") > 5);
    let said = bundle.say(&["events", "--stats", &bundle.id]);
    let event: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    let throttled = event["data"]["cpu"]["throttling"]["throttledPeriods"].as_u64();
    assert!(throttled.unwrap() > 5, "{event}");
}

#[test]
fn devices_are_decided_by_the_filter() {
    // Kernel messages (1:11) and memory (1:1) may be made, but only read what a rule allows.
    let script = "mknod /tmp/kmsg c 1 11; mknod /tmp/urandom c 1 9; mknod /tmp/full c 1 7; \
                  head -c1 /tmp/urandom | wc -c; head -c1 /tmp/kmsg || echo kmsg refused; \
                  echo x > /tmp/full 2>&1 || echo full refused";
    let Some(bundle) = unified(&["sh", "-c", script]) else {
        return;
    };
    let bundle = bundle
        .set(
            "/linux/resources",
            json!({"devices": [{"allow": false, "access": "rwm"}]}),
        )
        .set(
            "/process/capabilities",
            json!({"bounding": ["CAP_MKNOD"], "effective": ["CAP_MKNOD"], "permitted": ["CAP_MKNOD"]}),
        );
    let said = bundle.run();
    assert!(
        said.out.contains("1\nkmsg refused"),
        "{} {}",
        said.out,
        said.err
    );
    assert!(said.err.contains("Operation not permitted"), "{}", said.err);
    // An update changes the filter of a running container, and there is only one afterwards.
    let Some(bundle) = unified(&["sleep", "60"]) else {
        return;
    };
    let bundle = bundle
        .set(
            "/linux/devices",
            json!([{"path": "/dev/mine", "type": "b", "major": 7, "minor": 0, "fileMode": 438}]),
        )
        .set(
            "/linux/resources",
            json!({"devices": [{"allow": false, "access": "rwm"}]}),
        );
    bundle.up();
    let look = || bundle.exec(&["sh", "-c", ": < /dev/mine && echo open"]);
    assert_ne!(look().out, "open");
    let update = |rules: serde_json::Value| {
        let file = bundle.path().join("resources.json");
        fs::write(&file, json!({ "devices": rules }).to_string()).unwrap();
        let said = bundle.say(&["update", "-r", file.to_str().unwrap(), &bundle.id]);
        assert_eq!(said.code, 0, "{}", said.err);
    };
    update(json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "b", "major": 7, "minor": 0, "access": "r"}
    ]));
    assert_eq!(look().out, "open", "{}", look().err);
    update(json!([{"allow": false, "access": "rwm"}]));
    assert_ne!(look().out, "open", "the earlier filter is gone");
}

#[test]
fn a_frozen_group_stands_still() {
    let script = "i=0; while :; do i=$((i+1)); echo $i > /tmp/count; done";
    let Some(bundle) = unified(&["sh", "-c", script]) else {
        return;
    };
    bundle.up();
    let count = bundle.rootfs().join("tmp/count");
    eventually("it counts", || count.exists());
    assert_eq!(bundle.say(&["pause", &bundle.id]).code, 0);
    assert_eq!(figure(&bundle, "cgroup.events", "frozen "), 1);
    let before = fs::read_to_string(&count).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(fs::read_to_string(&count).unwrap(), before);
    // A frozen one is killed as any other.
    assert_eq!(bundle.say(&["kill", &bundle.id, "KILL"]).code, 0);
    assert_eq!(bundle.say(&["delete", "--force", &bundle.id]).code, 0);
}

#[test]
fn a_container_manages_groups_of_its_own() {
    // As systemd in a container does: moves itself down, hands controllers on, makes groups below.
    let script = "mkdir /sys/fs/cgroup/init /sys/fs/cgroup/work && echo 1 > /sys/fs/cgroup/init/cgroup.procs && \
                  echo '+memory +pids' > /sys/fs/cgroup/cgroup.subtree_control && \
                  echo 10 > /sys/fs/cgroup/work/pids.max && cat /proc/self/cgroup && echo up > /tmp/up; sleep 60";
    let Some(bundle) = unified(&["sh", "-c", script]) else {
        return;
    };
    let bundle = bundle.namespace_once("cgroup").cgroup_mount("rw");
    bundle.up();
    let up = bundle.rootfs().join("tmp/up");
    eventually("it has made its groups", || up.exists());
    assert_eq!(read(&bundle, "work/pids.max"), "10");
    assert_eq!(
        read(&bundle, "cgroup.procs"),
        "",
        "nobody is in the group itself"
    );
    // An exec cannot enter a group that hands controllers down: it goes where init went.
    let said = bundle.exec(&["cat", "/proc/self/cgroup"]);
    assert_eq!(
        (said.code, said.out.as_str()),
        (0, "0::/init"),
        "{}",
        said.err
    );
    let said = bundle.say(&["ps", "--format", "json", &bundle.id]);
    assert!(said.out.contains(&bundle.pid().to_string()), "{}", said.out);
    assert_eq!(bundle.say(&["pause", &bundle.id]).code, 0);
    assert_eq!(bundle.status(), "paused");
    assert_eq!(bundle.say(&["resume", &bundle.id]).code, 0);
    // Delete takes the groups below as well; the bundle's end looks for them.
}

#[test]
fn a_cgroup_namespace_hides_what_is_above() {
    let script = "cat /proc/self/cgroup; ls /sys/fs/cgroup/cgroup.procs; \
                  cat /sys/fs/cgroup/cgroup.procs | wc -l; mkdir /sys/fs/cgroup/x 2>/dev/null || echo read-only";
    let Some(bundle) = unified(&["sh", "-c", script]) else {
        return;
    };
    let bundle = bundle.namespace_once("cgroup").cgroup_mount("ro");
    let out = bundle.output();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], "0::/");
    assert_eq!(lines[1], "/sys/fs/cgroup/cgroup.procs");
    assert_eq!(lines.last(), Some(&"read-only"));
}

#[test]
fn a_group_in_use_is_not_taken() {
    let Some(first) = unified(&["sleep", "60"]) else {
        return;
    };
    first.up();
    let Some(second) = unified(&["true"]) else {
        return;
    };
    let second = second.set("/linux/cgroupsPath", json!(format!("/{}", first.id)));
    let said = second.create();
    assert_eq!(said.code, 1);
    assert!(
        said.err.contains("container's cgroup is not empty"),
        "{}",
        said.err
    );
    assert_eq!(first.status(), "running", "and nobody in it was harmed");
    let second = second.set("/linux/cgroupsPath", json!("/"));
    assert!(second.create().err.contains("root of the hierarchy"));
    assert_eq!(first.status(), "running");
}

#[test]
fn processes_outside_the_pid_namespace_die_with_the_container() {
    let Some(bundle) = unified(&["sh", "-c", "sleep 300 & sleep 301 & sleep 302 & wait"]) else {
        return;
    };
    let bundle = bundle.without_namespace("pid");
    bundle.up();
    eventually("four processes", || {
        read(&bundle, "cgroup.procs").lines().count() == 4
    });
    assert_eq!(bundle.say(&["delete", "--force", &bundle.id]).code, 0);
    assert!(!bundle.cgroup("").exists());
}
