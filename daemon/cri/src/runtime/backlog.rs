//! What subscribers of container events are told, and what is kept for the first of them.
//!
//! Without a subscriber events wait for [`KEPT_FOR`]; the first one gets them first. One that reads
//! too slowly is cut off rather than kept for: its stream ends with an error, and it lists anew.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use lighter_proto::runtime::v1::ContainerEventType;
use tokio::sync::mpsc;

/// How long an event waits for a first subscriber.
const KEPT_FOR: Duration = Duration::from_secs(5 * 60);
/// Events kept for one; the oldest go first.
const KEPT: usize = 8192;
/// Events that one subscriber may be behind.
const QUEUE: usize = 1024;

/// One event; what it says of the pod is looked up when it is sent.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    /// Container, or pod.
    pub(crate) id: String,
    /// Pod.
    pub(crate) pod_id: String,
    /// What happened.
    pub(crate) kind: ContainerEventType,
    /// When.
    pub(crate) at: SystemTime,
    /// The pod and its containers then, where somebody listened then.
    pub(crate) seen: Option<Box<Seen>>,
}

/// A pod and its containers at one time.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) pod: Option<lighter_proto::runtime::v1::PodSandboxStatus>,
    pub(crate) containers: Vec<lighter_proto::runtime::v1::ContainerStatus>,
}

#[derive(Debug, Default)]
struct Inner {
    kept: VecDeque<(Instant, Event)>,
    /// Receivers: streams of clients. Closed by a client that goes, or here when it is too slow.
    subscribers: Vec<mpsc::Sender<Event>>,
    /// Events that nobody was told of.
    dropped: u64,
}

/// All events and subscribers.
#[derive(Debug, Default)]
pub(crate) struct Backlog(Mutex<Inner>);

impl Backlog {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody listens now.
    pub(crate) fn heard(&self) -> bool {
        self.inner().subscribers.iter().any(|s| !s.is_closed())
    }

    /// Events that nobody was told of.
    pub(crate) fn dropped(&self) -> u64 {
        self.inner().dropped
    }

    /// Tells everyone, or keeps it for the first to come.
    pub(crate) fn publish(&self, event: Event) {
        let mut inner = self.inner();
        inner
            .subscribers
            .retain(|subscriber| subscriber.try_send(event.clone()).is_ok());
        if !inner.subscribers.is_empty() {
            return;
        }
        let now = Instant::now();
        while inner
            .kept
            .front()
            .is_some_and(|(at, _)| now.duration_since(*at) > KEPT_FOR)
            || inner.kept.len() >= KEPT
        {
            tracing::debug!("an event that nobody heard is dropped");
            inner.kept.pop_front();
            inner.dropped += 1;
        }
        inner.kept.push_back((now, event));
    }

    /// Subscribes; what was kept comes first.
    pub(crate) fn subscribe(&self) -> mpsc::Receiver<Event> {
        let mut inner = self.inner();
        let kept: Vec<_> = inner.kept.drain(..).collect();
        let late = kept.iter().filter(|(at, _)| at.elapsed() > KEPT_FOR);
        inner.dropped += late.count() as u64;
        let (sender, receiver) = mpsc::channel(kept.len() + QUEUE);
        for (at, event) in kept {
            if at.elapsed() <= KEPT_FOR {
                // There is room for all of them.
                let _ = sender.try_send(event);
            }
        }
        inner.subscribers.push(sender);
        receiver
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: &str) -> Event {
        Event {
            id: id.to_owned(),
            pod_id: String::new(),
            kind: ContainerEventType::ContainerCreatedEvent,
            at: SystemTime::now(),
            seen: None,
        }
    }

    #[test]
    fn the_first_subscriber_gets_what_was_kept() {
        let backlog = Backlog::default();
        backlog.publish(event("1"));
        let mut first = backlog.subscribe();
        let mut second = backlog.subscribe();
        backlog.publish(event("2"));
        assert_eq!(first.try_recv().unwrap().id, "1");
        assert_eq!(first.try_recv().unwrap().id, "2");
        assert_eq!(second.try_recv().unwrap().id, "2");
        assert!(backlog.heard());
        drop((first, second));
        assert!(!backlog.heard());
    }

    #[test]
    fn a_subscriber_that_does_not_read_is_cut_off() {
        let backlog = Backlog::default();
        let mut slow = backlog.subscribe();
        for _ in 0..=QUEUE {
            backlog.publish(event("x"));
        }
        let mut got = 0;
        while slow.try_recv().is_ok() {
            got += 1;
        }
        assert_eq!(got, QUEUE);
        assert!(matches!(
            slow.try_recv(),
            Err(mpsc::error::TryRecvError::Disconnected)
        ));
        for _ in 0..KEPT * 2 {
            backlog.publish(event("y"));
        }
        assert_eq!(backlog.inner().kept.len(), KEPT, "what is kept is bounded");
        // The event that found the subscriber too slow is the first one kept.
        assert_eq!(backlog.dropped(), KEPT as u64 + 1, "the rest is counted");
    }
}
