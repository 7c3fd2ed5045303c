//! `containerd.services.content.v1.Content`

use futures::stream::{self, BoxStream, StreamExt as _};
use lighter_proto::containerd::services::content::v1 as wire;
use lighter_proto::containerd::services::content::v1::content_server::Content;
use lighter_proto::errdefs::{ErrorKind, WireError, into_status};
use lighter_proto::time::to_timestamp;
use lighter_store::content::IngestStatus;
use lighter_store::metadata::Db;
use lighter_store::metadata::content::BlobInfo;
use tonic::{Request, Response, Status, Streaming};

mod read;

use self::read::Range;
pub(crate) use self::read::Reads;
use super::scope::scope_of;
use super::wire::{count, digest, filter, labels, paths, required, unordered};

/// Records in one message of a list.
const PAGE: usize = 100;
/// Bytes in one message of a read.
const CHUNK_BYTES: usize = 1 << 20;

/// Blobs over gRPC.
#[derive(Debug, Clone)]
pub(crate) struct ContentService {
    db: Db,
}

impl ContentService {
    /// Over the blobs of `db`.
    pub(crate) fn new(db: Db) -> Self {
        Self { db }
    }
}

impl ContentService {
    /// Opens what a request wants to read, and works out which bytes of it.
    async fn open(&self, request: &Request<wire::ReadContentRequest>) -> Result<Range, Status> {
        let scope = scope_of(request)?;
        let r = request.get_ref();
        let digest = digest(&r.digest)?;
        let reader = self.db.content().reader(&scope, &digest).await;
        let reader = reader.map_err(into_status)?;
        let start = u64::try_from(r.offset).unwrap_or(0);
        let size = reader.size_bytes();
        if start > size {
            return Err(into_status(WireError::new(
                ErrorKind::OutOfRange,
                format!("read past object length {size} bytes, offset {start}"),
            )));
        }
        let wanted = u64::try_from(r.size).unwrap_or(0);
        let end = match wanted {
            0 => size,
            wanted => start.saturating_add(wanted).min(size),
        };
        Ok(Range { reader, start, end })
    }
}

fn encode(info: BlobInfo) -> wire::Info {
    wire::Info {
        digest: info.digest.as_str().to_owned(),
        size: count(info.size_bytes),
        created_at: Some(to_timestamp(info.created_at)),
        updated_at: Some(to_timestamp(info.updated_at)),
        labels: unordered(info.labels),
    }
}

fn encode_status(status: IngestStatus) -> wire::Status {
    wire::Status {
        started_at: Some(to_timestamp(status.started_at)),
        updated_at: Some(to_timestamp(status.updated_at)),
        r#ref: status.reference,
        offset: count(status.offset_bytes),
        total: count(status.total_bytes),
        expected: status.expected.map_or_else(String::new, |d| d.to_string()),
    }
}

#[tonic::async_trait]
impl Content for ContentService {
    async fn info(
        &self,
        request: Request<wire::InfoRequest>,
    ) -> Result<Response<wire::InfoResponse>, Status> {
        let scope = scope_of(&request)?;
        let digest = digest(&request.get_ref().digest)?;
        let info = self
            .db
            .content()
            .info(&scope, &digest)
            .map_err(into_status)?;
        Ok(Response::new(wire::InfoResponse {
            info: Some(encode(info)),
        }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateRequest>,
    ) -> Result<Response<wire::UpdateResponse>, Status> {
        let scope = scope_of(&request)?;
        let r = request.into_inner();
        let info = required(r.info, "info")?;
        let digest = digest(&info.digest)?;
        let mask = paths(r.update_mask);
        let content = self.db.content();
        let updated = content.update(&scope, &digest, labels(info.labels), &mask);
        Ok(Response::new(wire::UpdateResponse {
            info: Some(encode(updated.await.map_err(into_status)?)),
        }))
    }

    type ListStream = BoxStream<'static, Result<wire::ListContentResponse, Status>>;

    async fn list(
        &self,
        request: Request<wire::ListContentRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let scope = scope_of(&request)?;
        let filter = filter(&request.get_ref().filters)?;
        let found = self.db.content().list(&scope, &filter);
        let pages = stream::iter(found.map_err(into_status)?.into_iter().map(encode));
        let messages = pages
            .chunks(PAGE)
            .map(|info| Ok(wire::ListContentResponse { info }));
        Ok(Response::new(messages.boxed()))
    }

    async fn delete(
        &self,
        request: Request<wire::DeleteContentRequest>,
    ) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let digest = digest(&request.get_ref().digest)?;
        let deleted = self.db.content().delete(&scope, &digest).await;
        deleted.map(Response::new).map_err(into_status)
    }

    type ReadStream = BoxStream<'static, Result<wire::ReadContentResponse, Status>>;

    /// Offsets of the answer count from 0 of this read. Served by [`read::Reads`] for whoever comes
    /// over HTTP/2.
    async fn read(
        &self,
        request: Request<wire::ReadContentRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let Range { reader, start, end } = self.open(&request).await?;
        let messages = stream::try_unfold(start, move |at| {
            let reader = reader.clone();
            async move {
                if at >= end {
                    return Ok(None);
                }
                let length = usize::try_from(end - at).unwrap_or(usize::MAX);
                let length = length.min(CHUNK_BYTES);
                let data = reader.read_at(at, length).await.map_err(into_status)?;
                let (offset, next) = (count(at - start), at + data.len() as u64);
                Ok(Some((wire::ReadContentResponse { offset, data }, next)))
            }
        });
        Ok(Response::new(messages.boxed()))
    }

    async fn status(
        &self,
        request: Request<wire::StatusRequest>,
    ) -> Result<Response<wire::StatusResponse>, Status> {
        let scope = scope_of(&request)?;
        let status = self
            .db
            .content()
            .status(&scope, &request.get_ref().r#ref)
            .await;
        Ok(Response::new(wire::StatusResponse {
            status: Some(encode_status(status.map_err(into_status)?)),
        }))
    }

    async fn list_statuses(
        &self,
        request: Request<wire::ListStatusesRequest>,
    ) -> Result<Response<wire::ListStatusesResponse>, Status> {
        let scope = scope_of(&request)?;
        let filter = filter(&request.get_ref().filters)?;
        let found = self.db.content().statuses(&scope, &filter).await;
        let statuses = found.map_err(into_status)?.into_iter();
        Ok(Response::new(wire::ListStatusesResponse {
            statuses: statuses.map(encode_status).collect(),
        }))
    }

    type WriteStream = BoxStream<'static, Result<wire::WriteContentResponse, Status>>;

    async fn write(
        &self,
        request: Request<Streaming<wire::WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let scope = scope_of(&request)?;
        let session = self.db.content().session(&scope);
        let state = Some((session, request.into_inner()));
        let answers = stream::unfold(state, |state| async {
            let (mut session, mut requests) = state?;
            let message = match requests.message().await {
                Ok(message) => message?,
                Err(status) => return Some((Err(status), None)),
            };
            let answer = session.answer(message).await.map_err(into_status);
            let next = (!session.is_over()).then_some((session, requests));
            Some((answer, next))
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn abort(&self, request: Request<wire::AbortRequest>) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let aborted = self
            .db
            .content()
            .abort(&scope, &request.get_ref().r#ref)
            .await;
        aborted.map(Response::new).map_err(into_status)
    }
}
