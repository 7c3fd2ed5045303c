//! `ctr containers checkpoint` and `restore`: a container's state as an image.
//!
//! The image is an index whose entries are told apart by media type: the task's memory (criu), the
//! container's image, its spec, its writable layer. Restoring reads the same entries back.

use std::collections::{BTreeMap, HashMap};

use anyhow::Context as _;
use clap::Args;
use lighter_proto::containerd::services::containers::v1::{
    Container, CreateContainerRequest, container::Runtime,
};
use lighter_proto::containerd::services::diff::v1::{ApplyRequest, DiffRequest};
use lighter_proto::containerd::services::images::v1::Image;
use lighter_proto::containerd::services::snapshots::v1::{
    MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use lighter_proto::containerd::services::tasks::v1::{
    CheckpointTaskRequest, PauseTaskRequest, ResumeTaskRequest,
};
use lighter_proto::containerd::types;
use lighter_proto::containerd::v1::types::Status;
use prost::Message;
use prost_types::Any;

use super::tasks::{self, TaskOptions};
use crate::advice;
use crate::attach::{IoFlags, Session};
use crate::cli::Ctx;
use crate::client::Client;
use crate::content;
use crate::image::model::{Descriptor, Index};
use crate::image::platform::Platform;
use crate::image::{self, model, unpack};
use crate::lease;
use crate::process::Process;
use crate::snapshot::{self, Access};

const CRIU: &str = "application/vnd.containerd.container.criu.checkpoint.criu.tar";
const CONFIG: &str = "application/vnd.containerd.container.checkpoint.config.v1+proto";
const RUNTIME_NAME: &str = "application/vnd.containerd.container.checkpoint.runtime.name";
const RUNTIME_OPTIONS: &str =
    "application/vnd.containerd.container.checkpoint.runtime.options+proto";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Annotation of a checkpoint: which image the container was made from.
const IMAGE_NAME: &str = "io.containerd.checkpoint.image.name";
/// Annotation of a checkpoint: which snapshotter it used.
const SNAPSHOTTER: &str = "io.containerd.checkpoint.snapshotter";

/// Flags of `checkpoint`.
#[derive(Debug, Args)]
pub(crate) struct Checkpoint {
    /// Include the writable layer
    #[arg(long)]
    rw: bool,
    /// Include the image
    #[arg(long)]
    image: bool,
    /// Include the running task
    #[arg(long)]
    task: bool,
    /// Container
    id: String,
    /// Name of the checkpoint image
    #[arg(value_name = "REF")]
    name: String,
}

impl Checkpoint {
    /// Makes the image.
    pub(super) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let container = tasks::container(&ctx.client, &self.id).await?;
        let running = tasks::get(&ctx.client, &self.id, "").await;
        let running = running.is_ok_and(|task| task.status() == Status::Running);
        if self.task && !running {
            return advice::fail(
                format!(
                    "container {} does not run, so there is no task to checkpoint",
                    self.id
                ),
                "leave out --task, or start it with `ctr tasks start`",
            );
        }
        let pause = running && self.rw;
        let container_id = self.id.clone();
        if pause {
            let request = PauseTaskRequest {
                container_id: container_id.clone(),
            };
            ctx.client.tasks().pause(request).await?;
        }
        let made = lease::hold(&ctx.client, |client| self.make(client, container)).await;
        if pause {
            ctx.client
                .tasks()
                .resume(ResumeTaskRequest { container_id })
                .await?;
        }
        made
    }

    async fn make(&self, client: Client, container: Container) -> anyhow::Result<()> {
        let mut index = Index {
            schema_version: 2,
            media_type: model::INDEX_TYPES[0].to_owned(),
            ..Default::default()
        };
        let spec = container.spec.clone().unwrap_or_default();
        index
            .manifests
            .push(blob(&client, CONFIG, spec.encode_to_vec()).await?);
        let runtime = container.runtime.clone().unwrap_or_default();
        index
            .manifests
            .push(blob(&client, RUNTIME_NAME, runtime.name.into_bytes()).await?);
        if let Some(options) = &runtime.options {
            let bytes = options.encode_to_vec();
            index
                .manifests
                .push(blob(&client, RUNTIME_OPTIONS, bytes).await?);
        }
        if self.task {
            let request = CheckpointTaskRequest {
                container_id: self.id.clone(),
                ..Default::default()
            };
            let made = client.tasks().checkpoint(request).await?.into_inner();
            let criu = made.descriptors.into_iter().find(|d| d.media_type == CRIU);
            index
                .manifests
                .push(criu.context("the daemon made no criu image")?.into());
        }
        if self.rw {
            index
                .manifests
                .push(self.writable_layer(&client, &container).await?);
        }
        if self.image {
            let record = image::get(&client, &container.image).await?;
            let mut target = image::target(&record)?;
            target.platform = None;
            index.manifests.push(target);
        }
        let annotations = BTreeMap::from([
            (IMAGE_NAME.to_owned(), container.image.clone()),
            (SNAPSHOTTER.to_owned(), container.snapshotter.clone()),
        ]);
        index
            .rest
            .insert("annotations".to_owned(), serde_json::to_value(annotations)?);
        let children = index.manifests.iter().enumerate();
        let labels: HashMap<_, _> = children
            .map(|(at, child)| {
                (
                    format!("containerd.io/gc.ref.content.{at}"),
                    child.digest.clone(),
                )
            })
            .collect();
        let bytes = serde_json::to_vec(&index)?;
        let size = i64::try_from(bytes.len())?;
        let digest = content::write(&client, bytes, labels).await?;
        let target = types::Descriptor {
            media_type: model::INDEX_TYPES[0].to_owned(),
            digest,
            size,
            ..Default::default()
        };
        let name = self.name.clone();
        image::store(
            &client,
            Image {
                name,
                target: Some(target),
                ..Default::default()
            },
        )
        .await
    }

    async fn writable_layer(
        &self,
        client: &Client,
        container: &Container,
    ) -> anyhow::Result<Descriptor> {
        anyhow::ensure!(
            !container.snapshot_key.is_empty(),
            "container {} has no snapshot, so there is no writable layer",
            self.id
        );
        let (snapshotter, key) = (
            container.snapshotter.clone(),
            container.snapshot_key.clone(),
        );
        let made = diff(
            client,
            &snapshotter,
            &key,
            LAYER,
            &format!("checkpoint-rw-{key}"),
        )
        .await?;
        Ok(made.into())
    }
}

