//! What each knob does to when collections run. No time passes here: the scheduler says how long it
//! wants to wait, and is told when that is over.

use std::collections::BTreeMap;
use std::time::SystemTime;

use lighter_store::content::Local;
use lighter_store::events::Exchange;
use lighter_store::metadata::{Descriptor, Image, SharingPolicy};
use lighter_store::{Digest, Labels, Namespace, Scope};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::*;

/// How long a test waits for the scheduler before it has failed.
const PATIENCE: Duration = Duration::from_secs(20);

/// A wait of the scheduler's that is not over.
#[derive(Debug)]
pub(super) struct Nap {
    length: Duration,
    wake: oneshot::Sender<()>,
}

impl Nap {
    fn over(self) {
        // Nobody listens when something else ended the wait.
        let _ended = self.wake.send(());
    }
}

/// Waits until the test lets it end.
pub(super) async fn nap(naps: &mpsc::UnboundedSender<Nap>, length: Duration) {
    let (wake, woken) = oneshot::channel();
    let told = naps.send(Nap { length, wake });
    if told.is_err() || woken.await.is_err() {
        std::future::pending::<()>().await;
    }
}

struct Bench {
    collector: Collector,
    scope: Scope,
    naps: mpsc::UnboundedReceiver<Nap>,
    images: u32,
    _job: JoinSet<()>,
    _dir: tempfile::TempDir,
}

impl Bench {
    async fn new(config: Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        let open = move || {
            Db::open(
                lighter_kv::Db::in_memory().unwrap(),
                Arc::new(Local::open(&root).unwrap()),
                BTreeMap::new(),
                Exchange::new(),
                SharingPolicy::Shared,
            )
            .unwrap()
        };
        let db = tokio::task::spawn_blocking(open).await.unwrap();
        let (sender, naps) = mpsc::unbounded_channel();
        let collector = Collector::by(Clock::Told(sender), db, config);
        let mut job = JoinSet::new();
        job.spawn(collector.clone().run(CancellationToken::new()));
        Self {
            collector,
            scope: Scope::new(Namespace::new("n").unwrap()),
            naps,
            images: 0,
            _job: job,
            _dir: dir,
        }
    }

    /// The scheduler has had its first run and waits for something to do; and that wait.
    async fn started(config: Config) -> (Self, Nap) {
        let mut bench = Self::new(config).await;
        bench.nap().await.over();
        let look = bench.nap().await;
        assert_eq!((look.length, bench.runs()), (LOOK_EVERY, 1));
        (bench, look)
    }

    /// What it waits for next.
    async fn nap(&mut self) -> Nap {
        let next = tokio::time::timeout(PATIENCE, self.naps.recv()).await;
        next.expect("the scheduler waits").expect("it runs")
    }

    /// That it goes on waiting for what it waited for.
    async fn assert_waits_on(&mut self) {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        let next = self.naps.try_recv();
        assert!(next.is_err(), "{next:?}");
    }

    fn runs(&self) -> u64 {
        self.collector.inner.begun.load(Ordering::SeqCst)
    }

    /// How long the last run took, as runs are counted.
    async fn took(&self) -> Duration {
        let run = self.collector.inner.run.lock().await;
        let summary = run.as_ref().unwrap().as_ref().unwrap();
        summary.took.max(LEAST_RUN)
    }

    /// Changes something without removing anything.
    async fn change(&mut self) -> String {
        self.images += 1;
        let name = format!("image-{}", self.images);
        let image = Image {
            name: name.clone(),
            labels: Labels::new(),
            target: Descriptor {
                media_type: "m".to_owned(),
                digest: Digest::of(name.as_bytes()),
                size_bytes: 1,
                annotations: Labels::new(),
            },
            created_at: SystemTime::UNIX_EPOCH,
            updated_at: SystemTime::UNIX_EPOCH,
        };
        let images = self.collector.inner.db.images();
        images.create(&self.scope, image, None).await.unwrap();
        name
    }

