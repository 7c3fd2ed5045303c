//! Containers from create to delete.

use lighter_proto::containerd::runc::v1::ProcessDetails;
use lighter_proto::containerd::task::v3 as api;
use lighter_proto::containerd::types::Mount;
use lighter_proto::containerd::v1::types::Status;
use lighter_proto::errdefs::ErrorKind;
use lighter_proto::io::containerd::cgroups::{v1, v2};

use crate::harness::{Daemon, alive, can_run, eventually};

/// Runs a test once per runtime.
macro_rules! for_each_runtime {
    ($($name:ident),* $(,)?) => {
        mod builtin { $(#[tokio::test] async fn $name() {
            if crate::harness::can_run() { super::$name("").await; }
        })* }
        mod runc { $(#[tokio::test] async fn $name() {
            if crate::harness::can_run() { super::$name("runc").await; }
        })* }
    };
}
pub(crate) use for_each_runtime;

for_each_runtime!(
    a_container_runs_and_leaves_nothing,
    execs_run_beside_init,
    a_failed_create_leaves_and_tells_nothing,
    pause_stops_and_resume_goes_on,
    metrics_and_pids_are_those_of_the_container,
    limits_can_be_changed,
    a_paused_container_can_be_killed,
    the_root_is_mounted_and_unmounted,
    what_init_leaves_in_a_shared_pid_namespace_dies,
    many_containers_and_execs_leave_no_growth,
    errors_have_their_code_and_text,
);

async fn a_container_runs_and_leaves_nothing(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = daemon
        .shim("run", &["/bin/busybox", "sh", "-c", "exit 7"])
        .await;
    shim.run().await;
    assert_eq!(shim.wait("").await, 7);
    let state = shim.state("").await.unwrap();
    assert_eq!(
        (state.status, state.exit_status),
        (i32::from(Status::Stopped), 7)
    );
    let deleted = shim.delete("").await.unwrap();
    assert_eq!((deleted.exit_status, deleted.pid), (7, state.pid));
    assert_eq!(shim.state("").await.unwrap_err().kind, ErrorKind::NotFound);
    shim.shutdown().await;
    shim.is_gone().await;
    assert_eq!(
        daemon.seen("run"),
        [
            "/tasks/create",
            "/tasks/start",
            "/tasks/exit run 7",
            "/tasks/delete"
        ]
    );
}

async fn execs_run_beside_init(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = daemon
        .shim("execs", &["/bin/busybox", "sleep", "1000"])
        .await;
    shim.run().await;
    shim.add_exec("e1", &["/bin/busybox", "sh", "-c", "exit 3"])
        .await
        .unwrap();
    let twice = shim.add_exec("e1", &["/bin/busybox"]).await.unwrap_err();
    assert_eq!(twice.kind, ErrorKind::AlreadyExists);
    assert_eq!(
        shim.kill("e1", 9).await.unwrap_err().kind,
        ErrorKind::FailedPrecondition
    );
    shim.start("e1").await.unwrap();
    assert_eq!(shim.wait("e1").await, 3);
    assert_eq!(
        shim.kill("e1", 9).await.unwrap_err().kind,
        ErrorKind::NotFound
    );
    assert_eq!(shim.delete("e1").await.unwrap().exit_status, 3);
    assert_eq!(
        shim.state("e1").await.unwrap_err().kind,
        ErrorKind::NotFound
    );
    shim.add_exec("e2", &["/bin/nope"]).await.unwrap();
    let error = shim.start("e2").await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unknown);
    assert!(
        error.message.starts_with("OCI runtime exec failed: "),
        "{}",
        error.message
    );
    assert!(
        error.message.contains("no such file or directory"),
        "{}",
        error.message
    );
    shim.delete("e2").await.unwrap();
    assert_eq!(
        shim.state("").await.unwrap().status,
        i32::from(Status::Running)
    );
    shim.finish().await;
}

