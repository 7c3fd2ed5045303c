//! A daemon that nobody asks anything takes little memory.
//!
//! Most of an idle daemon's resident memory is pages of its own program that were needed once, at the
//! start or in the last burst of requests. They are clean and come back from the page cache at the
//! cost of a minor fault for each 64 KiB, so after a while of quiet they are let go, together with
//! what the allocator holds free. Who asks next pays some hundred faults, a fraction of a
//! millisecond, once.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::server::observe::InFlight;
use crate::sys;

/// How long nothing may have been asked or answered before memory is given back.
const QUIET: Duration = Duration::from_secs(2);

/// Gives memory back after every burst of requests, until the daemon stops.
pub(crate) async fn keep_small(in_flight: Arc<InFlight>, stop: CancellationToken) {
    let work = async {
        loop {
            let mut seen = in_flight.moves();
            loop {
                tokio::time::sleep(QUIET).await;
                let now = in_flight.moves();
                if now == seen {
                    break;
                }
                seen = now;
            }
            // Walks all free memory: not on a thread that serves.
            let given = tokio::task::spawn_blocking(sys::give_back_memory).await;
            debug!(mappings = given.unwrap_or_default(), "memory given back");
            in_flight.moved_since(seen).await;
        }
    };
    // Nothing is lost by a cancellation anywhere in here.
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
}
