//! Byte streams multiplexed over one connection: the half that an application holds.
//!
//! Every queue is bounded, so a slow reader stops the connection's reading and a slow client stops
//! the application's writing: memory per session is a few hundred KiB whatever flows.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::PollSender;

/// Bytes in one piece of data, in either direction.
pub(super) const MAX_CHUNK: usize = 16 << 10;
/// Pieces received but not yet read, for each channel.
pub(super) const INBOUND_CHUNKS: usize = 16;
/// Pieces written but not yet sent, for a whole connection.
pub(super) const OUTBOUND_CHUNKS: usize = 8;

/// How often a client is looked for; one gone for two looks is gone.
const HANGUP_CHECK: Duration = Duration::from_secs(1);

/// What travels from the channels to the connection's writer.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// Data of one channel.
    Data {
        channel: u32,
        data: Bytes,
        /// Nothing follows on this channel.
        last: bool,
    },
    /// A frame that is encoded already.
    Raw(Bytes),
}

/// When something last flowed over a connection, and whether its client is still there.
#[derive(Debug)]
pub(super) struct Activity {
    start: Instant,
    last_ms: AtomicU64,
    /// The connection's socket, to see a client's going away behind data that nobody reads.
    socket: Option<OwnedFd>,
}

impl Activity {
    pub(super) fn new(socket: Option<OwnedFd>) -> Arc<Self> {
        Arc::new(Self {
            start: Instant::now(),
            last_ms: AtomicU64::new(0),
            socket,
        })
    }

    pub(super) fn touch(&self) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(now, Ordering::Relaxed);
    }

    /// Returns when nothing flowed for `limit`, or when the client has hung up for a while and the
    /// connection's reader has not noticed, because a full channel keeps it from reading on.
    pub(super) async fn over(&self, limit: Duration) {
        let mut hung_up = false;
        loop {
            let last = Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
            let due = self.start + last + limit;
            if due <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(due.min(Instant::now() + HANGUP_CHECK)).await;
            let before = std::mem::replace(&mut hung_up, self.hung_up());
            if before && hung_up {
                return;
            }
        }
    }

    fn hung_up(&self) -> bool {
        self.socket.as_ref().is_some_and(|socket| {
            let mut polled = [PollFd::new(socket, PollFlags::RDHUP)];
            poll(&mut polled, Some(&Timespec::default())).is_ok() && !polled[0].revents().is_empty()
        })
    }
}

/// Bytes that a peer allows to be sent. It binds only once the peer has shown that it hands out
/// more: the usual Kubernetes clients never do, and would stall a sender that waits.
#[derive(Debug)]
pub(super) struct Window {
    state: Mutex<WindowState>,
}

#[derive(Debug)]
struct WindowState {
    credit: i64,
    enforced: bool,
    wakers: Vec<Waker>,
}

impl Window {
    pub(super) fn new(credit: i64, enforced: bool) -> Self {
        Self {
            state: Mutex::new(WindowState {
                credit,
                enforced,
                wakers: Vec::new(),
            }),
        }
    }

    /// More may be sent; from now on the limit holds.
    pub(super) fn grant(&self, delta: i64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.credit = state.credit.saturating_add(delta);
        state.enforced = true;
        for waker in state.wakers.drain(..) {
            waker.wake();
        }
    }

    /// Wakes writers without granting anything, for them to see that the stream was reset.
    fn wake(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for waker in state.wakers.drain(..) {
            waker.wake();
        }
    }

    fn poll_room(&self, cx: &mut Context<'_>, want: usize) -> Poll<usize> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.enforced {
            return Poll::Ready(want);
        }
        match usize::try_from(state.credit) {
            Ok(room @ 1..) => Poll::Ready(want.min(room)),
            _ => {
                if !state.wakers.iter().any(|w| w.will_wake(cx.waker())) {
                    state.wakers.push(cx.waker().clone());
                }
                Poll::Pending
            }
        }
    }

    fn consume(&self, count: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.credit = state
            .credit
            .saturating_sub(i64::try_from(count).unwrap_or(i64::MAX));
    }
}

/// What both ends of a channel know of it.
#[derive(Debug)]
pub(super) struct ChannelState {
    reset: AtomicBool,
    finished: AtomicBool,
    /// The channel's own window and the connection's; none where the protocol has none.
    windows: Vec<Arc<Window>>,
}

