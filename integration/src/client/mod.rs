//! A containerd client of the harness's own: raw services, and the flows every client performs.

mod images;
mod streams;
mod tasks;

use std::collections::HashMap;
use std::path::Path;

use lighter_proto::containerd::services as svc;
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

use crate::Result;

/// Largest message, as real clients set it.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

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
}
