//! A Unix stream that wakes its owner for nothing but bytes to read.
//!
//! A stream of the runtime is registered for reading and writing. On a Unix socket every read of the
//! peer makes room, and the kernel tells: two processes that exchange messages wake each other twice
//! for each, once for nothing. Messages between a daemon and a shim are small, so there is room
//! nearly always: here a write is tried at once, and only a socket that is full is watched for room,
//! by a second registration that goes when there is some. Reads take all there is in one call.

use std::io::{self, IoSlice, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use crate::sys::register;

/// Bytes that one read may take: most messages whole. A reader with more room reads into that.
const BUFFER_BYTES: usize = 2048;

/// A connected Unix stream socket.
#[derive(Debug)]
pub struct Line {
    stream: AsyncFd<UnixStream>,
    /// A duplicate that is watched for room, while there is none.
    full: Option<AsyncFd<UnixStream>>,
    /// Bytes read and not taken yet; of no size until it is needed.
    buffer: Vec<u8>,
    taken: usize,
}

impl Line {
    /// Takes over a connected stream, whatever its mode.
    ///
    /// # Errors
    /// What the system said.
    ///
    /// # Panics
    /// Outside a runtime with I/O.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream: register(stream, Interest::READABLE)?,
            full: None,
            buffer: Vec::new(),
            taken: 0,
        })
    }

    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// What the system said.
    pub async fn connect(path: impl AsRef<std::path::Path>) -> io::Result<Self> {
        // A connect that may not block is what the runtime has; its registration is given up.
        tokio::net::UnixStream::connect(path).await?.try_into()
    }

    /// The descriptor, for what is asked of sockets.
    #[must_use]
    pub fn socket(&self) -> &UnixStream {
        self.stream.get_ref()
    }

    /// Whether there are bytes to read now. They are taken from the socket at once, whatever the
    /// reactor knows of it, and the next read has them.
    pub fn look(&mut self) -> bool {
        if self.taken < self.buffer.len() {
            return true;
        }
        self.buffer.resize(BUFFER_BYTES, 0);
        // An end or a failure is left for the read that waits for it.
        let count = self.stream.get_ref().read(&mut self.buffer).unwrap_or(0);
        self.buffer.truncate(count);
        self.taken = 0;
        count > 0
    }

    /// Tries `write` at once, and again whenever there is room.
    fn poll_written(
        &mut self,
        context: &mut Context<'_>,
        mut write: impl FnMut(&mut &UnixStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        if self.full.is_none() {
            loop {
                match write(&mut self.stream.get_ref()) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    done => return Poll::Ready(done),
                }
            }
            let same = self.stream.get_ref().try_clone()?;
            self.full = Some(register(same, Interest::WRITABLE)?);
        }
        loop {
            let full = self.full.as_ref().expect("made above");
            let mut room = ready!(full.poll_write_ready(context))?;
            match room.try_io(|full| write(&mut full.get_ref())) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(done) => {
                    self.full = None;
                    return Poll::Ready(done);
                }
                Err(_would_block) => {}
            }
        }
    }
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.get_ref().as_fd()
    }
}

impl TryFrom<tokio::net::UnixStream> for Line {
    type Error = io::Error;

    fn try_from(stream: tokio::net::UnixStream) -> io::Result<Self> {
        Self::new(stream.into_std()?)
    }
}

/// Reads into `place`; whether there may be more is remembered by the registration.
fn poll_read(
    stream: &AsyncFd<UnixStream>,
    context: &mut Context<'_>,
    place: &mut [u8],
) -> Poll<io::Result<usize>> {
    loop {
        let mut some = ready!(stream.poll_read_ready(context))?;
        match some.try_io(|stream| stream.get_ref().read(place)) {
            Ok(Ok(count)) => {
                // Less than there was room for: that was all, and what comes later is told again. The
                // peer's end stays known.
                if 0 < count && count < place.len() {
                    some.clear_ready();
                }
                return Poll::Ready(Ok(count));
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Poll::Ready(Err(error)),
            Err(_would_block) => {}
        }
    }
}

impl AsyncRead for Line {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let line = self.get_mut();
        if into.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if line.taken == line.buffer.len() {
            if into.remaining() >= BUFFER_BYTES {
                let place = into.initialize_unfilled();
                let count = ready!(poll_read(&line.stream, context, place))?;
                into.advance(count);
                return Poll::Ready(Ok(()));
            }
            line.buffer.resize(BUFFER_BYTES, 0);
            line.taken = BUFFER_BYTES;
            let count = ready!(poll_read(&line.stream, context, &mut line.buffer))?;
            line.buffer.truncate(count);
            line.taken = 0;
        }
        let waiting = &line.buffer[line.taken..];
        let count = waiting.len().min(into.remaining());
        into.put_slice(&waiting[..count]);
        line.taken += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Line {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut()
            .poll_written(context, |stream| stream.write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut()
            .poll_written(context, |stream| stream.write_vectored(parts))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ended = self.stream.get_ref().shutdown(std::net::Shutdown::Write);
        Poll::Ready(ended)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn pair() -> (Line, Line) {
        let (one, other) = UnixStream::pair().unwrap();
        (Line::new(one).unwrap(), Line::new(other).unwrap())
    }

    #[tokio::test]
    async fn what_is_written_is_read_in_any_pieces() {
        let (mut one, mut other) = pair();
        one.write_all(b"header and body").await.unwrap();
        let mut header = [0; 6];
        other.read_exact(&mut header).await.unwrap();
        assert_eq!(&header, b"header");
        let mut rest = [0; 9];
        other.read_exact(&mut rest).await.unwrap();
        assert_eq!(&rest, b" and body");
        // Nothing is left, and what comes later is told.
        let mut byte = [0; 1];
        let early = tokio::time::timeout(Duration::from_millis(20), other.read(&mut byte));
        assert!(early.await.is_err());
        one.write_all(b"x").await.unwrap();
        other.read_exact(&mut byte).await.unwrap();
        one.shutdown().await.unwrap();
        assert_eq!(other.read(&mut byte).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn what_a_look_found_is_read_first() {
        let (mut one, mut other) = pair();
        assert!(!other.look());
        let sent: Vec<u8> = (0..BUFFER_BYTES + 10).map(|n| n.to_le_bytes()[0]).collect();
        one.write_all(&sent).await.unwrap();
        assert!(other.look());
        assert!(other.look());
        let mut got = vec![0; sent.len()];
        other.read_exact(&mut got).await.unwrap();
        assert_eq!(got, sent);
        assert!(!other.look());
        drop(one);
        assert!(!other.look());
        assert_eq!(other.read(&mut got).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn the_end_is_seen_behind_the_last_bytes() {
        let (mut one, mut other) = pair();
        one.write_all(b"last").await.unwrap();
        drop(one);
        let mut all = Vec::new();
        other.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, b"last");
    }

    #[tokio::test]
    async fn a_full_socket_is_written_on_when_there_is_room() {
        const BYTES: usize = 4 << 20;
        let (mut one, mut other) = pair();
        let sent: Vec<u8> = (0..BYTES).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let expected = sent.clone();
        let write = async move {
            one.write_all(&sent).await.unwrap();
            one
        };
        let read = async {
            let mut got = vec![0; BYTES];
            other.read_exact(&mut got).await.unwrap();
            got
        };
        let (one, got) = tokio::join!(write, read);
        assert!(got == expected);
        assert!(one.full.is_none());
    }
}
