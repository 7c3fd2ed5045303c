//! `Content.Read` with as few copies of a blob's bytes as HTTP/2 allows.
//!
//! Through generated code each byte is copied from the file into a message, and from there into the
//! frame that carries it. Here a frame's head is written before the place that the file is read into,
//! and a read makes do with a few buffers, which come back when they are sent.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BufMut as _, Bytes};
use futures::future::BoxFuture;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body as HttpBody, Frame};
use http_body_util::{BodyExt as _, Limited};
use lighter_proto::containerd::services::content::v1 as wire;
use lighter_proto::errdefs::into_status;
use lighter_store::Error;
use lighter_store::content::BlobReader;
use prost::encoding::{WireType, encode_key, encode_varint};
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tower::Service;

use super::ContentService;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

const READ: &str = "/containerd.services.content.v1.Content/Read";
/// Bytes of the blob in one message: few enough that what is read is still in the processor's cache
/// when it is sent.
const CHUNK_BYTES: usize = 256 << 10;
/// Room before a chunk for all that comes before it in its message.
const HEAD_BYTES: usize = 32;
/// Buffers that a read keeps.
const BUFFERS: usize = 3;
/// Largest request, in bytes; a digest and two numbers need less.
const REQUEST_BYTES: usize = 64 << 10;
/// Flag and length before a message (gRPC over HTTP/2, Length-Prefixed-Message).
const PREFIX_BYTES: usize = 5;

/// The content service `S` with its reads served here.
#[derive(Debug, Clone)]
pub(crate) struct Reads<S> {
    others: S,
    content: ContentService,
}

impl<S> Reads<S> {
    /// Reads from `content`; all else is for `others`.
    pub(crate) fn new(others: S, content: ContentService) -> Self {
        Self { others, content }
    }
}

impl<S: NamedService> NamedService for Reads<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<Request<B>> for Reads<S>
where
    S: Service<Request<B>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.others.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // A message that is compressed is refused where all are.
        if request.uri().path() != READ || request.headers().contains_key("grpc-encoding") {
            return Box::pin(self.others.call(request));
        }
        let content = self.content.clone();
        Box::pin(async move {
            let (head, body) = request.into_parts();
            let opened = async {
                let request = message::<wire::ReadContentRequest, _>(body).await?;
                let metadata = tonic::metadata::MetadataMap::from_headers(head.headers);
                let request =
                    tonic::Request::from_parts(metadata, tonic::Extensions::default(), request);
                content.open(&request).await
            };
            Ok(match opened.await {
                Ok(range) => {
                    let mut response = Response::new(Body::new(Pieces::new(range)));
                    let kind = HeaderValue::from_static("application/grpc");
                    response.headers_mut().insert("content-type", kind);
                    response
                }
                Err(status) => status.into_http(),
            })
        })
    }
}

/// The one message of a request.
async fn message<M, B>(body: B) -> Result<M, Status>
where
    M: prost::Message + Default,
    B: HttpBody<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    let body = Limited::new(body, REQUEST_BYTES).collect().await;
    let mut data = match body {
        Ok(collected) => collected.to_bytes(),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => {
            return Err(Status::resource_exhausted(format!(
                "a request to read content has at most {REQUEST_BYTES} bytes"
            )));
        }
        Err(error) => return Err(Status::unknown(error.to_string())),
    };
    if data.len() < PREFIX_BYTES {
        return Err(Status::internal("Missing request message."));
    }
    let (compressed, length) = (data.get_u8(), data.get_u32());
    if compressed != 0 || usize::try_from(length).ok() != Some(data.len()) {
        return Err(Status::internal("malformed request message"));
    }
    M::decode(data).map_err(|error| Status::internal(error.to_string()))
}

/// What a read is of: from `start` to before `end`.
pub(super) struct Range {
    pub(super) reader: BlobReader,
    pub(super) start: u64,
    pub(super) end: u64,
}

type Buffer = Box<[u8]>;
type Idle = Arc<Mutex<Vec<Buffer>>>;
type Reading = BoxFuture<'static, Result<Buffer, Error>>;

/// The body of an answer: messages, then how it ended.
struct Pieces {
    range: Range,
    at: u64,
    idle: Idle,
    /// A piece that has to come from the disk, and its length.
    reading: Option<(Reading, usize)>,
    ended: bool,
}

impl Pieces {
    fn new(range: Range) -> Self {
        Self {
            at: range.start,
            range,
            idle: Idle::default(),
            reading: None,
            ended: false,
        }
    }

