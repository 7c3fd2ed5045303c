//! What the services have in common in turning wire types into values and back.

use std::collections::{BTreeMap, HashMap};
use std::time::SystemTime;

use lighter_proto::containerd::types;
use lighter_proto::errdefs::{ErrorKind, WireError, into_status};
use lighter_proto::time::from_timestamp;
use lighter_store::filter::Filter;
use lighter_store::metadata::Descriptor;
use lighter_store::{Digest, Labels};
use prost_types::{FieldMask, Timestamp};
use tonic::Status;

/// The status of a malformed request.
pub(crate) fn invalid(reason: impl Into<String>) -> Status {
    into_status(WireError::new(ErrorKind::InvalidArgument, reason))
}

/// The status of a request that would wait for something that another daemon may see.
pub(crate) fn stopping() -> Status {
    into_status(WireError::new(
        ErrorKind::Unavailable,
        "transport is closing: the daemon stops",
    ))
}

/// A sub-message that must be there; `name` says which.
pub(crate) fn required<T>(message: Option<T>, name: &str) -> Result<T, Status> {
    message.ok_or_else(|| invalid(format!("{name} must be set")))
}

/// Filters of a list request.
pub(crate) fn filter(filters: &[String]) -> Result<Filter, Status> {
    Filter::parse(filters).map_err(into_status)
}

/// A digest that must be there.
pub(crate) fn digest(text: &str) -> Result<Digest, Status> {
    Digest::parse(text).map_err(into_status)
}

/// A digest that may be left out.
pub(crate) fn optional_digest(text: &str) -> Result<Option<Digest>, Status> {
    if text.is_empty() {
        return Ok(None);
    }
    digest(text).map(Some)
}

/// Paths of a mask; none without one.
pub(crate) fn paths(mask: Option<FieldMask>) -> Vec<String> {
    mask.map(|mask| mask.paths).unwrap_or_default()
}

/// A count of bytes that must not be negative; `name` says which.
pub(crate) fn bytes(count: i64, name: &str) -> Result<u64, Status> {
    u64::try_from(count).map_err(|_| invalid(format!("{name} must not be negative, got {count}")))
}

/// A count for the wire.
pub(crate) fn count(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// A time that replaces now.
pub(crate) fn stamp(timestamp: Option<Timestamp>) -> Result<Option<SystemTime>, Status> {
    timestamp
        .map(|t| from_timestamp(t).ok_or_else(|| invalid("timestamp out of range")))
        .transpose()
}

/// Labels of a request, in order.
pub(crate) fn labels<V>(map: HashMap<String, V>) -> BTreeMap<String, V> {
    map.into_iter().collect()
}

/// A descriptor that must be whole.
pub(crate) fn descriptor(descriptor: types::Descriptor) -> Result<Descriptor, Status> {
    Ok(Descriptor {
        digest: digest(&descriptor.digest)?,
        size_bytes: bytes(descriptor.size, "Target.Size")?,
        media_type: descriptor.media_type,
        annotations: labels(descriptor.annotations),
    })
}

/// A descriptor for the wire.
pub(crate) fn encode_descriptor(descriptor: Descriptor) -> types::Descriptor {
    types::Descriptor {
        media_type: descriptor.media_type,
        digest: descriptor.digest.as_str().to_owned(),
        size: count(descriptor.size_bytes),
        annotations: unordered(descriptor.annotations),
    }
}

/// Labels for the wire.
pub(crate) fn unordered(labels: Labels) -> HashMap<String, String> {
    labels.into_iter().collect()
}
