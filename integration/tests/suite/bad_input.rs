//! Bad input: the right code, a text that names the input, and nothing left behind.

use std::collections::HashMap;

use lighter_integration::image::append;
use lighter_integration::{Blob, Client, Daemon, Image, Layer, Result, Spec, Subject, image};
use lighter_proto::containerd::services as svc;
use lighter_proto::containerd::types::Descriptor;
use prost_types::Any;
use tonic::{Code, Status};

use crate::run::ready;

#[tokio::test]
async fn a_missing_or_malformed_namespace_is_refused() -> Result {
    let daemon = Daemon::start().await?;
    let list = || svc::containers::v1::ListContainersRequest { filters: vec![] };
    let none = daemon.client().await?.in_namespace("");
    let status = none
        .containers()
        .list(list())
        .await
        .expect_err("no namespace");
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert!(
        status.message().contains("namespace is required"),
        "{status}"
    );
    for bad in ["a/b", "..", "-x", "a b"] {
        let status = none
            .in_namespace(bad)
            .containers()
            .list(list())
            .await
            .expect_err(bad);
        assert_eq!(status.code(), Code::InvalidArgument, "{bad}: {status}");
    }
    daemon.finish().await
}

#[tokio::test]
async fn containers_with_bad_fields_are_refused() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let good = svc::containers::v1::Container {
        id: "good".into(),
        runtime: Some(svc::containers::v1::container::Runtime {
            name: "io.containerd.runc.v2".into(),
            options: None,
        }),
        spec: Some(Any {
            type_url: "t".into(),
            value: b"{}".to_vec(),
        }),
        ..Default::default()
    };
    let mut bad = Vec::new();
    for id in ["", "a/b", "../x", "a..b", &"x".repeat(77), "ünï"] {
        bad.push(svc::containers::v1::Container {
            id: id.into(),
            ..good.clone()
        });
    }
    bad.push(svc::containers::v1::Container {
        runtime: None,
        ..good.clone()
    });
    bad.push(svc::containers::v1::Container {
        spec: None,
        ..good.clone()
    });
    bad.push(svc::containers::v1::Container {
        snapshot_key: "k".into(),
        ..good.clone()
    });
    let long = HashMap::from([("k".to_owned(), "v".repeat(4096))]);
    bad.push(svc::containers::v1::Container {
        labels: long,
        ..good.clone()
    });
    for record in bad {
        let id = record.id.clone();
        let request = svc::containers::v1::CreateContainerRequest {
            container: Some(record),
        };
        let status = client.containers().create(request).await.expect_err(&id);
        assert_eq!(status.code(), Code::InvalidArgument, "{id}: {status}");
    }
    let empty = svc::containers::v1::CreateContainerRequest { container: None };
    assert!(client.containers().create(empty).await.is_err());
    assert!(client.version().await.is_ok(), "the daemon is alive");
    daemon.finish().await
}

#[tokio::test]
async fn a_spec_that_is_no_json_fails_the_task_and_leaves_nothing() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let spec = Spec::new(daemon.namespace(), "broken", &["true"]);
    let container = client.create("broken", &top, &spec).await?;
    client
        .containers()
        .update(svc::containers::v1::UpdateContainerRequest {
            container: Some(svc::containers::v1::Container {
                id: "broken".into(),
                spec: Some(Any {
                    type_url: lighter_proto::any::SPEC.into(),
                    value: b"{ this is not json".to_vec(),
                }),
                ..Default::default()
            }),
            update_mask: Some(prost_types::FieldMask {
                paths: vec!["spec".into()],
            }),
        })
        .await?;
    client
        .create_task(&container, None)
        .await
        .expect_err("not JSON");
    assert_eq!(
        client.task("broken", "").await.expect_err("no task").code(),
        Code::NotFound
    );
    client.delete(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn unknown_things_are_not_found() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let codes = [
        client.task("nosuch", "").await.expect_err("task").code(),
        client.start("nosuch", "").await.expect_err("start").code(),
        client.kill("nosuch", "", 9).await.expect_err("kill").code(),
        client
            .delete_task("nosuch")
            .await
            .expect_err("delete")
            .code(),
        client.wait("nosuch", "").await.expect_err("wait").code(),
        client
            .images()
            .get(svc::images::v1::GetImageRequest {
                name: "nosuch".into(),
            })
            .await
            .expect_err("image")
            .code(),
        client
            .read_blob(&image::digest(b"nosuch"))
            .await
            .expect_err("blob")
            .code(),
    ];
    assert!(codes.iter().all(|c| *c == Code::NotFound), "{codes:?}");
    for bad in [
        "",
        "sha256:abc",
        "md5:d41d8cd98f00b204e9800998ecf8427e",
        "nonsense",
    ] {
        let info = svc::content::v1::InfoRequest { digest: bad.into() };
        let status = client.content().info(info).await.expect_err(bad);
        assert_eq!(status.code(), Code::InvalidArgument, "{bad}: {status}");
    }
    daemon.finish().await
}

