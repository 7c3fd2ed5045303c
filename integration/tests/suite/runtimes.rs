//! Shims with OCI runtimes chosen by `binary_name`: ours under Debian's shim, Debian's under ours.

use std::path::Path;

use lighter_integration::{Client, Daemon, Result, Spec, Subject, built, eventually};
use lighter_proto::any;
use lighter_proto::containerd::runc::v1::Options;
use lighter_proto::containerd::services::tasks::v1 as svc;
use lighter_proto::containerd::v1::types::Status;

use crate::run::ready;

const DEBIAN_SHIM: &str = "/usr/bin/containerd-shim-runc-v2";

/// A container's whole life with a shim and a runtime: create, start, exec, pause, kill, exit status, delete.
async fn life(daemon: &Daemon, client: &Client, top: &str, shim: &str, binary: &str) -> Result {
    let script = "trap 'exit 5' TERM; while :; do sleep 0.05; done";
    let spec = Spec::new(daemon.namespace(), "life", &["sh", "-c", script]);
    let options = Options {
        binary_name: binary.to_owned(),
        root: daemon.dir().join("oci").display().to_string(),
        ..Options::default()
    };
    let options = Some(any::pack(&options));
    let container = client
        .create_on("life", top, &spec, "overlayfs", shim, options)
        .await?;
    client.create_task(&container, None).await?;
    client.start("life", "").await?;
    let log = daemon.dir().join("exec.log");
    let _ = std::fs::remove_file(&log);
    let process = spec.process(&["sh", "-c", "echo hi; cat /proc/1/comm; exit 3"]);
    client.exec("life", "e", &process, Some(&log)).await?;
    assert_eq!(client.wait("life", "e").await?.status, 3);
    assert_eq!(std::fs::read_to_string(&log)?, "hi\nsh\n");
    let container_id = "life".to_owned();
    let pause = svc::PauseTaskRequest {
        container_id: container_id.clone(),
    };
    client.tasks().pause(pause).await?;
    assert_eq!(client.task("life", "").await?.status(), Status::Paused);
    let resume = svc::ResumeTaskRequest {
        container_id: container_id.clone(),
    };
    client.tasks().resume(resume).await?;
    let pids = svc::ListPidsRequest { container_id };
    let pids = client.tasks().list_pids(pids).await?.into_inner().processes;
    let init = client.task("life", "").await?.pid;
    assert!(pids.iter().any(|process| process.pid == init), "{pids:?}");
    client.kill("life", "", 15).await?;
    assert_eq!(client.wait("life", "").await?.status, 5);
    assert_eq!(client.delete_task("life").await?.status, 5);
    client.delete(&container).await?;

    // What the runtime says about a program that is not there reaches the caller.
    let spec = Spec::new(daemon.namespace(), "missing", &["/no/such/program"]);
    let options = Options {
        binary_name: binary.to_owned(),
        root: daemon.dir().join("oci").display().to_string(),
        ..Options::default()
    };
    let container = client
        .create_on(
            "missing",
            top,
            &spec,
            "overlayfs",
            shim,
            Some(any::pack(&options)),
        )
        .await?;
    let refused = match client.create_task(&container, None).await {
        Err(status) => status,
        Ok(_) => client
            .start("missing", "")
            .await
            .expect_err("no such program"),
    };
    assert!(
        refused
            .message()
            .to_lowercase()
            .contains("no such file or directory"),
        "{refused}"
    );
    eventually("the failed task is gone", async || {
        let _ = client.delete_task("missing").await;
        Ok(client.task("missing", "").await.is_err().then_some(()))
    })
    .await?;
    client.delete(&container).await?;
    Ok(())
}

/// Runs a life where both programs are installed; says why not elsewhere.
async fn pair(shim: &str, binary: &str) -> Result {
    for program in [shim, binary] {
        if program.starts_with('/') && !Path::new(program).exists() {
            eprintln!("skipped: {program} is not installed");
            return Ok(());
        }
    }
    let (daemon, client, _, top) = ready().await?;
    let shim = match (shim, daemon.subject()) {
        ("ours", Subject::Lighter) => "io.containerd.runc.v2".to_owned(),
        ("ours", Subject::Containerd) => built("containerd-shim-lighter-v2").display().to_string(),
        (other, _) => other.to_owned(),
    };
    life(&daemon, &client, &top, &shim, binary).await?;
    daemon.finish().await
}

#[tokio::test]
async fn our_runtime_serves_debians_shim() -> Result {
    pair(DEBIAN_SHIM, &built("lighter-oci").display().to_string()).await
}

#[tokio::test]
async fn our_runtime_serves_our_shim_as_a_program() -> Result {
    pair("ours", &built("lighter-oci").display().to_string()).await
}

#[tokio::test]
async fn runc_serves_our_shim() -> Result {
    pair("ours", "/usr/sbin/runc").await
}

#[tokio::test]
async fn crun_serves_our_shim() -> Result {
    // crun of this generation refuses a version 2 hierarchy with controllers beside version 1.
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/unified/cgroup.controllers");
    if controllers.is_ok_and(|controllers| !controllers.trim().is_empty()) {
        eprintln!("skipped: crun does not run on a hybrid of cgroup v1 and v2");
        return Ok(());
    }
    pair("ours", "/usr/bin/crun").await
}
