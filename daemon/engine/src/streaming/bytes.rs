//! Byte streams over message streams, with a window.
//!
//! The receiver grants a window whenever what is left of it is below [`WINDOW`]; the sender sends
//! data of at most [`MAX_DATA`] bytes and never more than it was granted. The end of the data is
//! the end of the sender's direction.

use std::io;

use bytes::Bytes;
use lighter_proto::any;
use lighter_proto::containerd::types::transfer::{Data, WindowUpdate};
use prost::Name;
use tracing::debug;

use super::{Error, Stream};

/// Bytes granted at a time.
pub const WINDOW: i32 = 64 << 10;
/// Most bytes in one message.
pub const MAX_DATA: usize = 32 << 10;
/// How far a sender may go beyond its window before it is taken for broken.
const MAX_OVERRUN: i64 = 16 << 20;

/// The receiving side.
#[derive(Debug)]
pub struct Reader {
    stream: Stream,
    window: i64,
}

impl Reader {
    /// Reads from `stream`.
    #[must_use]
    pub fn new(stream: Stream) -> Self {
        Self { stream, window: 0 }
    }

    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// [`Error::Protocol`] for data far beyond the window or that does not decode.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if self.window < i64::from(WINDOW) {
                let update = WindowUpdate { update: WINDOW };
                // A client that has sent everything may be gone already.
                if self.stream.send(any::pack(&update)).await.is_ok() {
                    self.window += i64::from(WINDOW);
                }
            }
            let Some(message) = self.stream.receive().await else {
                return Ok(None);
            };
            if !any::is(&message, &Data::full_name()) {
                debug!(type_url = %message.type_url, "message ignored in a byte stream");
                continue;
            }
            let data: Data = any::unpack(&message).map_err(|error| Error::Protocol {
                reason: error.to_string(),
            })?;
            self.window -= i64::try_from(data.data.len()).unwrap_or(i64::MAX);
            if self.window < -MAX_OVERRUN {
                return Err(Error::Protocol {
                    reason: "more data than the window allows".to_owned(),
                });
            }
            if !data.data.is_empty() {
                return Ok(Some(Bytes::from(data.data)));
            }
        }
    }

    /// As a stream of pieces, for `tokio_util::io::StreamReader` and the like.
    pub fn into_stream(self) -> impl futures::Stream<Item = io::Result<Bytes>> + Send {
        futures::stream::unfold(self, |mut reader| async move {
            match reader.next().await {
                Ok(piece) => piece.map(|piece| (Ok(piece), reader)),
                Err(error) => Some((Err(io::Error::other(error)), reader)),
            }
        })
    }

    /// As an [`tokio::io::AsyncRead`].
    pub fn into_async_read(self) -> impl tokio::io::AsyncBufRead + Send {
        tokio_util::io::StreamReader::new(Box::pin(self.into_stream()))
    }
}

/// The sending side. Dropping it ends the data.
#[derive(Debug)]
pub struct Writer {
    stream: Stream,
    window: i64,
}

impl Writer {
    /// Writes to `stream`.
    #[must_use]
    pub fn new(stream: Stream) -> Self {
        Self { stream, window: 0 }
    }

    /// Sends all of `bytes`, as fast as the receiver grants it.
    ///
    /// # Errors
    /// [`Error::Closed`] once the receiver is gone.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let mut left = bytes;
        while !left.is_empty() {
            let sent = self.write_some(left).await?;
            left = &left[sent..];
        }
        Ok(())
    }

    /// Sends as many of `bytes` as are granted and fit one message, waiting until it is one at least.
    /// Says how many; 0 only of none.
    ///
    /// # Errors
    /// [`Error::Closed`] once the receiver is gone.
    pub async fn write_some(&mut self, bytes: &[u8]) -> Result<usize, Error> {
        if bytes.is_empty() {
            return Ok(0);
        }
        while self.window <= 0 {
            self.grant().await?;
        }
        let room = usize::try_from(self.window).unwrap_or(usize::MAX);
        let now = &bytes[..bytes.len().min(MAX_DATA).min(room)];
        self.window -= i64::try_from(now.len()).unwrap_or(i64::MAX);
        let data = Data { data: now.to_vec() };
        self.stream.send(any::pack(&data)).await?;
        Ok(now.len())
    }

    async fn grant(&mut self) -> Result<(), Error> {
        let message = self.stream.receive().await.ok_or(Error::Closed)?;
        if !any::is(&message, &WindowUpdate::full_name()) {
            debug!(type_url = %message.type_url, "message ignored by a sender");
            return Ok(());
        }
        let update: WindowUpdate = any::unpack(&message).map_err(|error| Error::Protocol {
            reason: error.to_string(),
        })?;
        self.window = self.window.saturating_add(i64::from(update.update));
        Ok(())
    }
}