/// What an active snapshot has changed, as a layer.
pub(super) async fn diff(
    client: &Client,
    snapshotter: &str,
    key: &str,
    media_type: &str,
    reference: &str,
) -> anyhow::Result<types::Descriptor> {
    let (snapshotter, key) = (snapshotter.to_owned(), key.to_owned());
    let request = StatSnapshotRequest {
        snapshotter: snapshotter.clone(),
        key: key.clone(),
    };
    let info = client
        .snapshots()
        .stat(request)
        .await?
        .into_inner()
        .info
        .unwrap_or_default();
    let request = MountsRequest {
        snapshotter: snapshotter.clone(),
        key: key.clone(),
    };
    let right = client
        .snapshots()
        .mounts(request)
        .await?
        .into_inner()
        .mounts;
    let view = format!("{key}-parent-view-{:016x}", rand::random::<u64>());
    let request = PrepareSnapshotRequest {
        snapshotter: snapshotter.clone(),
        key: view.clone(),
        parent: info.parent,
        labels: HashMap::new(),
    };
    let left = snapshot::make(client, Access::Read, request).await?;
    let request = DiffRequest {
        left,
        right,
        media_type: media_type.to_owned(),
        r#ref: format!("{reference}-{:016x}", rand::random::<u64>()),
        ..Default::default()
    };
    let made = client.diff().diff(request).await;
    client
        .snapshots()
        .remove(RemoveSnapshotRequest {
            snapshotter,
            key: view,
        })
        .await?;
    made?.into_inner().diff.context("the daemon made no diff")
}

async fn blob(client: &Client, media_type: &str, bytes: Vec<u8>) -> anyhow::Result<Descriptor> {
    let size = i64::try_from(bytes.len())?;
    let digest = content::write(client, bytes, HashMap::new()).await?;
    Ok(Descriptor {
        media_type: media_type.to_owned(),
        digest,
        size,
        ..Default::default()
    })
}

