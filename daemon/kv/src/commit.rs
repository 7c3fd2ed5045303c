//! Group commit: one writer lock, one committer thread, tickets released together.
//!
//! ```text
//! update ──lock──► apply batch n ──► ticket(n) ──wait──────────────► released
//!                     │                                                 ▲
//!                     └─ wake ─► committer: sync, then `durable = n' ≥ n`┘
//! ```
//!
//! The committer is woken by who waits for a ticket or drops it. Batches applied while the committer
//! syncs share its next sync. Hooks of a batch run on the
//! committer, in the order of the batches, after its sync and before its ticket is released. A
//! failed or panicking write or sync stops the database: what is on disk is no longer known, so
//! every pending and later ticket fails.
//!
//! The thread ends when the last handle is dropped, after a last sync of what was applied.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::ticket::{Durable, Progress, Wake};
use crate::{Backend, Change, Error, Hook, Key, Value};

/// After this long without a commit the backend may tidy up.
const SETTLE_AFTER: Duration = Duration::from_secs(5);
/// How often the free space is looked at while there are commits.
const SPACE_CHECK: Duration = Duration::from_millis(200);
/// With less than this free, in bytes, only batches that remove are accepted.
const LOW_SPACE_BYTES: u64 = 4 << 20;

pub(crate) struct Shared {
    backend: Box<dyn Backend>,
    writer: Mutex<()>,
    /// Number of the newest applied batch. Written under `writer`.
    applied: AtomicU64,
    /// Hooks of batches that are not durable yet, with their batch's number. Pushed under `writer`.
    hooks: Mutex<VecDeque<(u64, Hook)>>,
    progress: Arc<Progress>,
    failed: OnceLock<String>,
    /// Sender: whoever sees the first failure. Receivers: those who wait for one. Closed when the
    /// database is gone.
    stopped: watch::Sender<()>,
    low_space: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("backend", &self.backend)
            .field("applied", &self.applied)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

/// The last handle's drop ends the committer.
#[derive(Debug)]
pub(crate) struct Handle {
    shared: Arc<Shared>,
    committer: Option<JoinHandle<()>>,
}

impl std::ops::Deref for Handle {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        lock(&self.shared.progress.wake.0).stop = true;
        self.shared.progress.wake.1.notify_one();
        let Some(committer) = self.committer.take() else {
            return;
        };
        // A hook may hold the last handle; the committer cannot wait for itself.
        if committer.thread().id() != std::thread::current().id() {
            let _ = committer.join();
        }
    }
}

impl Handle {
    pub(crate) fn start(backend: Box<dyn Backend>) -> Result<Self, Error> {
        let shared = Arc::new(Shared {
            backend,
            writer: Mutex::new(()),
            applied: AtomicU64::new(0),
            hooks: Mutex::default(),
            progress: Arc::default(),
            failed: OnceLock::new(),
            stopped: watch::channel(()).0,
            low_space: AtomicBool::new(false),
        });
        let worker = shared.clone();
        let committer = std::thread::Builder::new()
            .name("committer".to_owned())
            .spawn(move || {
                let mut space_checked = Instant::now();
                worker.check_space();
                while worker.commit_next() {
                    if space_checked.elapsed() >= SPACE_CHECK {
                        worker.check_space();
                        space_checked = Instant::now();
                    }
                }
            })
            .map_err(|source| Error::Io {
                operation: "start the committer",
                source,
            })?;
        Ok(Self {
            shared,
            committer: Some(committer),
        })
    }
}

