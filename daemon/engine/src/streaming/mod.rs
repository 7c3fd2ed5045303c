//! Named byte streams between clients and engines.
//!
//! A client opens a stream under an id of its choice ([`Streams::register`], through the edge); an
//! engine that is told the id takes it ([`Streams::take`]), once. What flows are `Any` messages;
//! [`bytes`] puts byte streams with a window on top.
//!
//! ```text
//! client ──gRPC──▶ Connection.inbound  ──bounded──▶ Stream::receive     engine
//!        ◀───────  Connection.outbound ◀─bounded──  Stream::send
//! ```
//!
//! A stream ends when either side drops its half: the client leaves, the engine is done, or a
//! collection finds that the lease it was opened under is gone.

pub mod bytes;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_store::metadata::edges::Kind;
use lighter_store::{Namespace, Scope};
use prost_types::Any;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::gc::{Collectable, Item};

/// Messages under way in one direction: enough for a window of the largest data messages twice.
const QUEUE: usize = 8;
/// Longest id, in bytes.
const MAX_ID_BYTES: usize = 256;
/// Streams open at once in one namespace; each may hold a few messages.
const MAX_STREAMS: usize = 10_000;

/// Why a stream is not to be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nobody registered it, or somebody took it already.
    #[error("stream {id:?}: not found")]
    NotFound {
        /// The id.
        id: String,
    },
    /// The id is in use.
    #[error("stream {id:?}: already exists")]
    AlreadyExists {
        /// The id.
        id: String,
    },
    /// An id that is none.
    #[error("stream id must have 1 to {MAX_ID_BYTES} bytes: invalid argument")]
    Id,
    /// Too many of them.
    #[error("more than {MAX_STREAMS} streams: resource exhausted")]
    TooMany,
    /// The other side is gone.
    #[error("stream closed: unavailable")]
    Closed,
    /// The other side sent what does not belong there.
    #[error("stream: {reason}: invalid argument")]
    Protocol {
        /// What.
        reason: String,
    },
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::AlreadyExists { .. } => ErrorKind::AlreadyExists,
            Self::Id | Self::Protocol { .. } => ErrorKind::InvalidArgument,
            Self::TooMany => ErrorKind::ResourceExhausted,
            Self::Closed => ErrorKind::Unavailable,
        }
    }
}

type Key = (Namespace, String);

#[derive(Debug)]
struct Registered {
    /// Which registration this is; an id may be used again.
    serial: u64,
    lease: Option<String>,
    closed: CancellationToken,
    /// `None` once an engine took it.
    stream: Option<Stream>,
}

/// Open streams; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Streams {
    inner: Arc<Mutex<Book>>,
}

#[derive(Debug, Default)]
struct Book {
    next: u64,
    streams: BTreeMap<Key, Registered>,
}

/// The engine's side.
#[derive(Debug)]
pub struct Stream {
    /// From the client; ends when it has no more to say.
    inbound: mpsc::Receiver<Any>,
    /// To the client; dropping it ends the stream.
    outbound: mpsc::Sender<Any>,
    closed: CancellationToken,
}

/// The client's side, held by the edge as long as the client is there.
#[derive(Debug)]
pub struct Connection {
    /// To the engine; dropped when the client has no more to say.
    pub inbound: mpsc::Sender<Any>,
    /// To the client; ends when the engine is done.
    pub outbound: mpsc::Receiver<Any>,
    /// Forgets the stream when dropped.
    pub registration: Registration,
}

/// Keeps a stream registered.
#[derive(Debug)]
pub struct Registration {
    streams: Streams,
    key: Key,
    serial: u64,
    closed: CancellationToken,
}

impl Registration {
    /// Cancelled when the stream must end now.
    #[must_use]
    pub fn closed(&self) -> CancellationToken {
        self.closed.clone()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.closed.cancel();
        let mut book = self.streams.lock();
        // A collection may have taken it off already, and another client taken the id.
        if book
            .streams
            .get(&self.key)
            .is_some_and(|r| r.serial == self.serial)
        {
            book.streams.remove(&self.key);
        }
    }
}

impl Streams {
    /// No streams.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a stream known under `id`.
    ///
    /// # Errors
    /// `AlreadyExists`, `InvalidArgument`, `ResourceExhausted`.
    pub fn register(&self, scope: &Scope, id: &str) -> Result<Connection, Error> {
        if id.is_empty() || id.len() > MAX_ID_BYTES {
            return Err(Error::Id);
        }
        let key = (scope.namespace.clone(), id.to_owned());
        let mut book = self.lock();
        if book.streams.contains_key(&key) {
            return Err(Error::AlreadyExists { id: id.to_owned() });
        }
        if book.streams.len() >= MAX_STREAMS {
            return Err(Error::TooMany);
        }
        let (inbound, from_client) = mpsc::channel(QUEUE);
        let (to_client, outbound) = mpsc::channel(QUEUE);
        let closed = CancellationToken::new();
        let stream = Stream {
            inbound: from_client,
            outbound: to_client,
            closed: closed.clone(),
        };
        book.next += 1;
        let registered = Registered {
            serial: book.next,
            lease: scope.lease.clone(),
            closed: closed.clone(),
            stream: Some(stream),
        };
        let serial = registered.serial;
        book.streams.insert(key.clone(), registered);
        drop(book);
        let registration = Registration {
            streams: self.clone(),
            key,
            serial,
            closed,
        };
        Ok(Connection {
            inbound,
            outbound,
            registration,
        })
    }

