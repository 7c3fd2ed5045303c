//! What a request may not ask, object by object: fields that never change, filters that do not
//! parse, digests that are none, things that are not there.

use std::collections::HashMap;

use lighter_integration::{Client, Daemon, Result, Subject, image};
use lighter_proto::containerd::services as svc;
use lighter_proto::containerd::types;
use prost_types::{Any, FieldMask};
use svc::content::v1 as content;
use svc::snapshots::v1 as snapshots;
use tonic::{Code, Status};

fn mask(path: &str) -> Option<FieldMask> {
    Some(FieldMask {
        paths: vec![path.to_owned()],
    })
}

fn invalid<T: std::fmt::Debug>(what: &str, answer: Result<T, Status>) {
    let status = answer.expect_err(what);
    // The reference gives some refusals another code, or none.
    if Subject::of_run() == Subject::Lighter {
        assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status}");
    }
    assert!(!status.message().is_empty(), "{what}");
}

fn missing<T: std::fmt::Debug>(what: &str, answer: Result<T, Status>) {
    let status = answer.expect_err(what);
    assert_eq!(status.code(), Code::NotFound, "{what}: {status}");
}

fn container() -> svc::containers::v1::Container {
    svc::containers::v1::Container {
        id: "fixed".into(),
        runtime: Some(svc::containers::v1::container::Runtime {
            name: "io.containerd.runc.v2".into(),
            options: None,
        }),
        spec: Some(Any {
            type_url: "t".into(),
            value: b"{}".to_vec(),
        }),
        ..Default::default()
    }
}

