//! A containerd client of the harness's own: raw services, and the flows every client performs.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Context as _;
use bytes::Bytes;
use lighter_proto::any;
use lighter_proto::containerd::services as svc;
use lighter_proto::containerd::types;
use prost_types::Any;
use serde_json::Value;
use tokio_stream::StreamExt as _;
use tonic::metadata::MetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status};

use svc::containers::v1::containers_client::ContainersClient;
use svc::content::v1::content_client::ContentClient;
use svc::diff::v1::diff_client::DiffClient;
use svc::events::v1::events_client::EventsClient;
use svc::images::v1::images_client::ImagesClient;
use svc::introspection::v1::introspection_client::IntrospectionClient;
use svc::leases::v1::leases_client::LeasesClient;
use svc::mounts::v1::mounts_client::MountsClient;
use svc::namespaces::v1::namespaces_client::NamespacesClient;
use svc::sandbox::v1::controller_client::ControllerClient;
use svc::sandbox::v1::store_client::StoreClient;
use svc::snapshots::v1::snapshots_client::SnapshotsClient;
use svc::streaming::v1::streaming_client::StreamingClient;
use svc::tasks::v1::tasks_client::TasksClient;
use svc::transfer::v1::transfer_client::TransferClient;
use svc::version::v1::version_client::VersionClient;

use crate::{Image, Result, Spec};

/// Largest message, as real clients set it.
const MAX_MESSAGE_BYTES: usize = 16 << 20;
/// Bytes in one content write.
const WRITE_CHUNK_BYTES: usize = 1 << 20;

/// Puts namespace and lease into every request.
#[derive(Debug, Clone)]
pub struct Headers {
    namespace: String,
    lease: Option<String>,
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> std::result::Result<Request<()>, Status> {
        let value = |text: &str| {
            MetadataValue::try_from(text).map_err(|e| Status::invalid_argument(e.to_string()))
        };
        if !self.namespace.is_empty() {
            request
                .metadata_mut()
                .insert("containerd-namespace", value(&self.namespace)?);
        }
        if let Some(lease) = &self.lease {
            request
                .metadata_mut()
                .insert("containerd-lease", value(lease)?);
        }
        Ok(request)
    }
}

/// The channel under every service client.
pub type Service = InterceptedService<Channel, Headers>;

/// A connection in one namespace.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Channel,
    headers: Headers,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, 128 + signal when killed.
    pub status: u32,
}

/// A container made by [`Client::create`].
#[derive(Debug, Clone)]
pub struct Container {
    /// Id of container, task and snapshot.
    pub id: String,
    /// Snapshotter of its root.
    pub snapshotter: String,
}

