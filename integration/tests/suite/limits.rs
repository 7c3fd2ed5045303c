//! Control groups as a client sees them: limits, figures, out-of-memory kills, the freezer, devices.
//!
//! The same on cgroup v1 and v2; `make test-vm` runs it on a v2 kernel.

use std::fs;
use std::path::{Path, PathBuf};

use lighter_integration::{Client, Container, Daemon, Result, Spec, Subject, eventually};
use lighter_proto::any;
use lighter_proto::containerd::events::{TaskExit, TaskOom};
use lighter_proto::containerd::services::tasks::v1 as svc;
use lighter_proto::containerd::v1::types::Status;
use lighter_proto::io::containerd::cgroups;
use serde_json::{Value, json};

use crate::run::ready;

/// Whether the machine has cgroup v2 alone.
fn is_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// A file of a container's group: its controller and name on v1, its name on v2.
fn file(daemon: &Daemon, id: &str, v1: (&str, &str), v2: &str) -> PathBuf {
    let root = Path::new("/sys/fs/cgroup");
    let group = Path::new(daemon.namespace()).join(id);
    if is_v2() {
        root.join(group).join(v2)
    } else {
        root.join(v1.0).join(group).join(v1.1)
    }
}

fn text(path: &Path) -> Result<String> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(error) => anyhow::bail!("{}: {error}", path.display()),
    }
}

/// The value of `key` in a file of `key value` lines, or of a file with one number.
fn figure(path: &Path, key: &str) -> Result<u64> {
    let text = text(path)?;
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let value = line.ok_or_else(|| anyhow::anyhow!("no {key} in {text}"))?;
    Ok(value.trim().parse()?)
}

pub(crate) fn limited(mut spec: Spec, resources: &Value) -> Spec {
    for (key, value) in resources.as_object().into_iter().flatten() {
        spec.0["linux"]["resources"][key] = value.clone();
    }
    spec
}

async fn start(client: &Client, top: &str, id: &str, spec: &Spec) -> Result<(Container, u32)> {
    let container = client.create(id, top, spec).await?;
    let pid = client.create_task(&container, None).await?;
    client.start(id, "").await?;
    Ok((container, pid))
}

#[tokio::test]
async fn limits_are_set_changed_and_hold() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let resources = json!({
        "memory": {"limit": 67_108_864}, "pids": {"limit": 20},
        "cpu": {"shares": 512, "quota": 50_000, "period": 100_000}
    });
    let spec = limited(
        Spec::new(daemon.namespace(), "tight", &["sleep", "1000"]),
        &resources,
    );
    let (container, _) = start(&client, &top, "tight", &spec).await?;
    let memory = file(
        &daemon,
        "tight",
        ("memory", "memory.limit_in_bytes"),
        "memory.max",
    );
    let pids = file(&daemon, "tight", ("pids", "pids.max"), "pids.max");
    let cpu = file(&daemon, "tight", ("cpu", "cpu.cfs_quota_us"), "cpu.max");
    assert_eq!(text(&memory)?, "67108864");
    assert_eq!(text(&pids)?, "20");
    assert!(text(&cpu)?.starts_with("50000"));

    let log = daemon.dir().join("forks.log");
    let script = "for i in $(seq 40); do sleep 5 & done; wait";
    let process = spec.process(&["sh", "-c", script]);
    client.exec("tight", "forks", &process, Some(&log)).await?;
    client.wait("tight", "forks").await?;
    let said = fs::read_to_string(&log)?;
    assert!(said.contains("can't fork"), "{said}");

    let resources = json!({"memory": {"limit": 134_217_728}, "pids": {"limit": 30}});
    let request = svc::UpdateTaskRequest {
        container_id: "tight".into(),
        resources: Some(any::pack_json(any::LINUX_RESOURCES, &resources)?),
        ..Default::default()
    };
    client.tasks().update(request).await?;
    assert_eq!(
        (text(&memory)?, text(&pids)?),
        ("134217728".into(), "30".into())
    );
    client.destroy(&container).await?;
    daemon.finish().await
}

async fn metrics(client: &Client, id: &str) -> Result<prost_types::Any> {
    let request = svc::MetricsRequest {
        filters: vec![format!("id=={id}")],
    };
    let metrics = client.tasks().metrics(request).await?.into_inner().metrics;
    anyhow::ensure!(metrics.len() == 1, "metrics of one task: {metrics:?}");
    let data = metrics.into_iter().next().and_then(|metric| metric.data);
    data.ok_or_else(|| anyhow::anyhow!("a metric without data"))
}

