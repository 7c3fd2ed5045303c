//! Events: a bounded fan-out from whoever changes something to every subscriber.

use std::sync::Arc;

use lighter_proto::containerd::types::Envelope;
use prost::{Message, Name};

use crate::filter::Filter;
use crate::{Error, Namespace};

/// The exchange; clones share it.
#[derive(Debug, Clone)]
pub struct Exchange {
    #[allow(dead_code, reason = "skeleton")]
    inner: Arc<()>,
}

/// One subscriber's bounded queue.
#[derive(Debug)]
pub struct Subscription {}

impl Default for Exchange {
    fn default() -> Self {
        Self::new()
    }
}

impl Exchange {
    /// An exchange without subscribers.
    #[must_use]
    pub fn new() -> Self {
        todo!()
    }

    /// Publishes `event` under `topic` in `namespace`, stamped now.
    ///
    /// # Errors
    /// `InvalidArgument` for a malformed topic.
    pub fn publish<M: Message + Name>(
        &self,
        _namespace: &Namespace,
        _topic: &str,
        _event: &M,
    ) -> Result<(), Error> {
        todo!()
    }

    /// Publishes an envelope as it is.
    ///
    /// # Errors
    /// `InvalidArgument` for a malformed topic, namespace, or a missing timestamp.
    pub fn forward(&self, _envelope: Envelope) -> Result<(), Error> {
        todo!()
    }

    /// A queue of every event that `filter` matches, from now on.
    #[must_use]
    pub fn subscribe(&self, _filter: Filter) -> Subscription {
        todo!()
    }
}

impl Subscription {
    /// The next event; an error once the subscriber fell behind by more than its queue holds.
    ///
    /// # Errors
    /// `ResourceExhausted` on overflow: the subscription is over.
    ///
    /// # Cancellation
    /// Safe: no event is lost.
    pub async fn next(&mut self) -> Result<Arc<Envelope>, Error> {
        todo!()
    }
}
