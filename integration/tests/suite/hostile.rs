//! Containers that mean harm: their shim and the daemon stay small and answer, their neighbours do not notice.

use std::fs;
use std::time::{Duration, Instant};

use lighter_integration::{
    Client, Container, Daemon, Result, Spec, Subject, eventually, parent_of,
};
use lighter_proto::containerd::services::tasks::v1 as svc;
use lighter_proto::containerd::v1::types::Status;
use serde_json::json;

use crate::limits::limited;
use crate::run::ready;

/// Execs timed for a latency.
const SAMPLES: usize = 7;

/// Most that a hostile container may add to its shim's memory, in KiB.
const GROWTH_KIB: u64 = 8 * 1024;

/// A task whose stdout and stderr go to `out` (a URI or a path).
async fn start(
    client: &Client,
    top: &str,
    id: &str,
    spec: &Spec,
    out: &str,
) -> Result<(Container, u32)> {
    let container = client.create(id, top, spec).await?;
    let mounts = lighter_proto::containerd::services::snapshots::v1::MountsRequest {
        snapshotter: "overlayfs".into(),
        key: id.to_owned(),
    };
    let request = svc::CreateTaskRequest {
        container_id: id.to_owned(),
        rootfs: client.snapshots().mounts(mounts).await?.into_inner().mounts,
        stdout: out.to_owned(),
        stderr: out.to_owned(),
        ..Default::default()
    };
    let pid = client.tasks().create(request).await?.into_inner().pid;
    client.start(id, "").await?;
    Ok((container, pid))
}

fn resident_kib(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let value = line.and_then(|line| line.split_whitespace().next());
    Ok(value.unwrap_or_default().parse()?)
}

/// Processor time a process has used, in clock ticks of 10 ms.
fn ticks(pid: u32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after = stat.rsplit(')').next().unwrap_or_default();
    let fields: Vec<_> = after.split_whitespace().collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

/// Median time of an exec of `true` in a container.
async fn exec_latency(client: &Client, id: &str, spec: &Spec, prefix: &str) -> Result<Duration> {
    let mut times = Vec::new();
    for n in 0..SAMPLES {
        let exec = format!("{prefix}-{n}");
        let begun = Instant::now();
        client
            .exec(id, &exec, &spec.process(&["true"]), None)
            .await?;
        anyhow::ensure!(client.wait(id, &exec).await?.status == 0, "{exec} failed");
        times.push(begun.elapsed());
        let request = svc::DeleteProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec,
        };
        client.tasks().delete_process(request).await?;
    }
    times.sort();
    Ok(times[SAMPLES / 2])
}

/// Runs a hostile container beside a quiet one and returns it with its shim's pid, after asserting that the neighbour's
/// execs take about as long as before and the hostile shim has not grown.
async fn beside_a_neighbour(
    daemon: &Daemon,
    client: &Client,
    top: &str,
    script: &str,
    out: &str,
) -> Result<(Container, Container, u32)> {
    let quiet = Spec::new(daemon.namespace(), "quiet", &["sleep", "1000"]);
    let (neighbour, _) = start(client, top, "quiet", &quiet, "").await?;
    let usual = exec_latency(client, "quiet", &quiet, "before").await?;
    let spec = limited(
        Spec::new(daemon.namespace(), "hostile", &["sh", "-c", script]),
        &json!({
            "pids": {"limit": 100}, "memory": {"limit": 33_554_432, "swap": 33_554_432},
            "cpu": {"quota": 50_000, "period": 100_000}
        }),
    );
    let (hostile, pid) = start(client, top, "hostile", &spec, out).await?;
    let shim = u32::try_from(parent_of(pid)?)?;
    let small = resident_kib(shim)?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let beside = exec_latency(client, "quiet", &quiet, "during").await?;
    assert!(
        beside < usual * 10 + Duration::from_millis(300),
        "an exec of the neighbour takes {beside:?} instead of {usual:?}"
    );
    let grown = resident_kib(shim)?.saturating_sub(small);
    assert!(grown < GROWTH_KIB, "the shim has grown by {grown} KiB");
    Ok((hostile, neighbour, shim))
}

