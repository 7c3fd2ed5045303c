//! A container's life: create, start, exec, kill, wait, delete.

use lighter_integration::{Daemon, Image, Result, Spec};

/// A daemon with a busybox image unpacked.
pub(crate) async fn ready() -> Result<(Daemon, lighter_integration::Client, Image, String)> {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let (image, top) = client.busybox().await?;
    Ok((daemon, client, image, top))
}

#[tokio::test]
async fn a_container_prints_and_exits_with_its_code() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let spec = Spec::new(
        daemon.namespace(),
        "hello",
        &["sh", "-c", "echo ahoy; exit 7"],
    );
    let (exit, output) = client.run("hello", &top, &spec, daemon.dir()).await?;
    assert_eq!((exit.status, output.as_str()), (7, "ahoy\n"));
    daemon.finish().await
}

#[tokio::test]
async fn an_exec_runs_beside_the_task_and_ends_alone() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let spec = Spec::new(daemon.namespace(), "sleeper", &["sleep", "1000"]);
    let container = client.create("sleeper", &top, &spec).await?;
    client.create_task(&container, None).await?;
    client.start("sleeper", "").await?;
    let log = daemon.dir().join("exec.log");
    let process = spec.process(&["sh", "-c", "echo from exec; exit 3"]);
    client.exec("sleeper", "e1", &process, Some(&log)).await?;
    assert_eq!(client.wait("sleeper", "e1").await?.status, 3);
    assert_eq!(std::fs::read_to_string(&log)?, "from exec\n");
    client
        .tasks()
        .delete_process(
            lighter_proto::containerd::services::tasks::v1::DeleteProcessRequest {
                container_id: "sleeper".into(),
                exec_id: "e1".into(),
            },
        )
        .await?;
    let task = client.task("sleeper", "").await?;
    assert_eq!(
        task.status(),
        lighter_proto::containerd::v1::types::Status::Running
    );
    client.kill("sleeper", "", 15).await?;
    client.kill("sleeper", "", 9).await?;
    assert_eq!(client.wait("sleeper", "").await?.status, 137);
    assert_eq!(client.delete_task("sleeper").await?.status, 137);
    client.delete(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn a_program_that_does_not_exist_fails_create_and_leaves_nothing() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let spec = Spec::new(daemon.namespace(), "nope", &["/no/such/program"]);
    let container = client.create("nope", &top, &spec).await?;
    let error = match client.create_task(&container, None).await {
        Err(status) => status,
        Ok(_) => client
            .start("nope", "")
            .await
            .expect_err("the program does not exist"),
    };
    assert_eq!(error.code(), tonic::Code::Unknown, "{error}");
    assert!(
        error.message().contains("no such file or directory"),
        "{error}"
    );
    let gone = client.task("nope", "").await.expect_err("no task is left");
    assert_eq!(gone.code(), tonic::Code::NotFound);
    client.delete(&container).await?;
    daemon.finish().await
}
