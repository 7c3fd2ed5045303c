//! Records of containers, images and namespaces: masks, filters, order, errors.

use std::collections::HashMap;

use lighter_integration::{Client, Daemon, Result, Spec, image};
use lighter_proto::any;
use lighter_proto::containerd::services as svc;
use lighter_proto::containerd::types::Descriptor;
use prost_types::{Any, FieldMask};
use svc::containers::v1 as containers;
use svc::images::v1 as images;
use svc::namespaces::v1 as namespaces;
use tonic::Code;

fn container(id: &str, labels: &[(&str, &str)]) -> Result<containers::Container> {
    Ok(containers::Container {
        id: id.into(),
        labels: labels
            .iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect(),
        image: "docker.io/test/none:1".into(),
        runtime: Some(containers::container::Runtime {
            name: "io.containerd.runc.v2".into(),
            options: None,
        }),
        spec: Some(any::pack_json(any::SPEC, &Spec::new("x", id, &["true"]).0)?),
        ..Default::default()
    })
}

async fn create(
    client: &Client,
    record: containers::Container,
) -> Result<containers::Container, tonic::Status> {
    let request = containers::CreateContainerRequest {
        container: Some(record),
    };
    let answer = client.containers().create(request).await?.into_inner();
    answer
        .container
        .ok_or_else(|| tonic::Status::internal("no container"))
}

#[tokio::test]
async fn containers_are_listed_in_order_and_filtered() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    for (id, labels) in [
        ("b", &[("tier", "web"), ("x.y", "1")][..]),
        ("a", &[("tier", "db")]),
        ("c", &[]),
    ] {
        create(&client, container(id, labels)?).await?;
    }
    let list = async |filters: &[&str]| -> Result<Vec<String>, tonic::Status> {
        let filters = filters.iter().map(|f| (*f).to_owned()).collect();
        let request = containers::ListContainersRequest { filters };
        let answer = client.containers().list(request).await?.into_inner();
        Ok(answer.containers.into_iter().map(|c| c.id).collect())
    };
    assert_eq!(list(&[]).await?, ["a", "b", "c"]);
    assert_eq!(list(&["labels.tier"]).await?, ["a", "b"]);
    assert_eq!(list(&["labels.tier==web"]).await?, ["b"]);
    assert_eq!(list(&["labels.\"x.y\"==1"]).await?, ["b"]);
    assert_eq!(list(&["labels.x.y==1"]).await?, ["b"]);
    assert_eq!(list(&["labels.tier!=web"]).await?, ["a", "c"]);
    assert_eq!(list(&["labels.tier~=^w"]).await?, ["b"]);
    assert_eq!(list(&["id==a", "id==c"]).await?, ["a", "c"]);
    assert_eq!(
        list(&["id==a,labels.tier==web"]).await?,
        Vec::<String>::new()
    );
    assert_eq!(
        list(&["runtime.name==io.containerd.runc.v2,id~=|[ab]|"]).await?,
        ["a", "b"]
    );
    for bad in ["id=a", "id==", "==a", "id==\"a"] {
        let status = list(&[bad]).await.expect_err(bad);
        assert_eq!(status.code(), Code::InvalidArgument, "{bad}: {status}");
    }
    for id in ["a", "b", "c"] {
        client
            .containers()
            .delete(containers::DeleteContainerRequest { id: id.into() })
            .await?;
    }
    daemon.finish().await
}

