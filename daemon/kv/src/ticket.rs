//! Tickets: who waits for which change, and how far the committer is.
//!
//! A commit wakes those whose change it made durable and nobody else: with many at once, each wake-up
//! of somebody whose turn has not come would cost as much as his answer.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::Error;

/// How far the committer is, and who waits for it.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    state: Mutex<State>,
    /// The committer sleeps here; the flags say that there is work or that it should end.
    pub(crate) wake: (Mutex<Wake>, Condvar),
}

#[derive(Debug, Default)]
pub(crate) struct Wake {
    pub(crate) work: bool,
    pub(crate) stop: bool,
}

#[derive(Debug, Default)]
struct State {
    /// Changes up to this number are durable.
    durable: u64,
    /// Why nothing more will be.
    failed: Option<String>,
    /// Who waits, by the number of the change and a number of his own.
    waiting: BTreeMap<(u64, u64), Waker>,
    /// The last own number given out.
    last: u64,
}

impl Progress {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the committer make the change durable.
    fn call(&self, number: u64) {
        if !self.reached(number) {
            let wake = self.wake.0.lock();
            wake.unwrap_or_else(PoisonError::into_inner).work = true;
            self.wake.1.notify_one();
        }
    }

    /// Whether the change is durable.
    pub(crate) fn reached(&self, number: u64) -> bool {
        self.state().durable >= number
    }

    /// Releases the tickets of changes up to `number`.
    pub(crate) fn advance(&self, number: u64) {
        let released = {
            let mut state = self.state();
            state.durable = state.durable.max(number);
            let later = state.waiting.split_off(&(number + 1, 0));
            std::mem::replace(&mut state.waiting, later)
        };
        released.into_values().for_each(Waker::wake);
    }

    /// Fails every ticket that is not released, and all to come. Only the first reason counts.
    pub(crate) fn fail(&self, reason: &str) {
        let released = {
            let mut state = self.state();
            state.failed.get_or_insert_with(|| reason.to_owned());
            std::mem::take(&mut state.waiting)
        };
        released.into_values().for_each(Waker::wake);
    }
}

/// The promise that a change will be durable; await it before saying that the change stands.
///
/// Dropping it does not undo the change, and has it made durable as well.
#[derive(Debug)]
#[must_use = "a change is durable only when its ticket was awaited"]
pub struct Durable {
    number: u64,
    progress: Arc<Progress>,
    /// The committer knows, or need not.
    called: bool,
}

impl Drop for Durable {
    fn drop(&mut self) {
        self.call();
    }
}

impl Durable {
    pub(crate) fn new(number: u64, progress: Arc<Progress>) -> Self {
        Self {
            number,
            progress,
            called: false,
        }
    }

    fn call(&mut self) {
        if !std::mem::replace(&mut self.called, true) {
            self.progress.call(self.number);
        }
    }

    /// Leaves the change to the commit of a change that follows at once, and whose ticket is awaited:
    /// one for both.
    pub fn with_next(mut self) {
        self.called = true;
    }

    /// Waits until the change is on disk.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the commit failed.
    ///
    /// # Cancellation
    /// Safe to drop; the change stays applied and becomes durable with the next commit.
    pub async fn wait(mut self) -> Result<(), Error> {
        self.call();
        let waiting = Waiting {
            number: self.number,
            progress: &self.progress,
            own: None,
        };
        waiting.await
    }

    /// [`Durable::wait`] for code outside the async runtime.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the commit failed.
    pub fn wait_blocking(self) -> Result<(), Error> {
        let waker = Arc::new(Unpark(std::thread::current())).into();
        let mut context = Context::from_waker(&waker);
        let mut wait = std::pin::pin!(self.wait());
        loop {
            match wait.as_mut().poll(&mut context) {
                Poll::Ready(result) => return result,
                Poll::Pending => std::thread::park(),
            }
        }
    }
}

/// Wakes a thread that waits for a ticket.
struct Unpark(std::thread::Thread);

impl std::task::Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// A ticket that is being awaited.
struct Waiting<'a> {
    number: u64,
    progress: &'a Progress,
    /// Second half of its place among those who wait, once it has one.
    own: Option<u64>,
}

impl Future for Waiting<'_> {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.progress.state();
        if state.durable >= self.number {
            return Poll::Ready(Ok(()));
        }
        if let Some(reason) = &state.failed {
            return Poll::Ready(Err(Error::Stopped {
                reason: reason.clone(),
            }));
        }
        let own = self.own.unwrap_or_else(|| {
            state.last += 1;
            state.last
        });
        state
            .waiting
            .insert((self.number, own), context.waker().clone());
        drop(state);
        self.own = Some(own);
        Poll::Pending
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(own) = self.own {
            self.progress.state().waiting.remove(&(self.number, own));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl std::task::Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_commit_wakes_those_it_released_and_nobody_else() {
        let progress = Arc::new(Progress::default());
        let mut waiting = Vec::new();
        for number in 1..=3 {
            let ticket = Durable::new(number, progress.clone());
            let (count, mut wait) = (Arc::new(Count::default()), Box::pin(ticket.wait()));
            let waker = count.clone().into();
            assert!(
                wait.as_mut()
                    .poll(&mut Context::from_waker(&waker))
                    .is_pending()
            );
            waiting.push((count, wait));
        }
        progress.advance(2);
        let woken = waiting
            .iter()
            .map(|(count, _)| count.0.load(Ordering::Relaxed));
        assert_eq!(woken.collect::<Vec<_>>(), [1, 1, 0]);
        let (_, dropped) = waiting.pop().unwrap();
        drop(dropped);
        assert!(progress.state().waiting.is_empty());
        progress.fail("the disk");
        let late = Durable::new(3, progress.clone());
        assert!(matches!(late.wait_blocking(), Err(Error::Stopped { .. })));
        for (_, wait) in waiting {
            futures_ready(wait);
        }
    }

    #[test]
    fn the_committer_is_called_by_who_waits_or_gives_up_and_not_for_what_goes_with_the_next() {
        let progress = Arc::new(Progress::default());
        let called = || std::mem::take(&mut progress.wake.0.lock().unwrap().work);
        let ticket = || Durable::new(1, progress.clone());
        ticket().with_next();
        assert!(!called());
        drop(ticket());
        assert!(called());
        let mut wait = Box::pin(ticket().wait());
        assert!(!called());
        let pending = wait.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(pending.is_pending() && called());
        drop(wait);
        assert!(!called());
        progress.advance(1);
        drop(ticket());
        assert!(!called());
    }

    fn futures_ready(mut wait: Pin<Box<impl Future<Output = Result<(), Error>>>>) {
        let waker = Waker::noop();
        let ready = wait.as_mut().poll(&mut Context::from_waker(waker));
        assert!(
            matches!(ready, Poll::Ready(Ok(()))),
            "released before the failure"
        );
    }
}
