//! When collections run.
//!
//! ```text
//! start ─► startup delay ─► reconcile + collect ─► idle ──removal / mutations──► wait interval ─► collect
//!                                                   ▲                                           │
//!                                                   └───────────────────────────────────────────┘
//! ```
//!
//! As many removals as `deletion_threshold` says cut the interval short.
//!
//! What records gave up by themselves (a removed snapshot's directory) goes soon after, without a
//! collection. A failed run is repeated after the interval and a second.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lighter_store::metadata::Db;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::sweep::{self, Summary};
use super::{Collectable, Error, failed};

/// The least time that a run is counted with.
const LEAST_RUN: Duration = Duration::from_millis(5);
/// How long a failed run is waited after, besides the interval.
const FAILED_PAUSE: Duration = Duration::from_secs(1);
/// How long removals gather before what they gave up is removed below.
const RECLAIM_DELAY: Duration = Duration::from_millis(20);
/// How often the counts are looked at when nothing was removed.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// The scheduler's knobs (`io.containerd.gc.v1.scheduler`).
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Share of time that collections may take, at most 0.5.
    pub pause_threshold: f64,
    /// Removals that start a run at once; 0: a removal only makes the next scheduled run happen.
    pub deletion_threshold: u64,
    /// Changes that make the next run happen.
    pub mutation_threshold: u64,
    /// How long a run that was triggered waits.
    pub schedule_delay: Duration,
    /// When the first run is.
    pub startup_delay: Duration,
    /// After a database was rebuilt from an export: nothing below is removed for want of a record.
    pub keep_unknown: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            pause_threshold: 0.02,
            deletion_threshold: 0,
            mutation_threshold: 100,
            schedule_delay: Duration::ZERO,
            startup_delay: Duration::from_millis(100),
            keep_unknown: false,
        }
    }
}

/// How long to wait before the next run.
#[derive(Debug, Clone, Copy)]
enum Pause {
    /// Removals may cut it short.
    Interval(Duration),
    /// After a run that failed: in any case.
    Failed(Duration),
}

/// What the scheduler waits by.
#[derive(Debug)]
enum Clock {
    Real,
    /// Whoever has the other end says when a wait is over.
    #[cfg(test)]
    Told(tokio::sync::mpsc::UnboundedSender<tests::Nap>),
}

impl Clock {
    async fn sleep(&self, length: Duration) {
        match self {
            Self::Real => tokio::time::sleep(length).await,
            #[cfg(test)]
            Self::Told(naps) => tests::nap(naps, length).await,
        }
    }
}

/// A handle on the collector; clones share it.
#[derive(Debug, Clone)]
pub struct Collector {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    db: Db,
    config: Config,
    clock: Clock,
    engines: Mutex<Vec<Arc<dyn Collectable>>>,
    /// Held by the run under way; holds the result of the last.
    run: tokio::sync::Mutex<Option<Result<Summary, Error>>>,
    /// Runs begun.
    begun: AtomicU64,
    /// When the run under way began.
    since: Mutex<Option<Instant>>,
    /// Owns runs whose callers went away.
    tasks: TaskTracker,
}

impl Collector {
    /// A collector of `db`; nothing runs before [`Collector::run`] or [`Collector::run_now`].
    #[must_use]
    pub fn new(db: Db, config: Config) -> Self {
        Self::by(Clock::Real, db, config)
    }

    fn by(clock: Clock, db: Db, config: Config) -> Self {
        Self {
            inner: Arc::new(Inner {
                db,
                config,
                clock,
                engines: Mutex::default(),
                run: tokio::sync::Mutex::default(),
                begun: AtomicU64::new(0),
                since: Mutex::default(),
                tasks: TaskTracker::new(),
            }),
        }
    }

    /// Has the objects of an engine collected as well.
    pub fn register(&self, engine: Arc<dyn Collectable>) {
        self.engines().push(engine);
    }

    fn engines(&self) -> std::sync::MutexGuard<'_, Vec<Arc<dyn Collectable>>> {
        let engines = self.inner.engines.lock();
        engines.unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one whole collection that begins after this call, and waits for it. Callers that wait at
    /// the same time share one.
    ///
    /// # Errors
    /// `gc failed`, with the reason.
    ///
    /// # Cancellation
    /// The collection goes on.
    pub async fn run_now(&self) -> Result<Summary, Error> {
        let asked = self.inner.begun.load(Ordering::SeqCst);
        let this = self.clone();
        let job = self.inner.tasks.spawn(async move {
            let mut run = this.inner.run.lock().await;
            if this.inner.begun.load(Ordering::SeqCst) > asked
                && let Some(done) = run.as_ref()
            {
                return done.clone();
            }
            this.inner.begun.fetch_add(1, Ordering::SeqCst);
            this.mark_since(Some(Instant::now()));
            let result = this.collect().await;
            this.mark_since(None);
            *run = Some(result.clone());
            result
        });
        job.await.unwrap_or_else(|error| {
            Err(Error {
                kind: lighter_proto::errdefs::ErrorKind::Internal,
                reason: error.to_string(),
            })
        })
    }