async fn a_failed_create_leaves_and_tells_nothing(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = daemon.shim("bad", &["/bin/nope"]).await;
    let error = shim.create(&shim.request()).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Unknown);
    assert!(
        error.message.starts_with("OCI runtime create failed: "),
        "{}",
        error.message
    );
    assert!(
        error.message.contains("no such file or directory"),
        "{}",
        error.message
    );
    assert_eq!(shim.state("").await.unwrap_err().kind, ErrorKind::NotFound);
    // The same id can be used at once.
    daemon.make_bundle("bad", &["/bin/busybox", "true"], |_| {});
    shim.run().await;
    assert_eq!(shim.wait("").await, 0);
    shim.finish().await;
    assert_eq!(daemon.seen("bad")[0], "/tasks/create");
    assert_eq!(daemon.seen("bad").len(), 4);
}

async fn pause_stops_and_resume_goes_on(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = daemon
        .shim("pause", &["/bin/busybox", "sleep", "1000"])
        .await;
    shim.run().await;
    let pause = api::PauseRequest { id: "pause".into() };
    let resume = api::ResumeRequest { id: "pause".into() };
    let _: () = shim.call("Pause", &pause).await.unwrap();
    assert_eq!(
        shim.state("").await.unwrap().status,
        i32::from(Status::Paused)
    );
    let refused = shim.add_exec("e", &["/bin/busybox"]).await.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::FailedPrecondition);
    let _: () = shim.call("Resume", &resume).await.unwrap();
    assert_eq!(
        shim.state("").await.unwrap().status,
        i32::from(Status::Running)
    );
    shim.finish().await;
    let seen = daemon.seen("pause");
    assert_eq!(seen[2..4], ["/tasks/paused", "/tasks/resumed"]);
}

async fn metrics_and_pids_are_those_of_the_container(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = daemon
        .shim("stats", &["/bin/busybox", "sleep", "1000"])
        .await;
    let pid = shim.run().await;
    shim.add_exec("e", &["/bin/busybox", "sleep", "1000"])
        .await
        .unwrap();
    let exec_pid = shim.start("e").await.unwrap();
    let request = api::PidsRequest { id: "stats".into() };
    let pids: api::PidsResponse = shim.call("Pids", &request).await.unwrap();
    assert_eq!(pids.processes.len(), 2);
    let exec = pids
        .processes
        .iter()
        .find(|process| process.pid == exec_pid)
        .unwrap();
    let details: ProcessDetails = lighter_proto::any::unpack(exec.info.as_ref().unwrap()).unwrap();
    assert_eq!(details.exec_id, "e");
    assert!(pids.processes.iter().any(|process| process.pid == pid));
    let request = api::StatsRequest { id: "stats".into() };
    let stats: api::StatsResponse = shim.call("Stats", &request).await.unwrap();
    let any = stats.stats.unwrap();
    let (processes, memory, cpu) = match any.type_url.as_str() {
        "io.containerd.cgroups.v1.Metrics" => {
            let metrics: v1::Metrics = lighter_proto::any::unpack(&any).unwrap();
            let usage = metrics.memory.unwrap().usage.unwrap().usage;
            (
                metrics.pids.unwrap().current,
                usage,
                metrics.cpu.unwrap().usage.unwrap().total,
            )
        }
        _ => {
            let metrics: v2::Metrics = lighter_proto::any::unpack(&any).unwrap();
            (
                metrics.pids.unwrap().current,
                metrics.memory.unwrap().usage,
                metrics.cpu.unwrap().usage_usec,
            )
        }
    };
    assert_eq!(processes, 2);
    assert!(memory > 0 && cpu > 0);
    shim.finish().await;
}

async fn a_paused_container_can_be_killed(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = daemon
        .shim("frozen", &["/bin/busybox", "sleep", "1000"])
        .await;
    shim.run().await;
    let pause = api::PauseRequest {
        id: "frozen".into(),
    };
    let _: () = shim.call("Pause", &pause).await.unwrap();
    shim.kill("", 9).await.unwrap();
    assert_eq!(shim.wait("").await, 137);
    shim.finish().await;
}