#[tokio::test]
async fn metrics_are_those_of_the_files() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let script = "head -c 5000000 /dev/zero > /tmp/file; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; \
                  echo done > /run/done; sleep 1000";
    let resources = json!({"memory": {"limit": 67_108_864}, "pids": {"limit": 20}});
    let spec = limited(
        Spec::new(daemon.namespace(), "counted", &["sh", "-c", script]),
        &resources,
    );
    let (container, pid) = start(&client, &top, "counted", &spec).await?;
    let done = format!("/proc/{pid}/root/run/done");
    eventually("the work is done", async || {
        Ok(Path::new(&done).exists().then_some(()))
    })
    .await?;
    // Frozen, the figures stand still.
    let id = "counted".to_owned();
    client
        .tasks()
        .pause(svc::PauseTaskRequest {
            container_id: id.clone(),
        })
        .await?;
    let at = |v1, v2| file(&daemon, "counted", v1, v2);
    let data = metrics(&client, "counted").await?;
    let current = at(("pids", "pids.current"), "pids.current");
    if is_v2() {
        let found: cgroups::v2::Metrics = any::unpack(&data)?;
        let (cpu, memory) = (
            found.cpu.unwrap_or_default(),
            found.memory.unwrap_or_default(),
        );
        let none = ("", "");
        assert_eq!(
            cpu.usage_usec,
            figure(&at(none, "cpu.stat"), "usage_usec ")?
        );
        assert_eq!(cpu.user_usec, figure(&at(none, "cpu.stat"), "user_usec ")?);
        assert!(cpu.usage_usec > 1000 && cpu.psi.is_some(), "{cpu:?}");
        assert_eq!(memory.usage, figure(&at(none, "memory.current"), "")?);
        assert_eq!(memory.usage_limit, 67_108_864);
        assert_eq!(memory.file, figure(&at(none, "memory.stat"), "file ")?);
        assert_eq!(memory.anon, figure(&at(none, "memory.stat"), "anon ")?);
        assert_eq!(
            memory.pgfault,
            figure(&at(none, "memory.stat"), "pgfault ")?
        );
        assert!(memory.anon > 0 && memory.pgfault > 0, "{memory:?}");
        assert!(memory.swap_limit > 0, "no swap limit was set: {memory:?}");
        let pids = found.pids.unwrap_or_default();
        assert_eq!((pids.current, pids.limit), (figure(&current, "")?, 20));
        assert_eq!(found.memory_events.unwrap_or_default().oom_kill, 0);
    } else {
        let found: cgroups::v1::Metrics = any::unpack(&data)?;
        let memory = found.memory.unwrap_or_default();
        let usage = memory.usage.unwrap_or_default();
        let cpu = found.cpu.and_then(|cpu| cpu.usage).unwrap_or_default();
        assert_eq!(
            cpu.total,
            figure(&at(("cpuacct", "cpuacct.usage"), ""), "")?
        );
        assert_eq!(cpu.per_cpu.iter().sum::<u64>(), cpu.total);
        assert_eq!(usage.limit, 67_108_864);
        assert_eq!(
            usage.usage,
            figure(&at(("memory", "memory.usage_in_bytes"), ""), "")?
        );
        assert_eq!(
            memory.rss,
            figure(&at(("memory", "memory.stat"), ""), "rss ")?
        );
        let pids = found.pids.unwrap_or_default();
        assert_eq!((pids.current, pids.limit), (figure(&current, "")?, 20));
    }
    client
        .tasks()
        .resume(svc::ResumeTaskRequest { container_id: id })
        .await?;
    client.destroy(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn a_kill_for_want_of_memory_is_told_before_the_exit() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let mut events = crate::events::subscribe(&client, &daemon).await;
    let spec = limited(
        Spec::new(
            daemon.namespace(),
            "greedy",
            &["tail", "-c", "150000000", "/dev/zero"],
        ),
        &json!({"memory": {"limit": 33_554_432, "swap": 33_554_432}}),
    );
    let (container, _) = start(&client, &top, "greedy", &spec).await?;
    assert_eq!(client.wait("greedy", "").await?.status, 137);
    let mut kills = 0;
    loop {
        let envelope = events.next().await?;
        let event = envelope.event.as_ref().expect("has an event");
        match envelope.topic.as_str() {
            "/tasks/oom" => {
                assert_eq!(any::unpack::<TaskOom>(event)?.container_id, "greedy");
                kills += 1;
            }
            "/tasks/exit" => {
                assert_eq!(any::unpack::<TaskExit>(event)?.exit_status, 137);
                break;
            }
            _ => {}
        }
    }
    // The reference of this generation tells it when it gets to it, or not at all.
    if daemon.subject() == Subject::Lighter {
        assert_eq!(kills, 1, "out-of-memory events before the exit");
    }
    client.destroy(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn a_paused_task_stands_still() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let mut events = crate::events::subscribe(&client, &daemon).await;
    let script = "i=0; while :; do i=$((i+1)); echo $i > /run/count; done";
    let spec = Spec::new(daemon.namespace(), "counter", &["sh", "-c", script]);
    let (container, pid) = start(&client, &top, "counter", &spec).await?;
    let count = format!("/proc/{pid}/root/run/count");
    let moved = async |from: &str| {
        eventually("it counts", async || {
            Ok(fs::read_to_string(&count)
                .ok()
                .filter(|now| now != from && !now.is_empty()))
        })
        .await
    };
    moved("").await?;
    let container_id = "counter".to_owned();
    client
        .tasks()
        .pause(svc::PauseTaskRequest {
            container_id: container_id.clone(),
        })
        .await?;
    assert_eq!(client.task("counter", "").await?.status(), Status::Paused);
    let before = fs::read_to_string(&count)?;
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert_eq!(fs::read_to_string(&count)?, before);
    client
        .tasks()
        .resume(svc::ResumeTaskRequest {
            container_id: container_id.clone(),
        })
        .await?;
    assert_eq!(client.task("counter", "").await?.status(), Status::Running);
    moved(&before).await?;
    // Paused, it can still be killed and deleted.
    client
        .tasks()
        .pause(svc::PauseTaskRequest { container_id })
        .await?;
    client.kill("counter", "", 9).await?;
    assert_eq!(client.wait("counter", "").await?.status, 137);
    let mut seen = Vec::new();
    while seen.last().map(String::as_str) != Some("/tasks/exit") {
        seen.push(events.next().await?.topic);
    }
    let freezer: Vec<_> = seen
        .iter()
        .filter(|topic| matches!(topic.as_str(), "/tasks/paused" | "/tasks/resumed"))
        .collect();
    assert_eq!(
        freezer[..3],
        ["/tasks/paused", "/tasks/resumed", "/tasks/paused"]
    );
    client.destroy(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn devices_without_a_rule_are_refused() -> Result {
    if Subject::of_run() == Subject::Containerd {
        eprintln!("skipped: runc of Debian lets the node be read here");
        return Ok(());
    }
    let (daemon, client, _, top) = ready().await?;
    let script =
        "busybox mknod /tmp/kmsg c 1 11 && head -c1 /dev/zero | wc -c && head -c1 /tmp/kmsg";
    let mut spec = Spec::new(daemon.namespace(), "nodes", &["sh", "-c", script]);
    for set in ["bounding", "effective", "permitted"] {
        spec.0["process"]["capabilities"][set] = json!(["CAP_MKNOD"]);
    }
    let (exit, output) = client.run("nodes", &top, &spec, daemon.dir()).await?;
    assert!(output.starts_with("1\n"), "{output}");
    assert!(output.contains("Operation not permitted"), "{output}");
    assert_ne!(exit.status, 0);
    daemon.finish().await
}

#[tokio::test]
async fn an_exec_is_in_the_group_of_its_task() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let spec = Spec::new(daemon.namespace(), "group", &["sleep", "1000"]);
    let (container, pid) = start(&client, &top, "group", &spec).await?;
    let pid = client
        .exec("group", "e", &spec.process(&["sleep", "1000"]), None)
        .await
        .map(|exec| (pid, exec))?;
    let groups = |pid: u32| fs::read_to_string(format!("/proc/{pid}/cgroup"));
    assert_eq!(groups(pid.0)?, groups(pid.1)?);
    let own = format!("/{}/group", daemon.namespace());
    assert!(groups(pid.1)?.contains(&own), "{}", groups(pid.1)?);
    client.destroy(&container).await?;
    daemon.finish().await
}
