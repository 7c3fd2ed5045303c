//! Events: a bounded fan-out from whoever changes something to every subscriber.
//!
//! Nothing is replayed. Publishing never waits: a subscriber whose queue is full loses its
//! subscription, its queue is freed at once, its next read fails with `ResourceExhausted`, and
//! [`Exchange::dropped`] counts it.

mod envelope;
mod exchange;
pub mod topic;

pub use exchange::{Exchange, QUEUE_EVENTS, Subscription};