impl Shared {
    pub(crate) fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    pub(crate) fn writer(&self) -> Writer<'_> {
        Writer {
            shared: self,
            _guard: lock(&self.writer),
        }
    }

    pub(crate) fn applied(&self) -> u64 {
        self.applied.load(Ordering::Acquire)
    }

    /// Why the database stopped, once it did.
    pub(crate) async fn stopped(&self) -> String {
        let mut stopped = self.stopped.subscribe();
        loop {
            if let Some(reason) = self.failed.get() {
                return reason.clone();
            }
            if stopped.changed().await.is_err() {
                return "the database was closed".to_owned();
            }
        }
    }

    /// Waits for work, then syncs once. False when the thread should end.
    fn commit_next(&self) -> bool {
        let Some(stop) = self.wait_for_work() else {
            return match guarded("checkpoint", || self.backend.settle()) {
                Ok(()) => true,
                Err(error) => {
                    self.fail(&error);
                    false
                }
            };
        };
        let target = self.applied.load(Ordering::Acquire);
        match guarded("sync", || self.backend.sync()) {
            Ok(()) => {
                self.run_hooks(target);
                self.progress.advance(target);
            }
            Err(error) => {
                self.fail(&error);
                return false;
            }
        }
        if stop && let Err(error) = guarded("close", || self.backend.close()) {
            // Nothing is lost: the next open finds it in the journal.
            let error = lighter_proto::errdefs::render(&error);
            tracing::warn!(%error, "the database was not closed in order");
        }
        !stop
    }

    /// Sleeps until there is work, and says whether it is the last; `None` when nothing came for
    /// a while and the backend has something to tidy up.
    fn wait_for_work(&self) -> Option<bool> {
        let idle = |wake: &mut Wake| !wake.work && !wake.stop;
        let unsettled = self.backend.unsettled();
        let (lock_of, sleeper) = &self.progress.wake;
        let wake = lock(lock_of);
        let mut wake = if unsettled {
            let (wake, waited) = sleeper
                .wait_timeout_while(wake, SETTLE_AFTER, idle)
                .unwrap_or_else(PoisonError::into_inner);
            if waited.timed_out() {
                return None;
            }
            wake
        } else {
            sleeper
                .wait_while(wake, idle)
                .unwrap_or_else(PoisonError::into_inner)
        };
        wake.work = false;
        Some(wake.stop)
    }

    fn run_hooks(&self, target: u64) {
        loop {
            let hook = {
                let mut hooks = lock(&self.hooks);
                match hooks.front() {
                    Some((number, _)) if *number <= target => hooks.pop_front(),
                    _ => None,
                }
            };
            let Some((_, hook)) = hook else { return };
            if catch_unwind(AssertUnwindSafe(hook)).is_err() {
                tracing::error!("a hook on a durable change panicked");
            }
        }
    }

    fn fail(&self, error: &Error) {
        let reason = lighter_proto::errdefs::render(error);
        tracing::error!(%reason, "database failed; no more writes are accepted");
        self.progress.fail(&reason);
        let _ = self.failed.set(reason);
        self.stopped.send_replace(());
    }

    fn check_space(&self) {
        let low = self
            .backend
            .free_bytes()
            .is_some_and(|free| free < LOW_SPACE_BYTES);
        if low != self.low_space.swap(low, Ordering::Relaxed) {
            tracing::warn!(low, "room for the database");
        }
    }
}

/// Runs a backend's call with its panics turned into errors: sled panics on some damage.
fn guarded<T>(
    operation: &'static str,
    call: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| {
        Err(Error::Io {
            operation,
            source: io::Error::other("the database panicked"),
        })
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The right to write, held for one change.
pub(crate) struct Writer<'a> {
    shared: &'a Shared,
    _guard: MutexGuard<'a, ()>,
}

impl Writer<'_> {
    pub(crate) fn apply(
        &mut self,
        batch: &BTreeMap<Key, Option<Value>>,
        hooks: Vec<Hook>,
    ) -> Result<Durable, Error> {
        let shared = self.shared;
        if let Some(reason) = shared.failed.get() {
            return Err(Error::Stopped {
                reason: reason.clone(),
            });
        }
        if batch.is_empty() && hooks.is_empty() {
            return Ok(self.ticket());
        }
        if shared.low_space.load(Ordering::Relaxed) && batch.values().any(Option::is_some) {
            // Removing is how room is made again; look anew, the disk may have been cleared.
            shared.check_space();
            if shared.low_space.load(Ordering::Relaxed) {
                return Err(Error::Full);
            }
        }
        if !batch.is_empty() {
            let changes: Vec<Change<'_>> = batch
                .iter()
                .map(|(key, value)| (key.as_slice(), value.as_deref()))
                .collect();
            if let Err(error) = guarded("write", || shared.backend.apply(&changes)) {
                shared.fail(&error);
                return Err(error);
            }
        }
        let number = shared.applied.fetch_add(1, Ordering::Release) + 1;
        lock(&shared.hooks).extend(hooks.into_iter().map(|hook| (number, hook)));
        Ok(self.ticket())
    }

    pub(crate) fn ticket(&self) -> Durable {
        let number = self.shared.applied.load(Ordering::Acquire);
        Durable::new(number, self.shared.progress.clone())
    }
}
