//! Shims that are started ahead of need: used, renewed, and gone with their daemon.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use lighter_integration::{
    Client, Container, Daemon, Options, Result, Spec, Subject, built, eventually, parent_of,
};
use lighter_testing::copy_executable;

use crate::run::ready;

async fn start(daemon: &Daemon, client: &Client, top: &str, id: &str) -> Result<(Container, u32)> {
    let spec = Spec::new(daemon.namespace(), id, &["sleep", "1000"]);
    let container = client.create(id, top, &spec).await?;
    let pid = client.create_task(&container, None).await?;
    client.start(id, "").await?;
    Ok((container, pid))
}

/// Waits until shims are ready; their pids.
async fn warm(daemon: &Daemon) -> Result<Vec<i32>> {
    eventually("warm shims are ready", async || {
        let warm = daemon.warm_shims();
        // The nursery, and what it keeps ready.
        Ok((warm.len() >= 3).then_some(warm))
    })
    .await
}

#[tokio::test]
async fn a_killed_daemon_leaves_containers_and_no_idle_shims() -> Result {
    if Subject::of_run() != Subject::Lighter {
        return Ok(());
    }
    let (mut daemon, client, _, top) = ready().await?;
    let idle = warm(&daemon).await?;
    let (container, pid) = start(&daemon, &client, &top, "kept").await?;
    let shim = parent_of(pid)?;
    assert!(idle.contains(&parent_of(shim)?), "a warm shim was used");
    assert!(!daemon.warm_shims().contains(&shim), "it is not idle");
    daemon.kill()?;
    eventually("idle shims end with their daemon", async || {
        Ok(daemon.warm_shims().is_empty().then_some(()))
    })
    .await?;
    assert_eq!(parent_of(pid)?, shim, "a shim in use goes on");
    daemon.boot().await?;
    let client = daemon.client().await?;
    client.destroy(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn a_new_binary_is_used_for_the_next_container() -> Result {
    if Subject::of_run() != Subject::Lighter {
        return Ok(());
    }
    let bin = tempfile::tempdir()?;
    for name in ["lighterd", "containerd-shim-lighter-v2"] {
        copy_executable(built(name), bin.path().join(name))?;
    }
    let options = Options {
        bin_dir: Some(bin.path().to_owned()),
        ..Options::default()
    };
    let daemon = Daemon::start_with(Subject::Lighter, &options).await?;
    let client = daemon.client().await?;
    let (_, top) = client.busybox().await?;
    let shim = bin.path().join("containerd-shim-lighter-v2");
    let inode = |path: &Path| -> Result<u64> { Ok(fs::metadata(path)?.ino()) };
    let exe = |pid: i32| inode(Path::new(&format!("/proc/{pid}/exe")));
    let old = warm(&daemon).await?;
    let (first, pid) = start(&daemon, &client, &top, "first").await?;
    assert_eq!(exe(parent_of(pid)?)?, inode(&shim)?);
    // As a package manager does it.
    let next = bin.path().join("next");
    copy_executable(&shim, &next)?;
    fs::rename(&next, &shim)?;
    let (second, pid) = start(&daemon, &client, &top, "second").await?;
    assert_eq!(exe(parent_of(pid)?)?, inode(&shim)?, "the new binary runs");
    eventually("shims of the old binary are gone", async || {
        let warm = daemon.warm_shims();
        Ok((!warm.iter().any(|pid| old.contains(pid))).then_some(()))
    })
    .await?;
    client.destroy(&first).await?;
    client.destroy(&second).await?;
    daemon.finish().await
}

#[tokio::test]
async fn sixteen_at_once_all_get_a_shim_of_their_own() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let all = (0..16).map(|n| {
        let (daemon, client, top) = (&daemon, &client, &top);
        async move { start(daemon, client, top, &format!("c{n}")).await }
    });
    let all: Result<Vec<_>> = futures::future::join_all(all).await.into_iter().collect();
    let all = all?;
    let shims: Result<std::collections::BTreeSet<_>> =
        all.iter().map(|(_, pid)| parent_of(pid)).collect();
    assert_eq!(shims?.len(), 16);
    // The ids are free as soon as their tasks are deleted.
    for (container, _) in &all[..4] {
        client.destroy(container).await?;
        let (again, _) = start(&daemon, &client, &top, &container.id).await?;
        client.destroy(&again).await?;
    }
    for (container, _) in &all[4..] {
        client.destroy(container).await?;
    }
    daemon.finish().await
}

#[tokio::test]
async fn without_warm_shims_each_is_started_when_it_is_needed() -> Result {
    if Subject::of_run() != Subject::Lighter {
        return Ok(());
    }
    let options = Options {
        config: "[plugins.'io.containerd.shim.v1.manager']\nwarm_shims = 0\n".to_owned(),
        ..Options::default()
    };
    let daemon = Daemon::start_with(Subject::Lighter, &options).await?;
    let client = daemon.client().await?;
    let (_, top) = client.busybox().await?;
    let (container, _) = start(&daemon, &client, &top, "cold").await?;
    assert!(daemon.warm_shims().is_empty());
    client.destroy(&container).await?;
    daemon.finish().await
}
