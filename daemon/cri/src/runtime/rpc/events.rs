//! The stream of what happens to pods and containers.

use std::sync::Arc;

use futures::stream::{BoxStream, StreamExt as _};
use lighter_proto::runtime::v1 as api;
use tonic::Status;

use crate::error::Result;
use crate::plugin::Plugin;

pub(in crate::runtime) async fn get_container_events(
    this: Arc<Plugin>,
    _: api::GetEventsRequest,
) -> Result<BoxStream<'static, Result<api::ContainerEventResponse, Status>>> {
    let events = tokio_stream::wrappers::BroadcastStream::new(this.events.subscribe());
    let events = events.map(|e| e.map_err(|lost| Status::data_loss(lost.to_string())));
    Ok(events.boxed())
}
