//! Answers that are bytes already.
//!
//! A list of ten thousand records spends most of its time in taking them apart and putting them
//! together again. Where a store can say a message as it is stored, the service hands the bytes to
//! the codec here instead of a value.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::marker::PhantomData;

use bytes::{BufMut as _, Bytes};
use futures::stream::{self, Iter};
use prost::Message;
use tonic::body::Body;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::server::{Grpc, ServerStreamingService, UnaryService};
use tonic::{Request, Response, Status};

use crate::config::MessageLimits;

type Answer = Result<http::Response<Body>, Infallible>;

/// A unary method: a request to the bytes of its answer.
pub(crate) struct Unary<F>(pub(crate) F);

impl<F, R> UnaryService<R> for Unary<F>
where
    F: FnMut(Request<R>) -> Result<Bytes, Status>,
{
    type Response = Bytes;
    type Future = Ready<Result<Response<Bytes>, Status>>;

    fn call(&mut self, request: Request<R>) -> Self::Future {
        ready((self.0)(request).map(Response::new))
    }
}

/// A streaming method: a request to the bytes of each message.
pub(crate) struct Streaming<F>(pub(crate) F);

impl<F, R, I> ServerStreamingService<R> for Streaming<F>
where
    F: FnMut(Request<R>) -> Result<I, Status>,
    I: Iterator<Item = Bytes> + Send + 'static,
{
    type Response = Bytes;
    type ResponseStream = Iter<std::iter::Map<I, fn(Bytes) -> Result<Bytes, Status>>>;
    type Future = Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<R>) -> Self::Future {
        ready((self.0)(request).map(|messages| {
            let whole: fn(Bytes) -> Result<Bytes, Status> = Ok;
            Response::new(stream::iter(messages.map(whole)))
        }))
    }
}

/// Answers a unary call.
pub(crate) async fn unary<S, R>(
    method: S,
    limits: MessageLimits,
    call: http::Request<Body>,
) -> Answer
where
    S: UnaryService<R, Response = Bytes>,
    R: Message + Default + 'static,
{
    Ok(grpc(limits).unary(method, call).await)
}

/// Answers a call with a stream of messages.
pub(crate) async fn streaming<S, R>(
    method: S,
    limits: MessageLimits,
    call: http::Request<Body>,
) -> Answer
where
    S: ServerStreamingService<R, Response = Bytes>,
    S::ResponseStream: Send + 'static,
    R: Message + Default + 'static,
{
    Ok(grpc(limits).server_streaming(method, call).await)
}

/// The same for those who want a value.
pub(crate) fn decoded<M: Message + Default>(bytes: Bytes) -> Result<Response<M>, Status> {
    M::decode(bytes)
        .map(Response::new)
        .map_err(|error| Status::internal(error.to_string()))
}

fn grpc<R: Message + Default + 'static>(limits: MessageLimits) -> Grpc<AsBytes<R>> {
    Grpc::new(AsBytes(PhantomData))
        .apply_max_message_size_config(Some(limits.receive_bytes), Some(limits.send_bytes))
}

/// Decodes requests, passes answers on.
struct AsBytes<R>(PhantomData<fn() -> R>);

impl<R: Message + Default + 'static> Codec for AsBytes<R> {
    type Encode = Bytes;
    type Decode = R;
    type Encoder = AsBytes<R>;
    type Decoder = AsBytes<R>;

    fn encoder(&mut self) -> Self::Encoder {
        AsBytes(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        AsBytes(PhantomData)
    }
}

impl<R> Encoder for AsBytes<R> {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.reserve(message.len());
        into.put(message);
        Ok(())
    }
}

impl<R: Message + Default> Decoder for AsBytes<R> {
    type Item = R;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<R>, Status> {
        R::decode(from)
            .map(Some)
            .map_err(|error| Status::internal(error.to_string()))
    }
}
