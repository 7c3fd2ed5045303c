//! What the configuration file decides: plugins, policies, what a broken one is told.

use std::collections::HashMap;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use lighter_integration::{Daemon, Options, Result, Subject, image};
use lighter_proto::containerd::services as svc;
use svc::content::v1 as content;
use tonic::Code;

async fn start(options: Options) -> Result<Daemon> {
    Daemon::start_with(Subject::of_run(), &options).await
}

#[tokio::test]
async fn a_disabled_plugin_is_not_there_and_takes_its_service_along() -> Result {
    let daemon = start(Options {
        disabled: vec![
            "io.containerd.service.v1.diff-service",
            "io.containerd.grpc.v1.leases",
        ],
        ..Options::default()
    })
    .await?;
    let client = daemon.client().await?;
    let all = svc::introspection::v1::PluginsRequest { filters: vec![] };
    let plugins = client
        .introspection()
        .plugins(all)
        .await?
        .into_inner()
        .plugins;
    let find = |kind: &str, id: &str| plugins.iter().find(|p| p.r#type == kind && p.id == id);
    assert!(find("io.containerd.service.v1", "diff-service").is_none());
    assert!(find("io.containerd.grpc.v1", "leases").is_none());
    let diff = find("io.containerd.grpc.v1", "diff").expect("listed as failed");
    assert!(diff.init_err.is_some(), "{diff:?}");
    let content = find("io.containerd.grpc.v1", "content").expect("there");
    assert!(content.init_err.is_none(), "{content:?}");
    let apply = client
        .diff()
        .apply(svc::diff::v1::ApplyRequest::default())
        .await;
    assert_eq!(apply.expect_err("off").code(), Code::Unimplemented);
    let list = client
        .leases()
        .list(svc::leases::v1::ListRequest { filters: vec![] })
        .await;
    assert_eq!(list.expect_err("off").code(), Code::Unimplemented);
    let list = content::ListStatusesRequest { filters: vec![] };
    client.content().list_statuses(list).await?;
    daemon.finish().await
}

#[tokio::test]
async fn a_required_plugin_that_is_off_keeps_the_daemon_from_starting() -> Result {
    let refused = start(Options {
        head: "required_plugins = ['io.containerd.grpc.v1.images']".to_owned(),
        disabled: vec!["io.containerd.service.v1.images-service"],
        ..Options::default()
    })
    .await;
    let text = format!("{:#}", refused.expect_err("it must not start"));
    assert!(text.contains("io.containerd.grpc.v1.images"), "{text}");
    let works = start(Options {
        head: "required_plugins = ['io.containerd.grpc.v1.images']".to_owned(),
        ..Options::default()
    });
    works.await?.finish().await
}

/// What a writer that expects a blob of another namespace is told: bytes there already.
async fn offset_elsewhere(policy: &str) -> Result<i64> {
    let daemon = start(Options {
        config: format!(
            "[plugins.'io.containerd.metadata.v1.bolt']\ncontent_sharing_policy = '{policy}'\n"
        ),
        ..Options::default()
    })
    .await?;
    let client = daemon.client().await?;
    let digest = image::digest(b"shared bytes");
    client
        .write_blob("r", &digest, b"shared bytes", HashMap::new())
        .await?;
    let other = client.in_namespace("elsewhere");
    let stat = content::WriteContentRequest {
        action: content::WriteAction::Stat.into(),
        r#ref: "r".to_owned(),
        expected: digest.clone(),
        total: 12,
        ..Default::default()
    };
    let commit = content::WriteContentRequest {
        action: content::WriteAction::Commit.into(),
        offset: 12,
        ..stat.clone()
    };
    let requests = [stat.clone()];
    let mut answers = other
        .content()
        .write(tokio_stream::iter(requests))
        .await?
        .into_inner();
    let offset = answers.message().await?.expect("an answer").offset;
    let requests = [if offset == 12 {
        commit
    } else {
        content::WriteContentRequest {
            action: content::WriteAction::Commit.into(),
            data: Bytes::from_static(b"shared bytes"),
            ..stat
        }
    }];
    drop(answers);
    // The first stream's lock goes a moment after its client.
    let mut service = other.content();
    lighter_integration::eventually("the blob is committed", async || {
        let answer = service.write(tokio_stream::iter(requests.clone())).await;
        let Ok(answer) = answer else { return Ok(None) };
        let mut answers = answer.into_inner();
        while let Some(message) = answers.message().await.transpose() {
            if message.is_err() {
                return Ok(None);
            }
        }
        Ok(Some(()))
    })
    .await?;
    assert_eq!(other.read_blob(&digest).await?, b"shared bytes");
    daemon.finish().await?;
    Ok(offset)
}

#[tokio::test]
async fn the_sharing_policy_decides_whether_bytes_are_proven() -> Result {
    assert_eq!(
        offset_elsewhere("shared").await?,
        12,
        "no bytes are asked for"
    );
    assert_eq!(
        offset_elsewhere("isolated").await?,
        0,
        "the bytes are asked for"
    );
    Ok(())
}

#[tokio::test]
async fn the_service_manager_is_told() -> Result {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("notify.sock");
    let socket = UnixDatagram::bind(&path)?;
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    let daemon = start(Options {
        env: vec![("NOTIFY_SOCKET", path)],
        ..Options::default()
    })
    .await?;
    let mut message = [0; 4096];
    let mut hear = |what: &str| -> Result {
        loop {
            let count = socket.recv(&mut message)?;
            let text = String::from_utf8_lossy(&message[..count]).into_owned();
            if text.lines().any(|line| line == what) {
                return Ok(());
            }
        }
    };
    hear("READY=1")?;
    daemon.finish().await?;
    hear("STOPPING=1")
}

/// What `<daemon> --config FILE config <verb>` prints.
fn config(daemon: &Daemon, file: &std::path::Path, verb: &str) -> Result<String> {
    let output = Command::new(daemon.subject().daemon())
        .arg("--config")
        .arg(file)
        .args(["config", verb])
        .output()?;
    let (out, err) = (output.stdout, String::from_utf8_lossy(&output.stderr));
    anyhow::ensure!(output.status.success(), "config {verb}: {err}");
    Ok(String::from_utf8(out)?)
}

#[tokio::test]
async fn config_dump_shows_what_runs_and_migrate_keeps_it() -> Result {
    let daemon = start(Options {
        config: "[plugins.'io.containerd.internal.v1.restart']\ninterval = '7s'\n".to_owned(),
        disabled: vec!["io.containerd.grpc.v1.diff"],
        ..Options::default()
    })
    .await?;
    let dump = config(&daemon, &daemon.config(), "dump")?;
    for part in [
        "io.containerd.grpc.v1.diff",
        "7s",
        "c.sock",
        "pause_threshold",
    ] {
        assert!(dump.contains(part), "{part} in {dump}");
    }
    // What is dumped is a configuration that dumps the same.
    let again = daemon.dir().join("again.toml");
    std::fs::write(&again, &dump)?;
    let second = config(&daemon, &again, "dump")?;
    if daemon.subject() == Subject::Lighter {
        assert_eq!(second, dump);
    }
    assert!(config(&daemon, &daemon.config(), "default")?.contains("pause_threshold"));
    if daemon.client().await?.is_recent().await? {
        let migrated = config(&daemon, &daemon.config(), "migrate")?;
        assert!(
            !migrated.contains("io.containerd.internal.v1.restart"),
            "{migrated}"
        );
        let new = daemon.dir().join("new.toml");
        std::fs::write(&new, migrated)?;
        let third = config(&daemon, &new, "dump")?;
        assert!(third.contains("7s") && third.contains("c.sock"), "{third}");
        if daemon.subject() == Subject::Lighter {
            assert_eq!(third, dump);
        }
    }
    daemon.finish().await
}

#[tokio::test]
async fn what_cannot_be_done_is_refused_with_a_remedy() -> Result {
    if Subject::of_run() != Subject::Lighter {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    for (text, remedy) in [
        (
            "version = 2\n[grpc]\ntcp_address = '127.0.0.1:1'\ntcp_tls_cert = '/c'\n",
            "tcp_tls_key",
        ),
        (
            "version = 2\n[grpc]\ntcp_address = '127.0.0.1:1'\ntcp_tls_ca = '/c'\n",
            "tcp_tls_cert",
        ),
        (
            "version = 2\n[grpc]\ntcp_address = '127.0.0.1:1'\ntcp_tls_common_name = 'c'\n",
            "name files with tcp_tls_cert",
        ),
        ("version = 2\nfrobnicate = 1\n", "frobnicate"),
        ("version = 9\n", "version"),
        ("version = 2\n[grpc]\nadress = '/x'\n", "adress"),
        ("version = [\n", "not valid TOML"),
    ] {
        let file = dir.path().join("config.toml");
        std::fs::write(&file, text)?;
        let mut command = Command::new(Subject::Lighter.daemon());
        let output = command
            .arg("--config")
            .arg(&file)
            .args(["config", "dump"])
            .output()?;
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{text}");
        assert!(err.contains(remedy), "{text}: {err}");
    }
    let refused = async |options: Options| {
        let text = start(options).await.expect_err("it must not start");
        format!("{text:#}")
    };
    let core = Options {
        disabled: vec!["io.containerd.metadata.v1.bolt"],
        ..Options::default()
    };
    let core = refused(core).await;
    assert!(core.contains("take it off the list"), "{core}");
    let policy = Options {
        config: "[plugins.'io.containerd.metadata.v1.bolt']\ncontent_sharing_policy = 'some'\n"
            .to_owned(),
        ..Options::default()
    };
    let policy = refused(policy).await;
    assert!(policy.contains("neither shared nor isolated"), "{policy}");
    Ok(())
}

#[tokio::test]
async fn mount_options_of_the_overlay_reach_its_mounts() -> Result {
    let daemon = start(Options {
        config: "[plugins.'io.containerd.snapshotter.v1.overlayfs']\nmount_options = \
                 ['redirect_dir=nofollow']\n"
            .to_owned(),
        ..Options::default()
    })
    .await?;
    let client = daemon.client().await?;
    // containerd 1.6 has no such key.
    if !client.is_recent().await? {
        return daemon.finish().await;
    }
    let snapshotter = || "overlayfs".to_owned();
    let prepare = |key: &str, parent: &str| svc::snapshots::v1::PrepareSnapshotRequest {
        snapshotter: snapshotter(),
        key: key.to_owned(),
        parent: parent.to_owned(),
        ..Default::default()
    };
    client.snapshots().prepare(prepare("k", "")).await?;
    let commit = svc::snapshots::v1::CommitSnapshotRequest {
        snapshotter: snapshotter(),
        name: "base".to_owned(),
        key: "k".to_owned(),
        ..Default::default()
    };
    client.snapshots().commit(commit).await?;
    let made = client
        .snapshots()
        .prepare(prepare("top", "base"))
        .await?
        .into_inner();
    let options = &made.mounts[0].options;
    assert!(
        options.iter().any(|o| o == "redirect_dir=nofollow"),
        "{options:?}"
    );
    daemon.finish().await
}
