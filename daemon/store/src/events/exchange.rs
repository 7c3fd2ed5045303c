//! The exchange and its subscribers' queues.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use lighter_proto::containerd::types::Envelope;
use lighter_proto::{any, time};
use prost::{Message, Name};
use prost_types::Any;
use tokio::sync::Notify;

use super::envelope::ByFilter;
use super::topic;
use crate::filter::Filter;
use crate::{Error, Namespace};

/// Events a subscriber may be behind: enough for a burst of some thousand containers, while a
/// thousand subscribers that never read hold only pointers to the same events.
pub const QUEUE_EVENTS: usize = 8192;

/// What Go clients send for a time that was never set.
const GO_ZERO_SECONDS: i64 = -62_135_596_800;

/// The exchange; clones share it.
#[derive(Debug, Clone)]
pub struct Exchange {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Read to publish, written to come and go.
    subscribers: RwLock<Vec<Arc<Subscriber>>>,
    dropped: AtomicU64,
}

#[derive(Debug)]
struct Subscriber {
    filter: Filter,
    capacity: usize,
    queue: Mutex<Queue>,
    /// Senders: publishers. Receiver: the subscription.
    arrived: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Arc<Envelope>>,
    overflowed: bool,
}

/// One subscriber's bounded queue. Dropping it ends the subscription.
#[derive(Debug)]
pub struct Subscription {
    subscriber: Arc<Subscriber>,
    exchange: Arc<Inner>,
}

impl Default for Exchange {
    fn default() -> Self {
        Self::new()
    }
}

impl Exchange {
    /// An exchange without subscribers.
    #[must_use]
    pub fn new() -> Self {
        Self {
            inner: Arc::default(),
        }
    }

    /// Publishes `event` under `topic` in `namespace`, stamped now.
    ///
    /// # Errors
    /// `InvalidArgument` for a malformed topic.
    pub fn publish<M: Message + Name>(
        &self,
        namespace: &Namespace,
        topic: &str,
        event: &M,
    ) -> Result<(), Error> {
        self.publish_any(namespace, topic, any::pack(event))
    }

    /// Publishes an event that is packed already, stamped now.
    ///
    /// # Errors
    /// `InvalidArgument` for a malformed topic.
    pub fn publish_any(&self, namespace: &Namespace, topic: &str, event: Any) -> Result<(), Error> {
        topic::check(topic)?;
        self.send(Envelope {
            timestamp: Some(time::now()),
            namespace: namespace.as_str().to_owned(),
            topic: topic.to_owned(),
            event: Some(event),
        });
        Ok(())
    }

    /// Publishes an envelope as it is.
    ///
    /// # Errors
    /// `InvalidArgument` for a malformed topic, namespace, or a missing timestamp.
    pub fn forward(&self, envelope: Envelope) -> Result<(), Error> {
        let invalid = |reason: String| Error::Invalid { reason };
        Namespace::new(&envelope.namespace)
            .map_err(|error| invalid(format!("event envelope has invalid namespace: {error}")))?;
        topic::check(&envelope.topic)?;
        if envelope
            .timestamp
            .is_none_or(|t| matches!(t.seconds, 0 | GO_ZERO_SECONDS) && t.nanos == 0)
        {
            return Err(invalid(
                "timestamp must be set on forwarded event".to_owned(),
            ));
        }
        self.send(envelope);
        Ok(())
    }

    fn send(&self, envelope: Envelope) {
        let mut overflowed = false;
        let envelope = Arc::new(envelope);
        {
            let subscribers = self
                .inner
                .subscribers
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            for subscriber in subscribers.iter() {
                if subscriber.filter.matches(&ByFilter(&envelope)) {
                    overflowed |= !subscriber.push(envelope.clone());
                }
            }
        }
        if overflowed {
            self.inner.drop_overflowed();
        }
    }

    /// A queue of every event that `filter` matches, from now on.
    #[must_use]
    pub fn subscribe(&self, filter: Filter) -> Subscription {
        self.subscribe_bounded(filter, QUEUE_EVENTS)
    }

    /// [`Exchange::subscribe`] with a queue of at most `capacity` events.
    #[must_use]
    pub fn subscribe_bounded(&self, filter: Filter, capacity: usize) -> Subscription {
        let subscriber = Arc::new(Subscriber {
            filter,
            capacity,
            queue: Mutex::default(),
            arrived: Notify::new(),
        });
        self.inner
            .subscribers
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .push(subscriber.clone());
        Subscription {
            subscriber,
            exchange: self.inner.clone(),
        }
    }

    /// Subscriptions at present.
    #[must_use]
    pub fn subscribers(&self) -> usize {
        self.inner
            .subscribers
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// Subscriptions that ended because their reader fell behind.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.inner.dropped.load(Ordering::Relaxed)
    }
}