/// Flags of `restore`.
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// Restore the writable layer
    #[arg(long)]
    rw: bool,
    /// Restore the running task
    #[arg(long)]
    live: bool,
    /// Container to make
    id: String,
    /// Name of the checkpoint image
    #[arg(value_name = "REF")]
    name: String,
}

impl Restore {
    /// Makes the container, and its task with `--live`.
    pub(super) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let record = image::get(&ctx.client, &self.name).await?;
        let target = image::target(&record)?;
        let bytes = content::read(&ctx.client, &target.digest).await?;
        let index = model::index(&target.digest, &bytes)?;
        let (container, criu) = lease::hold(&ctx.client, |client| self.make(client, index)).await?;
        let spec = tasks::spec_of(&container)?;
        let session = Session::prepare(&IoFlags::default(), &self.id, spec.terminal(), false)?;
        let checkpoint = if self.live {
            Some(criu.context("the checkpoint holds no task: it was made without --task")?)
        } else {
            None
        };
        let options = TaskOptions {
            checkpoint,
            ..Default::default()
        };
        tasks::create(&ctx.client, &container, &session, spec.terminal(), &options).await?;
        let process = Process::init(&ctx.client, &self.id);
        if let Err(status) = process.start().await {
            tasks::destroy(&process).await;
            return Err(status.into());
        }
        session.detach();
        Ok(())
    }

    async fn make(
        &self,
        client: Client,
        index: Index,
    ) -> anyhow::Result<(Container, Option<types::Descriptor>)> {
        let find = |kind: &str| index.manifests.iter().find(|d| d.media_type == kind);
        let needed = |kind: &str| {
            find(kind).with_context(|| format!("{} is no checkpoint: it has no {kind}", self.name))
        };
        let spec = content::read(&client, &needed(CONFIG)?.digest).await?;
        let spec = Any::decode(spec.as_slice()).context("the checkpoint's spec is malformed")?;
        let name = content::read(&client, &needed(RUNTIME_NAME)?.digest).await?;
        let mut runtime = Runtime {
            name: String::from_utf8(name).context("runtime name")?,
            options: None,
        };
        if let Some(options) = find(RUNTIME_OPTIONS) {
            let bytes = content::read(&client, &options.digest).await?;
            runtime.options = Some(Any::decode(bytes.as_slice()).context("runtime options")?);
        }
        let annotations = index.rest.get("annotations");
        let annotation = |key: &str| {
            let value = annotations
                .and_then(|all| all.get(key))
                .and_then(|value| value.as_str());
            value.unwrap_or_default().to_owned()
        };
        let image_name = annotation(IMAGE_NAME);
        let snapshotter = unpack::snapshotter(&client, &annotation(SNAPSHOTTER)).await?;
        let record = image::get(&client, &image_name).await?;
        let resolved = image::resolve(&client, &image::target(&record)?, &Platform::host()).await?;
        let parent = unpack::unpack(&client, &resolved, &snapshotter, false).await?;
        let request = PrepareSnapshotRequest {
            snapshotter: snapshotter.clone(),
            key: self.id.clone(),
            parent,
            labels: HashMap::new(),
        };
        let mounts = snapshot::make(&client, Access::Write, request).await?;
        if self.rw {
            let layer = needed(LAYER)?.to_wire();
            let request = ApplyRequest {
                diff: Some(layer),
                mounts,
                ..Default::default()
            };
            client.diff().apply(request).await?;
        }
        let container = Container {
            id: self.id.clone(),
            image: image_name,
            runtime: Some(runtime),
            spec: Some(spec),
            snapshot_key: self.id.clone(),
            snapshotter,
            ..Default::default()
        };
        let request = CreateContainerRequest {
            container: Some(container),
        };
        let made = client
            .containers()
            .create(request)
            .await?
            .into_inner()
            .container;
        let made = made.context("the daemon's answer holds no container")?;
        Ok((made, find(CRIU).map(Descriptor::to_wire)))
    }
}
