//! ttrpc with prost messages: a typed unary call, and unary handlers for a server.
//!
//! The ttrpc crate generates code for another protobuf library; its transport does not care, so
//! requests and responses are carried here as encoded prost messages.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::marker::PhantomData;
use std::sync::{Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use ::ttrpc::asynchronous::{Client, MethodHandler, TtrpcContext};
use ::ttrpc::proto::{Request, Response};
use prost::Message;

use crate::errdefs::WireError;

/// Metadata key that carries the namespace over ttrpc.
pub const NAMESPACE_KEY: &str = "containerd-namespace-ttrpc";

/// One unary call. `timeout` of `None` waits for ever.
///
/// # Errors
/// The peer's status, or `Unavailable` for any transport failure: the connection is then dead.
pub async fn call<Req: Message, Res: Message + Default>(
    client: &Client,
    service: &str,
    method: &str,
    namespace: &str,
    request: &Req,
    timeout: Option<Duration>,
) -> Result<Res, WireError> {
    let mut wire = Request::new();
    wire.service = service.to_owned();
    wire.method = method.to_owned();
    wire.payload = request.encode_to_vec();
    wire.timeout_nano = timeout.map_or(0, |limit| {
        i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX)
    });
    if !namespace.is_empty() {
        let mut pair = ::ttrpc::proto::KeyValue::new();
        pair.key = NAMESPACE_KEY.to_owned();
        pair.value = namespace.to_owned();
        wire.metadata.push(pair);
    }
    let response = in_order(client.request(wire)).await?;
    Res::decode(response.payload.as_slice()).map_err(|e| {
        WireError::new(
            crate::errdefs::ErrorKind::Internal,
            format!("{service}/{method}: {e}"),
        )
    })
}

/// Polls a request the first time alone: that is when it gets its number and its place in the queue
/// of its connection. Servers in Go refuse a number that is lower than one they have seen.
async fn in_order<F: Future>(request: F) -> F::Output {
    static ORDER: Mutex<()> = Mutex::new(());
    let mut request = std::pin::pin!(request);
    let first = poll_fn(|context| {
        let _alone = ORDER.lock().unwrap_or_else(PoisonError::into_inner);
        Poll::Ready(request.as_mut().poll(context))
    });
    match first.await {
        Poll::Ready(output) => output,
        Poll::Pending => request.await,
    }
}

/// A unary method served by an async function.
pub struct Unary<F, Req, Res> {
    handler: F,
    types: PhantomData<fn(Req) -> Res>,
}

impl<F, Req, Res> std::fmt::Debug for Unary<F, Req, Res> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unary")
    }
}

/// A handler to register with [`::ttrpc::asynchronous::Server::register_service`].
pub fn unary<F, Fut, Req, Res>(handler: F) -> Box<dyn MethodHandler + Send + Sync>
where
    F: Fn(TtrpcContext, Req) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Res, ::ttrpc::Error>> + Send + 'static,
    Req: Message + Default + 'static,
    Res: Message + 'static,
{
    Box::new(Unary {
        handler,
        types: PhantomData,
    })
}

#[async_trait::async_trait]
impl<F, Fut, Req, Res> MethodHandler for Unary<F, Req, Res>
where
    F: Fn(TtrpcContext, Req) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Res, ::ttrpc::Error>> + Send + 'static,
    Req: Message + Default + 'static,
    Res: Message + 'static,
{
    async fn handler(&self, context: TtrpcContext, request: Request) -> ::ttrpc::Result<Response> {
        let decoded = Req::decode(request.payload.as_slice()).map_err(|e| {
            crate::errdefs::ttrpc_status(tonic::Code::InvalidArgument, e.to_string())
        })?;
        // The caller's deadline bounds the work: a peer that gave up must not pile up tasks here.
        let limit = u64::try_from(request.timeout_nano).unwrap_or(0);
        let work = (self.handler)(context, decoded);
        let answer = if limit == 0 {
            work.await
        } else {
            tokio::time::timeout(Duration::from_nanos(limit), work)
                .await
                .unwrap_or_else(|_| {
                    Err(crate::errdefs::ttrpc_status(
                        tonic::Code::DeadlineExceeded,
                        format!("{}/{}: deadline exceeded", request.service, request.method),
                    ))
                })
        };
        let mut response = Response::new();
        match answer {
            Ok(message) => {
                response.set_status(::ttrpc::get_status(::ttrpc::Code::OK, String::new()));
                response.payload = message.encode_to_vec();
            }
            Err(::ttrpc::Error::RpcStatus(status)) => response.set_status(status),
            Err(other) => {
                response.set_status(::ttrpc::get_status(
                    ::ttrpc::Code::UNKNOWN,
                    other.to_string(),
                ));
            }
        }
        Ok(response)
    }
}

/// The namespace a ttrpc caller named, if any.
#[must_use]
pub fn namespace_of(context: &TtrpcContext) -> Option<&str> {
    context
        .metadata
        .get(NAMESPACE_KEY)
        .and_then(|values| values.first())
        .map(String::as_str)
}

/// Methods by name, for one service.
pub type Methods = HashMap<String, Box<dyn MethodHandler + Send + Sync>>;

/// A service made of unary methods.
#[must_use]
pub fn service(methods: Methods) -> ::ttrpc::asynchronous::Service {
    ::ttrpc::asynchronous::Service {
        methods,
        streams: HashMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    /// Numbers reach the peer in order, however many callers there are.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn concurrent_requests_are_numbered_in_the_order_they_are_sent() {
        const CALLERS: usize = 64;
        const CALLS: usize = 100;
        let (ours, mut theirs) = tokio::net::UnixStream::pair().unwrap();
        let client = Client::new(ours.into());
        let mut callers = tokio::task::JoinSet::new();
        for _ in 0..CALLERS {
            let client = client.clone();
            callers.spawn(async move {
                for _ in 0..CALLS {
                    let done = call::<(), ()>(&client, "s", "m", "", &(), None).await;
                    done.unwrap();
                }
            });
        }
        let mut last = 0;
        for _ in 0..CALLERS * CALLS {
            // Length, number, kind, flags; then the request.
            let length = theirs.read_u32().await.unwrap();
            let number = theirs.read_u32().await.unwrap();
            let mut rest = vec![0; usize::try_from(length).unwrap() + 2];
            theirs.read_exact(&mut rest).await.unwrap();
            assert!(number > last, "{number} after {last}");
            last = number;
            // An empty response.
            theirs.write_u32(0).await.unwrap();
            theirs.write_u32(number).await.unwrap();
            theirs.write_all(&[2, 0]).await.unwrap();
        }
        while let Some(done) = callers.join_next().await {
            done.unwrap();
        }
    }
}
