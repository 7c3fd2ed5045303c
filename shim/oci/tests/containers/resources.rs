//! Limits: control groups, rlimits, priorities, time.

use std::fs;

use serde_json::json;

use crate::bundle::bundle;

fn v1() -> bool {
    std::path::Path::new("/sys/fs/cgroup/memory").is_dir()
}

#[test]
fn limits_are_written_changed_and_enforced() {
    let Some(bundle) = bundle(&["sleep", "60"]) else {
        return;
    };
    let bundle = bundle.set("/linux/resources", json!({
        "memory": {"limit": 67_108_864}, "pids": {"limit": 20}, "cpu": {"shares": 512, "quota": 50_000, "period": 100_000},
    }));
    bundle.up();
    let read = |controller: &str, v1_file: &str, v2_file: &str| {
        let file = bundle
            .cgroup(controller)
            .join(if v1() { v1_file } else { v2_file });
        fs::read_to_string(&file)
            .unwrap_or_else(|error| panic!("{file:?}: {error}"))
            .trim()
            .to_owned()
    };
    assert_eq!(
        read("memory", "memory.limit_in_bytes", "memory.max"),
        "67108864"
    );
    assert_eq!(read("pids", "pids.max", "pids.max"), "20");
    assert_eq!(
        read("cpu", "cpu.shares", "cpu.weight"),
        if v1() { "512" } else { "20" }
    );
    assert_eq!(
        read("cpu", "cpu.cfs_quota_us", "cpu.max"),
        if v1() { "50000" } else { "50000 100000" }
    );
    let said = bundle.say(&[
        "update",
        "--memory",
        "128m",
        "--pids-limit",
        "30",
        &bundle.id,
    ]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert_eq!(
        read("memory", "memory.limit_in_bytes", "memory.max"),
        "134217728"
    );
    assert_eq!(read("pids", "pids.max", "pids.max"), "30");
    let said = bundle.exec(&["sh", "-c", "for i in $(seq 40); do sleep 5 & done"]);
    assert!(
        said.err.contains("can't fork") || said.err.contains("Resource temporarily unavailable"),
        "{}",
        said.err
    );
    let said = bundle.say(&["events", "--stats", &bundle.id]);
    let event: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(event["data"]["memory"]["usage"]["limit"], 134_217_728_u64);
    assert_eq!(event["data"]["pids"]["limit"], 30);
}

#[test]
fn a_refused_limit_fails_create_and_leaves_nothing() {
    let Some(bundle) = bundle(&["true"]) else {
        return;
    };
    let bundle = bundle.set("/linux/resources", json!({"cpu": {"cpus": "9999"}}));
    let said = bundle.create();
    assert_eq!(said.code, 1);
    assert!(said.err.contains("cpuset.cpus"), "{}", said.err);
}

#[test]
fn pausing_stops_and_resuming_continues() {
    let Some(bundle) = bundle(&["sleep", "60"]) else {
        return;
    };
    bundle.up();
    assert_eq!(bundle.say(&["pause", &bundle.id]).code, 0);
    assert_eq!(bundle.status(), "paused");
    let said = bundle.exec(&["true"]);
    assert!(
        said.err.contains("cannot exec in a paused container"),
        "{}",
        said.err
    );
    assert_eq!(bundle.say(&["resume", &bundle.id]).code, 0);
    assert_eq!(bundle.status(), "running");
    assert!(
        bundle
            .say(&["resume", &bundle.id])
            .err
            .contains("container not paused")
    );
    // A paused one is deleted as well, by force.
    assert_eq!(bundle.say(&["pause", &bundle.id]).code, 0);
    assert_eq!(bundle.say(&["delete", "--force", &bundle.id]).code, 0);
}

#[test]
fn process_limits_and_scores_are_set() {
    let Some(bundle) = bundle(&[
        "sh",
        "-c",
        "ulimit -n; ulimit -c; cat /proc/self/oom_score_adj; cat /proc/self/stat",
    ]) else {
        return;
    };
    let bundle = bundle
        .set("/process/rlimits", json!([
            {"type": "RLIMIT_NOFILE", "soft": 64, "hard": 128}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}
        ]))
        .set("/process/oomScoreAdj", json!(500))
        .set("/process/scheduler", json!({"policy": "SCHED_BATCH", "nice": 5}));
    let out = bundle.output();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(&lines[..3], ["64", "0", "500"]);
    let fields: Vec<&str> = lines[3].split(' ').collect();
    assert_eq!((fields[18], fields[40]), ("5", "3"), "nice and policy");
    let bundle = bundle.set(
        "/process/rlimits",
        json!([{"type": "RLIMIT_PAPER", "soft": 1, "hard": 1}]),
    );
    assert!(bundle.create().err.contains("RLIMIT_PAPER"));
}

#[test]
fn a_time_namespace_has_its_own_clock() {
    let Some(bundle) = bundle(&["cat", "/proc/uptime"]) else {
        return;
    };
    let bundle = bundle.namespace("time").set(
        "/linux/timeOffsets",
        json!({"boottime": {"secs": 1_000_000, "nanosecs": 0}}),
    );
    let uptime: f64 = bundle.output().split(' ').next().unwrap().parse().unwrap();
    assert!(uptime > 1_000_000.0, "{uptime}");
    let own = fs::read_link("/proc/self/ns/time").unwrap();
    assert_eq!(
        own,
        fs::read_link("/proc/self/ns/time_for_children").unwrap()
    );
}
