//! What the daemon is doing: requests in flight and since when, tasks and the step each is at.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::SystemTime;

use super::observe::InFlight;

/// A part of the report: its title and how it is made now.
pub(crate) struct Section {
    /// Title.
    pub(crate) title: &'static str,
    /// Lines, made when asked for.
    pub(crate) lines: Box<dyn Fn() -> Vec<String> + Send + Sync>,
}

impl std::fmt::Debug for Section {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.title)
    }
}

/// The report of everything that is going on.
#[derive(Debug)]
pub(crate) struct Report {
    in_flight: Arc<InFlight>,
    sections: Vec<Section>,
}

impl Report {
    /// A report of requests in flight and of `sections`.
    pub(crate) fn new(in_flight: Arc<InFlight>, sections: Vec<Section>) -> Self {
        Self {
            in_flight,
            sections,
        }
    }

    /// The report as text.
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        let now = SystemTime::now();
        let calls = self.in_flight.list();
        let _ = writeln!(out, "requests in flight: {}", calls.len());
        for call in calls {
            let seconds = now
                .duration_since(call.since)
                .unwrap_or_default()
                .as_secs_f64();
            let _ = writeln!(
                out,
                "  {seconds:9.3}s  {}  namespace={}",
                call.rpc, call.namespace
            );
        }
        for section in &self.sections {
            let lines = (section.lines)();
            let _ = writeln!(out, "{}: {}", section.title, lines.len());
            for line in lines {
                let _ = writeln!(out, "  {line}");
            }
        }
        out.push_str("threads:\n");
        out.push_str(&threads());
        out
    }
}

/// Every thread's name, state and the kernel function it waits in.
fn threads() -> String {
    let mut out = String::new();
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else {
        return out;
    };
    for task in tasks.flatten() {
        let read = |name: &str| {
            std::fs::read_to_string(task.path().join(name))
                .map(|text| text.trim().to_owned())
                .unwrap_or_default()
        };
        let stat = read("stat");
        let state = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.trim_start().chars().next())
            .unwrap_or('?');
        let _ = writeln!(
            out,
            "  {}  {}  {state}  {}",
            task.file_name().to_string_lossy(),
            read("comm"),
            read("wchan")
        );
    }
    out
}
