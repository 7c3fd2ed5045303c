//! How often the network operations ran, failed, and how long they took.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// An operation as Kubernetes' dashboards name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Attaching a pod.
    Setup,
    /// Detaching a pod.
    Teardown,
    /// Asking for readiness.
    Status,
}

/// Counters of every operation, for `network_plugin_operations_*`.
#[derive(Debug, Default)]
pub struct Metrics {
    counters: [Counters; 3],
}

#[derive(Debug, Default)]
struct Counters {
    total: AtomicU64,
    errors: AtomicU64,
    nanoseconds: AtomicU64,
}

/// One operation's counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OperationStats {
    /// Value of the label `operation_type`.
    pub operation: &'static str,
    /// Times it ran to an end.
    pub total: u64,
    /// Of these, failures.
    pub errors: u64,
    /// Time spent, in seconds.
    pub seconds: f64,
}

impl Metrics {
    /// The counters now.
    #[must_use]
    pub fn snapshot(&self) -> [OperationStats; 3] {
        let read = |index: usize, operation| {
            let counters: &Counters = &self.counters[index];
            let nanoseconds = counters.nanoseconds.load(Ordering::Relaxed);
            OperationStats {
                operation,
                total: counters.total.load(Ordering::Relaxed),
                errors: counters.errors.load(Ordering::Relaxed),
                seconds: std::time::Duration::from_nanos(nanoseconds).as_secs_f64(),
            }
        };
        [
            read(0, "setup_pod"),
            read(1, "teardown_pod"),
            read(2, "status"),
        ]
    }

    pub(super) fn start(&self, operation: Operation) -> Timer<'_> {
        let index = match operation {
            Operation::Setup => 0,
            Operation::Teardown => 1,
            Operation::Status => 2,
        };
        Timer {
            counters: &self.counters[index],
            started: Instant::now(),
        }
    }
}

/// A running operation.
pub(super) struct Timer<'a> {
    counters: &'a Counters,
    started: Instant,
}

impl Timer<'_> {
    pub(super) fn done(self, succeeded: bool) {
        let nanoseconds = u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let add = |counter: &AtomicU64, n| counter.fetch_add(n, Ordering::Relaxed);
        add(&self.counters.total, 1);
        add(&self.counters.errors, u64::from(!succeeded));
        add(&self.counters.nanoseconds, nanoseconds);
    }
}
