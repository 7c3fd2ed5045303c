//! One HTTP/2 connection: how its requests are run, and how its bytes are written.
//!
//! Most requests are answered from memory. Handing each to another thread and back costs more than
//! the answer, so a request is begun where its connection is read, and goes to the pool of threads
//! only when it has to wait for something. And what a connection has to say is written once for all
//! requests that one reading brought, not once for each.
//!
//! A client that makes one call after another has its next one ready sooner than a thread falls asleep
//! and is woken: its connection looks for that call a moment longer ([`Patience`]).

use std::future::Future;
use std::io::{self, IoSlice};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker, ready};
use std::time::{Duration, Instant};

use bytes::{Buf as _, BytesMut};
use lighter_proto::line::Line;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tokio_util::task::TaskTracker;
use tracing::error;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Bytes that are written at once, when there are as many.
const GATHER_BYTES: usize = 128 << 10;
/// How long a connection looks for the call that follows an answer.
const LOOK: Duration = Duration::from_micros(50);
/// A call this soon after an answer says that the client makes one after another. It was asleep, and so
/// was its connection: both had to be woken.
const SOON: Duration = Duration::from_micros(150);
/// How long a connection may keep its thread from what else that has to do.
const TURN: Duration = Duration::from_micros(250);

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

/// A stream whose next bytes can be looked for without waiting for them.
pub(super) trait Eager {
    /// Whether there are some: the next read has them.
    fn look(&mut self) -> bool {
        false
    }
}

impl Eager for Line {
    fn look(&mut self) -> bool {
        Self::look(self)
    }
}

/// Networks are slower than threads are woken.
impl Eager for TcpStream {}
impl<S> Eager for TlsStream<S> {}

/// The right to look for bytes, which one connection has at a time: another thread is left for the
/// rest.
#[derive(Debug, Clone, Default)]
pub(super) struct Seat(Arc<AtomicBool>);

/// Whether a client's next call is worth looking for.
#[derive(Debug)]
struct Patience {
    seat: Seat,
    /// Requests that wait for something: whose answers must not wait for us.
    waiting: TaskTracker,
    /// When the last answer went out.
    answered: Option<Instant>,
    /// The calls of this client follow one another.
    hot: bool,
}

impl Patience {
    /// Called when there is something to do.
    fn begin(&mut self) {
        if let Some(answered) = self.answered.take() {
            self.hot = answered.elapsed() < SOON;
        }
    }

    /// Called when answers are out: whether `look` found more to do. The turn began at `began`.
    fn more(&mut self, began: Instant, mut look: impl FnMut() -> bool) -> bool {
        let now = Instant::now();
        self.answered = Some(now);
        if !self.hot || !self.waiting.is_empty() || now - began > TURN {
            return false;
        }
        if self.seat.0.swap(true, Ordering::Acquire) {
            return false;
        }
        let mut found = look();
        while !found && now.elapsed() < LOOK {
            // Whoever is to make the call may need this processor.
            std::thread::yield_now();
            found = look();
        }
        self.seat.0.store(false, Ordering::Release);
        self.hot = found;
        if found {
            self.answered = None;
        }
        found
    }
}

/// Wakes a connection's task, but for what happens while that is polled: an answer that is ready at
/// once would have it queued again, and a second thread woken to share the queue with.
#[derive(Debug)]
struct Bell {
    state: AtomicU8,
    task: Mutex<Waker>,
}

/// States of a [`Bell`]: the task is not polled; it is; it is, and there is more for it to do.
const OUTSIDE: u8 = 0;
const INSIDE: u8 = 1;
const RUNG: u8 = 2;
/// How often a connection is polled again for what it rang itself, before others have their turn.
const AGAIN: u32 = 16;

impl Default for Bell {
    fn default() -> Self {
        Self {
            state: AtomicU8::new(OUTSIDE),
            task: Mutex::new(Waker::noop().clone()),
        }
    }
}