impl Inner {
    fn drop_overflowed(&self) {
        let mut subscribers = self
            .subscribers
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let before = subscribers.len();
        subscribers.retain(|subscriber| !subscriber.queue().overflowed);
        let dropped = before - subscribers.len();
        self.dropped.fetch_add(dropped as u64, Ordering::Relaxed);
        if dropped > 0 {
            tracing::warn!(dropped, "event subscribers fell behind and were dropped");
        }
    }
}

impl Subscriber {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False when the queue overflowed with this event.
    fn push(&self, envelope: Arc<Envelope>) -> bool {
        {
            let mut queue = self.queue();
            if queue.overflowed {
                return true;
            }
            if queue.events.len() >= self.capacity {
                queue.overflowed = true;
                queue.events = VecDeque::new();
            } else {
                queue.events.push_back(envelope);
            }
            if !queue.overflowed {
                drop(queue);
                self.arrived.notify_one();
                return true;
            }
        }
        self.arrived.notify_one();
        false
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
        loop {
            {
                let mut queue = self.subscriber.queue();
                if let Some(event) = queue.events.pop_front() {
                    return Ok(event);
                }
                if queue.overflowed {
                    return Err(Error::Exhausted {
                        reason: format!(
                            "subscriber fell more than {} events behind",
                            self.subscriber.capacity
                        ),
                    });
                }
            }
            self.subscriber.arrived.notified().await;
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.exchange
            .subscribers
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|other| !Arc::ptr_eq(other, &self.subscriber));
    }
}

#[cfg(test)]
mod tests {
    use lighter_proto::containerd::events::{TaskExit, TaskOom};
    use lighter_proto::errdefs::{Classify, ErrorKind};

    use super::*;

    fn namespace(name: &str) -> Namespace {
        Namespace::new(name).expect("a namespace")
    }

    #[tokio::test]
    async fn subscribers_get_what_their_filter_matches_in_order() {
        let exchange = Exchange::new();
        let mut all = exchange.subscribe(Filter::default());
        let filter = Filter::parse(&["namespace==b"]).expect("a filter");
        let mut some = exchange.subscribe(filter);
        for (n, name) in ["a", "b", "a"].into_iter().enumerate() {
            let event = TaskExit {
                pid: u32::try_from(n).expect("small"),
                ..Default::default()
            };
            exchange
                .publish(&namespace(name), "/tasks/exit", &event)
                .expect("published");
        }
        for name in ["a", "b", "a"] {
            assert_eq!(all.next().await.expect("an event").namespace, name);
        }
        assert_eq!(some.next().await.expect("an event").namespace, "b");
        drop((all, some));
        assert_eq!(exchange.subscribers(), 0);
    }

    #[tokio::test]
    async fn a_reader_that_falls_behind_is_dropped_and_the_others_go_on() {
        let exchange = Exchange::new();
        let mut slow: Vec<_> = (0..500)
            .map(|_| exchange.subscribe_bounded(Filter::default(), 4))
            .collect();
        let mut quick = exchange.subscribe_bounded(Filter::default(), 4);
        for _ in 0..6 {
            exchange
                .publish(&namespace("n"), "/tasks/oom", &TaskOom::default())
                .expect("published");
            quick.next().await.expect("an event");
        }
        assert_eq!((exchange.dropped(), exchange.subscribers()), (500, 1));
        let error = slow[0].next().await.expect_err("overflow");
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    }

    #[tokio::test]
    async fn a_forwarded_envelope_is_checked_and_kept() {
        let exchange = Exchange::new();
        let mut subscription = exchange.subscribe(Filter::default());
        let good = Envelope {
            timestamp: Some(prost_types::Timestamp {
                seconds: 5,
                nanos: 0,
            }),
            namespace: "n".to_owned(),
            topic: "/tasks/exit".to_owned(),
            event: None,
        };
        exchange.forward(good.clone()).expect("forwarded");
        assert_eq!(*subscription.next().await.expect("an event"), good);
        let bad = |change: fn(&mut Envelope)| {
            let mut envelope = good.clone();
            change(&mut envelope);
            exchange.forward(envelope).expect_err("refused").kind()
        };
        assert_eq!(bad(|e| e.timestamp = None), ErrorKind::InvalidArgument);
        let never = |e: &mut Envelope| {
            e.timestamp = Some(prost_types::Timestamp {
                seconds: GO_ZERO_SECONDS,
                nanos: 0,
            });
        };
        assert_eq!(bad(never), ErrorKind::InvalidArgument);
        assert_eq!(bad(|e| e.namespace.clear()), ErrorKind::InvalidArgument);
        assert_eq!(
            bad(|e| e.topic = "/tasks/?".into()),
            ErrorKind::InvalidArgument
        );
    }
}
