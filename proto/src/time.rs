//! `SystemTime` ⇄ `google.protobuf.Timestamp`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost_types::Timestamp;

/// The timestamp of a time; nanosecond precision.
#[must_use]
pub fn to_timestamp(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}

/// The time of a timestamp; `None` for one outside what the system can represent.
#[must_use]
pub fn from_timestamp(timestamp: Timestamp) -> Option<SystemTime> {
    SystemTime::try_from(timestamp).ok()
}

/// Now, as a timestamp.
#[must_use]
pub fn now() -> Timestamp {
    to_timestamp(SystemTime::now())
}

/// Nanoseconds since the epoch; negative before it.
#[must_use]
pub fn to_nanos(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |n| -n),
    }
}

/// The time that is `nanos` after (before, when negative) the epoch.
#[must_use]
pub fn from_nanos(nanos: i64) -> SystemTime {
    let distance = Duration::from_nanos(nanos.unsigned_abs());
    if nanos < 0 {
        UNIX_EPOCH - distance
    } else {
        UNIX_EPOCH + distance
    }
}
