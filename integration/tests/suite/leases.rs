//! Leases and collection: what is held stays, what nobody holds goes.

use std::collections::HashMap;

use lighter_integration::{Client, Daemon, Image, Result, image};
use lighter_proto::containerd::services as svc;
use lighter_proto::containerd::types::Descriptor;
use svc::content::v1::InfoRequest;
use svc::images::v1::DeleteImageRequest;
use svc::leases::v1 as api;
use tonic::Code;

async fn exists(client: &Client, digest: &str) -> Result<bool> {
    match client
        .content()
        .info(InfoRequest {
            digest: digest.to_owned(),
        })
        .await
    {
        Ok(_) => Ok(true),
        Err(status) if status.code() == Code::NotFound => Ok(false),
        Err(status) => Err(status.into()),
    }
}

#[tokio::test]
async fn a_lease_keeps_what_was_made_under_it() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let create = api::CreateRequest {
        id: "hold".into(),
        labels: HashMap::new(),
    };
    client.leases().create(create.clone()).await?;
    let twice = client.leases().create(create).await.expect_err("exists");
    assert_eq!(twice.code(), Code::AlreadyExists);
    let held = image::digest(b"held");
    let free = image::digest(b"free");
    client
        .under_lease("hold")
        .write_blob("held", &held, b"held", HashMap::new())
        .await?;
    client
        .write_blob("free", &free, b"free", HashMap::new())
        .await?;
    client.collect().await?;
    assert!(exists(&client, &held).await?, "a lease holds it");
    assert!(!exists(&client, &free).await?, "nothing holds it");
    let resources = api::ListResourcesRequest { id: "hold".into() };
    let resources = client
        .leases()
        .list_resources(resources)
        .await?
        .into_inner()
        .resources;
    assert_eq!(
        resources
            .iter()
            .map(|r| (r.id.as_str(), r.r#type.as_str()))
            .collect::<Vec<_>>(),
        [(held.as_str(), "content")]
    );
    client
        .leases()
        .delete(api::DeleteRequest {
            id: "hold".into(),
            sync: true,
        })
        .await?;
    assert!(!exists(&client, &held).await?, "the lease is gone");
    let unknown = client
        .under_lease("nosuch")
        .write_blob("u", &held, b"held", HashMap::new())
        .await;
    assert_eq!(unknown.expect_err("no such lease").code(), Code::NotFound);
    daemon.finish().await
}

#[tokio::test]
async fn an_image_keeps_its_tree_and_its_deletion_frees_it() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let image = Image::busybox("docker.io/test/tree:1")?;
    client.store(&image).await?;
    client.collect().await?;
    let blobs = [
        &image.manifest.digest,
        &image.config.digest,
        &image.layers[0].blob.digest,
    ];
    for digest in blobs {
        assert!(exists(&client, digest).await?, "{digest}");
    }
    let delete = DeleteImageRequest {
        name: image.name.clone(),
        sync: true,
        target: None,
    };
    client.images().delete(delete.clone()).await?;
    for digest in blobs {
        assert!(!exists(&client, digest).await?, "{digest}");
    }
    let again = client.images().delete(delete).await.expect_err("gone");
    assert_eq!(again.code(), Code::NotFound);
    daemon.finish().await
}

#[tokio::test]
async fn an_expired_lease_holds_nothing() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let labels = HashMap::from([(
        "containerd.io/gc.expire".to_owned(),
        "2020-01-01T00:00:00Z".to_owned(),
    )]);
    client
        .leases()
        .create(api::CreateRequest {
            id: "old".into(),
            labels,
        })
        .await?;
    let digest = image::digest(b"old");
    client
        .under_lease("old")
        .write_blob("old", &digest, b"old", HashMap::new())
        .await?;
    client.collect().await?;
    assert!(!exists(&client, &digest).await?);
    let left = client
        .leases()
        .list(api::ListRequest { filters: vec![] })
        .await?
        .into_inner()
        .leases;
    assert!(left.is_empty(), "{left:?}");
    daemon.finish().await
}

async fn lease(client: &Client, id: &str, label: Option<&str>) -> Result {
    let labels = label.map(|label| (label.to_owned(), "true".to_owned()));
    let request = api::CreateRequest {
        id: id.to_owned(),
        labels: labels.into_iter().collect(),
    };
    client.leases().create(request).await?;
    Ok(())
}

async fn end(client: &Client, id: &str) -> Result {
    let request = api::DeleteRequest {
        id: id.to_owned(),
        sync: true,
    };
    client.leases().delete(request).await?;
    Ok(())
}

async fn hold(client: &Client, lease: &str, kind: &str, id: &str) -> Result {
    let request = api::AddResourceRequest {
        id: lease.to_owned(),
        resource: Some(api::Resource {
            id: id.to_owned(),
            r#type: kind.to_owned(),
        }),
    };
    client.leases().add_resource(request).await?;
    Ok(())
}

