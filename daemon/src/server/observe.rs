//! What surrounds every RPC: a span with namespace, code and latency, counters, and the list of
//! what is in flight that the debug socket shows.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Instant, SystemTime};

use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::Notify;
use tonic::Code;
use tonic::body::Body;
use tower::{Layer, Service};
use tracing::{Instrument, debug};

use super::deadline;
use super::metrics::{Method, Metrics};
use crate::services::scope::NAMESPACE_HEADER;

/// RPCs in flight, by an id that grows.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    next: AtomicU64,
    ended: AtomicU64,
    calls: Mutex<BTreeMap<u64, Call>>,
    /// Woken by every call that comes or ends.
    moved: Notify,
}

/// One RPC in flight.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    /// Path: `/package.Service/Method`.
    pub(crate) rpc: Arc<str>,
    /// Namespace named by the client.
    pub(crate) namespace: String,
    /// When it came.
    pub(crate) since: SystemTime,
}

impl InFlight {
    /// What is in flight, oldest first.
    pub(crate) fn list(&self) -> Vec<Call> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Call>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many calls have come and ended so far; whether it changed says whether all is quiet.
    pub(crate) fn moves(&self) -> u64 {
        self.next.load(Ordering::Relaxed) + self.ended.load(Ordering::Relaxed)
    }

    /// Waits until there was a call since `seen`.
    pub(crate) async fn moved_since(&self, seen: u64) {
        while self.moves() == seen {
            self.moved.notified().await;
        }
    }

    fn enter(self: &Arc<Self>, call: Call) -> Entered {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(id, call);
        self.moved.notify_one();
        Entered {
            list: Arc::clone(self),
            id,
        }
    }
}

/// Takes its call off the list when it ends, however it ends.
#[derive(Debug)]
struct Entered {
    list: Arc<InFlight>,
    id: u64,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.list.lock().remove(&self.id);
        self.list.ended.fetch_add(1, Ordering::Relaxed);
        self.list.moved.notify_one();
    }
}

/// The layer around all services.
#[derive(Debug, Clone)]
pub(crate) struct Observe {
    in_flight: Arc<InFlight>,
    metrics: Metrics,
}

impl Observe {
    /// Observes into `in_flight` and `metrics`.
    pub(crate) fn new(in_flight: Arc<InFlight>, metrics: Metrics) -> Self {
        Self { in_flight, metrics }
    }
}

impl<S> Layer<S> for Observe {
    type Service = Observed<S>;

    fn layer(&self, inner: S) -> Observed<S> {
        Observed {
            inner,
            observe: self.clone(),
        }
    }
}

/// A service under observation.
#[derive(Debug, Clone)]
pub(crate) struct Observed<S> {
    inner: S,
    observe: Observe,
}

type Answer = Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send>>;

impl<S, B> Service<http::Request<B>> for Observed<S>
where
    B: HttpBody<Data = bytes::Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Answer {
        let rpc: Arc<str> = request.uri().path().into();
        let namespace = request
            .headers()
            .get(NAMESPACE_HEADER)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
            .to_owned();
        let span = tracing::debug_span!("rpc", rpc = %rpc, namespace = %namespace);
        let method = self.observe.metrics.method(&rpc);
        method.started();
        let mut record = Record {
            _entered: self.observe.in_flight.enter(Call {
                rpc,
                namespace,
                since: SystemTime::now(),
            }),
            method,
            begun: Instant::now(),
            done: false,
            span: span.clone(),
        };
        let limit = deadline::of(request.headers());
        let answer = self.inner.call(request.map(Body::new));
        Box::pin(
            async move {
                let mut response = deadline::keep(limit, answer).await?;
                name_as_clients_know(response.headers_mut());
                // A refusal has its code in the headers and no body to watch.
                if let Some(code) = response.headers().get("grpc-status") {
                    record.end(Code::from_bytes(code.as_bytes()));
                }
                Ok(response.map(|body| Body::new(Watched { body, record })))
            }
            .instrument(span),
        )
    }
}

/// Counts the RPC once, at its end: with its code, or as cancelled when it is dropped before.
#[derive(Debug)]
struct Record {
    _entered: Entered,
    method: Arc<Method>,
    begun: Instant,
    done: bool,
    span: tracing::Span,
}

impl Record {
    fn end(&mut self, code: Code) {
        if std::mem::replace(&mut self.done, true) {
            return;
        }
        let latency = self.begun.elapsed();
        self.method.handled(code, latency);
        let _in_span = self.span.enter();
        debug!(
            code = ?code,
            latency_us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX),
            "request served"
        );
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.end(Code::Cancelled);
    }
}

pin_project_lite::pin_project! {
    /// A response body whose trailers tell how the RPC ended.
    struct Watched {
        #[pin]
        body: Body,
        record: Record,
    }
}

/// A message beyond the limit is out of range to the transport here, and an exhausted resource to
/// the one that clients were written against.
fn name_as_clients_know(headers: &mut http::HeaderMap) {
    if headers.get("grpc-status").is_none_or(|code| code != "11") {
        return;
    }
    let message = headers.get("grpc-message").map(http::HeaderValue::as_bytes);
    let message = String::from_utf8_lossy(message.unwrap_or_default()).replace("%20", " ");
    if message.contains("coded message length too large") {
        let exhausted = http::HeaderValue::from_static("8");
        headers.insert("grpc-status", exhausted);
    }
}

fn code_in(headers: &http::HeaderMap) -> Code {
    headers
        .get("grpc-status")
        .map_or(Code::Ok, |value| Code::from_bytes(value.as_bytes()))
}

impl HttpBody for Watched {
    type Data = bytes::Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = self.project();
        let mut frame = ready!(this.body.poll_frame(cx));
        match &mut frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    name_as_clients_know(trailers);
                    this.record.end(code_in(trailers));
                }
            }
            Some(Err(status)) => this.record.end(status.code()),
            None => this.record.end(Code::Ok),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_message_beyond_the_limit_changes_its_code() {
        let renamed = |code: Code, message: &str| {
            let response = tonic::Status::new(code, message).into_http::<Body>();
            let mut headers = response.headers().clone();
            name_as_clients_know(&mut headers);
            code_in(&headers)
        };
        let large =
            "Error, decoded message length too large: found 17 bytes, the limit is: 16 bytes";
        assert_eq!(renamed(Code::OutOfRange, large), Code::ResourceExhausted);
        assert_eq!(renamed(Code::OutOfRange, "offset"), Code::OutOfRange);
        assert_eq!(renamed(Code::Internal, large), Code::Internal);
    }
}
