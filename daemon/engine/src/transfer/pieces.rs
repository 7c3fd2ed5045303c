//! Pieces of an archive, between a client's stream and the thread that works on it.
//!
//! The thread blocks for as long as its channel has another end, and holds the container's files: one at
//! rest cannot be started meanwhile. So a client by which not a byte moves is given up.

use std::io::{self, BufRead, Read};
use std::time::Duration;

use ::bytes::{Buf as _, Bytes};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::Error;
use crate::streaming::{Stream, bytes};

/// How long a client may take for its next byte, either way.
pub(super) const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// Hands what comes from `stream` to `pieces`, to its end or until nobody takes it any more.
///
/// # Errors
/// The stream's, or [`Error::Idle`] when nothing comes for `limit`.
pub(super) async fn feed(
    what: &str,
    limit: Duration,
    stream: Stream,
    pieces: mpsc::Sender<Bytes>,
) -> Result<(), Error> {
    let mut reader = bytes::Reader::new(stream);
    loop {
        let next = timeout(limit, reader.next()).await;
        let Some(piece) = next.map_err(|_| idle(what, "send", limit))?? else {
            return Ok(());
        };
        // However long the thread takes is not the client's fault.
        if pieces.send(piece).await.is_err() {
            return Ok(());
        }
    }
}

/// Sends what comes from `pieces`, whose other end fails when this ends early.
///
/// # Errors
/// The stream's, or [`Error::Idle`] when nothing is taken for `limit`.
pub(super) async fn send(
    what: &str,
    limit: Duration,
    mut pieces: mpsc::Receiver<Bytes>,
    writer: &mut bytes::Writer,
) -> Result<(), Error> {
    while let Some(piece) = pieces.recv().await {
        let mut left = &piece[..];
        while !left.is_empty() {
            let sent = timeout(limit, writer.write_some(left)).await;
            let sent = sent.map_err(|_| idle(what, "receive", limit))??;
            left = &left[sent..];
        }
    }
    Ok(())
}

fn idle(what: &str, awaited: &'static str, limit: Duration) -> Error {
    Error::Idle {
        what: what.to_owned(),
        awaited,
        limit,
    }
}

/// What comes through a stream, for a thread that may block.
pub(super) struct Incoming {
    pieces: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

impl Incoming {
    /// Of what is sent to the other end of `pieces`.
    pub(super) fn new(pieces: mpsc::Receiver<Bytes>) -> Self {
        Self {
            pieces,
            piece: Bytes::new(),
        }
    }
}

impl BufRead for Incoming {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.piece.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = piece,
                None => break,
            }
        }
        Ok(&self.piece)
    }

    fn consume(&mut self, amount: usize) {
        self.piece.advance(amount);
    }
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let there = self.fill_buf()?;
        let length = there.len().min(buffer.len());
        buffer[..length].copy_from_slice(&there[..length]);
        self.consume(length);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use lighter_proto::any;
    use lighter_proto::containerd::types::transfer::{Data, WindowUpdate};
    use lighter_proto::errdefs::{Classify as _, ErrorKind};
    use lighter_store::{Namespace, Scope};
    use tokio::time::sleep;

    use super::*;
    use crate::streaming::{Connection, Streams};

    /// Of one wait; three waits of [`STEP`] are more than it.
    const LIMIT: Duration = Duration::from_secs(1);
    const STEP: Duration = Duration::from_millis(400);

    fn open() -> (Connection, Stream) {
        let streams = Streams::new();
        let scope = Scope::new(Namespace::new("n").unwrap());
        let connection = streams.register(&scope, "a").unwrap();
        let stream = streams.take(&scope.namespace, "a").unwrap();
        (connection, stream)
    }

    fn assert_idle(done: Result<(), Error>, awaited: &str) {
        let error = done.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DeadlineExceeded);
        let text = format!("copy of it: waited 1s for the client to {awaited}: deadline exceeded");
        assert_eq!(error.to_string(), text);
    }

    #[tokio::test]
    async fn who_stops_feeding_is_given_up_and_who_is_slow_is_not() {
        let (connection, stream) = open();
        let (sender, pieces) = mpsc::channel(4);
        let thread = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            Incoming::new(pieces).read_to_end(&mut all).map(|_| all)
        });
        let client = async {
            for _ in 0..3 {
                sleep(STEP).await;
                let data = Data { data: vec![7] };
                connection.inbound.send(any::pack(&data)).await.unwrap();
            }
        };
        let (done, ()) = tokio::join!(feed("it", LIMIT, stream, sender), client);
        assert_idle(done, "send");
        assert_eq!(thread.await.unwrap().unwrap(), [7; 3], "the thread ends");
    }

    #[tokio::test]
    async fn who_stops_reading_is_given_up_and_who_is_slow_is_not() {
        let (connection, stream) = open();
        let (sender, pieces) = mpsc::channel(4);
        sender.send(Bytes::from(vec![7; 10_000])).await.unwrap();
        let client = async {
            for _ in 0..3 {
                sleep(STEP).await;
                let update = WindowUpdate { update: 1 };
                connection.inbound.send(any::pack(&update)).await.unwrap();
            }
        };
        let mut writer = bytes::Writer::new(stream);
        let (done, ()) = tokio::join!(send("it", LIMIT, pieces, &mut writer), client);
        assert_idle(done, "receive");
        assert_eq!(connection.outbound.len(), 3, "what was granted");
        assert!(sender.is_closed(), "the thread fails");
    }
}
