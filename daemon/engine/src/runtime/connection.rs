//! Calls to one shim, over ttrpc or gRPC, for version 2 and 3 of the protocol.
//!
//! The end of the connection is the death signal of the shim: the stream under the client tells
//! it, whether a call is under way or not. Every call ends with the connection.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use lighter_proto::errdefs::{ErrorKind, WireError};
use lighter_proto::line::Line;
use lighter_proto::ttrpc::call;
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::{Channel, Endpoint};
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;

use super::bootstrap::{Bootstrap, Protocol};
use super::early::Early;

const TASK_V2: &str = "containerd.task.v2.Task";
pub(super) const TASK_V3: &str = "containerd.task.v3.Task";
const SANDBOX: &str = "containerd.runtime.sandbox.v1.Sandbox";
/// Service of logs that the shim writes itself.
const LOG: &str = "lighter.shim.v1.Log";
/// Header that names the namespace over gRPC.
const NAMESPACE_HEADER: &str = "containerd-namespace";
/// Longest that opening a connection to a local socket may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// A connection to a shim; clones share it.
#[derive(Clone)]
pub struct Connection {
    inner: Arc<Inner>,
}

struct Inner {
    transport: Transport,
    namespace: String,
    version: AtomicU32,
    bootstrap: Bootstrap,
    /// Cancelled by the stream when the peer is gone, and by us to close it.
    closed: CancellationToken,
}

enum Transport {
    Ttrpc(Client),
    Grpc(Channel),
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("bootstrap", &self.inner.bootstrap)
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

/// What a connection that ended says.
fn gone() -> WireError {
    WireError::new(ErrorKind::Unavailable, "ttrpc: closed")
}

impl Connection {
    /// Connects to the shim that `bootstrap` describes; calls carry `namespace`.
    ///
    /// # Errors
    /// `Unavailable` when nobody listens there.
    pub async fn open(bootstrap: &Bootstrap, namespace: &str) -> Result<Self, WireError> {
        let stream = tokio::time::timeout(CONNECT_LIMIT, dial(&bootstrap.address))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|error| {
                WireError::new(
                    match error.kind() {
                        io::ErrorKind::TimedOut => ErrorKind::DeadlineExceeded,
                        _ => ErrorKind::Unavailable,
                    },
                    format!("connect to shim at {}: {error}", bootstrap.address),
                )
            })?;
        Self::over(stream, bootstrap, namespace).await
    }

    /// The connection to a shim that has come to serve.
    pub(super) fn settled(early: Early, bootstrap: &Bootstrap, namespace: &str) -> Self {
        let transport = Transport::Ttrpc(early.client);
        Self::with(transport, early.closed, bootstrap, namespace)
    }

    /// The same over a stream that is connected already.
    ///
    /// # Errors
    /// `Unavailable` when the stream has ended.
    async fn over(stream: Line, bootstrap: &Bootstrap, namespace: &str) -> Result<Self, WireError> {
        let closed = CancellationToken::new();
        let stream = Watched::new(stream, closed.clone());
        let transport = match bootstrap.protocol {
            Protocol::Ttrpc => Transport::Ttrpc(Client::new(Socket::new(stream))),
            Protocol::Grpc => Transport::Grpc(channel(stream).await?),
        };
        Ok(Self::with(transport, closed, bootstrap, namespace))
    }

