//! Sandboxes that shims run, asked for here or through a controller in another process.
//!
//! Only ours: containerd 1.6 has no sandbox API.

use std::collections::HashMap;

use lighter_integration::{Client, Daemon, Options, Result, Spec, Subject, eventually};
use lighter_proto::any;
use lighter_proto::containerd::events::SandboxExit;
use lighter_proto::containerd::services::sandbox::v1 as api;
use lighter_proto::containerd::services::tasks::v1::CreateTaskRequest;
use lighter_proto::containerd::types::{Sandbox, sandbox};
use lighter_proto::containerd::v1::types::Status as State;
use tonic::{Code, Status};

/// What all controllers here are called: a proxy asks its peer for the controller of its own name.
const SANDBOXER: &str = "shim";

fn shim() -> String {
    env!("CARGO_BIN_EXE_grpc-shim").to_owned()
}

/// Records a sandbox and asks the controller for it.
async fn create(client: &Client, id: &str, annotations: &[(&str, &str)]) -> Result<(), Status> {
    let record = Sandbox {
        sandbox_id: id.to_owned(),
        runtime: Some(sandbox::Runtime {
            name: shim(),
            options: None,
        }),
        sandboxer: SANDBOXER.to_owned(),
        ..Default::default()
    };
    let request = api::StoreCreateRequest {
        sandbox: Some(record),
    };
    client.sandbox_store().create(request).await?;
    make(client, id, annotations).await
}

async fn make(client: &Client, id: &str, annotations: &[(&str, &str)]) -> Result<(), Status> {
    let annotations = annotations.iter().map(|(k, v)| ((*k).into(), (*v).into()));
    let request = api::ControllerCreateRequest {
        sandbox_id: id.to_owned(),
        annotations: annotations.collect(),
        sandboxer: SANDBOXER.to_owned(),
        ..Default::default()
    };
    client.sandbox_controller().create(request).await.map(drop)
}

async fn start(client: &Client, id: &str) -> Result<api::ControllerStartResponse, Status> {
    let request = api::ControllerStartRequest {
        sandbox_id: id.to_owned(),
        sandboxer: SANDBOXER.to_owned(),
    };
    let answer = client.sandbox_controller().start(request).await?;
    Ok(answer.into_inner())
}

async fn status(client: &Client, id: &str) -> Result<api::ControllerStatusResponse, Status> {
    let request = api::ControllerStatusRequest {
        sandbox_id: id.to_owned(),
        verbose: true,
        sandboxer: SANDBOXER.to_owned(),
    };
    let answer = client.sandbox_controller().status(request).await?;
    Ok(answer.into_inner())
}

async fn shutdown(client: &Client, id: &str) -> Result<(), Status> {
    let request = api::ControllerShutdownRequest {
        sandbox_id: id.to_owned(),
        sandboxer: SANDBOXER.to_owned(),
    };
    client
        .sandbox_controller()
        .shutdown(request)
        .await
        .map(drop)
}

/// What a client asks of a sandbox that runs, besides a task in it.
async fn questions(client: &Client, id: &str) -> Result {
    let mut controller = client.sandbox_controller();
    let (sandbox_id, sandboxer) = (id.to_owned(), SANDBOXER.to_owned());
    let found = status(client, id).await?;
    assert_eq!(found.state, "SANDBOX_READY");
    assert_eq!(
        found.info,
        HashMap::from([("note".to_owned(), "kept".to_owned())])
    );
    let platform = api::ControllerPlatformRequest {
        sandbox_id: sandbox_id.clone(),
        sandboxer: sandboxer.clone(),
    };
    let platform = controller.platform(platform).await?.into_inner().platform;
    // As the shim says, which is not as this machine is.
    assert_eq!(platform.unwrap_or_default().architecture, "riscv64");
    let metrics = api::ControllerMetricsRequest {
        sandbox_id: sandbox_id.clone(),
        sandboxer: sandboxer.clone(),
    };
    let metrics = controller.metrics(metrics).await?.into_inner().metrics;
    assert_eq!(metrics.unwrap_or_default().id, id);
    let update = api::ControllerUpdateRequest {
        sandbox_id: sandbox_id.clone(),
        sandboxer,
        sandbox: Some(Sandbox {
            sandbox_id,
            ..Default::default()
        }),
        fields: vec!["labels".to_owned()],
    };
    controller.update(update).await?;
    Ok(())
}

/// A task that is told where the sandbox's shim is runs in that shim.
async fn task_inside(
    daemon: &Daemon,
    client: &Client,
    started: &api::ControllerStartResponse,
) -> Result {
    let (_, top) = client.busybox().await?;
    let spec = Spec::new(daemon.namespace(), "inside", &["true"]);
    let container = client
        .create_on("inside", &top, &spec, "overlayfs", &shim(), None)
        .await?;
    let request = CreateTaskRequest {
        container_id: "inside".to_owned(),
        task_api_address: started.address.clone(),
        task_api_version: started.version,
        ..Default::default()
    };
    let pid = client.tasks().create(request).await?.into_inner().pid;
    assert_eq!(client.start("inside", "").await?, pid);
    let parent = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let parent = parent.split(' ').nth(3).unwrap_or_default().to_owned();
    assert_eq!(parent, started.pid.to_string(), "the shim's own child");
    client.kill("inside", "", 9).await?;
    assert_eq!(client.wait("inside", "").await?.status, 137);
    eventually("the task is stopped", async || {
        let task = client.task("inside", "").await?;
        Ok((task.status() == State::Stopped).then_some(()))
    })
    .await?;
    assert_eq!(client.delete_task("inside").await?.status, 137);
    client.delete(&container).await?;
    Ok(())
}