async fn end(daemon: Daemon, client: &Client, containers: [&Container; 2]) -> Result {
    for container in containers {
        client.destroy(container).await?;
    }
    daemon.finish().await
}

#[tokio::test]
async fn a_fork_bomb_ends_with_its_container() -> Result {
    let (daemon, client, _, top) = ready().await?;
    // A shell gives up when it cannot fork; this does not.
    let bomb = r#"exec busybox awk 'BEGIN { while (1) system("sleep 1 & sleep 1 & sleep 1 &") }'"#;
    let (hostile, quiet, _) = beside_a_neighbour(&daemon, &client, &top, bomb, "").await?;
    client.kill("hostile", "", 9).await?;
    assert_eq!(client.wait("hostile", "").await?.status, 137);
    end(daemon, &client, [&hostile, &quiet]).await
}

#[tokio::test]
async fn filled_memory_costs_only_its_container() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let fill = "while :; do tail -c 150000000 /dev/zero; head -c 60000000 /dev/zero > /run/x; done";
    let (hostile, quiet, _) = beside_a_neighbour(&daemon, &client, &top, fill, "").await?;
    // Its shell may have been the one that the kernel chose.
    let _ = client.kill("hostile", "", 9).await;
    client.wait("hostile", "").await?;
    end(daemon, &client, [&hostile, &quiet]).await
}

#[tokio::test]
async fn flooded_output_fills_neither_memory_nor_time() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let flood = "yes & yes >&2 & cat /dev/urandom";
    let (hostile, quiet, _) =
        beside_a_neighbour(&daemon, &client, &top, flood, "file:///dev/null").await?;
    client.kill("hostile", "", 9).await?;
    assert_eq!(client.wait("hostile", "").await?.status, 137);
    end(daemon, &client, [&hostile, &quiet]).await
}

#[tokio::test]
async fn output_that_nobody_reads_stops_only_its_writer() -> Result {
    if Subject::of_run() == Subject::Containerd {
        eprintln!("skipped: the reference's shim waits for a reader");
        return Ok(());
    }
    let (daemon, client, _, top) = ready().await?;
    let fifo = daemon.dir().join("unread");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600))?;
    let fifo = fifo.display().to_string();
    let (hostile, quiet, shim) =
        beside_a_neighbour(&daemon, &client, &top, "yes; sleep 1000", &fifo).await?;
    let before = ticks(shim)?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(
        ticks(shim)? - before < 20,
        "the shim waits without spinning"
    );
    client.kill("hostile", "", 9).await?;
    assert_eq!(client.wait("hostile", "").await?.status, 137);
    end(daemon, &client, [&hostile, &quiet]).await
}

#[tokio::test]
async fn closed_streams_keep_nobody_busy() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let log = format!("file://{}", daemon.dir().join("log").display());
    let close = "exec <&- >&- 2>&-; while :; do sleep 1; done";
    let (hostile, quiet, shim) = beside_a_neighbour(&daemon, &client, &top, close, &log).await?;
    let before = ticks(shim)?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(
        ticks(shim)? - before < 20,
        "the shim waits without spinning"
    );
    assert_eq!(client.task("hostile", "").await?.status(), Status::Running);
    end(daemon, &client, [&hostile, &quiet]).await
}

#[tokio::test]
async fn signals_are_ignored_but_the_last() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let script = "trap '' HUP INT TERM USR1 USR2 QUIT; while :; do sleep 0.05; done";
    let (hostile, quiet, _) = beside_a_neighbour(&daemon, &client, &top, script, "").await?;
    for signal in [1, 2, 15, 10, 12, 3] {
        client.kill("hostile", "", signal).await?;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(client.task("hostile", "").await?.status(), Status::Running);
    client.kill("hostile", "", 9).await?;
    assert_eq!(client.wait("hostile", "").await?.status, 137);
    let gone = eventually("the exit is seen", async || {
        Ok((client.task("hostile", "").await?.status() == Status::Stopped).then_some(()))
    });
    gone.await?;
    end(daemon, &client, [&hostile, &quiet]).await
}
