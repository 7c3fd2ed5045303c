//! Snapshots through the API, on every snapshotter both daemons have.

use std::collections::HashMap;

use lighter_integration::{Daemon, Result};
use lighter_proto::containerd::services::snapshots::v1 as api;
use tokio_stream::StreamExt as _;
use tonic::Code;

fn prepare(snapshotter: &str, key: &str, parent: &str) -> api::PrepareSnapshotRequest {
    api::PrepareSnapshotRequest {
        snapshotter: snapshotter.into(),
        key: key.into(),
        parent: parent.into(),
        labels: HashMap::new(),
    }
}

fn commit(snapshotter: &str, name: &str, key: &str) -> api::CommitSnapshotRequest {
    api::CommitSnapshotRequest {
        snapshotter: snapshotter.into(),
        name: name.into(),
        key: key.into(),
        labels: HashMap::from([("containerd.io/gc.root".into(), "test".into())]),
        parent: String::new(),
    }
}

fn remove(snapshotter: &str, key: &str) -> api::RemoveSnapshotRequest {
    api::RemoveSnapshotRequest {
        snapshotter: snapshotter.into(),
        key: key.into(),
    }
}

async fn life(snapshotter: &str) -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let mut snapshots = client.snapshots();
    let code = |result: Result<(), tonic::Status>| result.expect_err("refused").code();
    snapshots
        .prepare(prepare(snapshotter, "base-work", ""))
        .await?;
    let twice = snapshots
        .prepare(prepare(snapshotter, "base-work", ""))
        .await
        .map(drop);
    assert_eq!(code(twice), Code::AlreadyExists);
    let orphan = snapshots
        .prepare(prepare(snapshotter, "x", "no-such-parent"))
        .await
        .map(drop);
    assert_eq!(code(orphan), Code::NotFound);
    let active = snapshots
        .prepare(prepare(snapshotter, "x", "base-work"))
        .await
        .map(drop);
    assert_eq!(code(active), Code::InvalidArgument);
    snapshots
        .commit(commit(snapshotter, "base", "base-work"))
        .await?;
    let gone = snapshots
        .commit(commit(snapshotter, "other", "base-work"))
        .await
        .map(drop);
    assert_eq!(code(gone), Code::NotFound);
    let mounts = snapshots
        .prepare(prepare(snapshotter, "top-work", "base"))
        .await?
        .into_inner()
        .mounts;
    assert_eq!(mounts.len(), 1, "{mounts:?}");
    let again = api::MountsRequest {
        snapshotter: snapshotter.into(),
        key: "top-work".into(),
    };
    assert_eq!(snapshots.mounts(again).await?.into_inner().mounts, mounts);
    let of_committed = api::MountsRequest {
        snapshotter: snapshotter.into(),
        key: "base".into(),
    };
    assert!(snapshots.mounts(of_committed).await.is_err());
    let view = api::ViewSnapshotRequest {
        snapshotter: snapshotter.into(),
        key: "view".into(),
        parent: "base".into(),
        labels: HashMap::new(),
    };
    snapshots.view(view).await?;
    // containerd 1.6 loses a native view whose commit it refuses.
    if snapshotter != "native" {
        let view = snapshots.commit(commit(snapshotter, "v", "view")).await;
        view.expect_err("a view cannot be committed");
    }
    let parent = snapshots
        .remove(remove(snapshotter, "base"))
        .await
        .map(drop);
    let parent = parent.expect_err("it has children");
    assert_eq!(parent.code(), Code::FailedPrecondition);
    assert!(
        parent
            .message()
            .contains("cannot remove snapshot with child"),
        "{parent}"
    );
    let list = api::ListSnapshotsRequest {
        snapshotter: snapshotter.into(),
        filters: vec![],
    };
    let mut names = Vec::new();
    let mut stream = snapshots.list(list).await?.into_inner();
    while let Some(page) = stream.next().await {
        names.extend(page?.info.into_iter().map(|i| (i.name, i.parent)));
    }
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(
        names,
        [
            pair("base", ""),
            pair("top-work", "base"),
            pair("view", "base")
        ]
    );
    let kinds = api::ListSnapshotsRequest {
        snapshotter: snapshotter.into(),
        filters: vec!["kind==view".into()],
    };
    let page = snapshots
        .list(kinds)
        .await?
        .into_inner()
        .next()
        .await
        .expect("one page")?;
    assert_eq!(
        page.info
            .iter()
            .map(|i| i.name.as_str())
            .collect::<Vec<_>>(),
        ["view"]
    );
    for key in ["view", "top-work", "base"] {
        snapshots.remove(remove(snapshotter, key)).await?;
        let stat = api::StatSnapshotRequest {
            snapshotter: snapshotter.into(),
            key: key.into(),
        };
        assert_eq!(code(snapshots.stat(stat).await.map(drop)), Code::NotFound);
    }
    daemon.finish().await
}

#[tokio::test]
async fn overlayfs_follows_the_rules() -> Result {
    life("overlayfs").await
}

#[tokio::test]
async fn native_follows_the_rules() -> Result {
    life("native").await
}

#[tokio::test]
async fn an_unknown_snapshotter_is_named() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let status = client
        .snapshots()
        .prepare(prepare("nosuch", "k", ""))
        .await
        .expect_err("unknown");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status.message().contains("snapshotter not loaded: nosuch"),
        "{status}"
    );
    let status = client
        .snapshots()
        .prepare(prepare("", "k", ""))
        .await
        .expect_err("missing");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    daemon.finish().await
}
