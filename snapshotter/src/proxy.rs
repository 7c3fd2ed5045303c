//! A snapshotter in another process, over the Snapshots gRPC service.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use lighter_proto::containerd::services::snapshots::v1 as wire;
use lighter_proto::errdefs::{ErrorKind, WireError};
use lighter_proto::time::from_timestamp;
use tokio_stream::StreamExt as _;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use wire::snapshots_client::SnapshotsClient;

use crate::connect::{MESSAGE_MAX_BYTES, connect};
use crate::{CommitOptions, Error, Info, Kind, LabelUpdate, Labels, Mount, Snapshotter, Usage};

/// How long a call may take that others wait behind: collections, the first look at a start.
const UPKEEP_TIMEOUT: Duration = Duration::from_secs(60);
/// Label that keeps a snapshot where the peer is a whole daemon, which collects garbage by itself.
/// Only ever between the two of them.
const LABEL_KEPT: &str = "containerd.io/gc.root";
/// Header that carries the namespace.
const NAMESPACE_HEADER: &str = "containerd-namespace";

/// A remote snapshotter.
#[derive(Debug, Clone)]
pub struct Proxy {
    client: SnapshotsClient<Channel>,
    snapshotter: String,
    namespace: MetadataValue<Ascii>,
    capabilities: Vec<String>,
    root: Option<PathBuf>,
}

impl Proxy {
    /// A client of the snapshotter called `snapshotter` on the Unix socket `address` (a path, or one
    /// with the prefix `unix://`). The connection is made on first use and again after a loss.
    ///
    /// # Errors
    /// When the address is none. Must be called inside a tokio runtime.
    pub fn connect(address: &str, snapshotter: &str) -> Result<Self, Error> {
        Ok(Self::new(connect(address)?, snapshotter))
    }

    /// A client over an existing channel.
    #[must_use]
    pub fn new(channel: Channel, snapshotter: &str) -> Self {
        Self {
            client: SnapshotsClient::new(channel)
                .max_decoding_message_size(MESSAGE_MAX_BYTES)
                .max_encoding_message_size(MESSAGE_MAX_BYTES),
            snapshotter: snapshotter.to_owned(),
            namespace: MetadataValue::from_static("default"),
            capabilities: Vec::new(),
            root: None,
        }
    }

    /// The same client calling in another namespace; keys carry the caller's namespace themselves.
    #[must_use]
    pub fn in_namespace(&self, namespace: &str) -> Self {
        let mut proxy = self.clone();
        if let Ok(value) = namespace.parse() {
            proxy.namespace = value;
        }
        proxy
    }

    /// What the operator's configuration says of it: capabilities and exported root.
    #[must_use]
    pub fn described(mut self, capabilities: Vec<String>, root: Option<PathBuf>) -> Self {
        self.capabilities = capabilities;
        self.root = root;
        self
    }

    fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request
            .metadata_mut()
            .insert(NAMESPACE_HEADER, self.namespace.clone());
        request
    }
}

fn remote(status: tonic::Status) -> Error {
    Error::Remote(WireError::from(status))
}

fn info(info: Option<wire::Info>) -> Result<Info, Error> {
    let info = info.ok_or_else(|| Error::Damaged {
        key: "remote snapshotter's answer without info".to_owned(),
    })?;
    let kind = match info.kind() {
        wire::Kind::View => Kind::View,
        wire::Kind::Active => Kind::Active,
        wire::Kind::Committed => Kind::Committed,
        wire::Kind::Unknown => return Err(Error::Damaged { key: info.name }),
    };
    let time = |t| from_timestamp(t).unwrap_or(SystemTime::UNIX_EPOCH);
    Ok(Info {
        kind,
        name: info.name,
        parent: (!info.parent.is_empty()).then_some(info.parent),
        labels: {
            let mut labels: Labels = info.labels.into_iter().collect();
            labels.remove(LABEL_KEPT);
            labels
        },
        created_at: info.created_at.map_or(SystemTime::UNIX_EPOCH, time),
        updated_at: info.updated_at.map_or(SystemTime::UNIX_EPOCH, time),
    })
}

/// The labels of a snapshot that must last.
fn kept(labels: Labels) -> std::collections::HashMap<String, String> {
    let mut labels: std::collections::HashMap<_, _> = labels.into_iter().collect();
    labels.insert(LABEL_KEPT.to_owned(), "proxied".to_owned());
    labels
}

