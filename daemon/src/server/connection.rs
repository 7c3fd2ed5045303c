//! One HTTP/2 connection: how its requests are run, and how its bytes are written.
//!
//! Most requests are answered from memory. Handing each to another thread and back costs more than
//! the answer, so a request is begun where its connection is read, and goes to the pool of threads
//! only when it has to wait for something. And what a connection has to say is written once for all
//! requests that one reading brought, not once for each.

use std::future::Future;
use std::io::{self, IoSlice};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::task::TaskTracker;
use tracing::error;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Bytes that are written at once, when there are as many.
const GATHER_BYTES: usize = 128 << 10;

/// Begins every request on the thread that read it; one that waits goes on as a task of its own.
#[derive(Debug, Clone)]
pub(super) struct BeginHere {
    waiting: TaskTracker,
}

impl BeginHere {
    /// Requests that wait are `waiting`'s.
    pub(super) fn new(waiting: TaskTracker) -> Self {
        Self { waiting }
    }
}

impl<F> hyper::rt::Executor<F> for BeginHere
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, request: F) {
        let mut request = Box::pin(request);
        // Whoever it waits for is told by the task that polls it next.
        let mut context = Context::from_waker(Waker::noop());
        // A request that panics ends itself, as it would in a task, and not its connection.
        match catch_unwind(AssertUnwindSafe(|| request.as_mut().poll(&mut context))) {
            Ok(Poll::Ready(())) => {}
            Ok(Poll::Pending) => drop(self.waiting.spawn(request)),
            Err(_) => error!("a request panicked"),
        }
    }
}

/// What a connection is about to write, shared by [`Gathering`] and [`Gathered`].
#[derive(Debug)]
struct Outgoing<S> {
    stream: S,
    buffer: BytesMut,
}

impl<S: AsyncWrite + Unpin> Outgoing<S> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.buffer.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.buffer))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.buffer.advance(written);
        }
        // An idle connection keeps no buffer.
        self.buffer = BytesMut::new();
        // What encrypts may hold records back when the socket is full.
        Pin::new(&mut self.stream).poll_flush(cx)
    }
}

/// The half of a stream that the HTTP/2 code sees: takes what is written and holds it back until
/// there is much of it, or until [`Gathered`] has let all requests speak.
#[derive(Debug)]
pub(super) struct Gathering<S>(Arc<Mutex<Outgoing<S>>>);

/// A future over a [`Gathering`] stream, which writes what was held back whenever it has nothing
/// more to say for now.
#[derive(Debug)]
pub(super) struct Gathered<S, F> {
    stream: Arc<Mutex<Outgoing<S>>>,
    driver: F,
}

fn locked<S>(stream: &Mutex<S>) -> MutexGuard<'_, S> {
    stream.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S> Clone for Gathering<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S> Gathering<S> {
    /// Over `stream`.
    pub(super) fn new(stream: S) -> Self {
        Self(Arc::new(Mutex::new(Outgoing {
            stream,
            buffer: BytesMut::new(),
        })))
    }

    /// `driver`, which writes to this stream, with what it writes going out whenever it waits.
    pub(super) fn drive<F>(&self, driver: F) -> Gathered<S, F> {
        Gathered {
            stream: Arc::clone(&self.0),
            driver,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gathering<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut locked(&self.0).stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gathering<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(data)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut out = locked(&self.0);
        if out.buffer.len() >= GATHER_BYTES {
            ready!(out.poll_drain(cx))?;
        }
        let mut taken = 0;
        for slice in slices {
            let part = &slice[..slice.len().min(GATHER_BYTES - taken)];
            out.buffer.extend_from_slice(part);
            taken += part.len();
        }
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Nothing is written yet: see [`Gathered`].
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut out = locked(&self.0);
        ready!(out.poll_drain(cx))?;
        Pin::new(&mut out.stream).poll_shutdown(cx)
    }
}

impl<S, F> Gathered<S, F> {
    /// The future that writes.
    pub(super) fn driver(&mut self) -> &mut F {
        &mut self.driver
    }
}

impl<S, F, E> Future for Gathered<S, F>
where
    S: AsyncWrite + Unpin,
    F: Future<Output = Result<(), E>> + Unpin,
    E: Into<BoxError>,
{
    type Output = Result<(), BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(ended) = Pin::new(&mut self.driver).poll(cx) {
            // It has shut its stream down, and all was written before that.
            return Poll::Ready(ended.map_err(Into::into));
        }
        match locked(&self.stream).poll_drain(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error.into())),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufWriter, duplex};

    use super::*;

    #[tokio::test]
    async fn a_stream_that_holds_back_is_made_to_write() {
        let (ours, mut theirs) = duplex(64);
        let mut stream = Gathering::new(BufWriter::new(ours));
        let driver = stream.drive(std::future::pending::<io::Result<()>>());
        stream.write_all(b"answer").await.expect("taken");
        let mut answer = [0; 6];
        tokio::select! {
            ended = driver => panic!("the driver ended: {ended:?}"),
            read = theirs.read_exact(&mut answer) => assert_eq!(read.expect("an answer"), 6),
        }
        assert_eq!(&answer, b"answer");
    }
}
