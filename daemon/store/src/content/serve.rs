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

use super::{Ingest, IngestStatus, Open, Session, Store, Stored, Target, TargetWriter};
use crate::filter::{Fields, Filter};
use crate::{Digest, Error, Labels};

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
            let mut session = Session::new(Bare(store));
            loop {
                // The ingest stays for resume.
                let Ok(Some(message)) = requests.message().await else {
                    return;
                };
                let answer = session.answer(message).await;
                let ended = session.is_over();
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

/// A store without namespaces, as write streams see it.
struct Bare(Arc<dyn Store>);

/// An ingest of a bare store.
struct BareIngest(Box<dyn Ingest>);

impl Target for Bare {
    type Writer = BareIngest;

    async fn open(
        &self,
        reference: &str,
        total_bytes: u64,
        expected: Option<&Digest>,
    ) -> Result<BareIngest, Error> {
        let open = Open {
            reference: reference.to_owned(),
            total_bytes,
            expected: expected.cloned(),
            holder: String::new(),
        };
        self.0.writer(open).await.map(BareIngest)
    }

    async fn has(&self, digest: &Digest) -> bool {
        self.0.info(digest).await.is_ok()
    }

    async fn abort(&self, reference: &str) -> Result<(), Error> {
        self.0.abort(reference).await
    }
}

impl TargetWriter for BareIngest {
    fn status(&self) -> IngestStatus {
        self.0.status()
    }

    async fn digest(&mut self) -> Result<Digest, Error> {
        self.0.digest().await
    }

    async fn write(&mut self, data: Bytes) -> Result<(), Error> {
        self.0.write(data).await
    }

    async fn restart(&mut self) -> Result<(), Error> {
        self.0.truncate(0).await
    }

    /// Labels are the namespaces' affair.
    async fn commit(
        self,
        total_bytes: u64,
        expected: Option<&Digest>,
        _labels: Labels,
    ) -> Result<Digest, Error> {
        self.0.commit(total_bytes, expected).await
    }
}
