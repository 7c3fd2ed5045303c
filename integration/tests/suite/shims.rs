//! Each daemon with the other's shim: ours under containerd, Debian's under lighter.

use lighter_integration::{Client, Container, Daemon, Result, Spec, Subject, eventually, subject};
use lighter_proto::containerd::v1::types::Status;

use crate::run::ready;

/// Path of the shim of the other side.
fn other_shim(daemon: &Daemon) -> String {
    match daemon.subject() {
        Subject::Lighter => "/usr/bin/containerd-shim-runc-v2".to_owned(),
        Subject::Containerd => subject::built("containerd-shim-lighter-v2")
            .to_string_lossy()
            .into_owned(),
    }
}

async fn start(daemon: &Daemon, client: &Client, top: &str, id: &str) -> Result<Container> {
    let script = "trap 'exit 5' TERM; while :; do sleep 0.05; done";
    let spec = Spec::new(daemon.namespace(), id, &["sh", "-c", script]);
    let shim = other_shim(daemon);
    let container = client
        .create_on(id, top, &spec, "overlayfs", &shim, None)
        .await?;
    client.create_task(&container, None).await?;
    client.start(id, "").await?;
    Ok(container)
}

#[tokio::test]
async fn the_others_shim_runs_execs_and_kills() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let mut events = crate::events::subscribe(&client, &daemon).await;
    let container = start(&daemon, &client, &top, "crossed").await?;
    let log = daemon.dir().join("exec.log");
    let process = Spec::new(daemon.namespace(), "x", &[]).process(&["sh", "-c", "echo hi; exit 3"]);
    client.exec("crossed", "e", &process, Some(&log)).await?;
    assert_eq!(client.wait("crossed", "e").await?.status, 3);
    assert_eq!(std::fs::read_to_string(&log)?, "hi\n");
    let exit = events.task_exit("crossed").await?;
    assert_eq!((exit.id.as_str(), exit.exit_status), ("e", 3));
    client.kill("crossed", "", 15).await?;
    assert_eq!(client.wait("crossed", "").await?.status, 5);
    let exit = events.task_exit("crossed").await?;
    assert_eq!((exit.id.as_str(), exit.exit_status), ("crossed", 5));
    assert_eq!(client.task("crossed", "").await?.status(), Status::Stopped);
    assert_eq!(client.delete_task("crossed").await?.status, 5);
    client.delete(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn the_others_shim_outlives_its_daemon() -> Result {
    let (mut daemon, client, _, top) = ready().await?;
    let container = start(&daemon, &client, &top, "survivor").await?;
    daemon.kill()?;
    daemon.boot().await?;
    let client = daemon.client().await?;
    let task = eventually("the task is found", async || {
        Ok(client.task("survivor", "").await.ok())
    })
    .await?;
    assert_eq!(task.status(), Status::Running);
    let mut events = crate::events::subscribe(&client, &daemon).await;
    client.kill("survivor", "", 15).await?;
    let exit = events.task_exit("survivor").await?;
    assert_eq!(exit.exit_status, 5, "its events reach the new daemon");
    assert_eq!(client.delete_task("survivor").await?.status, 5);
    client.delete(&container).await?;
    daemon.finish().await
}

/// What others write their shims with: its handshake, its socket, its events, and methods that are not
/// there. Not on Debian's containerd: the crate answers `start` with JSON, which 1.6 takes for an address.
#[tokio::test]
async fn a_shim_made_with_the_containerd_shim_crate_is_served() -> Result {
    if Subject::of_run() == Subject::Containerd {
        return Ok(());
    }
    let (mut daemon, client, _, top) = ready().await?;
    let spec = Spec::new(daemon.namespace(), "k", &["true"]);
    let shim = env!("CARGO_BIN_EXE_crate-shim");
    let container = client
        .create_on("k", &top, &spec, "overlayfs", shim, None)
        .await?;
    let pid = client.create_task(&container, None).await?;
    assert_eq!(client.task("k", "").await?.status(), Status::Created);
    assert_eq!(client.start("k", "").await?, pid);
    assert_eq!(client.task("k", "").await?.status(), Status::Running);
    let pause = lighter_proto::containerd::services::tasks::v1::PauseTaskRequest {
        container_id: "k".to_owned(),
    };
    let refused = client.tasks().pause(pause).await.expect_err("it cannot");
    assert!(
        refused.message().contains("containerd.task.v3.Task/Pause"),
        "{refused}"
    );
    assert_eq!(client.task("k", "").await?.status(), Status::Running);
    daemon.kill()?;
    daemon.boot().await?;
    let client = daemon.client().await?;
    let task = eventually("the task is found", async || {
        Ok(client.task("k", "").await.ok())
    })
    .await?;
    assert_eq!((task.status(), task.pid), (Status::Running, pid));
    client.kill("k", "", 9).await?;
    assert_eq!(client.wait("k", "").await?.status, 137);
    assert_eq!(client.task("k", "").await?.status(), Status::Stopped);
    assert_eq!(client.delete_task("k").await?.status, 137);
    client.delete(&container).await?;
    // Its events: those to a daemon that was away meanwhile are lost in the crate.
    let mut events = crate::events::subscribe(&client, &daemon).await;
    let container = client
        .create_on("told", &top, &spec, "overlayfs", shim, None)
        .await?;
    client.create_task(&container, None).await?;
    client.start("told", "").await?;
    client.kill("told", "", 9).await?;
    assert_eq!(events.task_exit("told").await?.exit_status, 137);
    assert_eq!(client.delete_task("told").await?.status, 137);
    client.delete(&container).await?;
    daemon.finish().await
}

/// Only ours: containerd 1.6 takes every shim for a speaker of ttrpc, and 2.4 takes a connection over
/// gRPC that it has just made, which is idle, for one that ended.
#[tokio::test]
async fn a_shim_may_speak_grpc() -> Result {
    if Subject::of_run() != Subject::Lighter {
        return Ok(());
    }
    let (mut daemon, client, _, top) = ready().await?;
    let spec = Spec::new(daemon.namespace(), "g", &["true"]);
    let shim = env!("CARGO_BIN_EXE_grpc-shim");
    let container = client
        .create_on("g", &top, &spec, "overlayfs", shim, None)
        .await?;
    let pid = client.create_task(&container, None).await?;
    assert_eq!(client.task("g", "").await?.status(), Status::Created);
    assert_eq!(client.start("g", "").await?, pid);
    assert_eq!(client.task("g", "").await?.status(), Status::Running);
    let request = lighter_proto::containerd::services::tasks::v1::ListPidsRequest {
        container_id: "g".to_owned(),
    };
    let pids = client.tasks().list_pids(request).await?.into_inner();
    assert_eq!(
        pids.processes.iter().map(|p| p.pid).collect::<Vec<_>>(),
        [pid]
    );
    let metrics = lighter_proto::containerd::services::tasks::v1::PauseTaskRequest {
        container_id: "g".to_owned(),
    };
    let refused = client.tasks().pause(metrics).await.expect_err("it cannot");
    assert_eq!(refused.code(), tonic::Code::Unimplemented, "{refused}");
    daemon.kill()?;
    daemon.boot().await?;
    let client = daemon.client().await?;
    let task = eventually("the task is found", async || {
        Ok(client.task("g", "").await.ok())
    })
    .await?;
    assert_eq!((task.status(), task.pid), (Status::Running, pid));
    let waiting = {
        let client = client.clone();
        tokio::spawn(async move { client.wait("g", "").await })
    };
    client.kill("g", "", 9).await?;
    assert_eq!(waiting.await??.status, 137);
    eventually("the task is stopped", async || {
        let task = client.task("g", "").await?;
        Ok((task.status() == Status::Stopped).then_some(()))
    })
    .await?;
    assert_eq!(client.delete_task("g").await?.status, 137);
    client.delete(&container).await?;
    daemon.finish().await
}