#[tokio::test]
async fn a_flat_lease_holds_what_it_names_and_no_more() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    lease(&client, "setup", None).await?;
    lease(&client, "flat", Some("containerd.io/gc.flat")).await?;
    lease(&client, "deep", None).await?;
    let setup = client.under_lease("setup");
    let mut blobs = Vec::new();
    for (name, holder) in [("one", "flat"), ("two", "deep")] {
        let (child, parent) = (format!("{name} child"), format!("{name} parent"));
        let child_digest = image::digest(child.as_bytes());
        setup
            .write_blob(&child, &child_digest, child.as_bytes(), HashMap::new())
            .await?;
        let label = ("containerd.io/gc.ref.content.l.0", child_digest.clone());
        let labels = HashMap::from([(label.0.to_owned(), label.1)]);
        let digest = image::digest(parent.as_bytes());
        setup
            .write_blob(&parent, &digest, parent.as_bytes(), labels)
            .await?;
        hold(&client, holder, "content", &digest).await?;
        blobs.push((digest, child_digest));
    }
    // The parents of a snapshot are no labels: without them it is nothing.
    let snapshotter = "overlayfs".to_owned();
    let prepare = |key: &str, parent: &str| svc::snapshots::v1::PrepareSnapshotRequest {
        snapshotter: snapshotter.clone(),
        key: key.to_owned(),
        parent: parent.to_owned(),
        labels: HashMap::new(),
    };
    setup.snapshots().prepare(prepare("making", "")).await?;
    let commit = svc::snapshots::v1::CommitSnapshotRequest {
        snapshotter: snapshotter.clone(),
        name: "base".to_owned(),
        key: "making".to_owned(),
        ..Default::default()
    };
    setup.snapshots().commit(commit).await?;
    setup.snapshots().prepare(prepare("top", "base")).await?;
    hold(&client, "flat", "snapshots/overlayfs", "top").await?;
    end(&client, "setup").await?;
    client.collect().await?;
    let (flat, deep) = (&blobs[0], &blobs[1]);
    assert!(exists(&client, &flat.0).await?, "the lease names it");
    assert!(!exists(&client, &flat.1).await?, "only a label names it");
    assert!(exists(&client, &deep.0).await? && exists(&client, &deep.1).await?);
    for key in ["top", "base"] {
        let stat = svc::snapshots::v1::StatSnapshotRequest {
            snapshotter: snapshotter.clone(),
            key: key.to_owned(),
        };
        client.snapshots().stat(stat).await?;
    }
    end(&client, "flat").await?;
    end(&client, "deep").await?;
    for digest in [&flat.0, &deep.0, &deep.1] {
        assert!(!exists(&client, digest).await?, "{digest}");
    }
    daemon.finish().await
}

#[tokio::test]
async fn an_image_goes_when_its_time_is_over_and_nothing_else_holds_it() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    if !client.is_recent().await? {
        // Images did not expire then.
        return daemon.finish().await;
    }
    lease(&client, "setup", None).await?;
    lease(&client, "holds", None).await?;
    let (past, future) = ("2020-01-01T00:00:00Z", "2999-01-01T00:00:00Z");
    let images = [("old", past), ("later", future), ("held", past)];
    for (name, expires) in images {
        let digest = image::digest(name.as_bytes());
        client
            .under_lease("setup")
            .write_blob(name, &digest, name.as_bytes(), HashMap::new())
            .await?;
        let expires = ("containerd.io/gc.expire".to_owned(), expires.to_owned());
        let image = svc::images::v1::Image {
            name: name.to_owned(),
            labels: HashMap::from([expires]),
            target: Some(Descriptor {
                media_type: "application/octet-stream".to_owned(),
                digest,
                size: i64::try_from(name.len())?,
                annotations: HashMap::new(),
            }),
            ..Default::default()
        };
        // Before it is there: it may go at any time after.
        if name == "held" {
            hold(&client, "holds", "images", name).await?;
        }
        let create = svc::images::v1::CreateImageRequest {
            image: Some(image),
            source_date_epoch: None,
        };
        client.images().create(create).await?;
    }
    end(&client, "setup").await?;
    client.collect().await?;
    let there = async |name: &str| -> Result<bool> {
        let get = svc::images::v1::GetImageRequest {
            name: name.to_owned(),
        };
        let found = match client.images().get(get).await {
            Ok(_) => true,
            Err(status) if status.code() == Code::NotFound => false,
            Err(status) => return Err(status.into()),
        };
        let blob = exists(&client, &image::digest(name.as_bytes())).await?;
        assert_eq!(found, blob, "an image and its blob go together: {name}");
        Ok(found)
    };
    assert!(!there("old").await?);
    assert!(there("later").await? && there("held").await?);
    end(&client, "holds").await?;
    client.collect().await?;
    assert!(!there("held").await?);
    assert!(there("later").await?);
    daemon.finish().await
}