    async fn remove(&mut self) {
        let name = self.change().await;
        let images = self.collector.inner.db.images();
        images.delete(&self.scope, &name, None).await.unwrap();
    }

    /// Removes something and returns the wait between runs that follows.
    async fn gathering(&mut self) -> Nap {
        self.remove().await;
        let reclaim = self.nap().await;
        assert_eq!(reclaim.length, RECLAIM_DELAY);
        reclaim.over();
        self.nap().await
    }

    /// The wait of `schedule_delay`, and then a run.
    async fn runs_after(&mut self, delay: Duration) {
        let before = self.runs();
        let triggered = self.nap().await;
        assert_eq!((triggered.length, self.runs()), (delay, before));
        triggered.over();
        let look = self.nap().await;
        assert_eq!((look.length, self.runs()), (LOOK_EVERY, before + 1));
    }
}

#[tokio::test]
async fn the_first_run_waits_for_startup_delay() {
    let startup_delay = Duration::from_secs(3);
    let mut bench = Bench::new(Config {
        startup_delay,
        ..Config::default()
    })
    .await;
    let start = bench.nap().await;
    assert_eq!((start.length, bench.runs()), (startup_delay, 0));
    bench.assert_waits_on().await;
    start.over();
    assert_eq!(bench.nap().await.length, LOOK_EVERY);
    assert_eq!(bench.runs(), 1);
}

#[tokio::test]
async fn runs_take_no_more_than_the_share_of_pause_threshold() {
    // The highest is 0.5, whatever is asked for.
    for (pause_threshold, share) in [(0.02, 0.02), (0.25, 0.25), (0.9, 0.5)] {
        let (mut bench, _look) = Bench::started(Config {
            pause_threshold,
            ..Config::default()
        })
        .await;
        let took = bench.took().await;
        let wait = bench.gathering().await;
        let taken = took.as_secs_f64() / (took + wait.length).as_secs_f64();
        assert!(
            (taken - share).abs() < 1e-4,
            "{pause_threshold}: {taken} of the time, by {took:?} and {:?}",
            wait.length
        );
        wait.over();
        bench.runs_after(Duration::ZERO).await;
    }
}

#[tokio::test]
async fn as_many_removals_as_deletion_threshold_cut_the_wait_short() {
    let (mut bench, _look) = Bench::started(Config {
        deletion_threshold: 3,
        ..Config::default()
    })
    .await;
    let _not_over = bench.gathering().await;
    bench.remove().await;
    bench.assert_waits_on().await;
    bench.remove().await;
    bench.runs_after(Duration::ZERO).await;
}

#[tokio::test]
async fn without_deletion_threshold_no_removals_cut_it_short() {
    let (mut bench, _look) = Bench::started(Config::default()).await;
    let wait = bench.gathering().await;
    for _ in 0..200 {
        bench.remove().await;
    }
    bench.assert_waits_on().await;
    wait.over();
    bench.runs_after(Duration::ZERO).await;
}

#[tokio::test]
async fn as_many_changes_as_mutation_threshold_make_a_run() {
    let (mut bench, look) = Bench::started(Config {
        mutation_threshold: 4,
        ..Config::default()
    })
    .await;
    for _ in 0..3 {
        bench.change().await;
    }
    assert_eq!(bench.collector.inner.db.counts().mutations, 3);
    look.over();
    // Looked, and found too little.
    let look = bench.nap().await;
    assert_eq!((look.length, bench.runs()), (LOOK_EVERY, 1));
    bench.change().await;
    look.over();
    let wait = bench.nap().await;
    assert_ne!(wait.length, LOOK_EVERY);
    wait.over();
    bench.runs_after(Duration::ZERO).await;
}

#[tokio::test]
async fn a_run_that_was_triggered_waits_for_schedule_delay() {
    let schedule_delay = Duration::from_secs(7);
    let (mut bench, _look) = Bench::started(Config {
        schedule_delay,
        ..Config::default()
    })
    .await;
    bench.gathering().await.over();
    bench.runs_after(schedule_delay).await;
}
