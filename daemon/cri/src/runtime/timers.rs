//! How long calls take and how often things happen, for the daemon's metrics page: `containerd_cri_*`
//! and `containerd_nri_*`, under upstream's names. Only calls that succeed are timed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::cni::Metrics as Network;
use crate::error::Result;
use crate::image::PullCounts;
use crate::nri;
use crate::plugin::Plugin;
use crate::store::Container;

/// Upper bounds of the buckets, in seconds.
const BOUNDS: [f64; 11] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// What is timed, and what the page says of it.
const HELP: [(&str, &str); 14] = [
    ("container_checkpoint", "time to checkpoint a container"),
    ("container_create", "time to create a container"),
    ("container_list", "time to list containers"),
    ("container_remove", "time to remove a container"),
    ("container_start", "time to start a container"),
    ("container_stop", "time to stop a container"),
    (
        "sandbox_create_network",
        "time to create the network for a sandbox",
    ),
    (
        "sandbox_delete_network",
        "time to delete a sandbox's network",
    ),
    ("sandbox_list", "time to list sandboxes"),
    ("sandbox_remove", "time to remove a sandbox"),
    (
        "sandbox_runtime_create",
        "time to create a sandbox in the runtime",
    ),
    ("sandbox_runtime_stop", "time to stop a sandbox"),
    ("stream_container_list", "time to stream containers"),
    ("stream_sandbox_list", "time to stream sandboxes"),
];

#[derive(Debug, Clone, Default)]
struct Histogram {
    counts: [u64; BOUNDS.len()],
    count: u64,
    seconds: f64,
}

impl Histogram {
    fn observe(&mut self, seconds: f64) {
        for (bound, count) in BOUNDS.iter().zip(&mut self.counts) {
            *count += u64::from(seconds <= *bound);
        }
        self.count += 1;
        self.seconds += seconds;
    }
}

