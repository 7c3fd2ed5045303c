//! One function for each call of the runtime service, in files by what they are about: requests are
//! taken apart here, the work is done by the files above.

pub(super) mod checkpoint;
mod config;
pub(super) mod containers;
pub(super) mod events;
pub(super) mod exec;
pub(super) mod metrics;
pub(super) mod pods;
pub(super) mod stats;
pub(super) mod status;
pub(super) mod update;

use std::time::Duration;

use futures::stream::{self, BoxStream, StreamExt as _};
use tonic::Status;

/// Items in one message of a streamed list.
const BATCH: usize = 5000;

/// A list as messages of at most [`BATCH`] items each.
fn batches<T: Clone, M: Send + 'static>(
    items: &[T],
    message: impl Fn(Vec<T>) -> M,
) -> BoxStream<'static, Result<M, Status>> {
    let messages: Vec<_> = items
        .chunks(BATCH)
        .map(|batch| Ok(message(batch.to_vec())))
        .collect();
    stream::iter(messages).boxed()
}

/// Seconds of a request; negative ones are none.
fn seconds(count: i64) -> Duration {
    Duration::from_secs(u64::try_from(count).unwrap_or(0))
}
