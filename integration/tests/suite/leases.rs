//! Leases and collection: what is held stays, what nobody holds goes.

use std::collections::HashMap;

use lighter_integration::{Client, Daemon, Image, Result, image};
use lighter_proto::containerd::services as svc;
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