fn picture() -> svc::images::v1::Image {
    svc::images::v1::Image {
        name: "fixed".into(),
        target: Some(types::Descriptor {
            media_type: "m".into(),
            digest: image::digest(b"x"),
            size: 1,
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[tokio::test]
async fn fields_that_never_change_are_named() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let create = svc::containers::v1::CreateContainerRequest {
        container: Some(container()),
    };
    client.containers().create(create).await?;
    for path in ["id", "runtime", "snapshotter", "created_at", "nosuch"] {
        let update = svc::containers::v1::UpdateContainerRequest {
            container: Some(container()),
            update_mask: mask(path),
        };
        invalid(path, client.containers().update(update).await);
    }
    let create = svc::images::v1::CreateImageRequest {
        image: Some(picture()),
        source_date_epoch: None,
    };
    client.images().create(create).await?;
    for path in ["name", "created_at", "nosuch"] {
        let update = svc::images::v1::UpdateImageRequest {
            image: Some(picture()),
            update_mask: mask(path),
            source_date_epoch: None,
        };
        invalid(path, client.images().update(update).await);
    }
    let prepare = snapshots::PrepareSnapshotRequest {
        snapshotter: "native".into(),
        key: "fixed".into(),
        ..Default::default()
    };
    client.snapshots().prepare(prepare).await?;
    for path in ["name", "parent", "kind", "created_at", "nosuch"] {
        let update = snapshots::UpdateSnapshotRequest {
            snapshotter: "native".into(),
            info: Some(snapshots::Info {
                name: "fixed".into(),
                ..Default::default()
            }),
            update_mask: mask(path),
        };
        invalid(path, client.snapshots().update(update).await);
    }
    for path in ["name", "labels", "nosuch"] {
        let update = svc::namespaces::v1::UpdateNamespaceRequest {
            namespace: Some(svc::namespaces::v1::Namespace {
                name: daemon.namespace().into(),
                ..Default::default()
            }),
            update_mask: mask(path),
        };
        invalid(path, client.namespaces().update(update).await);
    }
    if client.is_recent().await? {
        sandbox_fields(&client).await?;
    }
    let remove = snapshots::RemoveSnapshotRequest {
        snapshotter: "native".into(),
        key: "fixed".into(),
    };
    client.snapshots().remove(remove).await?;
    daemon.finish().await
}

async fn sandbox_fields(client: &Client) -> Result {
    use svc::sandbox::v1 as api;
    let sandbox = || types::Sandbox {
        sandbox_id: "fixed".into(),
        runtime: Some(types::sandbox::Runtime {
            name: "r".into(),
            options: None,
        }),
        sandboxer: "shim".into(),
        ..Default::default()
    };
    let create = api::StoreCreateRequest {
        sandbox: Some(sandbox()),
    };
    client.sandbox_store().create(create).await?;
    for path in ["sandbox_id", "sandboxer", "created_at", "nosuch"] {
        let update = api::StoreUpdateRequest {
            sandbox: Some(sandbox()),
            fields: vec![path.to_owned()],
        };
        invalid(path, client.sandbox_store().update(update).await);
    }
    let delete = api::StoreDeleteRequest {
        sandbox_id: "fixed".into(),
    };
    client.sandbox_store().delete(delete).await?;
    Ok(())
}

/// The first message of a stream, or why there is none.
async fn first<T>(
    answer: Result<tonic::Response<tonic::Streaming<T>>, Status>,
) -> Result<Option<T>, Status> {
    answer?.into_inner().message().await
}

#[tokio::test]
async fn filters_that_do_not_parse_are_refused_by_every_list() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let recent = client.is_recent().await?;
    for bad in ["id==", "=", "id=x", "labels.\"x", "a==b,", "id~=|x"] {
        let filters = || vec![bad.to_owned()];
        let list = content::ListContentRequest { filters: filters() };
        invalid(bad, first(client.content().list(list).await).await);
        let list = snapshots::ListSnapshotsRequest {
            snapshotter: "native".into(),
            filters: filters(),
        };
        invalid(bad, first(client.snapshots().list(list).await).await);
        let list = svc::events::v1::SubscribeRequest { filters: filters() };
        invalid(bad, first(client.events().subscribe(list).await).await);
        let list = svc::tasks::v1::MetricsRequest { filters: filters() };
        invalid(bad, client.tasks().metrics(list).await);
        let list = svc::containers::v1::ListContainersRequest { filters: filters() };
        invalid(
            bad,
            first(client.containers().list_stream(list).await).await,
        );
        if recent {
            let list = svc::sandbox::v1::StoreListRequest { filters: filters() };
            invalid(bad, client.sandbox_store().list(list).await);
            let list = svc::mounts::v1::ListRequest { filters: filters() };
            invalid(bad, first(client.mounts().list(list).await).await);
        }
    }
    daemon.finish().await
}

#[tokio::test]
async fn digests_that_are_none_are_refused_wherever_one_is_meant() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let lease = svc::leases::v1::CreateRequest {
        id: "l".into(),
        labels: HashMap::new(),
    };
    client.leases().create(lease).await?;
    let upper = format!("sha256:{}", "A".repeat(64));
    for bad in ["sha256:xyz", "md5:", &upper, "sha256:../../etc/passwd"] {
        let mut record = picture();
        record.target.get_or_insert_default().digest = bad.to_owned();
        let create = svc::images::v1::CreateImageRequest {
            image: Some(record),
            source_date_epoch: None,
        };
        invalid(bad, client.images().create(create).await);
        let add = svc::leases::v1::AddResourceRequest {
            id: "l".into(),
            resource: Some(svc::leases::v1::Resource {
                id: bad.to_owned(),
                r#type: "content".into(),
            }),
        };
        invalid(bad, client.leases().add_resource(add).await);
        let update = content::UpdateRequest {
            info: Some(content::Info {
                digest: bad.to_owned(),
                ..Default::default()
            }),
            update_mask: mask("labels.a"),
        };
        invalid(bad, client.content().update(update).await);
        let write = client.write_blob("w", bad, b"data", HashMap::new()).await;
        invalid(bad, write);
        let apply = svc::diff::v1::ApplyRequest {
            diff: Some(types::Descriptor {
                media_type: "application/vnd.oci.image.layer.v1.tar".into(),
                digest: bad.to_owned(),
                size: 1,
                ..Default::default()
            }),
            ..Default::default()
        };
        invalid(bad, client.diff().apply(apply).await);
    }
    if daemon.subject() == Subject::Lighter {
        let all = content::ListStatusesRequest { filters: vec![] };
        let left = client.content().list_statuses(all).await?.into_inner();
        assert!(left.statuses.is_empty(), "{left:?}");
    }
    daemon.finish().await
}

#[tokio::test]
async fn what_is_not_there_is_not_found_by_any_verb() -> Result {
    let daemon = Daemon::start().await?;
    let client = daemon.client().await?;
    let none = || "nosuch".to_owned();
    let get = svc::containers::v1::GetContainerRequest { id: none() };
    missing("container", client.containers().get(get).await);
    let delete = svc::containers::v1::DeleteContainerRequest { id: none() };
    missing("container", client.containers().delete(delete).await);
    let delete = svc::images::v1::DeleteImageRequest {
        name: none(),
        ..Default::default()
    };
    missing("image", client.images().delete(delete).await);
    let digest = image::digest(b"nosuch");
    let delete = content::DeleteContentRequest {
        digest: digest.clone(),
    };
    missing("blob", client.content().delete(delete).await);
    let info = content::InfoRequest { digest };
    missing("blob", client.content().info(info).await);
    let abort = content::AbortRequest { r#ref: none() };
    missing("ingest", client.content().abort(abort).await);
    let status = content::StatusRequest { r#ref: none() };
    missing("ingest", client.content().status(status).await);
    let delete = svc::leases::v1::DeleteRequest {
        id: none(),
        sync: false,
    };
    missing("lease", client.leases().delete(delete).await);
    let list = svc::leases::v1::ListResourcesRequest { id: none() };
    missing("lease", client.leases().list_resources(list).await);
    let delete = svc::namespaces::v1::DeleteNamespaceRequest { name: none() };
    missing("namespace", client.namespaces().delete(delete).await);
    let (snapshotter, key) = (|| "native".to_owned(), none);
    let stat = snapshots::StatSnapshotRequest {
        snapshotter: snapshotter(),
        key: key(),
    };
    missing("snapshot", client.snapshots().stat(stat).await);
    let mounts = snapshots::MountsRequest {
        snapshotter: snapshotter(),
        key: key(),
    };
    missing("snapshot", client.snapshots().mounts(mounts).await);
    let remove = snapshots::RemoveSnapshotRequest {
        snapshotter: snapshotter(),
        key: key(),
    };
    missing("snapshot", client.snapshots().remove(remove).await);
    let usage = snapshots::UsageRequest {
        snapshotter: snapshotter(),
        key: key(),
    };
    missing("snapshot", client.snapshots().usage(usage).await);
    let prepare = snapshots::PrepareSnapshotRequest {
        snapshotter: snapshotter(),
        key: "new".into(),
        parent: key(),
        labels: HashMap::new(),
    };
    missing("parent", client.snapshots().prepare(prepare).await);
    let pause = svc::tasks::v1::PauseTaskRequest {
        container_id: none(),
    };
    missing("task", client.tasks().pause(pause).await);
    let pids = svc::tasks::v1::ListPidsRequest {
        container_id: none(),
    };
    missing("task", client.tasks().list_pids(pids).await);
    if client.is_recent().await? {
        let get = svc::sandbox::v1::StoreGetRequest { sandbox_id: none() };
        missing("sandbox", client.sandbox_store().get(get).await);
        let start = svc::sandbox::v1::ControllerStartRequest {
            sandbox_id: none(),
            sandboxer: "shim".into(),
        };
        missing("sandbox", client.sandbox_controller().start(start).await);
        let start = svc::sandbox::v1::ControllerStartRequest {
            sandbox_id: none(),
            sandboxer: none(),
        };
        missing("sandboxer", client.sandbox_controller().start(start).await);
        let info = svc::mounts::v1::InfoRequest { name: none() };
        missing("mount", client.mounts().info(info).await);
        let undo = svc::mounts::v1::DeactivateRequest { name: none() };
        missing("mount", client.mounts().deactivate(undo).await);
    }
    daemon.finish().await
}
