//! Progress to a client's stream, a few times a second, without ever waiting for it.

use std::time::Duration;

use lighter_proto::any;
use lighter_proto::containerd::types::transfer::Progress;
use prost_types::Any;
use tokio::time::MissedTickBehavior;

use super::Error;
use crate::image::{Event, Tracker};
use crate::streaming::Stream;

const TICK: Duration = Duration::from_millis(300);
/// How long the last events may wait for a slow client.
const LAST_WORDS: Duration = Duration::from_secs(2);

fn message(event: Event) -> Any {
    let bytes = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    any::pack(&Progress {
        event: event.event,
        name: event.name,
        parents: event.parents,
        progress: bytes(event.progress_bytes),
        total: bytes(event.total_bytes),
        desc: event.descriptor.as_ref().map(Into::into),
    })
}

/// Drives `work` to its end and tells `watcher` how it goes.
pub(super) async fn watch(
    work: impl Future<Output = Result<(), Error>>,
    tracker: &Tracker,
    watcher: Option<Stream>,
) -> Result<(), Error> {
    let Some(watcher) = watcher else {
        return work.await;
    };
    let mut work = std::pin::pin!(work);
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Events a slow client has no room for yet; a blob's next event makes up for a lost one.
    let done = loop {
        tokio::select! {
            done = &mut work => break done,
            _ = tick.tick() => {
                for event in tracker.drain() {
                    // Room comes as fast as the client reads: a moment each, not more.
                    let sending = watcher.send(message(event));
                    let _ = tokio::time::timeout(Duration::from_millis(20), sending).await;
                }
            }
        }
    };
    let last = async {
        for event in tracker.drain() {
            if watcher.send(message(event)).await.is_err() {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(LAST_WORDS, last).await;
    done
}
