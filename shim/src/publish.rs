//! Delivery of task events to the daemon, in order, for as long as the shim lives.
//!
//! Events wait in one queue and one task sends them: the next leaves only when the one before was
//! taken. Any transport error means a new connection, with a pause that grows up to
//! [`RETRY_MAX`]; a daemon that is down or restarts therefore misses nothing. The queue is bounded:
//! when it is full the oldest event that is no exit goes. Exits are never dropped.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lighter_proto::containerd::events as message;
use lighter_proto::containerd::services::events::ttrpc::v1::ForwardRequest;
use lighter_proto::containerd::types::Envelope;
use lighter_proto::errdefs::ErrorKind;
use lighter_proto::line::Line;
use prost::{Message, Name};
use tokio::sync::Notify;
use tracing::{debug, warn};
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;

const SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";

/// Events waiting, at most (exits excepted).
const QUEUE_EVENTS: usize = 2048;
/// One call may take this long.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// First pause after a failure.
const RETRY_MIN: Duration = Duration::from_millis(10);
/// Longest pause between attempts.
const RETRY_MAX: Duration = Duration::from_secs(1);
/// Attempts for an event that the daemon answers with an error of its own.
const REFUSED_ATTEMPTS: u32 = 5;

struct Queued {
    envelope: Envelope,
    keep: bool,
}

#[derive(Default)]
struct Queue {
    events: VecDeque<Queued>,
    sending: bool,
    /// One will come soon.
    expected: bool,
}

struct Inner {
    namespace: String,
    address: String,
    queue: Mutex<Queue>,
    /// Woken by a new event (for the sender) and by an empty queue (for `drained`).
    changed: Notify,
    empty: Notify,
}

/// The ordered publisher; clones share the queue.
#[derive(Clone)]
pub(crate) struct Publisher(Arc<Inner>);

impl Publisher {
    /// A publisher to the daemon's ttrpc socket at `address` (a path, with or without `unix://`).
    pub(crate) fn new(namespace: String, address: &str) -> Self {
        let address = if address.is_empty() || address.contains("://") {
            address.to_owned()
        } else {
            format!("unix://{address}")
        };
        Self(Arc::new(Inner {
            namespace,
            address,
            queue: Mutex::default(),
            changed: Notify::new(),
            empty: Notify::new(),
        }))
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues an event.
    pub(crate) fn publish<M: Message + Name>(&self, topic: &str, event: &M) {
        if self.0.address.is_empty() {
            return;
        }
        let envelope = Envelope {
            timestamp: Some(lighter_proto::time::now()),
            namespace: self.0.namespace.clone(),
            topic: topic.to_owned(),
            event: Some(lighter_proto::any::pack(event)),
        };
        let keep = M::full_name() == message::TaskExit::full_name();
        let mut queue = self.queue();
        if queue.events.len() >= QUEUE_EVENTS {
            // The first may be on its way already.
            let first = usize::from(queue.sending);
            if let Some(at) = (first..queue.events.len()).find(|&i| !queue.events[i].keep) {
                queue.events.remove(at);
            }
        }
        queue.events.push_back(Queued { envelope, keep });
        drop(queue);
        self.0.changed.notify_one();
    }

    /// An event will come soon: connects meanwhile, if it has to.
    pub(crate) fn expect(&self) {
        self.queue().expected = true;
        self.0.changed.notify_one();
    }

    /// Waits until every event was taken.
    pub(crate) async fn drained(&self) {
        loop {
            let empty = self.0.empty.notified();
            if self.queue().events.is_empty() {
                return;
            }
            empty.await;
        }
    }

    /// Sends events until cancelled by being dropped.
    pub(crate) async fn run(self) {
        let mut client: Option<Client> = None;
        loop {
            let (next, expected) = {
                let mut queue = self.queue();
                queue.sending = !queue.events.is_empty();
                let next = queue.events.front().map(|queued| queued.envelope.clone());
                (next, std::mem::take(&mut queue.expected))
            };
            let Some(envelope) = next else {
                self.0.empty.notify_waiters();
                if expected && client.is_none() && !self.0.address.is_empty() {
                    client = connect(&self.0.address).await;
                    continue;
                }
                self.0.changed.notified().await;
                // Whoever told of the event has an answer to send, which somebody waits for.
                tokio::task::yield_now().await;
                continue;
            };
            self.deliver(&mut client, envelope).await;
            let mut queue = self.queue();
            queue.events.pop_front();
            queue.sending = false;
        }
    }

    /// Sends one event until the daemon takes it, or refuses it for good.
    async fn deliver(&self, client: &mut Option<Client>, envelope: Envelope) {
        let request = ForwardRequest {
            envelope: Some(envelope),
        };
        let mut pause = RETRY_MIN;
        let mut refusals = 0;
        loop {
            if client.is_none() {
                *client = connect(&self.0.address).await;
            }
            if let Some(connection) = client.as_ref() {
                match self.forward(connection, &request).await {
                    Ok(()) => return,
                    Err(error) if is_answer(error.kind) => {
                        refusals += 1;
                        if refusals >= REFUSED_ATTEMPTS {
                            warn!(%error, "event refused by the daemon");
                            return;
                        }
                    }
                    Err(error) => {
                        debug!(%error, "event not delivered, reconnecting");
                        *client = None;
                    }
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    async fn forward(
        &self,
        client: &Client,
        request: &ForwardRequest,
    ) -> Result<(), lighter_proto::errdefs::WireError> {
        let call = lighter_proto::ttrpc::call::<_, ()>(
            client,
            SERVICE,
            "Forward",
            &self.0.namespace,
            request,
            Some(CALL_TIMEOUT),
        );
        call.await
    }
}

/// Connects to the daemon; `None` when it is not there.
async fn connect(address: &str) -> Option<Client> {
    match address.strip_prefix("unix://") {
        // A path; abstract names are the library's business.
        Some(path) if path.starts_with('/') => {
            let line = Line::connect(path).await.ok()?;
            Some(Client::new(Socket::new(line)))
        }
        _ => Client::connect(address).await.ok(),
    }
}

/// Whether an error of this kind is the daemon's considered answer: asking again changes nothing.
fn is_answer(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::InvalidArgument
            | ErrorKind::Unimplemented
            | ErrorKind::PermissionDenied
            | ErrorKind::AlreadyExists
            | ErrorKind::FailedPrecondition
            | ErrorKind::OutOfRange
    )
}

impl std::fmt::Debug for Publisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publisher")
            .field("address", &self.0.address)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(id: usize) -> message::TaskExit {
        message::TaskExit {
            container_id: id.to_string(),
            ..Default::default()
        }
    }

    #[test]
    fn a_full_queue_keeps_every_exit() {
        let publisher = Publisher::new("ns".into(), "/nowhere.sock");
        for id in 0..QUEUE_EVENTS {
            publisher.publish("/tasks/exit", &exit(id));
        }
        publisher.publish("/tasks/oom", &message::TaskOom::default());
        for id in 0..10 {
            publisher.publish("/tasks/exit", &exit(id));
        }
        let queue = publisher.queue();
        let exits = queue.events.iter().filter(|queued| queued.keep).count();
        assert_eq!(
            (exits, queue.events.len()),
            (QUEUE_EVENTS + 10, QUEUE_EVENTS + 10)
        );
    }
}
