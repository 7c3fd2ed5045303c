//! gRPC: HTTP/2 settings, and the servers over Unix and TCP sockets.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use lighter_proto::line::Line;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use tower::Layer as _;
use tracing::{debug, warn};

use super::authority::AnyAuthority;
use super::connection::{BeginHere, Eager, Gathering, Seat};
use super::metrics::Metrics;
use super::observe::{InFlight, Observe, Observed};

/// Bytes a stream may send before it is acknowledged: one whole content chunk and more.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// Bytes all streams of a connection may send before that.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Largest HTTP/2 frame; fewer, larger frames carry content faster.
const FRAME_BYTES: u32 = 1 << 20;
/// Most requests one connection may have in flight.
const MAX_STREAMS: u32 = 10_000;
/// Pause after a failed accept, so that a lack of descriptors does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Longest that a client may take to agree on keys.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// All services of the daemon, as the servers share them.
#[derive(Debug, Clone)]
pub(crate) struct Serving {
    service: Observed<Routes>,
    stop: CancellationToken,
    seat: Seat,
}

impl Serving {
    /// `routes` under observation, until `stop`.
    pub(crate) fn new(
        routes: Routes,
        in_flight: Arc<InFlight>,
        metrics: Metrics,
        stop: CancellationToken,
    ) -> Self {
        Self {
            // Routes are looked up on each request: prepared once.
            service: Observe::new(in_flight, metrics).layer(routes.prepare()),
            stop,
            seat: Seat::default(),
        }
    }

    /// Serves a Unix socket until told to stop, then lets what is in flight end.
    pub(crate) async fn unix(self, listener: UnixListener) {
        // Nobody is to be woken because a client has read its answer.
        let accept = || async { Line::try_from(listener.accept().await?.0) };
        self.serve(accept, Self::talk).await;
    }

    /// Serves a TCP port likewise, encrypted where `tls` is given.
    pub(crate) async fn tcp(self, listener: TcpListener, tls: Option<TlsAcceptor>) {
        let accept = || async {
            let (stream, _) = listener.accept().await?;
            // An answer is one small packet: it must not wait for another.
            stream.set_nodelay(true)?;
            Ok(stream)
        };
        match tls {
            None => self.serve(accept, Self::talk).await,
            Some(tls) => {
                let greet = move |serving: Self, stream| serving.greet(tls.clone(), stream);
                self.serve(accept, greet).await;
            }
        }
    }

    async fn serve<S, A, T>(self, accept: impl Fn() -> A, talk: impl Fn(Self, S) -> T)
    where
        A: Future<Output = io::Result<S>>,
        T: Future<Output = ()> + Send + 'static,
    {
        let connections = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                () = self.stop.cancelled() => break,
                accepted = accept() => accepted,
            };
            match accepted {
                Ok(stream) => drop(connections.spawn(talk(self.clone(), stream))),
                Err(error) => {
                    warn!(%error, "a connection was not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        connections.close();
        connections.wait().await;
    }

    /// A connection that begins with TLS.
    async fn greet(self, tls: TlsAcceptor, stream: TcpStream) {
        let greeted = tokio::select! {
            () = self.stop.cancelled() => return,
            greeted = tokio::time::timeout(HANDSHAKE_LIMIT, tls.accept(stream)) => greeted,
        };
        match greeted {
            Ok(Ok(stream)) => self.talk(stream).await,
            Ok(Err(error)) => debug!(%error, "a TLS handshake failed"),
            Err(_) => debug!("a TLS handshake took too long"),
        }
    }

    /// One connection to its end; told to stop, it takes no more requests.
    async fn talk<S>(self, stream: S)
    where
        S: AsyncRead + AsyncWrite + Eager + Unpin + Send + 'static,
    {
        let requests = TaskTracker::new();
        let stream = Gathering::new(AnyAuthority::new(stream));
        let connection = http2::Builder::new(BeginHere::new(requests.clone()))
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .max_concurrent_streams(MAX_STREAMS)
            .serve_connection(
                TokioIo::new(stream.clone()),
                TowerToHyperService::new(self.service),
            );
        let mut connection = pin!(stream.drive(connection, self.seat, requests.clone()));
        let mut stopping = false;
        loop {
            tokio::select! {
                ended = &mut connection => {
                    if let Err(error) = ended {
                        debug!(%error, "a connection failed");
                    }
                    break;
                }
                () = self.stop.cancelled(), if !stopping => {
                    stopping = true;
                    std::pin::Pin::new(connection.driver()).graceful_shutdown();
                }
            }
        }
        requests.close();
        requests.wait().await;
    }
}
