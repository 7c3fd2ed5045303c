//! A content store in another process, over the Content gRPC service.
//!
//! Refs and digests are those of this daemon's own store; namespaces are kept above it, so every call
//! goes to one namespace of the peer. Where the peer is a whole daemon, which collects garbage by
//! itself, a label on every blob keeps it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use lighter_proto::containerd::services::content::v1 as wire;
use lighter_proto::errdefs::{ErrorKind, WireError};
use lighter_proto::time::from_timestamp;
use lighter_snapshotter::connect::{MESSAGE_MAX_BYTES, connect};
use prost_types::Timestamp;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use wire::content_client::ContentClient;

use super::reader::ReadAt;
use super::{
    BlobReader, Ingest, IngestStatus, Open, Store, Stored, blob_exists, blob_not_found,
    ingest_not_found,
};
use crate::{Digest, Error, labels};

/// Header that carries the namespace.
const NAMESPACE_HEADER: &str = "containerd-namespace";
/// The namespace of the peer that everything is in.
const NAMESPACE: &str = "default";
/// Bytes in one message of a write.
const CHUNK_BYTES: usize = 1 << 20;
/// How long a call may take that others wait behind: looks, removals.
const UPKEEP_TIMEOUT: Duration = Duration::from_secs(60);

/// A remote content store.
#[derive(Debug, Clone)]
pub struct Proxy {
    client: ContentClient<Channel>,
}

impl Proxy {
    /// A client of the store on the Unix socket `address`, connected to on first use and again after
    /// a loss.
    ///
    /// # Errors
    /// When the address is none. Must be called inside a tokio runtime.
    pub fn connect(address: &str) -> Result<Self, Error> {
        Ok(Self::new(connect(address)?))
    }

    /// A client over an existing channel.
    #[must_use]
    pub fn new(channel: Channel) -> Self {
        Self {
            client: ContentClient::new(channel)
                .max_decoding_message_size(MESSAGE_MAX_BYTES)
                .max_encoding_message_size(MESSAGE_MAX_BYTES),
        }
    }

    fn client(&self) -> ContentClient<Channel> {
        self.client.clone()
    }
}

fn request<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request
        .metadata_mut()
        .insert(NAMESPACE_HEADER, MetadataValue::from_static(NAMESPACE));
    request
}

fn remote(status: tonic::Status) -> Error {
    Error::Remote(WireError::from(status))
}

fn damaged(what: &str) -> Error {
    Error::Damaged {
        what: format!("answer of the remote content store: {what}"),
    }
}

/// The answer of a call that others wait behind.
async fn upkeep<T>(call: impl Future<Output = Result<T, tonic::Status>>) -> Result<T, Error> {
    match tokio::time::timeout(UPKEEP_TIMEOUT, call).await {
        Ok(answer) => answer.map_err(remote),
        Err(_) => Err(Error::Remote(WireError::new(
            ErrorKind::DeadlineExceeded,
            format!("remote content store did not answer within {UPKEEP_TIMEOUT:?}"),
        ))),
    }
}

/// An error about a blob in our own words, as far as it is one that callers tell apart.
fn of_blob(error: Error, digest: &Digest) -> Error {
    match error {
        Error::Remote(e) if e.kind == ErrorKind::NotFound => blob_not_found(digest),
        Error::Remote(e) if e.kind == ErrorKind::AlreadyExists => blob_exists(digest),
        other => other,
    }
}

fn of_ingest(error: Error, reference: &str) -> Error {
    match error {
        Error::Remote(e) if e.kind == ErrorKind::NotFound => ingest_not_found(reference),
        other => other,
    }
}

