//! Prometheus metrics, under upstream's names where upstream has them.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tonic::Code;

/// Upper bounds of the latency histogram, in seconds.
const LATENCY_SECONDS: [f64; 11] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Rpc {
    grpc_type: &'static str,
    grpc_service: String,
    grpc_method: String,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Handled {
    grpc_type: &'static str,
    grpc_service: String,
    grpc_method: String,
    grpc_code: &'static str,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Build {
    version: String,
    revision: String,
}

/// A family of latencies; the constructor of its members is a plain function.
type Latencies = Family<Rpc, Histogram, fn() -> Histogram>;

/// All metrics; clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Mutex<Registry>,
    started: Family<Rpc, Counter>,
    handled: Family<Handled, Counter>,
    latency: Option<Latencies>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// No counts yet; `histogram` keeps latencies too.
    pub(crate) fn new(histogram: bool) -> Self {
        let mut registry = Registry::default();
        let started = Family::<Rpc, Counter>::default();
        let handled = Family::<Handled, Counter>::default();
        registry.register(
            "grpc_server_started",
            "Total number of RPCs started on the server",
            started.clone(),
        );
        registry.register(
            "grpc_server_handled",
            "Total number of RPCs completed on the server, regardless of success or failure",
            handled.clone(),
        );
        let latency = histogram.then(|| {
            let family: Latencies =
                Family::new_with_constructor(|| Histogram::new(LATENCY_SECONDS));
            registry.register(
                "grpc_server_handling_seconds",
                "Histogram of response latency (seconds) of gRPC that had been application-level handled by the server",
                family.clone(),
            );
            family
        });
        let build = Family::<Build, Counter>::default();
        build
            .get_or_create(&Build {
                version: crate::VERSION.to_owned(),
                revision: crate::REVISION.to_owned(),
            })
            .inc();
        registry.register(
            "containerd_build_info",
            "containerd build information",
            build,
        );
        Self {
            inner: Arc::new(Inner {
                registry: Mutex::new(registry),
                started,
                handled,
                latency,
            }),
        }
    }

    /// Counts an RPC that came; `path` is `/service/method`.
    pub(crate) fn started(&self, path: &str) {
        self.inner.started.get_or_create(&rpc(path)).inc();
    }

    /// Counts an RPC that ended.
    pub(crate) fn handled(&self, path: &str, code: Code, latency: Duration) {
        let rpc = rpc(path);
        if let Some(family) = &self.inner.latency {
            family.get_or_create(&rpc).observe(latency.as_secs_f64());
        }
        self.inner
            .handled
            .get_or_create(&Handled {
                grpc_type: rpc.grpc_type,
                grpc_service: rpc.grpc_service,
                grpc_method: rpc.grpc_method,
                grpc_code: code_name(code),
            })
            .inc();
    }

    /// Everything in Prometheus' text form, with `more` families of other origin.
    ///
    /// # Errors
    /// When a metric cannot be written as text.
    pub(crate) fn text(&self, more: &str) -> Result<String, fmt::Error> {
        let mut out = String::new();
        let registry = self
            .inner
            .registry
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        text::encode(&mut out, &registry)?;
        drop(registry);
        process(&mut out, more);
        Ok(out)
    }
}

/// The process's own numbers and `more`, put before the end mark.
fn process(out: &mut String, more: &str) {
    use std::fmt::Write as _;
    let end = "# EOF\n";
    if out.ends_with(end) {
        out.truncate(out.len() - end.len());
    }
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let resident = pages.split(' ').nth(1).and_then(|n| n.parse::<u64>().ok());
    if let Some(resident) = resident {
        let _ = write!(
            out,
            "# HELP process_resident_memory_bytes Resident memory size in bytes.\n# TYPE process_resident_memory_bytes gauge\nprocess_resident_memory_bytes {}\n",
            resident * 4096
        );
    }
    if let Ok(fds) = std::fs::read_dir("/proc/self/fd") {
        let _ = write!(
            out,
            "# HELP process_open_fds Number of open file descriptors.\n# TYPE process_open_fds gauge\nprocess_open_fds {}\n",
            fds.count()
        );
    }
    out.push_str(more);
    out.push_str(end);
}

/// Client-streaming, server-streaming and both, of the services served here; all else is unary.
fn rpc(path: &str) -> Rpc {
    let (service, method) = path
        .trim_start_matches('/')
        .rsplit_once('/')
        .unwrap_or(("unknown", "unknown"));
    let known = service.starts_with("containerd.")
        || service.starts_with("runtime.v1.")
        || service.starts_with("grpc.health.");
    // A client may send any path: unknown ones share one label so that they cannot fill memory.
    if !known || method.len() > 64 || service.len() > 64 {
        return Rpc {
            grpc_type: "unary",
            grpc_service: "unknown".to_owned(),
            grpc_method: "unknown".to_owned(),
        };
    }
    let grpc_type = match (service.rsplit('.').next().unwrap_or_default(), method) {
        ("Content", "Write") | ("Streaming", "Stream") => "bidi_stream",
        ("Content", "Read" | "List")
        | ("Snapshots" | "Mounts", "List")
        | ("Containers", "ListStream")
        | ("Events", "Subscribe")
        | ("Health", "Watch")
        | ("RuntimeService", "GetContainerEvents") => "server_stream",
        ("RuntimeService" | "ImageService", m) if m.starts_with("Stream") => "server_stream",
        _ => "unary",
    };
    Rpc {
        grpc_type,
        grpc_service: service.to_owned(),
        grpc_method: method.to_owned(),
    }
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Canceled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_rpc_is_counted_by_service_method_and_code() {
        let metrics = Metrics::new(true);
        let path = "/containerd.services.version.v1.Version/Version";
        metrics.started(path);
        metrics.handled(path, Code::NotFound, Duration::from_millis(7));
        let text = metrics.text("").unwrap();
        assert!(text.contains(
            "grpc_server_handled_total{grpc_type=\"unary\",grpc_service=\"containerd.services.version.v1.Version\",grpc_method=\"Version\",grpc_code=\"NotFound\"} 1"
        ), "{text}");
        assert!(text.contains("grpc_server_handling_seconds_bucket"));
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn paths_of_strangers_share_one_label() {
        let metrics = Metrics::new(false);
        for i in 0..10 {
            metrics.started(&format!("/evil{i}/x{i}"));
        }
        assert!(
            metrics
                .text("")
                .unwrap()
                .contains("grpc_service=\"unknown\",grpc_method=\"unknown\"} 10")
        );
    }
}
