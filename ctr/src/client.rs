//! The connection to the daemon: one channel, and a typed client per service on it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use hyper_util::rt::TokioIo;
use lighter_proto::containerd::services as api;
use lighter_proto::lighter::disk::v1::disk_client::DiskClient;
use lighter_proto::runtime::v1::runtime_service_client::RuntimeServiceClient;
use tokio::net::UnixStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::advice::Advice;
use crate::cli::Global;

/// Largest message either way, bytes; the daemon's own default.
const MAX_MESSAGE: usize = 16 << 20;
/// How long to wait for a connection when nothing was said on the command line.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What every service client runs on.
pub(crate) type Service = InterceptedService<Channel, Headers>;

/// Puts namespace and lease on every request.
#[derive(Debug, Clone)]
pub(crate) struct Headers {
    namespace: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = request.metadata_mut();
        metadata.insert("containerd-namespace", self.namespace.clone());
        if let Some(lease) = &self.lease {
            metadata.insert("containerd-lease", lease.clone());
        }
        Ok(request)
    }
}

/// [`Headers`] where a namespace is meant, none where all are.
#[derive(Debug, Clone)]
pub(crate) struct Scoped(Option<Headers>);

impl Interceptor for Scoped {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        match &mut self.0 {
            Some(headers) => headers.call(request),
            None => Ok(request),
        }
    }
}

/// A daemon, as one namespace of it. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    channel: Channel,
    headers: Headers,
    namespace: Arc<str>,
}

/// Defines the accessor of each service.
macro_rules! services {
    ($($name:ident: $module:ident :: $client:ident :: $type:ident,)*) => {
        impl Client {
            $(
                pub(crate) fn $name(&self) -> api::$module::v1::$client::$type<Service> {
                    let service = InterceptedService::new(self.channel.clone(), self.headers.clone());
                    api::$module::v1::$client::$type::new(service)
                        .max_decoding_message_size(MAX_MESSAGE)
                        .max_encoding_message_size(MAX_MESSAGE)
                }
            )*
        }
    };
}

services! {
    containers: containers::containers_client::ContainersClient,
    content: content::content_client::ContentClient,
    diff: diff::diff_client::DiffClient,
    events: events::events_client::EventsClient,
    images: images::images_client::ImagesClient,
    introspection: introspection::introspection_client::IntrospectionClient,
    leases: leases::leases_client::LeasesClient,
    namespaces: namespaces::namespaces_client::NamespacesClient,
    sandbox_controller: sandbox::controller_client::ControllerClient,
    sandbox_store: sandbox::store_client::StoreClient,
    snapshots: snapshots::snapshots_client::SnapshotsClient,
    streaming: streaming::streaming_client::StreamingClient,
    tasks: tasks::tasks_client::TasksClient,
    transfer: transfer::transfer_client::TransferClient,
    version: version::version_client::VersionClient,
}

impl Client {
    /// What uses the disk; only our own daemon has it. Without a namespace it is about all.
    pub(crate) fn disk(
        &self,
        all_namespaces: bool,
    ) -> DiskClient<InterceptedService<Channel, Scoped>> {
        let headers = (!all_namespaces).then(|| self.headers.clone());
        DiskClient::new(InterceptedService::new(
            self.channel.clone(),
            Scoped(headers),
        ))
        .max_decoding_message_size(MAX_MESSAGE)
    }

    /// Connects to the daemon's socket.
    pub(crate) async fn connect(global: &Global) -> anyhow::Result<Self> {
        let path = PathBuf::from(socket_path(&global.address));
        let timeout = match global.connect_timeout {
            Duration::ZERO => CONNECT_TIMEOUT,
            given => given,
        };
        let namespace = global.namespace.parse().map_err(|_| {
            Advice::new(
                format!(
                    "namespace {:?} has characters that no namespace may have",
                    global.namespace
                ),
                "use letters, digits, '.', '_' and '-'",
            )
        })?;
        // A plain connect first: its error says more than the channel's would.
        tokio::time::timeout(timeout, UnixStream::connect(&path))
            .await
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))
            .and_then(|connected| connected)
            .map_err(|error| unreachable_daemon(&path, &error))?;
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The URI only fills `:authority`; the connector decides where the bytes go.
        let channel = Endpoint::from_static("http://localhost")
            .connect_timeout(timeout)
            .connect_with_connector(connector)
            .await
            .with_context(|| format!("cannot talk gRPC to {}", global.address))?;
        let headers = Headers {
            namespace,
            lease: None,
        };
        Ok(Self {
            channel,
            headers,
            namespace: global.namespace.as_str().into(),
        })
    }

    /// The CRI service, which has no namespaces.
    pub(crate) fn cri(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// The same daemon, in another namespace.
    pub(crate) fn in_namespace(&self, namespace: &'static str) -> Self {
        Self {
            channel: self.channel.clone(),
            headers: Headers {
                namespace: MetadataValue::from_static(namespace),
                lease: None,
            },
            namespace: namespace.into(),
        }
    }

    /// The namespace that requests go to.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The same daemon, with a lease on every request.
    pub(crate) fn under_lease(&self, id: &str) -> anyhow::Result<Self> {
        let lease = id
            .parse()
            .with_context(|| format!("lease id {id:?} cannot be a header"))?;
        let headers = Headers {
            lease: Some(lease),
            ..self.headers.clone()
        };
        Ok(Self {
            headers,
            ..self.clone()
        })
    }
}

/// `unix:///run/x.sock`, `unix:/run/x.sock` and `/run/x.sock` name the same socket.
fn socket_path(address: &str) -> &str {
    let path = address.strip_prefix("unix:").unwrap_or(address);
    match path.strip_prefix("//") {
        Some(rest) if rest.starts_with('/') => rest,
        _ => path,
    }
}

fn unreachable_daemon(path: &std::path::Path, error: &std::io::Error) -> Advice {
    use std::io::ErrorKind;
    let remedy = match error.kind() {
        ErrorKind::NotFound => {
            "start the daemon (lighterd), or name the socket it listens on with --address or \
             CONTAINERD_ADDRESS"
        }
        ErrorKind::ConnectionRefused => {
            "the socket exists but nobody listens: start the daemon (lighterd) again"
        }
        ErrorKind::PermissionDenied => {
            "run as root, or let the daemon give its socket to your group ([grpc] gid in its config)"
        }
        ErrorKind::TimedOut => {
            "the daemon does not accept: look at its log, or raise --connect-timeout"
        }
        _ => "see that the address is a Unix socket of a running daemon",
    };
    Advice::new(
        format!(
            "cannot connect to the daemon at {}: {error}",
            path.display()
        ),
        remedy,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_path_with_or_without_scheme() {
        for address in ["/run/a.sock", "unix:///run/a.sock", "unix:/run/a.sock"] {
            assert_eq!(socket_path(address), "/run/a.sock");
        }
    }
}
