//! Any [`Store`] as a Content gRPC service: the mirror image of [`super::Proxy`].
//!
//! For a store served apart from the daemon. A bare store has no namespaces and no labels: the
//! namespace of a request is not looked at, labels are neither kept nor changed.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use lighter_proto::containerd::services::content::v1 as wire;
use lighter_proto::errdefs::into_status;
use lighter_proto::time::to_timestamp;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};
use wire::content_server::{Content, ContentServer};

use super::{Ingest, IngestStatus, Open, Store, Stored, blob_exists};
use crate::filter::{Fields, Filter};
use crate::{Digest, Error};

/// Records in one message of a list.
const PAGE: usize = 100;
/// Bytes in one message of a read.
const CHUNK_BYTES: u64 = 1 << 20;
/// Messages of a read that wait for the client.
const READ_AHEAD: usize = 3;
/// Largest message either way, as everywhere on containerd's sockets.
const MESSAGE_MAX_BYTES: usize = 16 << 20;

/// Serves a content store.
#[derive(Debug, Clone)]
pub struct Serve {
    store: Arc<dyn Store>,
    /// Owner of reads and writes under way.
    tasks: TaskTracker,
}

impl Serve {
    /// A tonic service around `store`; streams are `tasks` of the caller's.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, tasks: TaskTracker) -> ContentServer<Self> {
        ContentServer::new(Self { store, tasks })
            .max_decoding_message_size(MESSAGE_MAX_BYTES)
            .max_encoding_message_size(MESSAGE_MAX_BYTES)
    }
}

type Stream1<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A blob as filters see it.
struct ByFilter<'a>(&'a Stored);

impl Fields for ByFilter<'_> {
    fn field(&self, path: &[String]) -> Option<std::borrow::Cow<'_, str>> {
        match path {
            [field] if field == "digest" => {
                Some(std::borrow::Cow::Borrowed(self.0.digest.as_str()))
            }
            _ => None,
        }
    }
}

fn parse(digest: &str) -> Result<Digest, Status> {
    Digest::parse(digest).map_err(into_status)
}