#[tokio::test]
async fn container_masks_change_only_what_they_name() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let made = create(&client, container("m", &[("a", "1"), ("empty", "")])?).await?;
    assert_eq!(made.created_at, made.updated_at);
    let update = async |record: containers::Container,
                        paths: &[&str]|
           -> Result<containers::Container, tonic::Status> {
        let paths = paths.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>();
        let request = containers::UpdateContainerRequest {
            container: Some(record),
            update_mask: (!paths.is_empty()).then_some(FieldMask { paths }),
        };
        Ok(client
            .containers()
            .update(request)
            .await?
            .into_inner()
            .container
            .unwrap_or_default())
    };
    let mut change = container("m", &[("b/c.d", "2"), ("a", "9")])?;
    change.image = "other".into();
    change.extensions = HashMap::from([(
        "e".into(),
        Any {
            type_url: "t".into(),
            value: vec![1],
        },
    )]);
    let after = update(change.clone(), &["labels.b/c.d", "extensions.e"]).await?;
    assert_eq!(after.labels.get("a").map(String::as_str), Some("1"));
    assert_eq!(after.labels.get("b/c.d").map(String::as_str), Some("2"));
    assert_eq!(
        (after.image.as_str(), after.extensions.len()),
        ("docker.io/test/none:1", 1)
    );
    assert_eq!(after.created_at, made.created_at);
    let after = update(change.clone(), &["image"]).await?;
    assert_eq!(after.image, "other");
    for path in ["id", "runtime", "created_at", "snapshot_key", "nonsense"] {
        let status = update(change.clone(), &[path]).await.expect_err(path);
        assert_eq!(status.code(), Code::InvalidArgument, "{path}: {status}");
    }
    let mut other = change.clone();
    other.runtime = Some(containers::container::Runtime {
        name: "io.containerd.other.v1".into(),
        options: None,
    });
    assert_eq!(
        update(other, &[]).await.expect_err("immutable").code(),
        Code::InvalidArgument
    );
    let unknown = update(container("nosuch", &[])?, &["labels"])
        .await
        .expect_err("unknown");
    assert_eq!(unknown.code(), Code::NotFound);
    client
        .containers()
        .delete(containers::DeleteContainerRequest { id: "m".into() })
        .await?;
    daemon.finish().await
}

#[tokio::test]
async fn images_are_guarded_by_their_target() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let target = |data: &[u8]| Descriptor {
        media_type: "application/vnd.oci.image.manifest.v1+json".into(),
        digest: image::digest(data),
        size: 3,
        annotations: HashMap::new(),
    };
    let record = |data: &[u8]| images::Image {
        name: "img".into(),
        target: Some(target(data)),
        ..Default::default()
    };
    let create = images::CreateImageRequest {
        image: Some(record(b"one")),
        source_date_epoch: None,
    };
    client.images().create(create.clone()).await?;
    assert_eq!(
        client
            .images()
            .create(create)
            .await
            .expect_err("twice")
            .code(),
        Code::AlreadyExists
    );
    let update = images::UpdateImageRequest {
        image: Some(record(b"two")),
        update_mask: Some(FieldMask {
            paths: vec!["target".into()],
        }),
        source_date_epoch: None,
    };
    let updated = client
        .images()
        .update(update)
        .await?
        .into_inner()
        .image
        .expect("image");
    assert_eq!(
        updated.target.expect("target").digest,
        image::digest(b"two")
    );
    for bad in [
        images::Image {
            name: String::new(),
            target: Some(target(b"x")),
            ..Default::default()
        },
        images::Image {
            name: "n".into(),
            target: Some(Descriptor {
                size: 0,
                ..target(b"x")
            }),
            ..Default::default()
        },
        images::Image {
            name: "n".into(),
            target: Some(Descriptor {
                digest: "sha256:zz".into(),
                ..target(b"x")
            }),
            ..Default::default()
        },
    ] {
        let request = images::CreateImageRequest {
            image: Some(bad.clone()),
            source_date_epoch: None,
        };
        let status = client.images().create(request).await.expect_err("bad");
        assert_eq!(status.code(), Code::InvalidArgument, "{bad:?}: {status}");
    }
    client
        .images()
        .delete(images::DeleteImageRequest {
            name: "img".into(),
            sync: false,
            target: None,
        })
        .await?;
    daemon.finish().await
}

#[tokio::test]
async fn a_namespace_is_deleted_only_when_empty() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let name = format!("{}-second", daemon.namespace());
    let inside = client.in_namespace(&name);
    create(&inside, container("in", &[])?).await?;
    let listed = client
        .namespaces()
        .list(namespaces::ListNamespacesRequest {
            filter: String::new(),
        })
        .await?;
    assert!(
        listed
            .into_inner()
            .namespaces
            .iter()
            .any(|n| n.name == name),
        "made by its first object"
    );
    let delete = namespaces::DeleteNamespaceRequest { name: name.clone() };
    let status = client
        .namespaces()
        .delete(delete.clone())
        .await
        .expect_err("not empty");
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert!(status.message().contains("containers"), "{status}");
    inside
        .containers()
        .delete(containers::DeleteContainerRequest { id: "in".into() })
        .await?;
    client.namespaces().delete(delete.clone()).await?;
    let gone = client.namespaces().delete(delete).await.expect_err("gone");
    assert_eq!(gone.code(), Code::NotFound, "{gone}");
    daemon.finish().await
}