macro_rules! services {
    ($($(#[$doc:meta])* $name:ident: $client:ident;)*) => {
        impl Client {
            $($(#[$doc])*
            #[must_use]
            pub fn $name(&self) -> $client<Service> {
                $client::with_interceptor(self.channel.clone(), self.headers.clone())
                    .max_decoding_message_size(MAX_MESSAGE_BYTES)
                    .max_encoding_message_size(MAX_MESSAGE_BYTES)
            })*
        }
    };
}

services! {
    /// Containers service.
    containers: ContainersClient;
    /// Content service.
    content: ContentClient;
    /// Diff service.
    diff: DiffClient;
    /// Events service.
    events: EventsClient;
    /// Images service.
    images: ImagesClient;
    /// Introspection service.
    introspection: IntrospectionClient;
    /// Leases service.
    leases: LeasesClient;
    /// Mounts service.
    mounts: MountsClient;
    /// Namespaces service.
    namespaces: NamespacesClient;
    /// Sandbox controllers.
    sandbox_controller: ControllerClient;
    /// Sandbox records.
    sandbox_store: StoreClient;
    /// Snapshots service.
    snapshots: SnapshotsClient;
    /// Streaming service.
    streaming: StreamingClient;
    /// Tasks service.
    tasks: TasksClient;
    /// Transfer service.
    transfer: TransferClient;
    /// Version service.
    versions: VersionClient;
}

impl Client {
    /// Connects to the Unix socket `address`; requests carry `namespace` unless it is empty.
    ///
    /// # Errors
    /// When nobody accepts.
    pub async fn connect(address: &Path, namespace: &str) -> Result<Self> {
        let path = address.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(path).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        });
        let channel = Endpoint::from_static("http://localhost")
            .connect_with_connector(connector)
            .await?;
        Ok(Self {
            channel,
            headers: Headers {
                namespace: namespace.to_owned(),
                lease: None,
            },
        })
    }

    /// The same connection in another namespace.
    #[must_use]
    pub fn in_namespace(&self, namespace: &str) -> Self {
        Self {
            channel: self.channel.clone(),
            headers: Headers {
                namespace: namespace.to_owned(),
                lease: None,
            },
        }
    }

    /// The same connection under a lease.
    #[must_use]
    pub fn under_lease(&self, lease: &str) -> Self {
        let mut client = self.clone();
        client.headers.lease = Some(lease.to_owned());
        client
    }

    /// The raw channel, for services without namespace.
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Namespace of the requests.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.headers.namespace
    }

    /// Runs a collection: a synchronous delete of a lease waits for one.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn collect(&self) -> std::result::Result<(), Status> {
        use svc::leases::v1::{CreateRequest, DeleteRequest};
        let id = format!("collect-{}", rand::random::<u32>());
        let create = CreateRequest {
            id: id.clone(),
            labels: HashMap::new(),
        };
        self.leases().create(create).await?;
        let delete = DeleteRequest { id, sync: true };
        self.leases().delete(delete).await.map(drop)
    }

    /// Whether the daemon serves what containerd has since 2.2: `false` for Debian's 1.6.
    ///
    /// # Errors
    /// When the daemon does not answer.
    pub async fn is_recent(&self) -> Result<bool> {
        Ok(!self
            .version()
            .await?
            .trim_start_matches('v')
            .starts_with("1."))
    }

    /// The daemon's version.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn version(&self) -> Result<String> {
        Ok(self.versions().version(()).await?.into_inner().version)
    }

    /// Writes a blob in one stream and commits it with `labels`; a blob that exists is fine.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn write_blob(
        &self,
        reference: &str,
        digest: &str,
        data: &[u8],
        labels: HashMap<String, String>,
    ) -> std::result::Result<(), Status> {
        use svc::content::v1::{WriteAction, WriteContentRequest};
        let total = i64::try_from(data.len()).unwrap_or(i64::MAX);
        let mut requests = Vec::new();
        let mut offset = 0_i64;
        for chunk in data.chunks(WRITE_CHUNK_BYTES) {
            requests.push(WriteContentRequest {
                action: WriteAction::Write.into(),
                r#ref: reference.to_owned(),
                total,
                expected: digest.to_owned(),
                offset,
                data: Bytes::copy_from_slice(chunk),
                labels: HashMap::new(),
            });
            offset += i64::try_from(chunk.len()).unwrap_or(0);
        }
        requests.push(WriteContentRequest {
            action: WriteAction::Commit.into(),
            r#ref: reference.to_owned(),
            total,
            expected: digest.to_owned(),
            offset,
            data: Bytes::new(),
            labels,
        });
        let answer = self.content().write(tokio_stream::iter(requests)).await;
        let done = match answer {
            Ok(response) => {
                let mut stream = response.into_inner();
                let mut last = Ok(());
                while let Some(message) = stream.next().await {
                    if let Err(status) = message {
                        last = Err(status);
                        break;
                    }
                }
                last
            }
            Err(status) => Err(status),
        };
        match done {
            Err(status) if status.code() == tonic::Code::AlreadyExists => Ok(()),
            other => other,
        }
    }

    /// Reads a whole blob.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn read_blob(&self, digest: &str) -> std::result::Result<Vec<u8>, Status> {
        let request = svc::content::v1::ReadContentRequest {
            digest: digest.to_owned(),
            offset: 0,
            size: 0,
        };
        let mut stream = self.content().read(request).await?.into_inner();
        let mut data = Vec::new();
        while let Some(message) = stream.next().await {
            data.extend_from_slice(&message?.data);
        }
        Ok(data)
    }

    /// Stores an image's blobs with references for collection, and its record.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn store(&self, image: &Image) -> Result<()> {
        for layer in &image.layers {
            let blob = &layer.blob;
            self.write_blob(
                &format!("layer-{}", blob.digest),
                &blob.digest,
                &blob.data,
                HashMap::new(),
            )
            .await?;
        }
        let config = &image.config;
        self.write_blob(
            &format!("config-{}", config.digest),
            &config.digest,
            &config.data,
            HashMap::new(),
        )
        .await?;
        let mut labels = HashMap::new();
        labels.insert(
            "containerd.io/gc.ref.content.config".to_owned(),
            config.digest.clone(),
        );
        for (n, layer) in image.layers.iter().enumerate() {
            labels.insert(
                format!("containerd.io/gc.ref.content.l.{n}"),
                layer.blob.digest.clone(),
            );
        }
        let manifest = &image.manifest;
        self.write_blob(
            &format!("manifest-{}", manifest.digest),
            &manifest.digest,
            &manifest.data,
            labels,
        )
        .await?;
        let record = svc::images::v1::Image {
            name: image.name.clone(),
            target: Some(types::Descriptor {
                media_type: manifest.media_type.clone(),
                digest: manifest.digest.clone(),
                size: i64::try_from(manifest.data.len())?,
                annotations: HashMap::new(),
            }),
            ..Default::default()
        };
        let request = svc::images::v1::CreateImageRequest {
            image: Some(record),
            source_date_epoch: None,
        };
        match self.images().create(request).await {
            Err(status) if status.code() != tonic::Code::AlreadyExists => Err(status.into()),
            _ => Ok(()),
        }
    }

    /// Unpacks a stored image layer by layer. Returns the name of its top snapshot.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn unpack(&self, image: &Image, snapshotter: &str) -> Result<String> {
        use svc::snapshots::v1 as snap;
        let mut parent = String::new();
        for (n, layer) in image.layers.iter().enumerate() {
            let chain = image.chain_id(n + 1);
            let stat = snap::StatSnapshotRequest {
                snapshotter: snapshotter.to_owned(),
                key: chain.clone(),
            };
            if self.snapshots().stat(stat).await.is_ok() {
                parent = chain;
                continue;
            }
            let key = format!("extract-{n}-{} {chain}", rand::random::<u32>());
            let prepared = self
                .snapshots()
                .prepare(snap::PrepareSnapshotRequest {
                    snapshotter: snapshotter.to_owned(),
                    key: key.clone(),
                    parent: parent.clone(),
                    labels: HashMap::from([(
                        "containerd.io/gc.root".to_owned(),
                        "test".to_owned(),
                    )]),
                })
                .await?
                .into_inner();
            let blob = &layer.blob;
            let applied = self
                .diff()
                .apply(svc::diff::v1::ApplyRequest {
                    diff: Some(types::Descriptor {
                        media_type: blob.media_type.clone(),
                        digest: blob.digest.clone(),
                        size: i64::try_from(blob.data.len())?,
                        annotations: HashMap::new(),
                    }),
                    mounts: prepared.mounts,
                    payloads: HashMap::new(),
                    sync_fs: false,
                })
                .await?
                .into_inner()
                .applied
                .context("Apply answers a descriptor")?;
            anyhow::ensure!(
                applied.digest == layer.diff_id,
                "diff id {}",
                applied.digest
            );
            self.snapshots()
                .commit(snap::CommitSnapshotRequest {
                    snapshotter: snapshotter.to_owned(),
                    name: chain.clone(),
                    key,
                    labels: HashMap::from([(
                        "containerd.io/gc.root".to_owned(),
                        "test".to_owned(),
                    )]),
                    parent: String::new(),
                })
                .await?;
            parent = chain;
        }
        Ok(parent)
    }

    /// Prepares a root on `parent` and records a container with `spec`.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn create(&self, id: &str, parent: &str, spec: &Spec) -> Result<Container> {
        self.create_on(id, parent, spec, "overlayfs", "io.containerd.runc.v2", None)
            .await
    }

    /// [`Client::create`] with snapshotter, runtime and runtime options of the caller's.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn create_on(
        &self,
        id: &str,
        parent: &str,
        spec: &Spec,
        snapshotter: &str,
        runtime: &str,
        options: Option<Any>,
    ) -> Result<Container> {
        self.snapshots()
            .prepare(svc::snapshots::v1::PrepareSnapshotRequest {
                snapshotter: snapshotter.to_owned(),
                key: id.to_owned(),
                parent: parent.to_owned(),
                labels: HashMap::new(),
            })
            .await?;
        let container = svc::containers::v1::Container {
            id: id.to_owned(),
            runtime: Some(svc::containers::v1::container::Runtime {
                name: runtime.to_owned(),
                options,
            }),
            spec: Some(any::pack_json(any::SPEC, &spec.0)?),
            snapshotter: snapshotter.to_owned(),
            snapshot_key: id.to_owned(),
            ..Default::default()
        };
        self.containers()
            .create(svc::containers::v1::CreateContainerRequest {
                container: Some(container),
            })
            .await?;
        Ok(Container {
            id: id.to_owned(),
            snapshotter: snapshotter.to_owned(),
        })
    }

    /// Creates the task with stdout and stderr to `log` (a `file://` log) where given. Returns its
    /// pid.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn create_task(
        &self,
        container: &Container,
        log: Option<&Path>,
    ) -> std::result::Result<u32, Status> {
        let mounts = self
            .snapshots()
            .mounts(svc::snapshots::v1::MountsRequest {
                snapshotter: container.snapshotter.clone(),
                key: container.id.clone(),
            })
            .await?
            .into_inner()
            .mounts;
        let stdout = log
            .map(|path| format!("file://{}", path.display()))
            .unwrap_or_default();
        let request = svc::tasks::v1::CreateTaskRequest {
            container_id: container.id.clone(),
            rootfs: mounts,
            stdout: stdout.clone(),
            stderr: stdout,
            ..Default::default()
        };
        Ok(self.tasks().create(request).await?.into_inner().pid)
    }

    /// Starts a process; an empty `exec_id` is the task itself.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn start(&self, id: &str, exec_id: &str) -> std::result::Result<u32, Status> {
        let request = svc::tasks::v1::StartRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        };
        Ok(self.tasks().start(request).await?.into_inner().pid)
    }

    /// Registers and starts an exec. Returns its pid.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        log: Option<&Path>,
    ) -> Result<u32> {
        let stdout = log
            .map(|path| format!("file://{}", path.display()))
            .unwrap_or_default();
        self.tasks()
            .exec(svc::tasks::v1::ExecProcessRequest {
                container_id: id.to_owned(),
                exec_id: exec_id.to_owned(),
                stdout: stdout.clone(),
                stderr: stdout,
                spec: Some(any::pack_json(any::PROCESS, process)?),
                ..Default::default()
            })
            .await?;
        Ok(self.start(id, exec_id).await?)
    }

    /// Waits for a process to end.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn wait(&self, id: &str, exec_id: &str) -> std::result::Result<Exit, Status> {
        let request = svc::tasks::v1::WaitRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        };
        Ok(Exit {
            status: self.tasks().wait(request).await?.into_inner().exit_status,
        })
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn kill(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
    ) -> std::result::Result<(), Status> {
        let request = svc::tasks::v1::KillRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            all: false,
        };
        self.tasks().kill(request).await.map(drop)
    }

    /// Deletes the task. Returns how it ended.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn delete_task(&self, id: &str) -> std::result::Result<Exit, Status> {
        let request = svc::tasks::v1::DeleteTaskRequest {
            container_id: id.to_owned(),
        };
        Ok(Exit {
            status: self.tasks().delete(request).await?.into_inner().exit_status,
        })
    }

    /// Deletes the container's record and snapshot.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn delete(&self, container: &Container) -> std::result::Result<(), Status> {
        self.containers()
            .delete(svc::containers::v1::DeleteContainerRequest {
                id: container.id.clone(),
            })
            .await?;
        self.snapshots()
            .remove(svc::snapshots::v1::RemoveSnapshotRequest {
                snapshotter: container.snapshotter.clone(),
                key: container.id.clone(),
            })
            .await
            .map(drop)
    }

    /// Runs `args` to the end and removes everything. Returns exit and output.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn run(
        &self,
        id: &str,
        parent: &str,
        spec: &Spec,
        dir: &Path,
    ) -> Result<(Exit, String)> {
        let log = dir.join(format!("{id}.log"));
        let container = self.create(id, parent, spec).await?;
        let ran = self.run_task(&container, &log).await;
        let _ = self.delete_task(id).await;
        self.delete(&container).await?;
        let output = std::fs::read_to_string(&log).unwrap_or_default();
        Ok((ran?, output))
    }

    async fn run_task(&self, container: &Container, log: &Path) -> Result<Exit> {
        self.create_task(container, Some(log)).await?;
        self.start(&container.id, "").await?;
        Ok(self.wait(&container.id, "").await?)
    }

    /// Kills what runs and removes task, container and snapshot; what is gone already is fine.
    ///
    /// # Errors
    /// When something could not be removed.
    pub async fn destroy(&self, container: &Container) -> Result<()> {
        let _ = self.kill(&container.id, "", 9).await;
        let _ = self.wait(&container.id, "").await;
        match self.delete_task(&container.id).await {
            Err(status) if status.code() != tonic::Code::NotFound => return Err(status.into()),
            _ => {}
        }
        self.delete(container).await?;
        Ok(())
    }

    /// State of a task.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn task(
        &self,
        id: &str,
        exec_id: &str,
    ) -> std::result::Result<lighter_proto::containerd::v1::types::Process, Status> {
        let request = svc::tasks::v1::GetRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        };
        self.tasks()
            .get(request)
            .await?
            .into_inner()
            .process
            .ok_or_else(|| Status::internal("Get answered no process"))
    }
}