async fn the_root_is_mounted_and_unmounted(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    // Enough layers that their paths do not fit one page of options: the other way of mounting.
    for layers in [1, 100] {
        let id = format!("mounted{layers}");
        let script = "test -e /mark0 && test -e /mark$1 && echo x >/written";
        let last = (layers - 1).to_string();
        let shim = daemon
            .shim(&id, &["/bin/busybox", "sh", "-c", script, "sh", &last])
            .await;
        let base = daemon
            .dir
            .path()
            .join(format!("layers-{layers}-of-a-snapshotter"));
        let rootfs = shim.bundle.join("rootfs");
        std::fs::create_dir_all(&base).unwrap();
        std::fs::rename(&rootfs, base.join("bottom")).unwrap();
        std::fs::create_dir(&rootfs).unwrap();
        let mut lower = Vec::new();
        for layer in 0..layers {
            let dir = base.join(format!("{layer:030}"));
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join(format!("mark{layer}")), "").unwrap();
            lower.push(dir.display().to_string());
        }
        lower.push(base.join("bottom").display().to_string());
        let (upper, work) = (base.join("upper"), base.join("work"));
        std::fs::create_dir_all(&upper).unwrap();
        std::fs::create_dir_all(&work).unwrap();
        let overlay = Mount {
            r#type: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                format!("workdir={}", work.display()),
                format!("upperdir={}", upper.display()),
                format!("lowerdir={}", lower.join(":")),
            ],
            ..Mount::default()
        };
        let request = api::CreateTaskRequest {
            rootfs: vec![overlay],
            ..shim.request()
        };
        shim.create(&request).await.unwrap();
        shim.start("").await.unwrap();
        assert_eq!(shim.wait("").await, 0);
        shim.delete("").await.unwrap();
        assert!(upper.join("written").exists());
        // A root that cannot be mounted leaves nothing.
        let mut bad = request.clone();
        bad.rootfs[0].options[2] = "lowerdir=/no/such/layer".into();
        let error = shim.create(&bad).await.unwrap_err();
        assert!(error.message.contains("mount"), "{}", error.message);
        shim.finish().await;
    }
}

async fn what_init_leaves_in_a_shared_pid_namespace_dies(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let script = "busybox sleep 1000 & busybox sleep 1001 & echo $! >/tmp/pid; exit 3";
    daemon.make_bundle("shared", &["/bin/busybox", "sh", "-c", script], |spec| {
        spec["linux"]["namespaces"] = serde_json::json!([{"type": "mount"}]);
    });
    let shim = daemon.connect("shared", &daemon.start("shared")).await;
    shim.run().await;
    assert_eq!(shim.wait("").await, 3);
    let file = daemon.bundle("shared").join("rootfs/tmp/pid");
    let left: u32 = std::fs::read_to_string(file)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    eventually("end of what was left", || (!alive(left)).then_some(())).await;
    shim.delete("").await.unwrap();
    shim.finish().await;
}

/// Anonymous memory in KiB, and open descriptors.
fn weight(pid: u32) -> (u64, usize) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let anon = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .unwrap();
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count();
    (anon.trim().trim_end_matches(" kB").parse().unwrap(), fds)
}

async fn many_containers_and_execs_leave_no_growth(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = daemon
        .shim("many", &["/bin/busybox", "sleep", "1000"])
        .await;
    shim.run().await;
    let mut first = None;
    for round in 0..25 {
        let exec = format!("e{round}");
        shim.add_exec(&exec, &["/bin/busybox", "true"])
            .await
            .unwrap();
        shim.start(&exec).await.unwrap();
        shim.wait(&exec).await;
        shim.delete(&exec).await.unwrap();
        let mut member = daemon
            .connect("member", &format!("unix://{}", shim.socket.display()))
            .await;
        daemon.make_bundle("member", &["/bin/busybox", "true"], |_| {});
        member.pid = shim.pid;
        member.run().await;
        member.wait("").await;
        member.delete("").await.unwrap();
        drop(member);
        if round == 4 {
            first = Some(weight(shim.pid));
        }
    }
    // The connection of the last round may still be closing.
    let (anon, fds) = first.unwrap();
    eventually("as many descriptors as before", || {
        (weight(shim.pid).1 <= fds).then_some(())
    })
    .await;
    let now = weight(shim.pid).0;
    assert!(now <= anon + 128, "{anon} KiB grew to {now} KiB");
    shim.finish().await;
}

