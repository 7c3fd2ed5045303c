//! Signals: which end the daemon, which ask it what it is doing.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::info;

/// Ends the daemon on SIGTERM and SIGINT, and calls `dump` on SIGUSR1.
///
/// # Errors
/// When the handlers cannot be installed.
pub(crate) fn signals() -> std::io::Result<Signals> {
    Ok(Signals {
        terminate: signal(SignalKind::terminate())?,
        interrupt: signal(SignalKind::interrupt())?,
        dump: signal(SignalKind::user_defined1())?,
        // A client that goes away must never end the daemon.
        pipe: signal(SignalKind::pipe())?,
    })
}

/// Installed handlers.
#[derive(Debug)]
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    dump: Signal,
    pipe: Signal,
}

impl Signals {
    /// Waits for the end; returns once `stop` is cancelled, by a signal or by somebody else.
    pub(crate) async fn wait(mut self, stop: CancellationToken, dump: impl Fn()) {
        loop {
            // All branches are cancel-safe: a signal not taken now is taken in the next round.
            tokio::select! {
                () = stop.cancelled() => return,
                _ = self.terminate.recv() => info!(signal = "SIGTERM", "stopping"),
                _ = self.interrupt.recv() => info!(signal = "SIGINT", "stopping"),
                _ = self.dump.recv() => { dump(); continue; }
                _ = self.pipe.recv() => continue,
            }
            stop.cancel();
        }
    }
}
