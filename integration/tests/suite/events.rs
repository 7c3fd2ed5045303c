//! Events: in order, complete, filtered, and never ahead of the state they announce.

use std::time::Duration;

use lighter_integration::{Client, Daemon, Result, Spec};
use lighter_proto::any;
use lighter_proto::containerd::events::{TaskExecStarted, TaskExit};
use lighter_proto::containerd::services::events::v1::{PublishRequest, SubscribeRequest};
use lighter_proto::containerd::types::Envelope;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tonic::Status;

use crate::run::ready;

/// How long the next event may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A subscription. containerd answers the call with its first event only, so the stream is opened
/// and read by a task of its own.
pub(crate) struct Events {
    received: mpsc::Receiver<Result<Envelope, Status>>,
    _reader: AbortOnDrop,
}

/// Ends the reader with its subscription.
struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Everything in the test's namespace.
pub(crate) async fn subscribe(client: &Client, daemon: &Daemon) -> Events {
    let filter = format!("namespace=={}", daemon.namespace());
    subscribe_to(client, &[&filter]).await
}

async fn subscribe_to(client: &Client, filters: &[&str]) -> Events {
    let request = SubscribeRequest {
        filters: filters.iter().map(|f| (*f).to_owned()).collect(),
    };
    let (sender, received) = mpsc::channel(1024);
    let mut service = client.events();
    let reader = tokio::spawn(async move {
        let mut stream = match service.subscribe(request).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => {
                let _ = sender.send(Err(status)).await;
                return;
            }
        };
        while let Some(event) = stream.next().await {
            if sender.send(event).await.is_err() {
                break;
            }
        }
    });
    // Nothing says when the daemon has begun to listen.
    tokio::time::sleep(Duration::from_millis(300)).await;
    Events {
        received,
        _reader: AbortOnDrop(reader.abort_handle()),
    }
}

impl Events {
    pub(crate) async fn next(&mut self) -> Result<Envelope> {
        match tokio::time::timeout(PATIENCE, self.received.recv()).await {
            Ok(Some(event)) => Ok(event?),
            Ok(None) => anyhow::bail!("the subscription ended"),
            Err(_) => anyhow::bail!("no event came"),
        }
    }

    /// The first exit of a process of `container`.
    pub(crate) async fn task_exit(&mut self, container: &str) -> Result<TaskExit> {
        loop {
            let envelope = self.next().await?;
            if envelope.topic == "/tasks/exit" {
                let exit: TaskExit = any::unpack(envelope.event.as_ref().expect("has an event"))?;
                if exit.container_id == container {
                    return Ok(exit);
                }
            }
        }
    }
}

#[tokio::test]
async fn a_life_is_told_in_order() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let mut events = subscribe(&client, &daemon).await;
    let spec = Spec::new(daemon.namespace(), "told", &["sleep", "1000"]);
    let container = client.create("told", &top, &spec).await?;
    client.create_task(&container, None).await?;
    client.start("told", "").await?;
    let process = spec.process(&["sleep", "1000"]);
    client.exec("told", "e", &process, None).await?;
    client.kill("told", "", 9).await?;
    client.wait("told", "").await?;
    client.delete_task("told").await?;
    client.delete(&container).await?;
    let want = [
        "/snapshot/prepare",
        "/containers/create",
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/exit",
        "/tasks/delete",
        "/containers/delete",
        "/snapshot/remove",
    ];
    let mut seen = Vec::new();
    let mut exits = Vec::new();
    while seen.len() < want.len() {
        let envelope = events.next().await?;
        let event = envelope.event.as_ref().expect("has an event");
        if envelope.topic == "/tasks/exit" {
            exits.push(any::unpack::<TaskExit>(event)?.id);
        }
        if envelope.topic == "/tasks/exec-started" {
            assert_eq!(any::unpack::<TaskExecStarted>(event)?.exec_id, "e");
        }
        seen.push(envelope.topic);
    }
    assert_eq!(seen, want);
    assert_eq!(
        exits,
        ["e", "told"],
        "the exec's exit comes before the task's"
    );
    daemon.finish().await
}

#[tokio::test]
async fn an_exit_event_finds_the_task_stopped() -> Result {
    let (daemon, client, _, top) = ready().await?;
    // The filter that dockerd uses, to the letter.
    let filter = format!("namespace=={},topic~=|^/tasks/|", daemon.namespace());
    let mut events = subscribe_to(&client, &[&filter]).await;
    for n in 0..5 {
        let id = format!("quick{n}");
        let spec = Spec::new(daemon.namespace(), &id, &["sh", "-c", "exit 9"]);
        let container = client.create(&id, &top, &spec).await?;
        client.create_task(&container, None).await?;
        client.start(&id, "").await?;
        let exit = events.task_exit(&id).await?;
        let task = client.task(&id, "").await?;
        assert_eq!(
            task.status(),
            lighter_proto::containerd::v1::types::Status::Stopped
        );
        assert_eq!((task.exit_status, exit.exit_status), (9, 9));
        assert!(task.exited_at.is_some() && exit.exited_at.is_some());
        client.delete_task(&id).await?;
        client.delete(&container).await?;
    }
    daemon.finish().await
}

#[tokio::test]
async fn publish_checks_topics_and_filters_select() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let mut events = subscribe_to(&client, &["topic==\"/one/two\"", "event.container_id==x"]).await;
    let event = any::pack(&TaskExit {
        container_id: "x".into(),
        ..Default::default()
    });
    let other = any::pack(&TaskExit {
        container_id: "y".into(),
        ..Default::default()
    });
    for bad in ["", "one", "/", "/one//two", "/one two", "/-"] {
        let request = PublishRequest {
            topic: bad.into(),
            event: Some(event.clone()),
        };
        let status = client.events().publish(request).await.expect_err(bad);
        assert_eq!(
            status.code(),
            tonic::Code::InvalidArgument,
            "{bad}: {status}"
        );
    }
    for (topic, event) in [("/a/b", &other), ("/one/two", &other), ("/a/b", &event)] {
        let request = PublishRequest {
            topic: topic.into(),
            event: Some(event.clone()),
        };
        client.events().publish(request).await?;
    }
    let first = events.next().await?;
    assert_eq!(
        (first.topic.as_str(), first.event.as_ref()),
        ("/one/two", Some(&other))
    );
    let second = events.next().await?;
    assert_eq!(
        (second.topic.as_str(), second.event.as_ref()),
        ("/a/b", Some(&event))
    );
    let failed = subscribe_to(&client, &["topic=x"])
        .await
        .received
        .recv()
        .await;
    let failed = failed.expect("an answer").expect_err("a bad filter");
    assert!(
        failed.message().contains("unsupported operator"),
        "{failed}"
    );
    daemon.finish().await
}
