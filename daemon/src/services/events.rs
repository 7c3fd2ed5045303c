//! `containerd.services.events.v1.Events`

use futures::stream::{self, BoxStream, StreamExt as _};
use lighter_proto::containerd::services::events::v1 as wire;
use lighter_proto::containerd::services::events::v1::events_server::Events;
use lighter_proto::containerd::types::Envelope;
use lighter_proto::errdefs::into_status;
use lighter_store::events::Exchange;
use lighter_store::metadata::Db;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::scope::scope_of;
use super::wire::{filter, required, stopping};

/// The exchange over gRPC.
#[derive(Debug, Clone)]
pub(crate) struct EventsService {
    exchange: Exchange,
    stop: CancellationToken,
}

impl EventsService {
    /// Over the exchange of `db`; subscriptions end at `stop`.
    pub(crate) fn new(db: &Db, stop: CancellationToken) -> Self {
        Self {
            exchange: db.events().clone(),
            stop,
        }
    }
}

#[tonic::async_trait]
impl Events for EventsService {
    async fn publish(
        &self,
        request: Request<wire::PublishRequest>,
    ) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let event = required(request.event, "event")?;
        let published = self
            .exchange
            .publish_any(&scope.namespace, &request.topic, event);
        published.map(Response::new).map_err(into_status)
    }

    async fn forward(
        &self,
        request: Request<wire::ForwardRequest>,
    ) -> Result<Response<()>, Status> {
        let envelope = required(request.into_inner().envelope, "envelope")?;
        let forwarded = self.exchange.forward(envelope);
        forwarded.map(Response::new).map_err(into_status)
    }

    type SubscribeStream = BoxStream<'static, Result<Envelope, Status>>;

    /// The answer's head goes out at once, so that a client that acts next misses nothing.
    async fn subscribe(
        &self,
        request: Request<wire::SubscribeRequest>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let filter = filter(&request.get_ref().filters)?;
        let subscription = self.exchange.subscribe(filter);
        let start = Some((subscription, self.stop.clone()));
        let events = stream::unfold(start, |state| async {
            let (mut subscription, stop) = state?;
            match stop.run_until_cancelled(subscription.next()).await {
                Some(Ok(event)) => Some((Ok((*event).clone()), Some((subscription, stop)))),
                Some(Err(error)) => Some((Err(into_status(error)), None)),
                None => Some((Err(stopping()), None)),
            }
        });
        Ok(Response::new(events.boxed()))
    }
}
