//! Prometheus metrics, under upstream's names where upstream has them.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
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

/// Most methods that are counted apart: more than there are.
const MAX_METHODS: usize = 512;
/// gRPC has as many codes.
const CODES: usize = 17;

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
    /// What was asked for so far, by path: a request looks up its counters once.
    methods: RwLock<HashMap<Box<str>, Arc<Method>>>,
    /// Everything that nobody serves.
    unknown: OnceLock<Arc<Method>>,
}

/// The counters of one method.
pub(crate) struct Method {
    labels: Rpc,
    started: Counter,
    latency: Option<Histogram>,
    family: Family<Handled, Counter>,
    handled: [OnceLock<Counter>; CODES],
}

impl fmt::Debug for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.labels.fmt(f)
    }
}

impl Method {
    /// Counts an RPC that came.
    pub(crate) fn started(&self) {
        self.started.inc();
    }

    /// Counts an RPC that ended.
    pub(crate) fn handled(&self, code: Code, latency: Duration) {
        if let Some(histogram) = &self.latency {
            histogram.observe(latency.as_secs_f64());
        }
        let index = usize::try_from(code as i32).unwrap_or(0).min(CODES - 1);
        let counter = self.handled[index].get_or_init(|| {
            let labels = Handled {
                grpc_type: self.labels.grpc_type,
                grpc_service: self.labels.grpc_service.clone(),
                grpc_method: self.labels.grpc_method.clone(),
                grpc_code: code_name(code),
            };
            self.family.get_or_create(&labels).clone()
        });
        counter.inc();
    }
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
                methods: RwLock::default(),
                unknown: OnceLock::new(),
            }),
        }
    }

    /// The counters of a method by its path, `/service/method`.
    pub(crate) fn method(&self, path: &str) -> Arc<Method> {
        let known = self.inner.methods.read();
        if let Some(method) = known.unwrap_or_else(PoisonError::into_inner).get(path) {
            return Arc::clone(method);
        }
        let Some(labels) = labels(path) else {
            return self.unknown();
        };
        let methods = self.inner.methods.write();
        let mut methods = methods.unwrap_or_else(PoisonError::into_inner);
        if methods.len() >= MAX_METHODS {
            return self.unknown();
        }
        let method = methods
            .entry(path.into())
            .or_insert_with(|| Arc::new(self.counters(labels)));
        Arc::clone(method)
    }

    /// What all paths share that are none of ours: they cannot fill memory.
    fn unknown(&self) -> Arc<Method> {
        let method = self.inner.unknown.get_or_init(|| {
            Arc::new(self.counters(Rpc {
                grpc_type: "unary",
                grpc_service: "unknown".to_owned(),
                grpc_method: "unknown".to_owned(),
            }))
        });
        Arc::clone(method)
    }

    fn counters(&self, labels: Rpc) -> Method {
        let latency = self.inner.latency.as_ref();
        Method {
            started: self.inner.started.get_or_create(&labels).clone(),
            latency: latency.map(|family| family.get_or_create(&labels).clone()),
            family: self.inner.handled.clone(),
            handled: Default::default(),
            labels,
        }
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

/// The labels of a method that may be one of ours. Client-streaming, server-streaming and both are
/// told apart for the services served here; all else is unary.
fn labels(path: &str) -> Option<Rpc> {
    let (service, method) = path.trim_start_matches('/').rsplit_once('/')?;
    let known = service.starts_with("containerd.")
        || service.starts_with("lighter.")
        || service.starts_with("runtime.v1.")
        || service.starts_with("grpc.health.");
    if !known || method.len() > 64 || service.len() > 64 {
        return None;
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
    Some(Rpc {
        grpc_type,
        grpc_service: service.to_owned(),
        grpc_method: method.to_owned(),
    })
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
        metrics.method(path).started();
        let took = Duration::from_millis(7);
        metrics.method(path).handled(Code::NotFound, took);
        metrics.method(path).handled(Code::Ok, took);
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
            metrics.method(&format!("/evil{i}/x{i}")).started();
        }
        assert!(
            metrics
                .text("")
                .unwrap()
                .contains("grpc_service=\"unknown\",grpc_method=\"unknown\"} 10")
        );
        for i in 0..2 * MAX_METHODS {
            metrics.method(&format!("/containerd.evil/x{i}")).started();
        }
        let text = metrics.text("").unwrap();
        assert!(text.lines().count() < MAX_METHODS + 100);
    }
}
