//! How often plugins are called, how long they take, and how often they fail.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Calls of one plugin for one kind of request.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CallStats {
    /// Calls made.
    pub calls: u64,
    /// Of these, failures.
    pub errors: u64,
    /// Time spent, in seconds.
    pub seconds: f64,
}

/// Calls by plugin and request, for `containerd_nri_plugin_*`.
#[derive(Debug, Default)]
pub struct Metrics {
    calls: Mutex<BTreeMap<(String, &'static str), CallStats>>,
}

impl Metrics {
    /// The counters now, by plugin and request.
    #[must_use]
    pub fn snapshot(&self) -> BTreeMap<(String, &'static str), CallStats> {
        let calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        calls.clone()
    }

    pub(super) fn record(&self, plugin: &str, request: &'static str, took: Duration, failed: bool) {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let stats = calls.entry((plugin.to_owned(), request)).or_default();
        stats.calls += 1;
        stats.errors += u64::from(failed);
        stats.seconds += took.as_secs_f64();
    }
}