/// One sandbox from its record to its end.
async fn life(daemon: &Daemon, client: &Client) -> Result {
    let mut events = crate::events::subscribe(client, daemon).await;
    create(client, "box", &[("note", "kept")]).await?;
    let again = make(client, "box", &[]).await.expect_err("made already");
    assert_eq!(again.code(), Code::AlreadyExists, "{again}");
    let started = start(client, "box").await?;
    assert!(started.pid > 0 && started.created_at.is_some());
    assert_eq!(started.version, 3);
    questions(client, "box").await?;
    task_inside(daemon, client, &started).await?;

    let waiting = {
        let request = api::ControllerWaitRequest {
            sandbox_id: "box".to_owned(),
            sandboxer: SANDBOXER.to_owned(),
        };
        let mut controller = client.sandbox_controller();
        tokio::spawn(async move { controller.wait(request).await })
    };
    let stop = api::ControllerStopRequest {
        sandbox_id: "box".to_owned(),
        timeout_secs: 5,
        sandboxer: SANDBOXER.to_owned(),
    };
    client.sandbox_controller().stop(stop).await?;
    assert_eq!(waiting.await??.into_inner().exit_status, 7);
    assert_eq!(status(client, "box").await?.state, "SANDBOX_NOTREADY");
    shutdown(client, "box").await?;
    // What is gone is stopped, and has nothing to shut down.
    assert_eq!(status(client, "box").await?.state, "SANDBOX_NOTREADY");
    shutdown(client, "box").await?;
    let unknown = start(client, "box").await.expect_err("shut down");
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    let delete = api::StoreDeleteRequest {
        sandbox_id: "box".to_owned(),
    };
    client.sandbox_store().delete(delete).await?;

    let mut topics = Vec::new();
    while topics.last().map(String::as_str) != Some("/sandboxes/exit") {
        let envelope = events.next().await?;
        if envelope.topic == "/sandboxes/exit" {
            let event = envelope.event.as_ref().expect("has an event");
            let exit: SandboxExit = any::unpack(event)?;
            assert_eq!((exit.sandbox_id.as_str(), exit.exit_status), ("box", 7));
        }
        if envelope.topic.starts_with("/sandboxes/") {
            topics.push(envelope.topic);
        }
    }
    assert_eq!(
        topics,
        ["/sandboxes/create", "/sandboxes/start", "/sandboxes/exit"]
    );
    Ok(())
}

/// Why a shim would not make it reaches the client, and nothing stays.
async fn refusal(client: &Client) -> Result {
    let why = [("refuse", "out of boxes")];
    let refused = create(client, "no", &why).await.expect_err("refused");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("out of boxes"), "{refused}");
    assert_eq!(status(client, "no").await?.state, "SANDBOX_NOTREADY");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_lives_in_a_shim() -> Result {
    if Subject::of_run() != Subject::Lighter {
        return Ok(());
    }
    let mut daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    life(&daemon, &client).await?;
    refusal(&client).await?;
    create(&client, "kept", &[]).await?;
    let pid = start(&client, "kept").await?.pid;
    daemon.kill()?;
    daemon.boot().await?;
    let client = daemon.client().await?;
    let found = status(&client, "kept").await?;
    assert_eq!((found.state.as_str(), found.pid), ("SANDBOX_READY", pid));
    shutdown(&client, "kept").await?;
    daemon.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_is_run_by_a_controller_in_another_process() -> Result {
    if Subject::of_run() != Subject::Lighter {
        return Ok(());
    }
    let mut backend = Daemon::start().await?;
    let address = backend.address();
    let options = Options {
        config: format!(
            "[proxy_plugins.{SANDBOXER}]\ntype = 'sandbox'\naddress = {address:?}\n\
             [proxy_plugins.other]\ntype = 'sandbox'\naddress = {address:?}\n"
        ),
        disabled: vec!["io.containerd.sandbox.controller.v1.shim"],
        ..Options::default()
    };
    let daemon = Daemon::start_with(Subject::Lighter, &options).await?;
    let client = daemon.client().await?;
    life(&daemon, &client).await?;
    refusal(&client).await?;
    // Its peer has no controller of that name, and says so.
    let unknown = api::ControllerStatusRequest {
        sandbox_id: "box".to_owned(),
        verbose: false,
        sandboxer: "other".to_owned(),
    };
    let unknown = client.sandbox_controller().status(unknown).await;
    let unknown = unknown.expect_err("not there");
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    assert!(unknown.message().contains("other"), "{unknown}");

    // The peer's death is told as what it is; when it is back, so is the sandbox.
    create(&client, "kept", &[]).await?;
    let pid = start(&client, "kept").await?.pid;
    backend.kill()?;
    let lost = status(&client, "kept").await.expect_err("nobody there");
    assert_eq!(lost.code(), Code::Unavailable, "{lost}");
    backend.boot().await?;
    let found = eventually("the peer is found again", async || {
        Ok(status(&client, "kept").await.ok())
    })
    .await?;
    assert_eq!((found.state.as_str(), found.pid), ("SANDBOX_READY", pid));
    shutdown(&client, "kept").await?;
    daemon.finish().await?;
    backend.finish().await
}