/// Durations by name and runtime; a name without a runtime has an empty one.
#[derive(Debug, Default)]
pub(crate) struct Timers(Mutex<BTreeMap<(&'static str, String), Histogram>>);

impl Timers {
    /// Does `work`, and notes how long it took if it succeeds.
    pub(crate) async fn time<T>(
        &self,
        name: &'static str,
        runtime: &str,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let begun = Instant::now();
        let done = work.await;
        if done.is_ok() {
            self.note(name, runtime, begun.elapsed());
        }
        done
    }

    /// Does `work` that cannot fail, and notes how long it took.
    pub(crate) fn time_now<T>(&self, name: &'static str, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let done = work();
        self.note(name, "", begun.elapsed());
        done
    }

    pub(crate) fn note(&self, name: &'static str, runtime: &str, took: Duration) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let one = all.entry((name, runtime.to_owned())).or_default();
        one.observe(took.as_secs_f64());
    }

    fn write(&self, page: &mut Page) {
        let all = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        for (name, help) in HELP {
            let of = all.iter().filter(|((of, _), _)| *of == name);
            let rows: Vec<_> = of
                .map(|((_, runtime), histogram)| {
                    let labelled = !runtime.is_empty();
                    let label = labelled.then_some(("runtime", runtime.as_str()));
                    (label.into_iter().collect(), histogram)
                })
                .collect();
            page.histogram(&format!("containerd_cri_{name}_seconds"), help, &rows);
        }
    }
}

type Labels<'a> = Vec<(&'a str, &'a str)>;

/// Text in the form of OpenMetrics.
#[derive(Debug, Default)]
struct Page(String);

impl Page {
    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let escape = |text: &str| {
            let text = text.replace('\\', "\\\\").replace('"', "\\\"");
            text.replace('\n', "\\n")
        };
        let labels: Vec<_> = labels
            .iter()
            .map(|(key, value)| format!("{key}=\"{}\"", escape(value)))
            .collect();
        let braces = if labels.is_empty() {
            String::new()
        } else {
            format!("{{{}}}", labels.join(","))
        };
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "{name}{braces} {value}");
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}.\n# TYPE {name} {kind}");
    }

    fn histogram(&mut self, name: &str, help: &str, rows: &[(Labels<'_>, &Histogram)]) {
        if rows.is_empty() {
            return;
        }
        self.head(name, "histogram", help);
        for (labels, histogram) in rows {
            let bucket = |page: &mut Self, bound: &str, count: u64| {
                let mut labels = labels.clone();
                labels.push(("le", bound));
                page.line(&format!("{name}_bucket"), &labels, count);
            };
            for (bound, count) in BOUNDS.iter().zip(histogram.counts) {
                bucket(self, &bound.to_string(), count);
            }
            bucket(self, "+Inf", histogram.count);
            self.line(&format!("{name}_sum"), labels, histogram.seconds);
            self.line(&format!("{name}_count"), labels, histogram.count);
        }
    }

    /// A counter; `_total` is put behind its name in each row.
    fn counter(&mut self, name: &str, help: &str, rows: &[(Labels<'_>, u64)]) {
        if rows.is_empty() {
            return;
        }
        self.head(name, "counter", help);
        for (labels, value) in rows {
            self.line(&format!("{name}_total"), labels, value);
        }
    }

    fn network(&mut self, networks: &Network) {
        let all = networks.snapshot();
        let rows = |value: fn(&crate::cni::OperationStats) -> u64| {
            let row = |s: &crate::cni::OperationStats| {
                (vec![("operation_type", operation(s.operation))], value(s))
            };
            all.iter().map(row).collect::<Vec<_>>()
        };
        let name = "containerd_cri_network_plugin_operations";
        let help = "cumulative number of network plugin operations by operation type";
        self.counter(name, help, &rows(|s| s.total));
        let name = "containerd_cri_network_plugin_operations_errors";
        let help = "cumulative number of network plugin operations that failed by operation type";
        self.counter(name, help, &rows(|s| s.errors));
        let name = "containerd_cri_network_plugin_operations_duration_seconds";
        self.head(
            name,
            "summary",
            "latency in seconds of network plugin operations",
        );
        for s in &all {
            let labels = [("operation_type", operation(s.operation))];
            self.line(&format!("{name}_sum"), &labels, s.seconds);
            self.line(&format!("{name}_count"), &labels, s.total);
        }
    }

    fn pulls(&mut self, pulls: &PullCounts) {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let rows = [
            (vec![("status", "success")], of(&pulls.succeeded)),
            (vec![("status", "failure")], of(&pulls.failed)),
        ];
        let name = "containerd_cri_sandboxed_image_pulls";
        self.counter(name, "succeeded and failed counters", &rows);
        let name = "containerd_cri_sandboxed_in_progress_image_pulls_total";
        self.head(name, "gauge", "in progress pulls");
        self.line(name, &[], of(&pulls.running));
        let name = "containerd_cri_sandboxed_image_pulled_bytes";
        let help = "bytes of the images that were pulled";
        self.counter(name, help, &[(vec![], of(&pulls.bytes))]);
        let name = "containerd_cri_sandboxed_image_pull_milliseconds";
        let help = "time that pulls took, from end to end";
        self.counter(name, help, &[(vec![], of(&pulls.millis))]);
    }

    fn plugins(&mut self, metrics: &nri::Metrics, active: usize) {
        let all = metrics.snapshot();
        let rows: Vec<_> = all
            .iter()
            .flat_map(|((plugin, request), stats)| {
                let labels = |status| {
                    vec![
                        ("plugin", plugin.as_str()),
                        ("operation", *request),
                        ("status", status),
                    ]
                };
                [
                    (labels("success"), stats.calls - stats.errors),
                    (labels("error"), stats.errors),
                ]
            })
            .collect();
        let name = "containerd_nri_plugin_invocations";
        self.counter(name, "Number of NRI plugin invocations", &rows);
        let name = "containerd_nri_plugin_latency_seconds";
        self.head(name, "summary", "NRI plugin operation latency");
        for ((plugin, request), stats) in &all {
            let labels = [("plugin", plugin.as_str()), ("operation", *request)];
            self.line(&format!("{name}_sum"), &labels, stats.seconds);
            self.line(&format!("{name}_count"), &labels, stats.calls);
        }
        let name = "containerd_nri_active_plugins_total";
        self.head(name, "gauge", "Number of currently active NRI plugins");
        self.line(name, &[], active);
    }
}

/// Upstream's value of the label.
fn operation(name: &str) -> &str {
    match name {
        "setup_pod" => "set_up_pod",
        "teardown_pod" => "tear_down_pod",
        _ => "get_pod_network_status",
    }
}

impl Plugin {
    /// Type of the runtime that serves a handler, as label of timers.
    pub(super) fn runtime_label(&self, handler: &str) -> String {
        let handler = self.handler(handler);
        handler.map_or_else(|_| String::new(), |h| h.runtime_type.clone())
    }

    /// [`Plugin::runtime_label`] of a container.
    pub(super) fn runtime_label_of(&self, container: &Container) -> String {
        match self.store.pods.find(&container.pod_id) {
            Ok(Some(pod)) => self.runtime_label(&pod.handler),
            _ => String::new(),
        }
    }

    /// The plugin's share of the metrics page.
    #[must_use]
    pub fn metrics_page(&self) -> String {
        let mut page = Page::default();
        self.timers.write(&mut page);
        let dropped = self.events.dropped();
        let name = "containerd_cri_container_events_dropped";
        let help = "count container discarding event total from server start";
        page.counter(name, help, &[(vec![], dropped)]);
        page.pulls(&self.images.pulls);
        page.network(self.cni.metrics());
        if let Some((metrics, active)) = self.hooks.metrics() {
            page.plugins(metrics, active);
        }
        page.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_succeeds_is_timed() {
        let timers = Timers::default();
        let fine = timers.time("container_create", "a\"b", async { Ok(()) });
        fine.await.unwrap();
        let bad: Result<()> = Err(crate::error::Error::unknown("x"));
        assert!(
            timers
                .time("container_start", "", async { bad })
                .await
                .is_err()
        );
        let mut page = Page::default();
        timers.write(&mut page);
        let text = page.0;
        let name = "containerd_cri_container_create_seconds";
        for line in [
            format!("# TYPE {name} histogram\n"),
            format!("{name}_bucket{{runtime=\"a\\\"b\",le=\"0.005\"}} 1\n"),
            format!("{name}_bucket{{runtime=\"a\\\"b\",le=\"+Inf\"}} 1\n"),
            format!("{name}_count{{runtime=\"a\\\"b\"}} 1\n"),
        ] {
            assert!(text.contains(&line), "{line} in\n{text}");
        }
        assert!(!text.contains("container_start"), "{text}");
    }

    #[test]
    fn a_name_that_is_timed_has_its_help() {
        let mut names = HELP.map(|(name, _)| name);
        names.sort_unstable();
        assert_eq!(names, HELP.map(|(name, _)| name));
    }
}
