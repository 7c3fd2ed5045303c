//! Containers that are started again because their labels say so.

use std::time::Duration;

use lighter_integration::{Client, Container, Daemon, Options, Result, Spec, Subject, eventually};
use lighter_proto::containerd::services::containers::v1 as api;
use lighter_proto::containerd::v1::types::Status;
use prost_types::FieldMask;

const STATUS: &str = "containerd.io/restart.status";
const POLICY: &str = "containerd.io/restart.policy";
const COUNT: &str = "containerd.io/restart.count";
const LOG: &str = "containerd.io/restart.loguri";
const BY_HAND: &str = "containerd.io/restart.explicitly-stopped";

/// A daemon that looks every second, and a busybox image unpacked.
async fn ready() -> Result<(Daemon, Client, String)> {
    let options = Options {
        config: "[plugins.'io.containerd.internal.v1.restart']\ninterval = '1s'\n".to_owned(),
        ..Options::default()
    };
    let daemon = Daemon::start_with(Subject::of_run(), &options).await?;
    let client = daemon.client().await?;
    let (_, top) = client.busybox().await?;
    Ok((daemon, client, top))
}

async fn label(client: &Client, id: &str, labels: &[(&str, &str)]) -> Result {
    let paths = labels.iter().map(|(key, _)| format!("labels.{key}"));
    let container = api::Container {
        id: id.to_owned(),
        labels: labels
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect(),
        ..Default::default()
    };
    let request = api::UpdateContainerRequest {
        container: Some(container),
        update_mask: Some(FieldMask {
            paths: paths.collect(),
        }),
    };
    client.containers().update(request).await?;
    Ok(())
}

async fn count(client: &Client, id: &str) -> Result<u32> {
    let request = api::GetContainerRequest { id: id.to_owned() };
    let container = client.containers().get(request).await?.into_inner();
    let labels = container.container.unwrap_or_default().labels;
    Ok(labels.get(COUNT).map_or(Ok(0), |text| text.parse())?)
}

/// The pid of the task once it runs and is not `old`.
async fn running(client: &Client, id: &str, old: u32) -> Result<u32> {
    eventually("the task runs", async || {
        let task = client.task(id, "").await.ok();
        let task = task.filter(|t| t.status() == Status::Running && t.pid != old);
        Ok(task.map(|t| t.pid))
    })
    .await
}

async fn container(
    client: &Client,
    daemon: &Daemon,
    top: &str,
    id: &str,
    script: &str,
) -> Result<Container> {
    let spec = Spec::new(daemon.namespace(), id, &["sh", "-c", script]);
    client.create(id, top, &spec).await
}

/// Takes the wish away, so that nothing comes back, and removes everything.
async fn end(client: &Client, container: &Container) -> Result {
    label(client, &container.id, &[(STATUS, "")]).await?;
    // One that is just being started again is waited for.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    client.destroy(container).await
}

#[tokio::test]
async fn a_container_that_should_run_is_started_and_started_again() -> Result {
    let (daemon, client, top) = ready().await?;
    let sleeper = container(&client, &daemon, &top, "sleeper", "echo up; sleep 1000").await?;
    let log = daemon.dir().join("sleeper.log");
    let uri = format!("file://{}", log.display());
    label(&client, "sleeper", &[(STATUS, "running"), (LOG, &uri)]).await?;
    let first = running(&client, "sleeper", 0).await?;
    // Not before it wrote: it may be killed between its start and its first word.
    eventually("the first wrote to the log", async || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        Ok((text == "up\n").then_some(()))
    })
    .await?;
    client.kill("sleeper", "", 9).await?;
    running(&client, "sleeper", first).await?;
    eventually("both wrote to the log", async || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        Ok((text == "up\nup\n").then_some(()))
    })
    .await?;
    label(&client, "sleeper", &[(STATUS, "stopped")]).await?;
    eventually("the task is stopped", async || {
        let task = client.task("sleeper", "").await;
        Ok(task
            .map_or(true, |t| t.status() == Status::Stopped)
            .then_some(()))
    })
    .await?;
    end(&client, &sleeper).await?;
    daemon.finish().await
}

#[tokio::test]
async fn a_policy_says_how_often_and_after_what() -> Result {
    let (daemon, client, top) = ready().await?;
    // Policies came after containerd 1.6.
    if !client.is_recent().await? {
        return daemon.finish().await;
    }
    let fails = container(&client, &daemon, &top, "fails", "exit 3").await?;
    let works = container(&client, &daemon, &top, "works", "exit 0").await?;
    let by_hand = container(&client, &daemon, &top, "by-hand", "exit 0").await?;
    for one in [&fails, &works, &by_hand] {
        client.create_task(one, None).await?;
        client.start(&one.id, "").await?;
        client.wait(&one.id, "").await?;
    }
    let policy = [(STATUS, "running"), (POLICY, "on-failure:2")];
    label(&client, "fails", &policy).await?;
    label(&client, "works", &policy).await?;
    let policy = [
        (STATUS, "running"),
        (POLICY, "unless-stopped"),
        (BY_HAND, "true"),
    ];
    label(&client, "by-hand", &policy).await?;
    eventually("the failing one was started twice", async || {
        Ok((count(&client, "fails").await? == 2).then_some(()))
    })
    .await?;
    // Three more looks change nothing.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(count(&client, "fails").await?, 2);
    assert_eq!(count(&client, "works").await?, 0);
    assert_eq!(count(&client, "by-hand").await?, 0);
    label(&client, "by-hand", &[(BY_HAND, "false")]).await?;
    eventually("nobody stopped it by hand any more", async || {
        Ok((count(&client, "by-hand").await? > 0).then_some(()))
    })
    .await?;
    for one in [&fails, &works, &by_hand] {
        end(&client, one).await?;
    }
    daemon.finish().await
}