fn time(timestamp: Option<Timestamp>) -> SystemTime {
    timestamp
        .and_then(from_timestamp)
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

fn count(bytes: i64) -> Result<u64, Error> {
    u64::try_from(bytes).map_err(|_| damaged("a negative size"))
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn stored(info: &wire::Info) -> Result<Stored, Error> {
    Ok(Stored {
        digest: Digest::parse(&info.digest)?,
        size_bytes: count(info.size)?,
        created_at: time(info.created_at),
    })
}

fn ingest_status(status: wire::Status) -> Result<IngestStatus, Error> {
    Ok(IngestStatus {
        offset_bytes: count(status.offset)?,
        total_bytes: count(status.total)?,
        expected: Digest::parse(&status.expected).ok(),
        started_at: time(status.started_at),
        updated_at: time(status.updated_at),
        reference: status.r#ref,
    })
}

#[async_trait]
impl Store for Proxy {
    async fn info(&self, digest: &Digest) -> Result<Stored, Error> {
        let asked = request(wire::InfoRequest {
            digest: digest.to_string(),
        });
        let mut client = self.client();
        let answer = upkeep(client.info(asked)).await;
        let answer = answer.map_err(|error| of_blob(error, digest))?;
        let info = answer.into_inner().info.ok_or_else(|| damaged("no info"))?;
        let info = stored(&info)?;
        if info.digest != *digest {
            return Err(damaged("another blob's info"));
        }
        Ok(info)
    }

    async fn reader(&self, digest: &Digest) -> Result<BlobReader, Error> {
        let info = self.info(digest).await?;
        let remote = RemoteBlob {
            client: self.client(),
            digest: digest.clone(),
        };
        Ok(BlobReader::of_remote(Arc::new(remote), info.size_bytes))
    }

    async fn remove(&self, digest: &Digest) -> Result<(), Error> {
        let asked = request(wire::DeleteContentRequest {
            digest: digest.to_string(),
        });
        let mut client = self.client();
        let answer = upkeep(client.delete(asked)).await;
        answer.map(drop).map_err(|error| of_blob(error, digest))
    }

    async fn walk(&self) -> Result<Vec<Stored>, Error> {
        let asked = request(wire::ListContentRequest::default());
        let mut client = self.client();
        let listed = upkeep(async {
            let mut stream = client.list(asked).await?.into_inner();
            let mut found = Vec::new();
            while let Some(page) = stream.next().await {
                found.extend(page?.info);
            }
            Ok(found)
        });
        listed.await?.iter().map(stored).collect()
    }

    async fn status(&self, reference: &str) -> Result<IngestStatus, Error> {
        let asked = request(wire::StatusRequest {
            r#ref: reference.to_owned(),
        });
        let mut client = self.client();
        let answer = upkeep(client.status(asked)).await;
        let answer = answer.map_err(|error| of_ingest(error, reference))?;
        let status = answer.into_inner().status;
        ingest_status(status.ok_or_else(|| damaged("no status"))?)
    }

    async fn statuses(&self) -> Result<Vec<IngestStatus>, Error> {
        let asked = request(wire::ListStatusesRequest::default());
        let mut client = self.client();
        let answer = upkeep(client.list_statuses(asked)).await?;
        let statuses = answer.into_inner().statuses.into_iter();
        statuses.map(ingest_status).collect()
    }

    async fn abort(&self, reference: &str) -> Result<(), Error> {
        let asked = request(wire::AbortRequest {
            r#ref: reference.to_owned(),
        });
        let mut client = self.client();
        let answer = upkeep(client.abort(asked)).await;
        answer
            .map(drop)
            .map_err(|error| of_ingest(error, reference))
    }

    async fn writer(&self, open: Open) -> Result<Box<dyn Ingest>, Error> {
        if open.reference.is_empty() {
            return Err(Error::Invalid {
                reason: "ref must not be empty".to_owned(),
            });
        }
        // One message is under way at a time: each is answered before the next is sent.
        let (requests, outgoing) = mpsc::channel(1);
        let first = wire::WriteContentRequest {
            action: wire::WriteAction::Stat.into(),
            r#ref: open.reference.clone(),
            total: signed(open.total_bytes),
            expected: open
                .expected
                .as_ref()
                .map_or_else(String::new, Digest::to_string),
            ..wire::WriteContentRequest::default()
        };
        requests
            .send(first)
            .await
            .map_err(|_| closed(&open.reference))?;
        let exists = |error| match &open.expected {
            Some(expected) => match error {
                Error::Remote(e) if e.kind == ErrorKind::AlreadyExists => blob_exists(expected),
                other => other,
            },
            None => error,
        };
        let outgoing = request(ReceiverStream::new(outgoing));
        let mut client = self.client();
        let answers = upkeep(client.write(outgoing)).await.map_err(exists)?;
        let mut ingest = RemoteIngest {
            requests,
            answers: answers.into_inner(),
            status: IngestStatus {
                reference: open.reference.clone(),
                offset_bytes: 0,
                total_bytes: open.total_bytes,
                expected: open.expected.clone(),
                started_at: SystemTime::UNIX_EPOCH,
                updated_at: SystemTime::UNIX_EPOCH,
            },
            digest: None,
        };
        let answer = ingest.answer().await.map_err(exists)?;
        ingest.status.started_at = time(answer.started_at);
        ingest.take(&answer)?;
        Ok(Box::new(ingest))
    }
}

fn closed(reference: &str) -> Error {
    Error::Unavailable {
        reason: format!("the remote content store ended the write of ref {reference:?}"),
    }
}

/// A blob of the peer.
#[derive(Debug)]
struct RemoteBlob {
    client: ContentClient<Channel>,
    digest: Digest,
}

#[async_trait]
impl ReadAt for RemoteBlob {
    async fn read_at(&self, offset: u64, length: usize) -> Result<Bytes, Error> {
        let asked = request(wire::ReadContentRequest {
            digest: self.digest.to_string(),
            offset: signed(offset),
            size: signed(length as u64),
        });
        let answer = self.client.clone().read(asked).await.map_err(remote);
        let mut stream = answer
            .map_err(|error| of_blob(error, &self.digest))?
            .into_inner();
        let mut first = Bytes::new();
        let mut rest = Vec::new();
        while let Some(piece) = stream.next().await {
            let data = piece.map_err(remote)?.data;
            if first.len() + rest.len() + data.len() > length {
                return Err(damaged("more bytes than were asked for"));
            }
            // Mostly there is one piece, and nothing is copied.
            if first.is_empty() {
                first = data;
            } else {
                rest.extend_from_slice(&data);
            }
        }
        if first.len() + rest.len() != length {
            return Err(damaged("fewer bytes than the blob has"));
        }
        if rest.is_empty() {
            return Ok(first);
        }
        Ok(Bytes::from([first.as_ref(), &rest].concat()))
    }
}

/// An ingest of the peer; closing the stream unlocks its ref there.
#[derive(Debug)]
struct RemoteIngest {
    requests: mpsc::Sender<wire::WriteContentRequest>,
    answers: tonic::Streaming<wire::WriteContentResponse>,
    status: IngestStatus,
    /// Of the bytes so far, when the peer said.
    digest: Option<Digest>,
}

impl RemoteIngest {
    async fn answer(&mut self) -> Result<wire::WriteContentResponse, Error> {
        match self.answers.message().await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(closed(&self.status.reference)),
            Err(status) => Err(remote(status)),
        }
    }

    async fn ask(
        &mut self,
        message: wire::WriteContentRequest,
    ) -> Result<wire::WriteContentResponse, Error> {
        // When the peer has closed, its answer says why.
        let sent = self.requests.send(message).await;
        let answer = self.answer().await;
        if sent.is_err() && answer.is_ok() {
            return Err(closed(&self.status.reference));
        }
        answer
    }

    fn take(&mut self, answer: &wire::WriteContentResponse) -> Result<(), Error> {
        self.status.offset_bytes = count(answer.offset)?;
        self.status.total_bytes = self.status.total_bytes.max(count(answer.total)?);
        self.status.updated_at = time(answer.updated_at);
        self.digest = Digest::parse(&answer.digest).ok();
        Ok(())
    }

    fn message(&self, action: wire::WriteAction) -> wire::WriteContentRequest {
        wire::WriteContentRequest {
            action: action.into(),
            offset: signed(self.status.offset_bytes),
            ..wire::WriteContentRequest::default()
        }
    }
}

#[async_trait]
impl Ingest for RemoteIngest {
    fn status(&self) -> IngestStatus {
        self.status.clone()
    }

    async fn digest(&mut self) -> Result<Digest, Error> {
        if let Some(digest) = &self.digest {
            return Ok(digest.clone());
        }
        let answer = self.ask(self.message(wire::WriteAction::Stat)).await?;
        self.take(&answer)?;
        self.digest.clone().ok_or_else(|| damaged("no digest"))
    }

    async fn write(&mut self, data: Bytes) -> Result<(), Error> {
        let mut data = data;
        while !data.is_empty() {
            let chunk = data.split_to(data.len().min(CHUNK_BYTES));
            let end = self.status.offset_bytes + chunk.len() as u64;
            let mut message = self.message(wire::WriteAction::Write);
            message.data = chunk;
            let answer = self.ask(message).await?;
            self.take(&answer)?;
            if self.status.offset_bytes != end {
                return Err(damaged("an offset that does not follow from the write"));
            }
        }
        Ok(())
    }

    async fn truncate(&mut self, size_bytes: u64) -> Result<(), Error> {
        if size_bytes != 0 {
            return Err(Error::Unimplemented {
                what: format!("truncation of an ingest to {size_bytes} bytes"),
            });
        }
        if self.status.offset_bytes == 0 {
            return Ok(());
        }
        let mut message = self.message(wire::WriteAction::Write);
        message.offset = 0;
        let answer = self.ask(message).await?;
        self.take(&answer)?;
        if self.status.offset_bytes != 0 {
            return Err(damaged("an ingest that was not truncated"));
        }
        Ok(())
    }

    async fn commit(
        mut self: Box<Self>,
        size_bytes: u64,
        expected: Option<&Digest>,
    ) -> Result<Digest, Error> {
        let expected = expected.or(self.status.expected.as_ref()).cloned();
        let known = match &expected {
            Some(expected) => Some(expected.clone()),
            None => self.digest.clone(),
        };
        let mut message = self.message(wire::WriteAction::Commit);
        message.total = signed(size_bytes);
        message.expected = expected.map_or_else(String::new, |d| d.to_string());
        message
            .labels
            .insert(labels::GC_ROOT.to_owned(), "proxied".to_owned());
        let answer = match self.ask(message).await {
            Err(Error::Remote(e)) if e.kind == ErrorKind::AlreadyExists => {
                return Err(match known {
                    Some(digest) => blob_exists(&digest),
                    None => Error::Remote(e),
                });
            }
            other => other?,
        };
        let digest = Digest::parse(&answer.digest)?;
        if known.is_some_and(|known| known != digest) {
            return Err(damaged("another digest than that of the blob"));
        }
        Ok(digest)
    }
}
