//! What is remembered between two questions: processor time to make rates of, sizes of layers, and
//! whether anybody asks at all.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use lighter_snapshotter::Usage;

use super::cgroup::Cgroup;

/// Time between two samples unless the configuration says otherwise.
const DEFAULT_PERIOD: Duration = Duration::from_secs(1);
/// Time that samples are kept unless the configuration says otherwise.
const DEFAULT_RETENTION: Duration = Duration::from_secs(120);
/// Shortest time between two samples.
const MIN_PERIOD: Duration = Duration::from_millis(100);

/// Processor time at a moment.
#[derive(Debug, Clone, Copy)]
struct Point {
    at: Instant,
    usage_ns: u64,
}

/// What a layer takes, and when that was found out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layer {
    pub(crate) usage: Usage,
    pub(crate) at: SystemTime,
    measured: Instant,
}

/// What is remembered of one container or pod.
#[derive(Debug, Default)]
struct Entry {
    /// Where it is measured, with the process that it was found by.
    cgroup: Option<(u32, Arc<Cgroup>)>,
    points: VecDeque<Point>,
    layer: Option<Layer>,
}

/// Memory of the statistics, by container and pod id.
#[derive(Debug)]
pub(crate) struct History {
    /// Time between two samples.
    pub(crate) period: Duration,
    retention: Duration,
    /// How old a layer's size may be.
    pub(crate) layer_period: Duration,
    entries: Mutex<HashMap<String, Entry>>,
    asked: Mutex<Option<Instant>>,
}

impl History {
    /// Empty; `None` for what the configuration leaves open.
    pub(crate) fn new(
        period: Option<Duration>,
        retention: Option<Duration>,
        layer_period: Duration,
    ) -> Self {
        Self {
            period: period.unwrap_or(DEFAULT_PERIOD).max(MIN_PERIOD),
            retention: retention.unwrap_or(DEFAULT_RETENTION),
            layer_period,
            entries: Mutex::default(),
            asked: Mutex::default(),
        }
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that somebody asks: samples are taken until nobody has for the time they are kept.
    pub(crate) fn ask(&self) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        *asked = Some(Instant::now());
    }

    /// Whether somebody asked lately.
    pub(crate) fn is_asked(&self) -> bool {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.is_some_and(|at| at.elapsed() < self.retention)
    }

    /// The cgroup of a container, found once for each process.
    pub(crate) fn cgroup(&self, id: &str, pid: u32) -> Option<Arc<Cgroup>> {
        if let Some(entry) = self.entries().get(id)
            && let Some((known, cgroup)) = &entry.cgroup
            && *known == pid
        {
            return Some(Arc::clone(cgroup));
        }
        let cgroup = Arc::new(Cgroup::of(pid, id)?);
        let mut entries = self.entries();
        let entry = entries.entry(id.to_owned()).or_default();
        entry.cgroup = Some((pid, Arc::clone(&cgroup)));
        Some(cgroup)
    }

    /// Remembers processor time. One that is less than before is a new life.
    pub(crate) fn note(&self, id: &str, usage_ns: u64) {
        let now = Instant::now();
        let mut entries = self.entries();
        let points = &mut entries.entry(id.to_owned()).or_default().points;
        if points.back().is_some_and(|last| last.usage_ns > usage_ns) {
            points.clear();
        }
        points.push_back(Point { at: now, usage_ns });
        // The last one beyond the time kept still gives a rate.
        while points.len() > 2 && now.duration_since(points[1].at) > self.retention {
            points.pop_front();
        }
        let most = usize::try_from(self.retention.as_millis() / self.period.as_millis().max(1));
        let most = most.unwrap_or(usize::MAX).max(2);
        while points.len() > most {
            points.pop_front();
        }
    }

    /// Cores in use, in billionths, over the last period; `None` before there are two samples.
    pub(crate) fn rate(&self, id: &str) -> Option<u64> {
        let entries = self.entries();
        let points = &entries.get(id)?.points;
        let last = points.back()?;
        // Not the sample just before, which may be a moment old: one from a period ago.
        let enough = self.period / 2;
        let first = points
            .iter()
            .rev()
            .skip(1)
            .find(|p| last.at.duration_since(p.at) >= enough)?;
        let passed = last.at.duration_since(first.at).as_nanos();
        let used = u128::from(last.usage_ns.saturating_sub(first.usage_ns));
        u64::try_from(used * 1_000_000_000 / passed.max(1)).ok()
    }

    /// Remembers the size of a container's layer.
    pub(crate) fn note_layer(&self, id: &str, usage: Usage) -> Layer {
        let layer = Layer {
            usage,
            at: SystemTime::now(),
            measured: Instant::now(),
        };
        self.entries().entry(id.to_owned()).or_default().layer = Some(layer);
        layer
    }

    /// The size of a container's layer as last measured.
    pub(crate) fn layer(&self, id: &str) -> Option<Layer> {
        self.entries().get(id)?.layer
    }

    /// Whether the size is missing or too old.
    pub(crate) fn layer_is_due(&self, id: &str) -> bool {
        self.layer(id)
            .is_none_or(|l| l.measured.elapsed() >= self.layer_period)
    }

    /// Forgets everything but these.
    pub(crate) fn keep(&self, ids: &HashSet<String>) {
        self.entries().retain(|id, _| ids.contains(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(period: Duration) -> History {
        History::new(Some(period), None, Duration::ZERO)
    }

    #[test]
    fn a_rate_needs_two_samples() {
        let history = history(MIN_PERIOD);
        history.note("a", 0);
        assert_eq!(history.rate("a"), None);
        std::thread::sleep(MIN_PERIOD);
        // Half of one core.
        history.note("a", 50_000_000);
        let rate = history.rate("a").unwrap();
        assert!((1..=500_000_000).contains(&rate), "{rate}");
        // Two samples at once are no rate; the older one still is.
        history.note("a", 50_000_000);
        assert!(history.rate("a").unwrap() > 0);
    }

    #[test]
    fn a_new_life_starts_over() {
        let history = history(MIN_PERIOD);
        history.note("a", 100);
        history.note("a", 5);
        assert_eq!(history.rate("a"), None);
        history.keep(&HashSet::new());
        assert!(history.entries().is_empty());
    }

    #[test]
    fn sampling_ends_when_nobody_asks() {
        let history = History::new(None, Some(Duration::ZERO), Duration::ZERO);
        assert!(!history.is_asked());
        history.ask();
        assert!(!history.is_asked(), "kept for no time at all");
    }

    #[test]
    fn a_layers_size_ages() {
        let history = History::new(None, None, Duration::from_secs(60));
        assert!(history.layer_is_due("a"));
        history.note_layer("a", Usage::default());
        assert!(!history.layer_is_due("a"));
    }
}