/// Stores a layer and applies it to a fresh snapshot `key`.
async fn apply(client: &Client, layer: &Blob, key: &str) -> Result<(), Status> {
    client
        .write_blob(key, &layer.digest, &layer.data, HashMap::new())
        .await?;
    let prepare = svc::snapshots::v1::PrepareSnapshotRequest {
        snapshotter: "overlayfs".into(),
        key: key.into(),
        parent: String::new(),
        labels: HashMap::new(),
    };
    let mounts = client
        .snapshots()
        .prepare(prepare)
        .await?
        .into_inner()
        .mounts;
    let request = svc::diff::v1::ApplyRequest {
        diff: Some(Descriptor {
            media_type: layer.media_type.clone(),
            digest: layer.digest.clone(),
            size: i64::try_from(layer.data.len()).unwrap_or(0),
            annotations: HashMap::new(),
        }),
        mounts,
        payloads: HashMap::new(),
        sync_fs: false,
    };
    let applied = client.diff().apply(request).await.map(drop);
    let remove = svc::snapshots::v1::RemoveSnapshotRequest {
        snapshotter: "overlayfs".into(),
        key: key.into(),
    };
    client.snapshots().remove(remove).await?;
    applied
}

#[tokio::test]
async fn damaged_layers_fail_and_leave_nothing_mounted() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let whole = Layer::busybox()?.blob;
    let cut = Blob::new(
        &whole.media_type,
        whole.data[..whole.data.len() / 2].to_vec(),
    );
    apply(&client, &cut, "cut")
        .await
        .expect_err("a truncated layer");
    let mut bent = whole.data.clone();
    let middle = bent.len() / 2;
    for byte in &mut bent[middle..middle + 64] {
        *byte ^= 0x5a;
    }
    apply(&client, &Blob::new(&whole.media_type, bent), "bent")
        .await
        .expect_err("a bent layer");
    apply(&client, &whole, "whole").await?;
    daemon.finish().await
}

#[tokio::test]
async fn hostile_tars_stay_inside_their_root() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let mark = daemon.dir().join("escaped");
    let outside = mark.to_str().expect("UTF-8");
    let up = format!("{}{}", "../".repeat(12), outside.trim_start_matches('/'));
    let file = tar::EntryType::Regular;
    let link = tar::EntryType::Symlink;
    let hard = tar::EntryType::Link;
    std::fs::write(daemon.dir().join("secret"), "secret")?;
    let parent = daemon.dir().to_str().expect("UTF-8").to_owned();
    type Entry<'a> = (&'a str, tar::EntryType, Option<&'a str>);
    let cases: Vec<Vec<Entry<'_>>> = vec![
        vec![(up.as_str(), file, None)],
        vec![(outside, file, None)],
        vec![
            ("out", link, Some(parent.as_str())),
            ("out/escaped", file, None),
        ],
        vec![
            ("a", link, Some("/")),
            ("b", link, Some("a")),
            ("b/escaped-root", file, None),
        ],
        vec![
            ("up", link, Some("../../../../../../../../../../..")),
            ("up/escaped-up", file, None),
        ],
        vec![("stolen", hard, Some("/etc/hostname"))],
        vec![("../.wh.etc", file, None)],
        vec![(".wh..", file, None)],
        vec![(".wh...", file, None)],
    ];
    for (n, entries) in cases.iter().enumerate() {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, kind, target) in entries {
            let data: &[u8] = if *kind == file { b"escaped" } else { b"" };
            append(&mut tar, path, *kind, 0o644, data, *target)?;
        }
        let layer = Layer::gzip(&tar.into_inner()?)?.blob;
        // Either refused or confined: both are right, escaping is not.
        let _ = apply(&client, &layer, &format!("hostile{n}")).await;
        assert!(!mark.exists(), "case {n} escaped: {entries:?}");
        for path in ["/escaped-root", "/escaped-up"] {
            assert!(
                !std::path::Path::new(path).exists(),
                "case {n} escaped to {path}"
            );
        }
        assert!(std::path::Path::new("/etc").is_dir(), "case {n}");
    }
    daemon.finish().await
}

