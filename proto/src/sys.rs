//! What has no safe wrapper.
#![allow(unsafe_code, reason = "registering a descriptor is a promise about it")]

use std::io;
use std::os::unix::net::UnixStream;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a stream with the reactor.
///
/// # Errors
/// What the system said.
pub(crate) fn register(stream: UnixStream, interest: Interest) -> io::Result<AsyncFd<UnixStream>> {
    // SAFETY: a stream owns its descriptor, which stays the same until it is dropped, and the
    // registration owns the stream.
    Ok(unsafe { AsyncFd::register_with_interest(stream, interest) }?)
}