/// The answer of a call that others wait behind.
async fn upkeep<T>(
    what: &str,
    call: impl Future<Output = Result<T, tonic::Status>>,
) -> Result<T, Error> {
    match tokio::time::timeout(UPKEEP_TIMEOUT, call).await {
        Ok(answer) => answer.map_err(remote),
        Err(_) => Err(Error::Remote(WireError::new(
            ErrorKind::DeadlineExceeded,
            format!("remote snapshotter did not answer {what} within {UPKEEP_TIMEOUT:?}"),
        ))),
    }
}

fn mounts(mounts: Vec<lighter_proto::containerd::types::Mount>) -> Vec<Mount> {
    mounts.into_iter().map(Mount::from).collect()
}

#[async_trait]
impl Snapshotter for Proxy {
    async fn stat(&self, key: &str) -> Result<Info, Error> {
        let request = self.request(wire::StatSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        });
        let answer = self.client.clone().stat(request).await.map_err(remote)?;
        info(answer.into_inner().info)
    }

    async fn update(&self, key: &str, labels: LabelUpdate) -> Result<Info, Error> {
        let (labels, paths) = match labels {
            LabelUpdate::Replace(labels) => (kept(labels), vec!["labels".to_owned()]),
            LabelUpdate::Merge(changes) => {
                let paths = changes.keys().map(|k| format!("labels.{k}")).collect();
                let labels = changes
                    .into_iter()
                    .map(|(key, value)| (key, value.unwrap_or_default()))
                    .collect();
                (labels, paths)
            }
        };
        let request = self.request(wire::UpdateSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            info: Some(wire::Info {
                name: key.to_owned(),
                labels,
                ..wire::Info::default()
            }),
            update_mask: Some(prost_types::FieldMask { paths }),
        });
        let answer = self.client.clone().update(request).await.map_err(remote)?;
        info(answer.into_inner().info)
    }

    async fn usage(&self, key: &str) -> Result<Usage, Error> {
        let request = self.request(wire::UsageRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        });
        let answer = self.client.clone().usage(request).await.map_err(remote)?;
        let answer = answer.into_inner();
        Ok(Usage {
            size_bytes: u64::try_from(answer.size).unwrap_or(0),
            inodes: u64::try_from(answer.inodes).unwrap_or(0),
        })
    }

    async fn mounts(&self, key: &str) -> Result<Vec<Mount>, Error> {
        let request = self.request(wire::MountsRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        });
        let answer = self.client.clone().mounts(request).await.map_err(remote)?;
        Ok(mounts(answer.into_inner().mounts))
    }

    async fn prepare(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        let request = self.request(wire::PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.unwrap_or_default().to_owned(),
            labels: kept(labels),
        });
        let answer = self.client.clone().prepare(request).await.map_err(remote)?;
        Ok(mounts(answer.into_inner().mounts))
    }

    async fn view(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        let request = self.request(wire::ViewSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.unwrap_or_default().to_owned(),
            labels: kept(labels),
        });
        let answer = self.client.clone().view(request).await.map_err(remote)?;
        Ok(mounts(answer.into_inner().mounts))
    }

    async fn commit(&self, name: &str, key: &str, options: CommitOptions) -> Result<(), Error> {
        let request = self.request(wire::CommitSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels: kept(options.labels),
            parent: options.parent.unwrap_or_default(),
        });
        self.client.clone().commit(request).await.map_err(remote)?;
        Ok(())
    }

    async fn remove(&self, key: &str) -> Result<(), Error> {
        let request = self.request(wire::RemoveSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        });
        upkeep("Remove", self.client.clone().remove(request)).await?;
        Ok(())
    }

    async fn walk(&self) -> Result<Vec<Info>, Error> {
        let request = self.request(wire::ListSnapshotsRequest {
            snapshotter: self.snapshotter.clone(),
            filters: Vec::new(),
        });
        let mut client = self.client.clone();
        let listed = upkeep("List", async {
            let mut stream = client.list(request).await?.into_inner();
            let mut found = Vec::new();
            while let Some(batch) = stream.next().await {
                found.extend(batch?.info);
            }
            Ok(found)
        });
        let mut found = Vec::new();
        for one in listed.await? {
            found.push(info(Some(one))?);
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    async fn cleanup(&self) -> Result<(), Error> {
        let request = self.request(wire::CleanupRequest {
            snapshotter: self.snapshotter.clone(),
        });
        upkeep("Cleanup", self.client.clone().cleanup(request)).await?;
        Ok(())
    }

    /// A remote snapshotter answers only what stands.
    async fn durable(&self) -> Result<(), Error> {
        Ok(())
    }

    fn capabilities(&self) -> Vec<String> {
        self.capabilities.clone()
    }

    fn root(&self) -> Option<PathBuf> {
        self.root.clone()
    }
}
