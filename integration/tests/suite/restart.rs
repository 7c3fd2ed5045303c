//! The daemon and shims die; containers, records and exits do not get lost.

use std::fs;

use lighter_integration::{
    Client, Container, Daemon, Result, Spec, Subject, eventually, parent_of,
};
use lighter_proto::containerd::v1::types::Status;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::run::ready;

/// Clients that start or end tasks of a crowd.
const STARTERS: usize = 8;

/// Starts a container that ends with code 5 on SIGTERM.
async fn start(client: &Client, daemon: &Daemon, top: &str, id: &str) -> Result<(Container, u32)> {
    let script = "trap 'exit 5' TERM; while :; do sleep 0.05; done";
    let spec = Spec::new(daemon.namespace(), id, &["sh", "-c", script]);
    let container = client.create(id, top, &spec).await?;
    let pid = client.create_task(&container, None).await?;
    client.start(id, "").await?;
    Ok((container, pid))
}

#[tokio::test]
async fn containers_outlive_a_killed_daemon_and_are_found_again() -> Result {
    let (mut daemon, client, _, top) = ready().await?;
    let mut containers = Vec::new();
    for n in 0..20 {
        containers.push(start(&client, &daemon, &top, &format!("c{n}")).await?);
    }
    daemon.kill()?;
    for (_, pid) in &containers {
        kill(Pid::from_raw(i32::try_from(*pid)?), None)?;
    }
    // Two end while nobody looks.
    if daemon.subject() == Subject::Lighter {
        for (_, pid) in &containers[..2] {
            kill(Pid::from_raw(i32::try_from(*pid)?), Signal::SIGTERM)?;
        }
    }
    daemon.boot().await?;
    let client = daemon.client().await?;
    let live = if daemon.subject() == Subject::Lighter {
        2..
    } else {
        0..
    };
    for (container, pid) in &containers[live] {
        let task = eventually("the task is found", async || {
            Ok(client.task(&container.id, "").await.ok())
        })
        .await?;
        assert_eq!(
            (task.status(), task.pid),
            (Status::Running, *pid),
            "{}",
            container.id
        );
        let process = Spec::new(daemon.namespace(), "x", &[]).process(&["sh", "-c", "exit 4"]);
        client.exec(&container.id, "again", &process, None).await?;
        assert_eq!(client.wait(&container.id, "again").await?.status, 4);
    }
    if daemon.subject() == Subject::Lighter {
        for (container, _) in &containers[..2] {
            assert_eq!(
                client.wait(&container.id, "").await?.status,
                5,
                "{}",
                container.id
            );
            assert_eq!(
                client.task(&container.id, "").await?.status(),
                Status::Stopped
            );
            assert_eq!(client.delete_task(&container.id).await?.status, 5);
            client.delete(container).await?;
        }
        containers.drain(..2);
    }
    for (container, _) in &containers {
        client.kill(&container.id, "", 15).await?;
        assert_eq!(client.wait(&container.id, "").await?.status, 5);
        assert_eq!(client.delete_task(&container.id).await?.status, 5);
        client.delete(container).await?;
    }
    daemon.finish().await
}

#[tokio::test]
async fn a_killed_shim_takes_only_its_own_container() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let (victim, pid) = start(&client, &daemon, &top, "victim").await?;
    let (other, other_pid) = start(&client, &daemon, &top, "other").await?;
    let mut events = crate::events::subscribe(&client, &daemon).await;
    kill(Pid::from_raw(parent_of(pid)?), Signal::SIGKILL)?;
    let exit = events.task_exit("victim").await?;
    assert_eq!((exit.id.as_str(), exit.exit_status), ("victim", 137));
    let gone = eventually("the task is gone", async || {
        Ok(client.task("victim", "").await.err())
    })
    .await?;
    assert_eq!(gone.code(), tonic::Code::NotFound);
    eventually("its process is gone", async || {
        Ok((!fs::exists(format!("/proc/{pid}"))?).then_some(()))
    })
    .await?;
    let task = client.task("other", "").await?;
    assert_eq!((task.status(), task.pid), (Status::Running, other_pid));
    client.destroy(&victim).await?;
    client.destroy(&other).await?;
    daemon.finish().await
}

#[tokio::test]
async fn stopping_the_daemon_stops_no_container() -> Result {
    let (mut daemon, client, _, top) = ready().await?;
    let (container, pid) = start(&client, &daemon, &top, "stays").await?;
    daemon.stop().await?;
    assert!(fs::exists(format!("/proc/{pid}"))?);
    daemon.boot().await?;
    let client = daemon.client().await?;
    let task = eventually("the task is found", async || {
        Ok(client.task("stays", "").await.ok())
    })
    .await?;
    assert_eq!(task.status(), Status::Running);
    client.destroy(&container).await?;
    daemon.finish().await
}