fn count(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn size(bytes: i64) -> Result<u64, Error> {
    u64::try_from(bytes).map_err(|_| Error::Invalid {
        reason: format!("offset or size must not be negative, got {bytes}"),
    })
}

fn encode(stored: &Stored) -> wire::Info {
    let time = to_timestamp(stored.created_at);
    wire::Info {
        digest: stored.digest.to_string(),
        size: count(stored.size_bytes),
        created_at: Some(time),
        updated_at: Some(time),
        ..wire::Info::default()
    }
}

fn encode_status(status: IngestStatus) -> wire::Status {
    wire::Status {
        started_at: Some(to_timestamp(status.started_at)),
        updated_at: Some(to_timestamp(status.updated_at)),
        offset: count(status.offset_bytes),
        total: count(status.total_bytes),
        expected: status.expected.map_or_else(String::new, |d| d.to_string()),
        r#ref: status.reference,
    }
}

#[tonic::async_trait]
impl Content for Serve {
    async fn info(
        &self,
        request: Request<wire::InfoRequest>,
    ) -> Result<Response<wire::InfoResponse>, Status> {
        let digest = parse(&request.get_ref().digest)?;
        let info = self.store.info(&digest).await.map_err(into_status)?;
        Ok(Response::new(wire::InfoResponse {
            info: Some(encode(&info)),
        }))
    }

    async fn update(
        &self,
        _request: Request<wire::UpdateRequest>,
    ) -> Result<Response<wire::UpdateResponse>, Status> {
        Err(into_status(Error::Precondition {
            reason: "update not supported on immutable content store".to_owned(),
        }))
    }

    type ListStream = Stream1<wire::ListContentResponse>;

    async fn list(
        &self,
        request: Request<wire::ListContentRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let filter = Filter::parse(&request.get_ref().filters).map_err(into_status)?;
        let mut found = self.store.walk().await.map_err(into_status)?;
        found.retain(|stored| filter.matches(&ByFilter(stored)));
        let pages: Vec<_> = found
            .chunks(PAGE)
            .map(|page| {
                Ok(wire::ListContentResponse {
                    info: page.iter().map(encode).collect(),
                })
            })
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(pages))))
    }

    async fn delete(
        &self,
        request: Request<wire::DeleteContentRequest>,
    ) -> Result<Response<()>, Status> {
        let digest = parse(&request.get_ref().digest)?;
        let removed = self.store.remove(&digest).await;
        removed.map(Response::new).map_err(into_status)
    }

    type ReadStream = Stream1<wire::ReadContentResponse>;

    async fn read(
        &self,
        request: Request<wire::ReadContentRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let request = request.get_ref();
        let digest = parse(&request.digest)?;
        let reader = self.store.reader(&digest).await.map_err(into_status)?;
        let start = size(request.offset).map_err(into_status)?;
        let wanted = size(request.size).map_err(into_status)?;
        let all = reader.size_bytes();
        if start > all {
            return Err(into_status(Error::OutOfRange {
                reason: format!("read past object length {all} bytes, offset {start}"),
            }));
        }
        let end = match wanted {
            0 => all,
            wanted => start.saturating_add(wanted).min(all),
        };
        // From the reader to the client; closed when the client has gone.
        let (send, receive) = mpsc::channel(READ_AHEAD);
        self.tasks.spawn(async move {
            let mut at = start;
            while at < end {
                let length = CHUNK_BYTES.min(end - at);
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                let read = reader.read_at(at, length).await.map_err(into_status);
                let failed = read.is_err();
                let read = read.map(|data| wire::ReadContentResponse {
                    offset: count(at - start),
                    data,
                });
                if send.send(read).await.is_err() || failed {
                    return;
                }
                at += length as u64;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }

    async fn status(
        &self,
        request: Request<wire::StatusRequest>,
    ) -> Result<Response<wire::StatusResponse>, Status> {
        let status = self.store.status(&request.get_ref().r#ref).await;
        Ok(Response::new(wire::StatusResponse {
            status: Some(encode_status(status.map_err(into_status)?)),
        }))
    }

    async fn list_statuses(
        &self,
        request: Request<wire::ListStatusesRequest>,
    ) -> Result<Response<wire::ListStatusesResponse>, Status> {
        let filter = Filter::parse(&request.get_ref().filters).map_err(into_status)?;
        let mut found = self.store.statuses().await.map_err(into_status)?;
        found.retain(|status| filter.matches(status));
        Ok(Response::new(wire::ListStatusesResponse {
            statuses: found.into_iter().map(encode_status).collect(),
        }))
    }

    type WriteStream = Stream1<wire::WriteContentResponse>;

    async fn write(
        &self,
        request: Request<Streaming<wire::WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let mut requests = request.into_inner();
        let store = Arc::clone(&self.store);
        // From the writer to the client; closed when the client has gone.
        let (send, receive) = mpsc::channel(1);
        self.tasks.spawn(async move {
            let mut open = None;
            loop {
                // The ingest stays for resume.
                let Ok(Some(message)) = requests.message().await else {
                    return;
                };
                let answer = handle(store.as_ref(), &mut open, message).await;
                let ended = open.is_none();
                if send.send(answer.map_err(into_status)).await.is_err() || ended {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }

    async fn abort(&self, request: Request<wire::AbortRequest>) -> Result<Response<()>, Status> {
        let aborted = self.store.abort(&request.get_ref().r#ref).await;
        aborted.map(Response::new).map_err(into_status)
    }
}

/// An ingest that the first message of a stream opened.
struct Opened {
    ingest: Box<dyn Ingest>,
    total: u64,
    expected: Option<Digest>,
}

/// One message of a write; `open` is empty afterwards when it was the last.
async fn handle(
    store: &dyn Store,
    open: &mut Option<Opened>,
    message: wire::WriteContentRequest,
) -> Result<wire::WriteContentResponse, Error> {
    let mut opened = opened(store, open.take(), &message).await?;
    let action = message.action();
    if action == wire::WriteAction::Stat {
        let answer = answer(&mut opened, action).await?;
        *open = Some(opened);
        return Ok(answer);
    }
    append(opened.ingest.as_mut(), message.offset, message.data).await?;
    let mut answer = answer(&mut opened, action).await?;
    if action == wire::WriteAction::Write {
        *open = Some(opened);
        return Ok(answer);
    }
    let Opened {
        ingest,
        total,
        expected,
    } = opened;
    let digest = ingest.commit(total, expected.as_ref()).await?;
    answer.digest = digest.to_string();
    Ok(answer)
}

async fn opened(
    store: &dyn Store,
    open: Option<Opened>,
    message: &wire::WriteContentRequest,
) -> Result<Opened, Error> {
    let total = size(message.total)?;
    let expected = match message.expected.as_str() {
        "" => None,
        text => Some(Digest::parse(text)?),
    };
    let Some(mut open) = open else {
        if message.r#ref.is_empty() {
            return Err(Error::Invalid {
                reason: "first message must have a reference".to_owned(),
            });
        }
        let ingest = store
            .writer(Open {
                reference: message.r#ref.clone(),
                total_bytes: total,
                expected: expected.clone(),
                holder: String::new(),
            })
            .await?;
        return Ok(Opened {
            ingest,
            total,
            expected,
        });
    };
    if total > 0 {
        open.total = total;
    }
    if let Some(expected) = expected
        && open.expected.as_ref() != Some(&expected)
    {
        if store.info(&expected).await.is_ok() {
            let reference = open.ingest.status().reference;
            drop(open);
            store.abort(&reference).await?;
            return Err(blob_exists(&expected));
        }
        open.expected = Some(expected);
    }
    Ok(open)
}

/// Appends at `offset`, which must be where the ingest ends; 0 begins anew.
async fn append(ingest: &mut dyn Ingest, offset: i64, data: Bytes) -> Result<(), Error> {
    let current = ingest.status().offset_bytes;
    let offset = size(offset)?;
    if offset > 0 && offset != current {
        return Err(Error::OutOfRange {
            reason: format!("write @{offset} must occur at current offset {current}"),
        });
    }
    if offset == 0 && current > 0 {
        ingest.truncate(0).await?;
    }
    ingest.write(data).await
}

async fn answer(
    open: &mut Opened,
    action: wire::WriteAction,
) -> Result<wire::WriteContentResponse, Error> {
    let status = open.ingest.status();
    Ok(wire::WriteContentResponse {
        action: action.into(),
        started_at: Some(to_timestamp(status.started_at)),
        updated_at: Some(to_timestamp(status.updated_at)),
        offset: count(status.offset_bytes),
        total: count(open.total.max(status.total_bytes)),
        digest: open.ingest.digest().await?.to_string(),
    })
}