    fn mark_since(&self, since: Option<Instant>) {
        let slot = self.inner.since.lock();
        *slot.unwrap_or_else(PoisonError::into_inner) = since;
    }

    /// For how long a collection has been under way.
    #[must_use]
    pub fn under_way(&self) -> Option<Duration> {
        let since = self.inner.since.lock();
        since
            .unwrap_or_else(PoisonError::into_inner)
            .map(|since| since.elapsed())
    }

    async fn collect(&self) -> Result<Summary, Error> {
        let began = Instant::now();
        let counted = self.inner.db.take_counts();
        let engines = self.engines().clone();
        let db = self.inner.db.clone();
        let swept = blocking(move || sweep::sweep(&db, &engines)).await;
        let (mut summary, unkept) = swept.map_err(|error| {
            self.inner.db.give_back(counted);
            failed(error)
        })?;
        sweep::remove_items(&unkept, &mut summary).await;
        summary.reclaimed = self.inner.db.reclaim().await;
        summary.took = began.elapsed();
        tracing::debug!(took = ?summary.took, removed = ?summary.removed, "collection");
        Ok(summary)
    }

    /// Runs `work` with the records and the engines on a thread that may block.
    pub(super) async fn look<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Db, &[Arc<dyn Collectable>]) -> Result<T, lighter_store::Error>
        + Send
        + 'static,
    ) -> Result<T, Error> {
        let (db, engines) = (self.inner.db.clone(), self.engines().clone());
        let done = blocking(move || work(&db, &engines)).await;
        done.map_err(failed)
    }

    /// The records.
    pub(super) fn db(&self) -> &Db {
        &self.inner.db
    }

    /// Schedules collections until `stop`; then waits for the one under way.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.schedule() => {}
        }
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    async fn schedule(&self) {
        let Inner {
            db, config, clock, ..
        } = &*self.inner;
        clock.sleep(config.startup_delay).await;
        if !config.keep_unknown
            && let Err(error) = db.reconcile().await
        {
            tracing::warn!(%error, "stores are not reconciled");
        }
        let mut pause = self.timed().await;
        loop {
            // Not cancel-safe branches do not matter: both only wake the loop.
            tokio::select! {
                () = db.removed() => clock.sleep(RECLAIM_DELAY).await,
                () = clock.sleep(LOOK_EVERY) => {}
            }
            if !config.keep_unknown {
                db.reclaim().await;
            }
            let counts = db.counts();
            if counts.removals == 0 && counts.mutations < config.mutation_threshold {
                continue;
            }
            match pause {
                Pause::Interval(wait) => self.gather(wait).await,
                // What failed is not hurried: removals ask for it at once again and again.
                Pause::Failed(wait) => clock.sleep(wait).await,
            }
            clock.sleep(config.schedule_delay).await;
            pause = self.timed().await;
        }
    }

    /// Waits until `wait` is over, or until there are as many removals as start a run at once.
    async fn gather(&self, wait: Duration) {
        let Inner {
            db, config, clock, ..
        } = &*self.inner;
        let mut end = std::pin::pin!(clock.sleep(wait));
        while config.deletion_threshold == 0 || db.counts().removals < config.deletion_threshold {
            tokio::select! {
                () = db.removed() => {}
                () = &mut end => break,
            }
        }
    }

    /// Runs once; returns how long to wait before the next.
    async fn timed(&self) -> Pause {
        let outcome = self.run_now().await;
        let share = self.inner.config.pause_threshold.clamp(0.001, 0.5);
        let interval = |took: Duration| took.mul_f64(1.0 / share) - took;
        match outcome {
            Ok(summary) => Pause::Interval(interval(summary.took.max(LEAST_RUN))),
            Err(error) => {
                tracing::warn!(%error, "a collection failed; it is tried again");
                Pause::Failed(interval(LEAST_RUN) + FAILED_PAUSE)
            }
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, lighter_store::Error> + Send + 'static,
) -> Result<T, lighter_store::Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| {
        Err(lighter_store::Error::Io {
            operation: "collect in",
            path: std::path::PathBuf::new(),
            source: std::io::Error::other(error),
        })
    })
}

#[cfg(test)]
mod tests;