    fn with(
        transport: Transport,
        closed: CancellationToken,
        bootstrap: &Bootstrap,
        namespace: &str,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                transport,
                namespace: namespace.to_owned(),
                version: AtomicU32::new(bootstrap.version),
                bootstrap: bootstrap.clone(),
                closed,
            }),
        }
    }

    /// How the shim is reached, with the version it turned out to speak.
    #[must_use]
    pub fn bootstrap(&self) -> Bootstrap {
        Bootstrap {
            version: self.version(),
            ..self.inner.bootstrap.clone()
        }
    }

    /// Version of the protocol in use.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.inner.version.load(Ordering::Relaxed)
    }

    /// A call of the task service. A shim that does not know version 3 is spoken to in version 2
    /// from then on.
    ///
    /// # Errors
    /// The shim's own, `DeadlineExceeded` after `limit`, `Unavailable` when it is gone.
    ///
    /// # Cancellation
    /// The request may have been sent; its answer is thrown away.
    pub async fn task<Req: Message + Clone + 'static, Res: Message + Default + 'static>(
        &self,
        method: &str,
        request: Req,
        limit: Option<Duration>,
    ) -> Result<Res, WireError> {
        if self.version() < 3 {
            return self.request(TASK_V2, method, request, limit).await;
        }
        match self.request(TASK_V3, method, request.clone(), limit).await {
            Err(error)
                if lacks(&error, TASK_V3) && self.inner.bootstrap.protocol == Protocol::Ttrpc =>
            {
                match self.request(TASK_V2, method, request, limit).await {
                    // It has neither: what it lacks is this one method.
                    Err(second) if lacks(&second, TASK_V2) => Err(error),
                    answer => {
                        self.inner.version.store(2, Ordering::Relaxed);
                        answer
                    }
                }
            }
            answer => answer,
        }
    }

    /// A call of the sandbox service.
    ///
    /// # Errors
    /// As [`Connection::task`].
    pub async fn sandbox<Req: Message + 'static, Res: Message + Default + 'static>(
        &self,
        method: &str,
        request: Req,
        limit: Option<Duration>,
    ) -> Result<Res, WireError> {
        self.request(SANDBOX, method, request, limit).await
    }

    /// A call of the log service, which only our own shim has.
    ///
    /// # Errors
    /// As [`Connection::task`]; `Unimplemented` from other shims.
    pub async fn log<Req: Message + 'static, Res: Message + Default + 'static>(
        &self,
        method: &str,
        request: Req,
        limit: Option<Duration>,
    ) -> Result<Res, WireError> {
        self.request(LOG, method, request, limit).await
    }

    async fn request<Req: Message + 'static, Res: Message + Default + 'static>(
        &self,
        service: &str,
        method: &str,
        request: Req,
        limit: Option<Duration>,
    ) -> Result<Res, WireError> {
        let answer = async {
            match &self.inner.transport {
                Transport::Ttrpc(client) => {
                    call(
                        client,
                        service,
                        method,
                        &self.inner.namespace,
                        &request,
                        limit,
                    )
                    .await
                }
                Transport::Grpc(channel) => {
                    grpc(
                        channel.clone(),
                        service,
                        method,
                        &self.inner.namespace,
                        request,
                    )
                    .await
                }
            }
        };
        // Both branches may be dropped: an answer to a dead connection is of no use.
        tokio::select! {
            biased;
            answer = bounded(answer, limit) => match answer {
                // The transport may notice its end before the watch on the stream does.
                Err(error) if error.kind == ErrorKind::Unavailable && self.is_closed() => Err(gone()),
                answer => answer,
            },
            () = self.inner.closed.cancelled() => Err(gone()),
        }
    }

    /// Whether the peer is gone or we closed it.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.inner.closed.is_cancelled()
    }

    /// Waits until the peer is gone or we closed it.
    pub async fn closed(&self) {
        self.inner.closed.cancelled().await;
    }

    /// Ends the connection; calls under way fail.
    pub fn close(&self) {
        self.inner.closed.cancel();
    }
}

/// Whether the shim answered that it knows no such service, or no such method of it.
fn lacks(error: &WireError, service: &str) -> bool {
    // Servers of the Rust library say it with other codes.
    let others = matches!(error.kind, ErrorKind::NotFound | ErrorKind::InvalidArgument);
    error.kind == ErrorKind::Unimplemented || others && error.message.contains(service)
}

async fn bounded<T>(
    answer: impl Future<Output = Result<T, WireError>>,
    limit: Option<Duration>,
) -> Result<T, WireError> {
    match limit {
        None => answer.await,
        Some(limit) => tokio::time::timeout(limit, answer)
            .await
            .unwrap_or_else(|_| {
                Err(WireError::new(
                    ErrorKind::DeadlineExceeded,
                    format!("the shim did not answer within {limit:?}: context deadline exceeded"),
                ))
            }),
    }
}

async fn grpc<Req: Message + 'static, Res: Message + Default + 'static>(
    channel: Channel,
    service: &str,
    method: &str,
    namespace: &str,
    request: Req,
) -> Result<Res, WireError> {
    let mut client = tonic::client::Grpc::new(channel);
    client
        .ready()
        .await
        .map_err(|e| WireError::new(ErrorKind::Unavailable, e.to_string()))?;
    let path = http::uri::PathAndQuery::try_from(format!("/{service}/{method}"))
        .map_err(|e| WireError::new(ErrorKind::Internal, e.to_string()))?;
    let mut request = tonic::Request::new(request);
    if let Ok(value) = namespace.parse() {
        request.metadata_mut().insert(NAMESPACE_HEADER, value);
    }
    let codec = tonic_prost::ProstCodec::<Req, Res>::default();
    Ok(client.unary(request, path, codec).await?.into_inner())
}

