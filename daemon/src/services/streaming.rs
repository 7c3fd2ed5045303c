//! `containerd.services.streaming.v1.Streaming`: connects a client's stream with its name.

use std::pin::Pin;

use futures::{Stream, StreamExt as _};
use lighter_engine::streaming::{Connection, Streams};
use lighter_proto::any;
use lighter_proto::containerd::services::streaming::v1::StreamInit;
use lighter_proto::containerd::services::streaming::v1::streaming_server::Streaming;
use lighter_proto::errdefs::{ErrorKind, WireError, into_status};
use prost_types::Any;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status};

use super::scope::scope_of;

/// Connects streams.
#[derive(Debug, Clone)]
pub(crate) struct StreamingService {
    streams: Streams,
    tracker: TaskTracker,
}

impl StreamingService {
    /// Puts clients' streams into `streams`; tasks that carry them are `tracker`'s.
    pub(crate) fn new(streams: Streams, tracker: TaskTracker) -> Self {
        Self { streams, tracker }
    }
}

#[tonic::async_trait]
impl Streaming for StreamingService {
    type StreamStream = Pin<Box<dyn Stream<Item = Result<Any, Status>> + Send>>;

    async fn stream(
        &self,
        request: Request<tonic::Streaming<Any>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        let scope = scope_of(&request)?;
        let mut client = request.into_inner();
        let first = client
            .message()
            .await?
            .ok_or_else(|| bad("stream without init"))?;
        let init: StreamInit = any::unpack(&first).map_err(|error| bad(&error.to_string()))?;
        let connection = self
            .streams
            .register(&scope, &init.id)
            .map_err(into_status)?;
        let Connection {
            inbound,
            outbound,
            registration,
        } = connection;
        let closed = registration.closed();
        let ended = closed.clone();
        // Ends with the client, with the response below, or when the stream is closed.
        self.tracker
            .spawn(closed.run_until_cancelled_owned(async move {
                while let Ok(Some(message)) = client.message().await {
                    if inbound.send(message).await.is_err() {
                        break;
                    }
                }
            }));
        let ready = futures::stream::iter([Ok(any::pack(&()))]);
        let rest = ReceiverStream::new(outbound)
            .map(Ok)
            .take_until(ended.cancelled_owned());
        // The stream is known for as long as this response is.
        let answer = ready.chain(rest).map(move |message| {
            let _ = &registration;
            message
        });
        Ok(Response::new(Box::pin(answer)))
    }
}

fn bad(reason: &str) -> Status {
    into_status(WireError::new(ErrorKind::InvalidArgument, reason))
}
