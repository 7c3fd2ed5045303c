//! What shims log: read from the fifo in the bundle, so that they never wait for a reader.

use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::unix::pipe;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::bundle::Bundle;
use super::error::Error;

/// Most bytes of a line; what is longer is cut into several.
const MAX_LINE_BYTES: usize = 4096;

/// Copies the fifo to our log until the guard is dropped.
///
/// # Errors
/// When the fifo cannot be opened.
pub(super) fn follow(tracker: &TaskTracker, bundle: &Bundle) -> Result<DropGuard, Error> {
    let path = bundle.log();
    // Opened for both ways: it has a reader before the shim writes, and no end while it lives.
    let fifo = pipe::OpenOptions::new()
        .read_write(true)
        .open_receiver(&path)
        .map_err(Error::io("open", &path))?;
    let end = CancellationToken::new();
    let (ended, id) = (end.clone(), bundle.id.clone());
    tracker.spawn(async move {
        tokio::select! {
            () = ended.cancelled() => {}
            () = copy(fifo, &id) => {}
        }
    });
    Ok(end.drop_guard())
}

async fn copy(fifo: pipe::Receiver, id: &str) {
    let mut lines = BufReader::with_capacity(MAX_LINE_BYTES, fifo);
    loop {
        let Ok(bytes) = lines.fill_buf().await else {
            return;
        };
        let (line, used) = match bytes.iter().position(|b| *b == b'\n') {
            Some(end) => (&bytes[..end], end + 1),
            None => (bytes, bytes.len()),
        };
        let text = String::from_utf8_lossy(line);
        let text = text.trim();
        if text.contains("level=error") || text.contains("level=warning") {
            warn!(container_id = id, "shim: {text}");
        } else if !text.is_empty() {
            debug!(container_id = id, "shim: {text}");
        }
        lines.consume(used);
    }
}
