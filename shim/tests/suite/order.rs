//! The order of events, whatever happens meanwhile.

use lighter_proto::containerd::v1::types::Status;

use crate::harness::{Daemon, Shim};
use crate::lifecycle::for_each_runtime;

for_each_runtime!(
    execs_end_before_init_does,
    killed_before_its_start,
    a_daemon_that_was_away_gets_every_exit,
    out_of_memory_is_told_before_the_exit,
    short_execs_never_end_before_they_start,
);

async fn sleeper(daemon: &Daemon, id: &str) -> Shim {
    let shim = daemon.shim(id, &["/bin/busybox", "sleep", "1000"]).await;
    shim.run().await;
    shim
}

async fn execs_end_before_init_does(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = sleeper(&daemon, "tree").await;
    for exec in ["a", "b", "c"] {
        shim.add_exec(exec, &["/bin/busybox", "sleep", "1000"])
            .await
            .unwrap();
        shim.start(exec).await.unwrap();
    }
    shim.kill("", 9).await.unwrap();
    assert_eq!(shim.wait("").await, 137);
    daemon.wait_event("tree", "/tasks/exit tree 137").await;
    let seen = daemon.seen("tree");
    let exits: Vec<_> = seen
        .iter()
        .filter(|line| line.starts_with("/tasks/exit "))
        .collect();
    assert_eq!(exits.len(), 4, "{seen:?}");
    assert_eq!(exits[3], "/tasks/exit tree 137");
    shim.finish().await;
}

async fn killed_before_its_start(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = daemon.shim("early", &["/bin/busybox", "true"]).await;
    shim.create(&shim.request()).await.unwrap();
    assert_eq!(
        shim.state("").await.unwrap().status,
        i32::from(Status::Created)
    );
    shim.kill("", 9).await.unwrap();
    assert_eq!(shim.wait("").await, 137);
    shim.finish().await;
    assert_eq!(
        daemon.seen("early"),
        ["/tasks/create", "/tasks/exit early 137", "/tasks/delete"]
    );
    // And one that is deleted in that state.
    let shim = daemon.shim("unborn", &["/bin/busybox", "true"]).await;
    shim.create(&shim.request()).await.unwrap();
    assert_eq!(shim.delete("").await.unwrap().exit_status, 137);
    shim.finish().await;
    assert_eq!(
        daemon.seen("unborn"),
        ["/tasks/create", "/tasks/exit unborn 137", "/tasks/delete"]
    );
}

async fn a_daemon_that_was_away_gets_every_exit(runtime: &str) {
    let mut daemon = Daemon::new(runtime).await;
    let shim = sleeper(&daemon, "away").await;
    shim.add_exec("e", &["/bin/busybox", "sleep", "1000"])
        .await
        .unwrap();
    shim.start("e").await.unwrap();
    daemon.wait_event("away", "/tasks/exec-started e").await;
    daemon.die().await;
    shim.kill("e", 15).await.unwrap();
    shim.wait("e").await;
    shim.kill("", 9).await.unwrap();
    shim.wait("").await;
    assert_eq!(daemon.seen("away").len(), 4);
    daemon.listen().await;
    daemon.wait_event("away", "/tasks/exit away 137").await;
    assert_eq!(
        daemon.seen("away")[4..],
        ["/tasks/exit e 143", "/tasks/exit away 137"]
    );
    shim.finish().await;
}

async fn out_of_memory_is_told_before_the_exit(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let command = "x=0123456789abcdef; while :; do x=$x$x; done";
    daemon.make_bundle("oom", &["/bin/busybox", "sh", "-c", command], |spec| {
        spec["linux"]["resources"]["memory"] = serde_json::json!({"limit": 16 << 20});
    });
    let shim = daemon.connect("oom", &daemon.start("oom")).await;
    shim.run().await;
    assert_eq!(shim.wait("").await, 137);
    daemon.wait_event("oom", "/tasks/exit oom 137").await;
    let seen = daemon.seen("oom");
    let oom = seen
        .iter()
        .position(|line| line == "/tasks/oom")
        .expect("an OOM event");
    let exit = seen
        .iter()
        .position(|line| line.starts_with("/tasks/exit"))
        .unwrap();
    assert!(oom < exit, "{seen:?}");
    shim.finish().await;
}

async fn short_execs_never_end_before_they_start(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = sleeper(&daemon, "short").await;
    for number in 0..10 {
        let exec = format!("e{number}");
        shim.add_exec(&exec, &["/bin/busybox", "true"])
            .await
            .unwrap();
        shim.start(&exec).await.unwrap();
    }
    for number in 0..10 {
        let exec = format!("e{number}");
        assert_eq!(shim.wait(&exec).await, 0);
        daemon
            .wait_event("short", &format!("/tasks/exit {exec} 0"))
            .await;
        let seen = daemon.seen("short");
        let at = |line: String| seen.iter().position(|l| *l == line).unwrap();
        assert!(
            at(format!("/tasks/exec-added {exec}")) < at(format!("/tasks/exec-started {exec}"))
        );
        assert!(at(format!("/tasks/exec-started {exec}")) < at(format!("/tasks/exit {exec} 0")));
    }
    shim.finish().await;
}
