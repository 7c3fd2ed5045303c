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
//! A stream ends when either side drops its half: the client leaves, the engine is done, or the
//! lease it was opened under goes ([`Streams::retain`]).

pub mod bytes;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_store::{Namespace, Scope};
use prost_types::Any;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

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
    lease: Option<String>,
    closed: CancellationToken,
    /// `None` once an engine took it.
    stream: Option<Stream>,
}

/// Open streams; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Streams {
    inner: Arc<Mutex<BTreeMap<Key, Registered>>>,
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
        self.streams.lock().remove(&self.key);
    }
}

impl Streams {
    /// No streams.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Registered>> {
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
        let mut streams = self.lock();
        if streams.contains_key(&key) {
            return Err(Error::AlreadyExists { id: id.to_owned() });
        }
        if streams.len() >= MAX_STREAMS {
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
        let registered = Registered {
            lease: scope.lease.clone(),
            closed: closed.clone(),
            stream: Some(stream),
        };
        streams.insert(key.clone(), registered);
        drop(streams);
        let registration = Registration {
            streams: self.clone(),
            key,
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
        let mut streams = self.lock();
        let registered = streams.get_mut(&(namespace.clone(), id.to_owned()));
        registered
            .and_then(|registered| registered.stream.take())
            .ok_or_else(|| Error::NotFound { id: id.to_owned() })
    }

    /// Open streams with the lease each was opened under: what a collection must not take for
    /// garbage.
    #[must_use]
    pub fn list(&self) -> Vec<(Namespace, String, Option<String>)> {
        let streams = self.lock();
        let entries = streams.iter();
        entries
            .map(|((namespace, id), registered)| {
                (namespace.clone(), id.clone(), registered.lease.clone())
            })
            .collect()
    }

    /// Ends every stream that was opened under a lease for which `lives` is false.
    pub fn retain(&self, lives: impl Fn(&Namespace, &str) -> bool) {
        for ((namespace, _), registered) in self.lock().iter() {
            if let Some(lease) = &registered.lease
                && !lives(namespace, lease)
            {
                registered.closed.cancel();
            }
        }
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
        assert!(streams.list().is_empty());
        streams.register(&scope, "a").expect("free again");
    }

    #[tokio::test]
    async fn a_stream_dies_with_its_lease() {
        let streams = Streams::new();
        let kept = streams.register(&scope(None), "a").expect("new");
        let leased = streams.register(&scope(Some("l")), "b").expect("new");
        streams.retain(|_, lease| lease != "l");
        assert!(!kept.registration.closed().is_cancelled());
        assert!(leased.registration.closed().is_cancelled());
    }

    #[test]
    fn ids_have_bounds() {
        let streams = Streams::new();
        for bad in [String::new(), "x".repeat(257)] {
            assert_eq!(streams.register(&scope(None), &bad).err(), Some(Error::Id));
        }
    }
}
