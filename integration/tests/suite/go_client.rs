//! What containerd's Go client does and expects without saying so: it keeps its ends of streams open,
//! lets the request decide about a terminal, and tells a daemon that ends from a process that did.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lighter_integration::{Container, Daemon, Result, Spec, Subject, eventually};
use lighter_proto::any;
use lighter_proto::containerd::runc::v1::Options;
use lighter_proto::containerd::services::events::v1::SubscribeRequest;
use lighter_proto::containerd::services::snapshots::v1::MountsRequest;
use lighter_proto::containerd::services::tasks::v1 as svc;
use lighter_proto::containerd::v1::types::Status;
use tonic::Code;

use crate::run::ready;

async fn sleeper(
    daemon: &Daemon,
    client: &lighter_integration::Client,
    top: &str,
) -> Result<(Container, Spec)> {
    let spec = Spec::new(daemon.namespace(), "c", &["sleep", "1000"]);
    let container = client.create("c", top, &spec).await?;
    client.create_task(&container, None).await?;
    client.start("c", "").await?;
    Ok((container, spec))
}

#[tokio::test]
async fn a_daemon_that_stops_sends_away_who_waits_and_ends_no_process() -> Result {
    if Subject::of_run() == Subject::Containerd {
        // The reference of that age closes the connection without an answer.
        return Ok(());
    }
    let (mut daemon, client, _, top) = ready().await?;
    let (container, _) = sleeper(&daemon, &client, &top).await?;
    let pid = client.task("c", "").await?.pid;
    let waiting = {
        let client = client.clone();
        tokio::spawn(async move { client.wait("c", "").await })
    };
    let listening = {
        let mut events = client.events();
        tokio::spawn(async move {
            let request = SubscribeRequest { filters: vec![] };
            let mut events = events.subscribe(request).await?.into_inner();
            while events.message().await?.is_some() {}
            Ok::<_, tonic::Status>(())
        })
    };
    // Both calls are at the daemon before it is told to stop.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let stopped = Instant::now();
    daemon.stop().await?;
    if daemon.subject() == Subject::Lighter {
        let took = stopped.elapsed();
        assert!(took < Duration::from_secs(1), "stopping took {took:?}");
    }
    let told = waiting.await?.expect_err("the process has not ended");
    assert_eq!(told.code(), Code::Unavailable, "{told}");
    let told = listening.await?.expect_err("there may be more");
    assert_eq!(told.code(), Code::Unavailable, "{told}");
    assert!(std::fs::exists(format!("/proc/{pid}"))?);
    daemon.boot().await?;
    let client = daemon.client().await?;
    eventually("the task is found", async || {
        Ok(client.task("c", "").await.ok())
    })
    .await?;
    client.destroy(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn an_input_that_the_client_keeps_open_holds_up_no_delete() -> Result {
    if Subject::of_run() == Subject::Containerd {
        // The reference's shim takes no input without an output.
        return Ok(());
    }
    let (daemon, client, _, top) = ready().await?;
    let fifo = |name: &str| -> Result<String> {
        let path = daemon.dir().join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU)?;
        Ok(path.display().to_string())
    };
    let (stdin, stdout) = (fifo("in")?, fifo("out")?);
    let open = |path: &str| {
        let mut options = std::fs::File::options();
        options.read(true).write(true).open(path)
    };
    let _client = (open(&stdin)?, open(&stdout)?);
    let spec = Spec::new(daemon.namespace(), "c", &["true"]);
    let container = client.create("c", &top, &spec).await?;
    let request = MountsRequest {
        snapshotter: "overlayfs".to_owned(),
        key: "c".to_owned(),
    };
    let rootfs = client.snapshots().mounts(request).await?.into_inner();
    let request = svc::CreateTaskRequest {
        container_id: "c".to_owned(),
        rootfs: rootfs.mounts,
        stdin: stdin.clone(),
        stdout: stdout.clone(),
        ..Default::default()
    };
    client.tasks().create(request).await?;
    client.start("c", "").await?;
    assert_eq!(client.wait("c", "").await?.status, 0);
    let asked = Instant::now();
    client.delete_task("c").await?;
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(5), "deleting took {took:?}");
    client.delete(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn the_request_decides_whether_an_exec_has_a_terminal() -> Result {
    if Subject::of_run() == Subject::Containerd {
        // The reference's shim takes no file for what a terminal says.
        return Ok(());
    }
    let (daemon, client, _, top) = ready().await?;
    let (container, spec) = sleeper(&daemon, &client, &top).await?;
    for (exec_id, terminal, told) in [("with", true, 0), ("without", false, 1)] {
        let log = daemon.dir().join(exec_id);
        let mut process = spec.process(&["test", "-t", "0"]);
        process["terminal"] = (!terminal).into();
        let request = svc::ExecProcessRequest {
            container_id: "c".to_owned(),
            exec_id: exec_id.to_owned(),
            terminal,
            stdout: format!("file://{}", log.display()),
            spec: Some(any::pack_json(any::PROCESS, &process)?),
            ..Default::default()
        };
        client.tasks().exec(request).await?;
        client.start("c", exec_id).await?;
        assert_eq!(client.wait("c", exec_id).await?.status, told, "{exec_id}");
        let request = svc::DeleteProcessRequest {
            container_id: "c".to_owned(),
            exec_id: exec_id.to_owned(),
        };
        client.tasks().delete_process(request).await?;
    }
    client.destroy(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn an_exec_that_cannot_be_started_stays_created_and_holds_up_nobody() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let (container, spec) = sleeper(&daemon, &client, &top).await?;
    let request = svc::ExecProcessRequest {
        container_id: "c".to_owned(),
        exec_id: "e".to_owned(),
        spec: Some(any::pack_json(
            any::PROCESS,
            &spec.process(&["/no/such/program"]),
        )?),
        ..Default::default()
    };
    client.tasks().exec(request).await?;
    let waiting = {
        let client = client.clone();
        tokio::spawn(async move { client.wait("c", "e").await })
    };
    client.start("c", "e").await.expect_err("no such program");
    let process = client.task("c", "e").await?;
    assert_eq!(
        (process.status(), process.exit_status),
        (Status::Created, 0)
    );
    let limit = Duration::from_secs(5);
    tokio::time::timeout(limit, waiting).await???;
    tokio::time::timeout(limit, client.wait("c", "e")).await??;
    let killed = client.kill("c", "e", 9).await.expect_err("it never ran");
    assert_eq!(killed.code(), Code::FailedPrecondition, "{killed}");
    let request = svc::DeleteProcessRequest {
        container_id: "c".to_owned(),
        exec_id: "e".to_owned(),
    };
    client.tasks().delete_process(request).await?;
    assert_eq!(client.task("c", "").await?.status(), Status::Running);
    client.destroy(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn a_container_may_be_deleted_with_runc() -> Result {
    if !std::path::Path::new("/usr/sbin/runc").exists() {
        eprintln!("skipped: runc is not installed");
        return Ok(());
    }
    let (daemon, client, _, top) = ready().await?;
    let root = daemon.dir().join("oci");
    let options = Options {
        root: root.display().to_string(),
        ..Options::default()
    };
    let spec = Spec::new(daemon.namespace(), "c", &["sleep", "1000"]);
    let runtime = "io.containerd.runc.v2";
    let options = Some(any::pack(&options));
    let container = client
        .create_on("c", &top, &spec, "overlayfs", runtime, options)
        .await?;
    client.create_task(&container, None).await?;
    client.start("c", "").await?;
    let runc = |args: &[&str]| {
        let mut command = Command::new("/usr/sbin/runc");
        command
            .arg("--root")
            .arg(root.join(daemon.namespace()))
            .args(args);
        command.stderr(Stdio::inherit()).output()
    };
    let listed = runc(&["list", "-q"])?;
    assert_eq!(String::from_utf8_lossy(&listed.stdout), "c\n");
    let deleted = runc(&["delete", "--force", "c"])?;
    assert!(deleted.status.success(), "{deleted:?}");
    let killed = client.kill("c", "", 9).await.expect_err("it is gone");
    assert_eq!(killed.code(), Code::NotFound, "{killed}");
    assert_eq!(client.wait("c", "").await?.status, 137);
    assert_eq!(client.delete_task("c").await?.status, 137);
    client.delete(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn a_hook_gets_what_it_asks_for_of_the_state() -> Result {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("config.json"), r#"{"root":{"path":"r"}}"#)?;
    let state = serde_json::json!({
        "ociVersion": "1.0.2", "id": "c", "status": "created", "pid": 7,
        "bundle": dir.path(), "annotations": {"k": "v w"},
    });
    let daemon = Subject::of_run().daemon();
    let script = r#"echo "$0 $1 $ASKED""#;
    let mut hook = Command::new(daemon)
        .args(["oci-hook", "--", "/bin/sh", "-c", script, "{{pid}}"])
        .arg(r#"{{rootfs}}:{{annotation "k"}}"#)
        .env("ASKED", "{{ id }}/{{status}}")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let stdin = hook.stdin.take().expect("piped");
    serde_json::to_writer(stdin, &state)?;
    let output = hook.wait_with_output()?;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        String::from_utf8(output.stdout)?,
        format!("7 {}/r:v w c/created\n", dir.path().display())
    );
    Ok(())
}