#[tokio::test]
async fn a_runtime_that_is_not_installed_is_named() -> Result {
    let (daemon, client, _, top) = ready().await?;
    let spec = Spec::new(daemon.namespace(), "rt", &["true"]);
    let container = client
        .create_on(
            "rt",
            &top,
            &spec,
            "overlayfs",
            "io.containerd.nosuch.v9",
            None,
        )
        .await?;
    let status = client
        .create_task(&container, None)
        .await
        .expect_err("no such shim");
    assert!(
        status.message().contains("containerd-shim-nosuch-v9"),
        "{status}"
    );
    assert_eq!(
        client.task("rt", "").await.expect_err("no task").code(),
        Code::NotFound
    );
    client.delete(&container).await?;
    daemon.finish().await
}

#[tokio::test]
async fn requests_without_their_parts_do_not_kill_the_daemon() -> Result {
    let daemon = Daemon::start().await?;
    if daemon.subject() == Subject::Containerd {
        // The reference panics on some of these.
        return daemon.finish().await;
    }
    let client = daemon.client().await?;
    let image = svc::images::v1::CreateImageRequest {
        image: None,
        source_date_epoch: None,
    };
    assert_eq!(
        client
            .images()
            .create(image)
            .await
            .expect_err("empty")
            .code(),
        Code::InvalidArgument
    );
    let image = svc::images::v1::CreateImageRequest {
        image: Some(svc::images::v1::Image {
            name: "x".into(),
            ..Default::default()
        }),
        source_date_epoch: None,
    };
    assert_eq!(
        client
            .images()
            .create(image)
            .await
            .expect_err("no target")
            .code(),
        Code::InvalidArgument
    );
    let apply = svc::diff::v1::ApplyRequest::default();
    assert_eq!(
        client.diff().apply(apply).await.expect_err("empty").code(),
        Code::InvalidArgument
    );
    let create = svc::tasks::v1::CreateTaskRequest::default();
    assert!(client.tasks().create(create).await.is_err());
    let update = svc::content::v1::UpdateRequest::default();
    assert_eq!(
        client
            .content()
            .update(update)
            .await
            .expect_err("empty")
            .code(),
        Code::InvalidArgument
    );
    let lease = svc::leases::v1::AddResourceRequest::default();
    assert!(client.leases().add_resource(lease).await.is_err());
    let publish = svc::events::v1::PublishRequest::default();
    assert_eq!(
        client
            .events()
            .publish(publish)
            .await
            .expect_err("empty")
            .code(),
        Code::InvalidArgument
    );
    let namespace = svc::namespaces::v1::CreateNamespaceRequest { namespace: None };
    assert_eq!(
        client
            .namespaces()
            .create(namespace)
            .await
            .expect_err("empty")
            .code(),
        Code::InvalidArgument
    );
    assert!(client.version().await.is_ok(), "the daemon is alive");
    daemon.finish().await
}

#[tokio::test]
async fn an_image_of_another_platform_is_said_to_be_one() -> Result {
    let daemon = Daemon::start().await?;
    let layer = Layer::files(&[("hello", b"hello")])?;
    let config = serde_json::json!({
        "architecture": "s390x", "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": [layer.diff_id] }
    });
    let image = Image::with_config("docker.io/test/other:1", &config, vec![layer])?;
    let file = daemon.dir().join("other.tar");
    std::fs::write(&file, image.oci_archive()?)?;
    let path = file.to_str().expect("UTF-8");
    let ctr = daemon.debian_ctr();
    ctr.run(&["images", "import", "--no-unpack", path])?.ok()?;
    let ran = ctr.run(&["run", "--rm", "docker.io/test/other:1", "x", "true"])?;
    assert_ne!(ran.code, 0);
    let client = daemon.client().await?;
    assert_eq!(
        client.task("x", "").await.expect_err("no task").code(),
        Code::NotFound
    );
    daemon.finish().await
}
