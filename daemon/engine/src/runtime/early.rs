//! A shim that was told to serve and has not said yet that it does.
//!
//! The answer of a warm shim (see [`nursery`](super::nursery)) comes on the stream that is its first
//! connection, ahead of the protocol's frames. Whoever waited for it before the first call would
//! wait for two processes to wake each other for nothing, so the first call is on its way meanwhile:
//! a shim that serves finds it, one that does not closes the stream.

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::future::BoxFuture;
use lighter_proto::errdefs::WireError;
use lighter_proto::line::Line;
use lighter_proto::ttrpc::call;
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;

use super::connection::{TASK_V3, Watched};

/// Largest answer that is read.
const MAX_ANSWER_BYTES: usize = 64 << 10;
/// Status of an answer after which the stream is a connection.
const SERVES: u8 = 0;

/// What was answered: a status, and the bytes that belong to it.
type Answered = io::Result<(u8, Vec<u8>)>;

/// A connection whose peer has not answered yet.
pub(super) struct Early {
    /// Calls that are made before the answer.
    pub(super) client: Client,
    /// Cancelled when the peer is gone.
    pub(super) closed: CancellationToken,
    /// Sent by the stream.
    answer: oneshot::Receiver<Answered>,
}

impl std::fmt::Debug for Early {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Early")
    }
}

impl Early {
    pub(super) fn over(line: Line) -> Self {
        let closed = CancellationToken::new();
        let (told, answer) = oneshot::channel();
        let stream = Answering {
            line,
            head: Vec::new(),
            told: Some(told),
        };
        Self {
            client: Client::new(Socket::new(Watched::new(stream, closed.clone()))),
            closed,
            answer,
        }
    }

    /// A call of the task service. It fails when the peer does not come to serve.
    pub(super) fn task<Req, Res>(
        &self,
        method: &'static str,
        namespace: String,
        request: Req,
    ) -> BoxFuture<'static, Result<Res, WireError>>
    where
        Req: Message + 'static,
        Res: Message + Default + 'static,
    {
        let client = self.client.clone();
        Box::pin(async move { call(&client, TASK_V3, method, &namespace, &request, None).await })
    }

    /// Polls for the answer.
    pub(super) fn poll_answer(&mut self, context: &mut Context<'_>) -> Poll<Answered> {
        let answer = ready!(Pin::new(&mut self.answer).poll(context));
        let gone = |_| Err(io::ErrorKind::UnexpectedEof.into());
        Poll::Ready(answer.unwrap_or_else(gone))
    }
}

/// A stream that begins with an answer.
struct Answering {
    line: Line,
    /// As much of the answer as was read: its length in four bytes, a status, the rest.
    head: Vec<u8>,
    /// Where the answer goes; `None` once it went.
    told: Option<oneshot::Sender<Answered>>,
}

impl Answering {
    /// Bytes of the whole answer, as far as is known: the length says it.
    fn wanted(&self) -> io::Result<usize> {
        let Some(length) = self.head.first_chunk::<4>() else {
            return Ok(4);
        };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if (1..=MAX_ANSWER_BYTES).contains(&length) {
            Ok(4 + length)
        } else {
            Err(io::Error::other(format!("answer of {length} bytes")))
        }
    }

    /// Reads the answer, and not a byte more.
    fn poll_answer(&mut self, context: &mut Context<'_>) -> Poll<Answered> {
        loop {
            let wanted = self.wanted()?;
            if self.head.len() == wanted {
                let head = std::mem::take(&mut self.head);
                return Poll::Ready(Ok((head[4], head[5..].to_vec())));
            }
            let mut place = [0; 256];
            let room = place.len().min(wanted - self.head.len());
            let mut read = ReadBuf::new(&mut place[..room]);
            ready!(Pin::new(&mut self.line).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            self.head.extend_from_slice(read.filled());
        }
    }
}

impl AsyncRead for Answering {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.told.is_some() {
            let answer = ready!(self.poll_answer(context));
            let serves = matches!(answer, Ok((SERVES, _)));
            if let Some(told) = self.told.take() {
                let _left = told.send(answer);
            }
            if !serves {
                // The end, for the protocol.
                return Poll::Ready(Ok(()));
            }
        }
        Pin::new(&mut self.line).poll_read(context, buffer)
    }
}

impl AsyncWrite for Answering {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.line).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.line).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.line).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn pair() -> (Early, Line) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (
            Early::over(Line::new(ours).unwrap()),
            Line::new(theirs).unwrap(),
        )
    }

    async fn answer(early: &mut Early) -> Answered {
        std::future::poll_fn(|context| early.poll_answer(context)).await
    }

    #[tokio::test]
    async fn a_call_is_on_its_way_before_the_answer() {
        let (mut early, mut shim) = pair();
        let first: BoxFuture<'_, Result<(), _>> = early.task("Create", "n".to_owned(), ());
        let mut first = tokio_util::task::AbortOnDropHandle::new(spawn(first));
        let mut header = [0; 10];
        shim.read_exact(&mut header).await.unwrap();
        assert_eq!(header[8], 1, "a request");
        shim.write_all(b"\0\0\0\x03\0ab").await.unwrap();
        assert_eq!(answer(&mut early).await.unwrap(), (0, b"ab".to_vec()));
        assert!(!early.closed.is_cancelled());
        drop(shim);
        assert!((&mut first).await.unwrap().is_err());
        early.closed.cancelled().await;
    }

    #[expect(clippy::disallowed_methods, reason = "the handle aborts it")]
    fn spawn<T: Send + 'static>(work: BoxFuture<'static, T>) -> tokio::task::JoinHandle<T> {
        tokio::spawn(work)
    }

    #[tokio::test]
    async fn a_refusal_and_a_silent_end_end_the_connection() {
        let (mut early, mut shim) = pair();
        shim.write_all(b"\0\0\0\x03\x01no").await.unwrap();
        assert_eq!(answer(&mut early).await.unwrap(), (1, b"no".to_vec()));
        early.closed.cancelled().await;
        for sent in [&b""[..], b"\0\0", b"\0\0\0\0", b"\xff\xff\xff\xff"] {
            let (mut early, mut shim) = pair();
            shim.write_all(sent).await.unwrap();
            drop(shim);
            assert!(answer(&mut early).await.is_err(), "{sent:?}");
        }
    }
}