impl Bell {
    /// Polls `each` until nothing rings any more: `each` hears of its wakes by `waker`, which is this
    /// bell's, and `task` is woken for those to come.
    fn poll<T>(
        &self,
        waker: &Waker,
        task: &Waker,
        mut each: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        locked(&self.task).clone_from(task);
        for _ in 0..AGAIN {
            self.state.store(INSIDE, Ordering::Release);
            if let Poll::Ready(done) = each(&mut Context::from_waker(waker)) {
                self.state.store(OUTSIDE, Ordering::Release);
                return Poll::Ready(done);
            }
            let quiet =
                self.state
                    .compare_exchange(INSIDE, OUTSIDE, Ordering::AcqRel, Ordering::Acquire);
            if quiet.is_ok() {
                return Poll::Pending;
            }
        }
        self.state.store(OUTSIDE, Ordering::Release);
        task.wake_by_ref();
        Poll::Pending
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let rung = self
            .state
            .compare_exchange(INSIDE, RUNG, Ordering::AcqRel, Ordering::Acquire);
        if rung == Err(OUTSIDE) {
            locked(&self.task).wake_by_ref();
        }
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
    patience: Patience,
    bell: Arc<Bell>,
    /// That of the bell.
    waker: Waker,
}

fn locked<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
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
    ///
    /// It looks for its client's next call when it has the `seat` and nothing is `waiting`.
    pub(super) fn drive<F>(&self, driver: F, seat: Seat, waiting: TaskTracker) -> Gathered<S, F> {
        let bell = Arc::<Bell>::default();
        Gathered {
            stream: Arc::clone(&self.0),
            driver,
            waker: Waker::from(Arc::clone(&bell)),
            bell,
            patience: Patience {
                seat,
                waiting,
                answered: None,
                hot: false,
            },
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
    S: AsyncWrite + Eager + Unpin,
    F: Future<Output = Result<(), E>> + Unpin,
    E: Into<BoxError>,
{
    type Output = Result<(), BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self {
            stream,
            driver,
            patience,
            bell,
            waker,
        } = &mut *self;
        let began = Instant::now();
        patience.begin();
        loop {
            let polled = bell.poll(waker, cx.waker(), |cx| Pin::new(&mut *driver).poll(cx));
            if let Poll::Ready(ended) = polled {
                // It has shut its stream down, and all was written before that.
                return Poll::Ready(ended.map_err(Into::into));
            }
            let mut out = locked(stream);
            let spoke = !out.buffer.is_empty();
            match out.poll_drain(cx) {
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
                Poll::Ready(Ok(())) if spoke && patience.more(began, || out.stream.look()) => {}
                Poll::Ready(Ok(())) | Poll::Pending => return Poll::Pending,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufWriter, duplex};

    use super::*;

    impl<S> Eager for BufWriter<S> {}

    fn patience() -> Patience {
        Patience {
            seat: Seat::default(),
            waiting: TaskTracker::new(),
            answered: None,
            hot: true,
        }
    }

    #[test]
    fn the_next_call_is_looked_for_while_calls_follow_one_another() {
        let began = Instant::now() + Duration::from_secs(60);
        let mut patience = patience();
        let mut looks = 0;
        assert!(patience.more(began, || {
            looks += 1;
            looks == 3
        }));
        assert!(patience.hot && patience.answered.is_none());
        // None came: the next that comes soon makes it look again.
        assert!(!patience.more(began, || false));
        assert!(!patience.more(began, || panic!("looked")));
        patience.answered = Some(Instant::now() + Duration::from_secs(60));
        patience.begin();
        assert!(patience.more(began, || true));
        patience.answered = Instant::now().checked_sub(SOON);
        patience.begin();
        assert!(!patience.more(began, || panic!("looked")));
    }

    #[test]
    fn nothing_else_waits_for_a_look() {
        let began = Instant::now() + Duration::from_secs(60);
        let mut patience = patience();
        let seat = patience.seat.clone();
        let mut other = Patience {
            seat: seat.clone(),
            ..self::patience()
        };
        assert!(patience.more(began, || !other.more(began, || panic!("two look"))));
        let request = patience.waiting.token();
        assert!(!patience.more(began, || panic!("a request waits")));
        drop(request);
        let past = Instant::now()
            .checked_sub(2 * TURN)
            .expect("after the boot");
        assert!(!patience.more(past, || panic!("its turn was over")));
        assert!(!seat.0.load(Ordering::Acquire));
    }

    /// Counts how often it is woken.
    #[derive(Default)]
    struct Count(AtomicU8);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_task_that_is_polled_is_not_woken_but_polled_again() {
        let (bell, count) = (Arc::<Bell>::default(), Arc::<Count>::default());
        let (waker, task) = (
            Waker::from(Arc::clone(&bell)),
            Waker::from(Arc::clone(&count)),
        );
        let mut polls = 0;
        let polled = bell.poll(&waker, &task, |cx| -> Poll<()> {
            polls += 1;
            if polls < 3 {
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        });
        assert!(polled.is_pending());
        assert_eq!((polls, count.0.load(Ordering::Relaxed)), (3, 0));
        waker.wake_by_ref();
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        // One that never has enough lets others have their turn.
        let polled = bell.poll(&waker, &task, |cx| -> Poll<()> {
            cx.waker().wake_by_ref();
            Poll::Pending
        });
        assert!(polled.is_pending());
        assert_eq!(count.0.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn a_stream_that_holds_back_is_made_to_write() {
        let (ours, mut theirs) = duplex(64);
        let mut stream = Gathering::new(BufWriter::new(ours));
        let driver = std::future::pending::<io::Result<()>>();
        let driver = stream.drive(driver, Seat::default(), TaskTracker::new());
        stream.write_all(b"answer").await.expect("taken");
        let mut answer = [0; 6];
        tokio::select! {
            ended = driver => panic!("the driver ended: {ended:?}"),
            read = theirs.read_exact(&mut answer) => assert_eq!(read.expect("an answer"), 6),
        }
        assert_eq!(&answer, b"answer");
    }
}