impl ChannelState {
    pub(super) fn new(windows: Vec<Arc<Window>>) -> Arc<Self> {
        Arc::new(Self {
            reset: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            windows,
        })
    }

    /// The peer wants nothing more of this channel.
    pub(super) fn reset(&self) {
        self.reset.store(true, Ordering::Release);
        for window in &self.windows {
            window.wake();
        }
    }

    /// The channel's own window.
    pub(super) fn window(&self) -> Option<&Arc<Window>> {
        self.windows.first()
    }

    pub(super) fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }
}

/// What the peer sends on one channel.
#[derive(Debug)]
pub(super) struct ChannelReader {
    /// From the connection's reader; closed at the end of the channel or of the connection.
    queue: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl ChannelReader {
    pub(super) fn new() -> (mpsc::Sender<Bytes>, Self) {
        let (sender, queue) = mpsc::channel(INBOUND_CHUNKS);
        let current = Bytes::new();
        (sender, Self { queue, current })
    }
}

impl AsyncRead for ChannelReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.current.is_empty() {
            match ready!(self.queue.poll_recv(cx)) {
                Some(data) => self.current = data,
                None => return Poll::Ready(Ok(())),
            }
        }
        let count = self.current.len().min(buf.remaining());
        buf.put_slice(&self.current.split_to(count));
        Poll::Ready(Ok(()))
    }
}

/// What we send on one channel.
#[derive(Debug)]
pub(super) struct ChannelWriter {
    /// To the connection's writer; closed when the connection is gone.
    queue: PollSender<Outgoing>,
    channel: u32,
    state: Arc<ChannelState>,
}

impl ChannelWriter {
    pub(super) fn new(
        queue: mpsc::Sender<Outgoing>,
        channel: u32,
        state: Arc<ChannelState>,
    ) -> Self {
        Self {
            queue: PollSender::new(queue),
            channel,
            state,
        }
    }

    /// A handle that ends the channel, also after the writer has been given away.
    pub(super) fn closer(&self) -> Option<ChannelCloser> {
        Some(ChannelCloser {
            queue: self.queue.get_ref()?.clone(),
            channel: self.channel,
            state: self.state.clone(),
        })
    }
}

impl AsyncWrite for ChannelWriter {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let broken = || Poll::Ready(Err(io::Error::from(io::ErrorKind::BrokenPipe)));
        if self.state.reset.load(Ordering::Acquire) || self.state.is_finished() {
            return broken();
        }
        let mut count = buf.len().min(MAX_CHUNK);
        for window in &self.state.windows {
            count = ready!(window.poll_room(cx, count));
        }
        if ready!(self.queue.poll_reserve(cx)).is_err() {
            return broken();
        }
        let data = Bytes::copy_from_slice(&buf[..count]);
        let channel = self.channel;
        let item = Outgoing::Data {
            channel,
            data,
            last: false,
        };
        if self.queue.send_item(item).is_err() {
            return broken();
        }
        for window in &self.state.windows {
            window.consume(count);
        }
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's writer flushes as soon as its queue is empty.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.state.is_finished() {
            return Poll::Ready(Ok(()));
        }
        if ready!(self.queue.poll_reserve(cx)).is_ok()
            && !self.state.finished.swap(true, Ordering::AcqRel)
        {
            let channel = self.channel;
            let _ = self.queue.send_item(last_of(channel));
        }
        Poll::Ready(Ok(()))
    }
}

fn last_of(channel: u32) -> Outgoing {
    Outgoing::Data {
        channel,
        data: Bytes::new(),
        last: true,
    }
}

/// Ends a channel.
#[derive(Debug)]
pub(super) struct ChannelCloser {
    queue: mpsc::Sender<Outgoing>,
    channel: u32,
    state: Arc<ChannelState>,
}

impl ChannelCloser {
    /// Ends the channel unless that has happened.
    pub(super) async fn close(self) {
        if !self.state.finished.swap(true, Ordering::AcqRel) {
            // Fails only when the connection is gone.
            let _ = self.queue.send(last_of(self.channel)).await;
        }
    }
}
