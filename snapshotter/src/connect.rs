//! Channels to plugins in other processes.

use std::path::Path;
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use crate::Error;

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often an idle or waiting connection is asked for a sign of life.
const PING_EVERY: Duration = Duration::from_secs(10);
/// How long that sign may take; then the connection is cut and its calls fail.
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Largest message either way, as everywhere on containerd's sockets.
pub const MESSAGE_MAX_BYTES: usize = 16 << 20;

/// A channel to the Unix socket `address`: a path, or one with the prefix `unix://`.
///
/// The connection is made on first use and again after a loss. A peer that stops answering loses it,
/// and with it the calls that wait for it; a call to a peer that lives may take as long as it takes.
///
/// # Errors
/// When the address is none. Must be called inside a tokio runtime.
pub fn connect(address: &str) -> Result<Channel, Error> {
    let path = address.strip_prefix("unix://").unwrap_or(address);
    if !Path::new(path).is_absolute() {
        return Err(Error::Invalid {
            reason: format!("address {address:?} is not an absolute path: invalid argument"),
        });
    }
    let endpoint = Endpoint::try_from(format!("unix://{path}"))
        .map_err(|e| Error::Invalid {
            reason: format!("address {address:?}: {e}: invalid argument"),
        })?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true);
    Ok(endpoint.connect_lazy())
}