/// A gRPC channel over one stream; when that ends the channel does, too.
async fn channel(stream: Watched<Line>) -> Result<Channel, WireError> {
    let mut stream = Some(stream);
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let stream = stream.take().map(hyper_util::rt::TokioIo::new);
            async move { stream.ok_or(io::Error::from(io::ErrorKind::NotConnected)) }
        }))
        .await
        .map_err(|e| WireError::new(ErrorKind::Unavailable, e.to_string()))
}

/// Connects to `unix://path` or a plain path (as shims over gRPC answer), to a hybrid vsock (`hvsock://path:port`), or to an abstract name.
async fn dial(address: &str) -> io::Result<Line> {
    let plain = address.starts_with('/').then_some(address);
    if let Some(path) = address.strip_prefix("unix://").or(plain) {
        return Line::connect(path).await;
    }
    if let Some(rest) = address.strip_prefix("hvsock://") {
        return hybrid(rest).await;
    }
    if let Some((scheme, _)) = address.split_once("://") {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("sockets of scheme {scheme} are not supported"),
        ));
    }
    abstract_name(address.trim_start_matches('\0'))
}

fn abstract_name(name: &str) -> io::Result<Line> {
    use std::os::linux::net::SocketAddrExt as _;
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name.as_bytes())?;
    // A local connect does not block: the peer's backlog takes it or the call fails.
    Line::new(std::os::unix::net::UnixStream::connect_addr(&address)?)
}

/// The handshake of a virtual machine monitor's socket: `CONNECT port`, answered by `OK …`.
async fn hybrid(rest: &str) -> io::Result<Line> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let (path, port) = rest
        .rsplit_once(':')
        .and_then(|(path, port)| Some((path, port.parse::<u32>().ok()?)))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "want hvsock://path:port"))?;
    let mut stream = Line::connect(Path::new(path)).await?;
    stream
        .write_all(format!("CONNECT {port}\n").as_bytes())
        .await?;
    let mut line = Vec::with_capacity(32);
    while line.last() != Some(&b'\n') {
        // Byte by byte: what follows the line belongs to the protocol.
        line.push(stream.read_u8().await?);
        if line.len() > 64 {
            break;
        }
    }
    if line.starts_with(b"OK") {
        Ok(stream)
    } else {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

/// A stream that tells a token of its end, and ends when the token says so.
pub(super) struct Watched<S> {
    stream: S,
    closed: CancellationToken,
    close: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, closed: CancellationToken) -> Self {
        Self {
            stream,
            close: Box::pin(closed.clone().cancelled_owned()),
            closed,
        }
    }
}

impl<S> Drop for Watched<S> {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let had = buf.filled().len();
        match Pin::new(&mut self.stream).poll_read(cx, buf) {
            Poll::Ready(Ok(())) if buf.filled().len() == had && buf.remaining() > 0 => {
                self.closed.cancel();
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => {
                self.closed.cancel();
                Poll::Ready(Err(error))
            }
            // Closed by us: the reader sees the end of the stream.
            Poll::Pending if self.close.as_mut().poll(cx).is_ready() => Poll::Ready(Ok(())),
            other => other,
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_death_of_the_peer_is_noticed_without_a_call() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let bootstrap = Bootstrap::parse(format!("unix://{}", path.display()).as_bytes()).unwrap();
        let connection = Connection::open(&bootstrap, "n").await.unwrap();
        let (peer, _) = listener.accept().await.unwrap();
        assert!(!connection.is_closed());
        drop(peer);
        tokio::time::timeout(Duration::from_secs(5), connection.closed())
            .await
            .unwrap();
        let answer: Result<(), _> = connection.task("Connect", (), None).await;
        assert_eq!(answer.unwrap_err().kind, ErrorKind::Unavailable);
    }

    #[tokio::test]
    async fn closing_ends_the_peers_stream() {
        use tokio::io::AsyncReadExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let bootstrap = Bootstrap::parse(format!("unix://{}", path.display()).as_bytes()).unwrap();
        let connection = Connection::open(&bootstrap, "n").await.unwrap();
        let (mut peer, _) = listener.accept().await.unwrap();
        connection.close();
        let mut byte = [0; 1];
        let read = tokio::time::timeout(Duration::from_secs(5), peer.read(&mut byte));
        assert_eq!(read.await.unwrap().unwrap(), 0);
    }
}