async fn limits_can_be_changed(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = daemon
        .shim("update", &["/bin/busybox", "sleep", "1000"])
        .await;
    shim.run().await;
    let resources = serde_json::json!({"pids": {"limit": 77}});
    let resources =
        lighter_proto::any::pack_json(lighter_proto::any::LINUX_RESOURCES, &resources).unwrap();
    let request = api::UpdateTaskRequest {
        id: "update".into(),
        resources: Some(resources),
        ..api::UpdateTaskRequest::default()
    };
    let _: () = shim.call("Update", &request).await.unwrap();
    let request = api::StatsRequest {
        id: "update".into(),
    };
    let stats: api::StatsResponse = shim.call("Stats", &request).await.unwrap();
    let any = stats.stats.unwrap();
    let limit = if any.type_url.contains("v1") {
        lighter_proto::any::unpack::<v1::Metrics>(&any)
            .unwrap()
            .pids
            .unwrap()
            .limit
    } else {
        lighter_proto::any::unpack::<v2::Metrics>(&any)
            .unwrap()
            .pids
            .unwrap()
            .limit
    };
    assert_eq!(limit, 77);
    shim.finish().await;
}

async fn errors_have_their_code_and_text(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = daemon.shim("errors", &["/bin/busybox", "true"]).await;
    let unknown = shim.start("").await.unwrap_err();
    assert_eq!(unknown.kind, ErrorKind::NotFound);
    assert_eq!(unknown.message, "container not created: not found");
    assert_eq!(shim.connect_rpc().await.task_pid, 0);
    let escape = api::CreateTaskRequest {
        id: "../x".into(),
        ..shim.request()
    };
    assert_eq!(
        shim.create(&escape).await.unwrap_err().kind,
        ErrorKind::InvalidArgument
    );
    let stream = api::CreateTaskRequest {
        stdout: "npipe:///x".into(),
        ..shim.request()
    };
    assert_eq!(
        shim.create(&stream).await.unwrap_err().kind,
        ErrorKind::InvalidArgument
    );
    let fifo = api::CreateTaskRequest {
        stdout: "/no/such/fifo".into(),
        ..shim.request()
    };
    assert!(
        shim.create(&fifo)
            .await
            .unwrap_err()
            .message
            .contains("/no/such/fifo")
    );
    shim.run().await;
    let again = shim.create(&shim.request()).await.unwrap_err();
    assert_eq!(again.kind, ErrorKind::AlreadyExists);
    shim.wait("").await;
    let finished = shim.kill("", 15).await.unwrap_err();
    assert_eq!(finished.message, "process already finished: not found");
    assert_eq!(
        shim.start("").await.unwrap_err().kind,
        ErrorKind::FailedPrecondition
    );
    shim.finish().await;
}

#[tokio::test]
async fn a_running_container_keeps_its_shim() {
    if !can_run() {
        return;
    }
    let daemon = Daemon::new("").await;
    let shim = daemon
        .shim("keeps", &["/bin/busybox", "sleep", "1000"])
        .await;
    shim.run().await;
    assert_eq!(
        shim.delete("").await.unwrap_err().kind,
        ErrorKind::FailedPrecondition
    );
    shim.shutdown().await;
    assert_eq!(
        shim.state("").await.unwrap().status,
        i32::from(Status::Running)
    );
    shim.finish().await;
}
