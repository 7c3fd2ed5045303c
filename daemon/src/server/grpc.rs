//! gRPC: HTTP/2 settings, and the servers over Unix and TCP sockets.

use std::sync::Arc;

use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;

use super::metrics::Metrics;
use super::observe::{InFlight, Observe};

/// Bytes a stream may send before it is acknowledged: one whole content chunk and more.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// Bytes all streams of a connection may send before that.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Largest HTTP/2 frame; fewer, larger frames carry content faster.
const FRAME_BYTES: u32 = 1 << 20;
/// Most requests one connection may have in flight.
const MAX_STREAMS: u32 = 10_000;

fn builder() -> Server {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .max_concurrent_streams(MAX_STREAMS)
        .tcp_nodelay(true)
}

/// Serves `routes` on a Unix socket until `stop`, then lets what is in flight end.
///
/// # Errors
/// When the transport fails as a whole.
pub(crate) async fn serve_unix(
    listener: UnixListener,
    routes: Routes,
    in_flight: Arc<InFlight>,
    metrics: Metrics,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    builder()
        .layer(Observe::new(in_flight, metrics))
        .add_routes(routes)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled_owned())
        .await
}

/// Serves `routes` on a TCP port.
///
/// # Errors
/// When the transport fails as a whole.
pub(crate) async fn serve_tcp(
    listener: TcpListener,
    routes: Routes,
    in_flight: Arc<InFlight>,
    metrics: Metrics,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    builder()
        .layer(Observe::new(in_flight, metrics))
        .add_routes(routes)
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.cancelled_owned())
        .await
}