    /// Hands the stream `id` to an engine.
    ///
    /// # Errors
    /// `NotFound`, also when it was taken before.
    pub fn take(&self, namespace: &Namespace, id: &str) -> Result<Stream, Error> {
        let mut book = self.lock();
        let registered = book.streams.get_mut(&(namespace.clone(), id.to_owned()));
        registered
            .and_then(|registered| registered.stream.take())
            .ok_or_else(|| Error::NotFound { id: id.to_owned() })
    }
}

#[async_trait]
impl Collectable for Streams {
    fn kind(&self) -> Kind {
        Kind::Stream
    }

    fn items(&self) -> Vec<Item> {
        let book = self.lock();
        let entries = book.streams.iter();
        entries
            .map(|((namespace, id), registered)| Item {
                namespace: namespace.to_string(),
                id: id.clone(),
                serial: registered.serial,
                lease: registered.lease.clone(),
                keepers: Vec::new(),
            })
            .collect()
    }

    async fn remove(&self, item: &Item) -> Result<(), lighter_store::Error> {
        let key = (Namespace::new(&item.namespace)?, item.id.clone());
        let mut book = self.lock();
        if book
            .streams
            .get(&key)
            .is_some_and(|r| r.serial == item.serial)
            && let Some(registered) = book.streams.remove(&key)
        {
            registered.closed.cancel();
        }
        Ok(())
    }
}

impl Stream {
    /// The next message; `None` when the client has no more to say or is gone.
    ///
    /// # Cancellation
    /// Safe: no message is lost.
    pub async fn receive(&mut self) -> Option<Any> {
        tokio::select! {
            biased;
            message = self.inbound.recv() => message,
            () = self.closed.cancelled() => None,
        }
    }

    /// Sends a message, waiting while the client is slow.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub async fn send(&self, message: Any) -> Result<(), Error> {
        tokio::select! {
            sent = self.outbound.send(message) => sent.map_err(|_| Error::Closed),
            () = self.closed.cancelled() => Err(Error::Closed),
        }
    }

    /// Sends a message unless the client is slow or gone; `false` when it was thrown away.
    #[must_use]
    pub fn try_send(&self, message: Any) -> bool {
        self.outbound.try_send(message).is_ok()
    }

    /// Waits until the other side is gone.
    pub async fn closed(&self) {
        tokio::select! {
            () = self.closed.cancelled() => {}
            () = self.outbound.closed() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(lease: Option<&str>) -> Scope {
        Scope {
            namespace: Namespace::new("n").expect("valid"),
            lease: lease.map(str::to_owned),
        }
    }

    fn any(text: &str) -> Any {
        Any {
            type_url: text.to_owned(),
            value: Vec::new(),
        }
    }

    #[tokio::test]
    async fn a_stream_is_taken_once_and_forgotten_with_its_client() {
        let streams = Streams::new();
        let scope = scope(None);
        let connection = streams.register(&scope, "a").expect("new");
        assert!(matches!(
            streams.register(&scope, "a"),
            Err(Error::AlreadyExists { .. })
        ));
        let mut stream = streams.take(&scope.namespace, "a").expect("registered");
        assert!(matches!(
            streams.take(&scope.namespace, "a"),
            Err(Error::NotFound { .. })
        ));
        connection.inbound.send(any("x")).await.expect("open");
        drop(connection);
        assert_eq!(
            stream.receive().await,
            Some(any("x")),
            "what was sent is not lost"
        );
        assert_eq!(stream.receive().await, None);
        assert_eq!(stream.send(any("y")).await, Err(Error::Closed));
        assert!(streams.items().is_empty());
        streams.register(&scope, "a").expect("free again");
    }

    #[tokio::test]
    async fn a_collection_ends_the_stream_it_saw_and_no_other() {
        let streams = Streams::new();
        let kept = streams.register(&scope(None), "a").expect("new");
        let leased = streams.register(&scope(Some("l")), "b").expect("new");
        let items = streams.items();
        assert_eq!(
            items
                .iter()
                .map(|i| (i.id.as_str(), i.is_root()))
                .collect::<Vec<_>>(),
            [("a", true), ("b", false)]
        );
        streams.remove(&items[1]).await.expect("removed");
        assert!(!kept.registration.closed().is_cancelled());
        assert!(leased.registration.closed().is_cancelled());
        drop(leased);
        let again = streams
            .register(&scope(Some("l")), "b")
            .expect("free again");
        streams.remove(&items[1]).await.expect("nothing to do");
        assert!(!again.registration.closed().is_cancelled());
    }

    #[test]
    fn ids_have_bounds() {
        let streams = Streams::new();
        for bad in [String::new(), "x".repeat(257)] {
            assert_eq!(streams.register(&scope(None), &bad).err(), Some(Error::Id));
        }
    }
}
