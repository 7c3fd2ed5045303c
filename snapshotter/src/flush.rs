//! One sync for all who wait for one.

use std::io;
use std::sync::{Condvar, Mutex, PoisonError};

/// Runs of a sync; a run serves everyone who asked before it began.
#[derive(Debug, Default)]
pub(crate) struct Flush {
    state: Mutex<State>,
    /// Told after every run.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    /// Runs begun so far; the number of the newest.
    begun: u64,
    /// Number of the newest run that succeeded.
    succeeded: u64,
}

impl Flush {
    /// Returns after a `sync` that began after this call did, made by this caller or another. Blocks.
    ///
    /// # Errors
    /// As `sync`; a failed run serves nobody else.
    pub(crate) fn run(&self, sync: impl Fn() -> io::Result<()>) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // The run under way may have passed by what was just written.
        let wanted = state.begun + 1;
        loop {
            if state.succeeded >= wanted {
                return Ok(());
            }
            if state.running {
                state = self
                    .ended
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.running = true;
            state.begun += 1;
            let number = state.begun;
            drop(state);
            let result = sync();
            state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.running = false;
            if result.is_ok() {
                state.succeeded = number;
            }
            self.ended.notify_all();
            return result;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn many_callers_share_few_runs_and_each_sees_one_that_began_after_it() {
        let (flush, runs) = (Flush::default(), AtomicU64::new(0));
        let written = AtomicU64::new(0);
        let on_disk = AtomicU64::new(0);
        let start = Barrier::new(8);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    start.wait();
                    for _ in 0..50 {
                        let mine = written.fetch_add(1, Ordering::SeqCst) + 1;
                        let sync = || {
                            runs.fetch_add(1, Ordering::SeqCst);
                            let seen = written.load(Ordering::SeqCst);
                            thread::yield_now();
                            on_disk.fetch_max(seen, Ordering::SeqCst);
                            Ok(())
                        };
                        flush.run(sync).expect("sync");
                        assert!(on_disk.load(Ordering::SeqCst) >= mine);
                    }
                });
            }
        });
        assert!(runs.load(Ordering::SeqCst) <= 400);
    }

    #[test]
    fn a_failed_run_serves_nobody() {
        let flush = Flush::default();
        assert!(flush.run(|| Err(io::ErrorKind::Other.into())).is_err());
        let mut ran = false;
        let cell = std::cell::RefCell::new(&mut ran);
        flush
            .run(|| {
                **cell.borrow_mut() = true;
                Ok(())
            })
            .expect("sync");
        assert!(ran);
    }
}
