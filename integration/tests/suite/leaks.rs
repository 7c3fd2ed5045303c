//! Many containers come and go, and many stay: nothing may grow, and what stays must be small.
//!
//! `LEAK_ROUNDS` and `LEAK_CONTAINERS` (20 and 500 in full) and `IDLE_CONTAINERS` (1,000 in full)
//! scale the work; without them it is what a test run can bear.

use std::fs;
use std::time::Duration;

use lighter_integration::{Client, Daemon, Options, Result, Spec, Subject, eventually};
use lighter_proto::containerd::services::leases::v1 as leases;

use crate::run::ready;

/// Containers that live at the same time.
const AT_ONCE: usize = 8;
/// Growth of the daemon's memory that counts as none: 5 %.
const GROWTH: f64 = 1.05;
/// Containers after which everything that fills once is full.
const FILLED_BY: usize = 1500;
/// What these may still take where fewer have lived before the first figures, in KiB.
const FILLING_KIB: f64 = 4096.0;
/// How long an idle daemon takes to write down what waits and to give its pages back.
const SETTLES: Duration = Duration::from_secs(6);
/// What a thousand idle containers may take with their daemon, in KiB.
const THOUSAND_KIB: f64 = 1024.0 * 1024.0;

fn setting(name: &str, usual: usize) -> usize {
    std::env::var(name)
        .ok()
        .and_then(|value| value.parse().ok())
        .unwrap_or(usual)
}

/// Figures that must not grow.
#[derive(Debug)]
struct Figures {
    /// Memory that no file stands behind: pages of the program come and go as the kernel likes.
    anonymous_kib: f64,
    descriptors: usize,
    threads: usize,
    mounts: usize,
    processes: usize,
}

fn kib(pid: i32, field: &str) -> Result<f64> {
    let table = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = table.lines().find(|line| line.starts_with(field));
    Ok(line
        .and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .unwrap_or_default())
}

fn entries(path: String) -> Result<usize> {
    Ok(fs::read_dir(path)?.count())
}

fn figures(daemon: &Daemon) -> Result<Figures> {
    let pid = daemon.pid()?;
    Ok(Figures {
        anonymous_kib: kib(pid, "Anonymous:")?,
        descriptors: entries(format!("/proc/{pid}/fd"))?,
        threads: entries(format!("/proc/{pid}/task"))?,
        mounts: daemon.mounts(),
        processes: daemon.processes(),
    })
}

async fn live(daemon: &Daemon, client: &Client, top: &str, id: &str) -> Result {
    let spec = Spec::new(daemon.namespace(), id, &["true"]);
    let container = client.create(id, top, &spec).await?;
    client.create_task(&container, None).await?;
    client.start(id, "").await?;
    client.wait(id, "").await?;
    client.delete_task(id).await?;
    client.delete(&container).await?;
    Ok(())
}

async fn round(
    daemon: &Daemon,
    client: &Client,
    top: &str,
    round: usize,
    containers: usize,
) -> Result {
    let workers = (0..AT_ONCE).map(async |worker| -> Result {
        for n in (worker..containers).step_by(AT_ONCE) {
            live(daemon, client, top, &format!("r{round}-{n}")).await?;
        }
        Ok(())
    });
    for done in futures::future::join_all(workers).await {
        done?;
    }
    Ok(())
}

/// Waits until what is cleared away behind answers is gone.
async fn quiet(daemon: &Daemon, before: &Figures) -> Result<Figures> {
    let mut last = None;
    let settled = eventually("everything is gone", async || {
        let now = figures(daemon)?;
        let gone = now.mounts <= before.mounts
            && now.processes <= before.processes
            && now.descriptors <= before.descriptors
            && now.threads <= before.threads;
        last = Some(now);
        Ok(gone.then_some(()))
    })
    .await;
    let now = figures(daemon)?;
    anyhow::ensure!(
        settled.is_ok(),
        "left behind: before {before:?}, after {last:?}"
    );
    Ok(now)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_that_come_and_go_leave_nothing() -> Result {
    if Subject::of_run() == Subject::Containerd {
        eprintln!("skipped: the reference promises no such figures");
        return Ok(());
    }
    let (rounds, containers) = (setting("LEAK_ROUNDS", 4), setting("LEAK_CONTAINERS", 40));
    let collecting = Options {
        collects: true,
        ..Options::default()
    };
    let daemon = Daemon::start_with(Subject::of_run(), &collecting).await?;
    let client = daemon.client().await?;
    // Without it a snapshot could go before its container is there.
    let lease = leases::CreateRequest {
        id: "lives".to_owned(),
        ..leases::CreateRequest::default()
    };
    client.leases().create(lease).await?;
    let client = client.under_lease("lives");
    let (_, top) = client.busybox().await?;
    // Caches, pools and the allocator's arenas fill once.
    let filling = FILLED_BY.div_ceil(containers).min(rounds);
    for n in 0..filling {
        round(&daemon, &client, &top, rounds + 1 + n, containers).await?;
    }
    let rest = if filling * containers < FILLED_BY {
        FILLING_KIB
    } else {
        0.0
    };
    tokio::time::sleep(SETTLES).await;
    let before = figures(&daemon)?;
    for n in 1..=rounds {
        round(&daemon, &client, &top, n, containers).await?;
    }
    quiet(&daemon, &before).await?;
    tokio::time::sleep(SETTLES).await;
    let after = figures(&daemon)?;
    eprintln!("{rounds} times {containers}: before {before:?}, after {after:?}");
    anyhow::ensure!(
        after.anonymous_kib <= before.anonymous_kib * GROWTH + rest,
        "the daemon grew: before {before:?}, after {after:?}"
    );
    daemon.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_idle_containers_fit_into_a_gigabyte() -> Result {
    if Subject::of_run() == Subject::Containerd {
        eprintln!("skipped: the reference promises no such figures");
        return Ok(());
    }
    let count = setting("IDLE_CONTAINERS", 24);
    let (daemon, client, _, top) = ready().await?;
    let empty = kib(daemon.pid()?, "Pss:")?;
    let mut containers = Vec::new();
    let mut pids = Vec::new();
    for n in 0..count {
        let id = format!("idle-{n}");
        let spec = Spec::new(daemon.namespace(), &id, &["sleep", "100000"]);
        let container = client.create(&id, &top, &spec).await?;
        pids.push(client.create_task(&container, None).await?);
        client.start(&id, "").await?;
        containers.push(container);
    }
    let mut sum = kib(daemon.pid()?, "Pss:")? - empty;
    for pid in daemon.process_ids() {
        sum += kib(pid, "Pss:").unwrap_or_default();
    }
    #[allow(clippy::cast_precision_loss, reason = "a few thousand containers")]
    let thousand = empty + sum / count as f64 * 1000.0;
    anyhow::ensure!(
        thousand <= THOUSAND_KIB,
        "{count} idle containers take {sum} KiB: {thousand} KiB a thousand"
    );
    for container in &containers {
        client.destroy(container).await?;
    }
    daemon.finish().await
}