    /// The message around the `length` bytes at `HEAD_BYTES` of `buffer`.
    fn framed(&mut self, mut buffer: Buffer, length: usize) -> Bytes {
        let (start, end) = (
            head(&mut buffer, self.at - self.range.start, length),
            HEAD_BYTES + length,
        );
        self.at += length as u64;
        Bytes::from_owner(Lent {
            buffer,
            start,
            end,
            idle: Arc::clone(&self.idle),
        })
    }

    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, Error>> {
        if let Some((reading, length)) = &mut self.reading {
            let (read, length) = (ready!(reading.as_mut().poll(cx)), *length);
            self.reading = None;
            return Poll::Ready(read.map(|buffer| self.framed(buffer, length)));
        }
        let left = self.range.end - self.at;
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK_BYTES);
        let idle = self
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let mut buffer = idle.unwrap_or_else(|| vec![0; HEAD_BYTES + CHUNK_BYTES].into());
        let (reader, at) = (&self.range.reader, self.at);
        if reader.read_cached(at, &mut buffer[HEAD_BYTES..HEAD_BYTES + length]) {
            return Poll::Ready(Ok(self.framed(buffer, length)));
        }
        let reader = reader.clone();
        let reading: Reading = Box::pin(async move {
            let data = reader.read_at(at, length).await?;
            buffer[HEAD_BYTES..HEAD_BYTES + length].copy_from_slice(&data);
            Ok(buffer)
        });
        self.reading = Some((reading, length));
        self.poll_piece(cx)
    }
}

impl HttpBody for Pieces {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let mut trailers = HeaderMap::new();
        if self.at < self.range.end {
            match ready!(self.poll_piece(cx)) {
                Ok(piece) => return Poll::Ready(Some(Ok(Frame::data(piece)))),
                Err(error) => into_status(error).add_header(&mut trailers)?,
            }
        } else {
            trailers.insert("grpc-status", HeaderValue::from_static("0"));
        }
        self.ended = true;
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}

/// A buffer on its way to a client; it comes back when it is there.
struct Lent {
    buffer: Buffer,
    start: usize,
    end: usize,
    idle: Idle,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < BUFFERS {
            idle.push(std::mem::take(&mut self.buffer));
        }
    }
}

/// Writes what comes before the data of a message to before `HEAD_BYTES`, and says where it begins:
/// gRPC's prefix, then `ReadContentResponse` up to the bytes of its field `data`.
fn head(buffer: &mut [u8], offset: u64, length: usize) -> usize {
    let mut fields = [0_u8; HEAD_BYTES - PREFIX_BYTES];
    let mut rest = &mut fields[..];
    // A number that is 0 is not sent.
    if offset != 0 {
        encode_key(1, WireType::Varint, &mut rest);
        encode_varint(offset, &mut rest);
    }
    encode_key(2, WireType::LengthDelimited, &mut rest);
    encode_varint(length as u64, &mut rest);
    let left = rest.len();
    let fields = &fields[..fields.len() - left];
    let start = HEAD_BYTES - PREFIX_BYTES - fields.len();
    let mut place = &mut buffer[start..HEAD_BYTES];
    place.put_u8(0);
    place.put_u32(u32::try_from(fields.len() + length).unwrap_or(u32::MAX));
    place.put_slice(fields);
    start
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    #[test]
    fn a_message_by_hand_is_the_generated_one() {
        for (offset, length) in [(0, 1), (1, 127), (300, 128), (1 << 40, CHUNK_BYTES)] {
            let mut buffer = vec![7; HEAD_BYTES + CHUNK_BYTES];
            let start = head(&mut buffer, offset, length);
            let message = &buffer[start..HEAD_BYTES + length];
            assert_eq!(message[0], 0);
            let size = u32::from_be_bytes(message[1..5].try_into().expect("four bytes"));
            assert_eq!(size as usize, message.len() - PREFIX_BYTES);
            let decoded = wire::ReadContentResponse::decode(&message[PREFIX_BYTES..]);
            let expected = wire::ReadContentResponse {
                offset: i64::try_from(offset).expect("small"),
                data: vec![7; length].into(),
            };
            assert_eq!(decoded.expect("a message"), expected);
        }
    }

    #[tokio::test]
    async fn a_request_is_one_whole_message() {
        let body = |data: &[u8]| Body::new(http_body_util::Full::new(Bytes::copy_from_slice(data)));
        let request = wire::ReadContentRequest {
            digest: "sha256:x".into(),
            offset: 3,
            size: 4,
        };
        let mut framed = vec![0, 0, 0, 0, 14];
        framed.extend_from_slice(&request.encode_to_vec());
        let read = message::<wire::ReadContentRequest, _>(body(&framed)).await;
        assert_eq!(read.expect("a request"), request);
        for bad in [&framed[..0], &framed[..4], &framed[..9], &[1, 0, 0, 0, 0]] {
            let read = message::<wire::ReadContentRequest, _>(body(bad)).await;
            assert_eq!(read.expect_err("no request").code(), tonic::Code::Internal);
        }
        let large = message::<wire::ReadContentRequest, _>(body(&vec![0; REQUEST_BYTES + 1])).await;
        let code = large.expect_err("too large").code();
        assert_eq!(code, tonic::Code::ResourceExhausted);
    }
}