/// A [`Writer`] as a [`tokio::io::AsyncWrite`]: bytes go through a bounded pipe to a future that
/// must be polled along ([`pipe`]).
///
/// # Errors
/// The future ends with [`Error::Closed`] once the receiver is gone.
pub fn pipe(
    mut writer: Writer,
) -> (
    tokio::io::DuplexStream,
    impl Future<Output = Result<(), Error>> + Send,
) {
    let (near, mut far) = tokio::io::duplex(MAX_DATA);
    let pump = async move {
        use tokio::io::AsyncReadExt as _;
        let mut buffer = vec![0; MAX_DATA];
        loop {
            match far.read(&mut buffer).await {
                Ok(0) | Err(_) => return Ok(()),
                Ok(length) => writer.write(&buffer[..length]).await?,
            }
        }
    };
    (near, pump)
}

#[cfg(test)]
mod tests {
    use lighter_store::{Namespace, Scope};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::super::Streams;
    use super::*;

    fn open() -> (super::super::Connection, Stream) {
        let streams = Streams::new();
        let scope = Scope::new(Namespace::new("n").expect("valid"));
        let connection = streams.register(&scope, "a").expect("new");
        let stream = streams.take(&scope.namespace, "a").expect("there");
        (connection, stream)
    }

    #[tokio::test]
    async fn a_reader_grants_windows_and_gets_every_byte() {
        let (mut connection, stream) = open();
        let sent: Vec<u8> = (0..300_000u32).map(|n| n.to_le_bytes()[0]).collect();
        let expected = sent.clone();
        let client = async move {
            let mut window = 0i64;
            for piece in sent.chunks(10_000) {
                while window < 10_000 {
                    let message = connection.outbound.recv().await.expect("a grant");
                    let update: WindowUpdate = any::unpack(&message).expect("a window");
                    assert_eq!(update.update, WINDOW);
                    window += i64::from(update.update);
                    assert!(window <= i64::from(WINDOW) * 2, "granted too much");
                }
                window -= 10_000;
                let data = Data {
                    data: piece.to_vec(),
                };
                connection
                    .inbound
                    .send(any::pack(&data))
                    .await
                    .expect("open");
            }
        };
        let server = async move {
            let mut got = Vec::new();
            let mut reader = Reader::new(stream).into_async_read();
            reader.read_to_end(&mut got).await.expect("reads");
            got
        };
        let ((), got) = tokio::join!(client, server);
        assert!(got == expected);
    }

    #[tokio::test]
    async fn a_writer_never_sends_more_than_it_was_granted() {
        let (mut connection, stream) = open();
        let client = async move {
            let mut got = 0;
            let mut granted = 0;
            while got < 100_000 {
                if got == granted {
                    granted += 1000;
                    let update = any::pack(&WindowUpdate { update: 1000 });
                    connection.inbound.send(update).await.expect("open");
                }
                let message = connection.outbound.recv().await.expect("data");
                let data: Data = any::unpack(&message).expect("data");
                got += data.data.len();
                assert!(got <= granted);
            }
            assert!(connection.outbound.recv().await.is_none(), "the end");
        };
        let (mut near, pump) = pipe(Writer::new(stream));
        let server = async move {
            near.write_all(&[7; 100_000]).await.expect("writes");
        };
        let ((), (), pumped) = tokio::join!(client, server, pump);
        pumped.expect("all sent");
    }

    #[tokio::test]
    async fn a_writer_fails_when_the_client_is_gone() {
        let (connection, stream) = open();
        drop(connection);
        assert_eq!(Writer::new(stream).write(b"x").await, Err(Error::Closed));
    }
}
