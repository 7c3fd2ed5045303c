//! When callers stop waiting, and work that goes on when they do.

use std::time::{Duration, Instant};

use lighter_proto::errdefs::into_status;
use tokio_util::task::TaskTracker;
use tonic::metadata::MetadataMap;
use tonic::{Response, Status};

use crate::error::Result;

tokio::task_local! {
    /// When the caller of this work stops waiting for it.
    static DEADLINE: Option<Instant>;
}

/// How much longer the caller of this work waits; `None` when it said nothing.
pub(crate) fn time_left() -> Option<Duration> {
    let deadline = DEADLINE.try_with(|at| *at).ok().flatten()?;
    Some(deadline.saturating_duration_since(Instant::now()))
}

/// The deadline in a request's metadata. Spec: gRPC over HTTP2, `grpc-timeout`.
pub(crate) fn deadline(metadata: &MetadataMap) -> Option<Instant> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let count: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    let limit = match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    };
    Instant::now().checked_add(limit)
}

/// Time before a caller's deadline at which it is told that it passed: what watches the deadlines of
/// all calls would say "cancelled", which a kubelet does not take for a timeout.
const ANSWER_SHARE: Duration = Duration::from_millis(5);

/// Does work to its end, even when the caller hangs up.
pub(crate) async fn owned<T: Send + 'static>(
    tasks: &TaskTracker,
    deadline: Option<Instant>,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<Response<T>, Status> {
    let task = tasks.spawn(DEADLINE.scope(deadline, work));
    let answer_by = deadline.and_then(|at| at.checked_sub(ANSWER_SHARE));
    let done = match answer_by {
        Some(at) => tokio::time::timeout_at(at.into(), task)
            .await
            .map_err(|_| Status::deadline_exceeded("context deadline exceeded"))?,
        None => task.await,
    };
    let done = done.map_err(|e| Status::internal(e.to_string()))?;
    done.map(Response::new).map_err(into_status)
}
