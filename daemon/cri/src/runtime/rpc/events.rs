//! The stream of what happens to pods and containers.

use std::sync::Arc;

use futures::stream::{self, BoxStream, StreamExt as _};
use lighter_proto::runtime::v1 as api;
use tonic::Status;

use crate::error::Result;
use crate::plugin::Plugin;

pub(in crate::runtime) async fn get_container_events(
    this: Arc<Plugin>,
    _: api::GetEventsRequest,
) -> Result<BoxStream<'static, Result<api::ContainerEventResponse, Status>>> {
    let events = this.events.subscribe();
    let stop = this.stop.clone();
    let next = move |state: Option<_>| {
        let (this, stop) = (Arc::clone(&this), stop.clone());
        async move {
            let mut events: tokio::sync::mpsc::Receiver<_> = state?;
            // The end of the daemon ends the stream.
            match stop.run_until_cancelled(events.recv()).await? {
                Some(event) => Some((Ok(this.told(event)), Some(events))),
                None => Some((Err(Status::data_loss("events were read too slowly")), None)),
            }
        }
    };
    Ok(stream::unfold(Some(events), next).boxed())
}