/// Only ours: containerd looks at one bundle after the other before it serves.
#[tokio::test]
async fn many_tasks_are_recovered_beside_the_first_requests() -> Result {
    if Subject::of_run() != Subject::Lighter {
        return Ok(());
    }
    let count = match std::env::var_os("LIGHTER_FULL") {
        Some(_) => 2000,
        None => 200,
    };
    let (mut daemon, client, _, top) = ready().await?;
    let (container, pid) = start(&client, &daemon, &top, "alive").await?;
    daemon.stop().await?;
    // The shims of these died with the daemon; a few of them had no address yet.
    let tasks = daemon
        .dir()
        .join("state/io.containerd.runtime.v2.task")
        .join(daemon.namespace());
    for n in 0..count {
        let bundle = tasks.join(format!("dead-{n}"));
        fs::create_dir(&bundle)?;
        fs::write(bundle.join("config.json"), "{}")?;
        fs::write(
            bundle.join("shim-binary-path"),
            env!("CARGO_BIN_EXE_grpc-shim"),
        )?;
        if n % 10 != 0 {
            let address = format!("unix://{}", bundle.join("s").display());
            let bootstrap =
                format!("{{\"version\":3,\"address\":\"{address}\",\"protocol\":\"ttrpc\"}}");
            fs::write(bundle.join("bootstrap.json"), bootstrap)?;
        }
    }
    let began = std::time::Instant::now();
    daemon.boot().await?;
    let served = began.elapsed();
    assert!(served.as_secs() < 5, "served after {served:?}");
    let client = daemon.client().await?;
    let task = eventually("the task that lives is found", async || {
        Ok(client.task("alive", "").await.ok())
    })
    .await?;
    assert_eq!((task.status(), task.pid), (Status::Running, pid));
    eventually("what is dead is cleaned up", async || {
        let left = fs::read_dir(&tasks)?.count();
        Ok((left == 1).then_some(()))
    })
    .await?;
    println!(
        "{count} tasks: served after {served:?}, recovered after {:?}",
        began.elapsed()
    );
    client.destroy(&container).await?;
    daemon.finish().await
}

/// Tasks that run when the daemon is killed: 2,000 where `LIGHTER_FULL=1` says that there is room.
#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_that_runs_is_found_again_beside_the_first_requests() -> Result {
    if Subject::of_run() != Subject::Lighter {
        return Ok(());
    }
    let count: usize = match std::env::var_os("LIGHTER_FULL") {
        Some(_) => 2000,
        None => 40,
    };
    let (mut daemon, _, _, top) = ready().await?;
    let mut starters = tokio::task::JoinSet::new();
    for first in 0..STARTERS {
        let client = daemon.client().await?;
        let (namespace, top) = (daemon.namespace().to_owned(), top.clone());
        starters.spawn(async move {
            let mut made = Vec::new();
            for n in (first..count).step_by(STARTERS) {
                let id = format!("crowd-{n}");
                let spec = Spec::new(&namespace, &id, &["sleep", "100000"]);
                let container = client.create(&id, &top, &spec).await?;
                let pid = client.create_task(&container, None).await?;
                client.start(&id, "").await?;
                made.push((container, pid));
            }
            Ok::<_, anyhow::Error>(made)
        });
    }
    let mut made = Vec::new();
    while let Some(done) = starters.join_next().await {
        made.extend(done??);
    }
    daemon.kill()?;
    let began = std::time::Instant::now();
    daemon.boot().await?;
    let served = began.elapsed();
    assert!(served.as_secs() < 5, "served after {served:?}");
    let client = daemon.client().await?;
    let all = || lighter_proto::containerd::services::tasks::v1::ListTasksRequest::default();
    let tasks = eventually("all are found", async || {
        let tasks = client.tasks().list(all()).await?.into_inner().tasks;
        Ok((tasks.len() == count).then_some(tasks))
    })
    .await?;
    println!(
        "{count} running: served after {served:?}, all found after {:?}",
        began.elapsed()
    );
    for (container, pid) in &made {
        let task = tasks.iter().find(|task| task.id == container.id);
        let task = task.ok_or_else(|| anyhow::anyhow!("{container:?} is lost"))?;
        assert_eq!((task.status(), task.pid), (Status::Running, *pid));
    }
    let mut enders = tokio::task::JoinSet::new();
    for (container, _) in made {
        if enders.len() == STARTERS {
            enders.join_next().await.expect("some")??;
        }
        let client = client.clone();
        enders.spawn(async move { client.destroy(&container).await });
    }
    while let Some(done) = enders.join_next().await {
        done??;
    }
    daemon.finish().await
}
