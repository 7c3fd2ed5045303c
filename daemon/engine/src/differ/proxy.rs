//! A differ in another process, over the Diff gRPC service.
//!
//! It reads and writes blobs of this daemon's content store, under the namespace and lease of the
//! request.

use async_trait::async_trait;
use lighter_proto::containerd::services::diff::v1 as wire;
use lighter_proto::containerd::types;
use lighter_proto::errdefs::{Classify, ErrorKind, WireError, render};
use lighter_proto::time::to_timestamp;
use lighter_snapshotter::Mount;
use lighter_snapshotter::connect::{MESSAGE_MAX_BYTES, connect};
use lighter_store::metadata::Descriptor;
use lighter_store::{Digest, Scope};
use tonic::transport::Channel;
use wire::diff_client::DiffClient;

use super::{Applied, ApplyOptions, Differ, Difference};
use crate::diff::LeansOn;

/// Header that carries the namespace.
const NAMESPACE_HEADER: &str = "containerd-namespace";
/// Header that carries the lease.
const LEASE_HEADER: &str = "containerd-lease";

/// A remote differ.
#[derive(Debug, Clone)]
pub struct ProxyDiffer {
    client: DiffClient<Channel>,
}

impl ProxyDiffer {
    /// A client of the differ on the Unix socket `address`, connected to on first use and again after
    /// a loss.
    ///
    /// # Errors
    /// When the address is none. Must be called inside a tokio runtime.
    pub fn connect(address: &str) -> Result<Self, WireError> {
        let channel = connect(address).map_err(|e| WireError::new(e.kind(), render(&e)))?;
        Ok(Self {
            client: DiffClient::new(channel)
                .max_decoding_message_size(MESSAGE_MAX_BYTES)
                .max_encoding_message_size(MESSAGE_MAX_BYTES),
        })
    }
}

/// A request of `scope`.
pub(crate) fn scoped<T>(scope: &Scope, message: T) -> Result<tonic::Request<T>, WireError> {
    let mut request = tonic::Request::new(message);
    let lease = scope.lease.as_deref().map(|lease| (LEASE_HEADER, lease));
    let namespace = (NAMESPACE_HEADER, scope.namespace.as_str());
    for (name, value) in lease.into_iter().chain([namespace]) {
        let value = value.parse().map_err(|_| {
            WireError::new(
                ErrorKind::InvalidArgument,
                format!("{value:?} cannot be sent as header {name}"),
            )
        })?;
        request.metadata_mut().insert(name, value);
    }
    Ok(request)
}

fn encode(descriptor: &Descriptor) -> types::Descriptor {
    types::Descriptor {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.to_string(),
        size: i64::try_from(descriptor.size_bytes).unwrap_or(i64::MAX),
        annotations: descriptor.annotations.clone().into_iter().collect(),
    }
}

fn decode(answer: Option<types::Descriptor>) -> Result<Descriptor, WireError> {
    let damaged = |what: String| {
        WireError::new(
            ErrorKind::DataLoss,
            format!("answer of the remote differ is damaged: {what}"),
        )
    };
    let answer = answer.ok_or_else(|| damaged("no descriptor".to_owned()))?;
    Ok(Descriptor {
        digest: Digest::parse(&answer.digest).map_err(|e| damaged(e.to_string()))?,
        size_bytes: u64::try_from(answer.size).map_err(|e| damaged(e.to_string()))?,
        media_type: answer.media_type,
        annotations: answer.annotations.into_iter().collect(),
    })
}

fn mounts(mounts: Vec<Mount>) -> Vec<types::Mount> {
    mounts.into_iter().map(Into::into).collect()
}

#[async_trait]
impl Differ for ProxyDiffer {
    async fn apply(
        &self,
        scope: &Scope,
        layer: &Descriptor,
        over: &[Mount],
        options: ApplyOptions,
    ) -> Result<Applied, WireError> {
        let request = wire::ApplyRequest {
            diff: Some(encode(layer)),
            mounts: mounts(over.to_vec()),
            payloads: options.payloads.into_iter().collect(),
            sync_fs: options.sync_fs,
        };
        let answer = self.client.clone().apply(scoped(scope, request)?).await?;
        Ok(Applied {
            layer: decode(answer.into_inner().applied)?,
            leans_on: LeansOn::default(),
        })
    }

    async fn compare(&self, scope: &Scope, asked: Difference) -> Result<Descriptor, WireError> {
        let request = wire::DiffRequest {
            left: mounts(asked.lower),
            right: mounts(asked.upper),
            media_type: asked.media_type,
            r#ref: asked.reference,
            labels: asked.labels.into_iter().collect(),
            source_date_epoch: asked.source_date_epoch.map(to_timestamp),
        };
        let answer = self.client.clone().diff(scoped(scope, request)?).await?;
        decode(answer.into_inner().diff)
    }
}
