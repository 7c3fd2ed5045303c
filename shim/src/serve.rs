//! The serving process: one thread, one runtime, one socket.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt as _;
use lighter_proto::line::Line;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Level, error, info, warn};
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::bootstrap::Request;
use crate::error::{Error, Result};
use crate::publish::Publisher;
use crate::reaper::Reaper;
use crate::runtime::builtin::Library;
use crate::service::Shim;
use crate::task::Core;
use crate::{log, socket, sys};

/// How long a shim that ends waits for the daemon to take its last events.
const FLUSH_LIMIT: Duration = Duration::from_secs(3);
/// A shim without containers and without connections for this long ends: its daemon died between
/// starting it and using it.
const IDLE_LIMIT: Duration = Duration::from_secs(120);
/// How long after its beginning a shim is past the start of its first container.
const SETTLES_AFTER: Duration = Duration::from_secs(2);
/// Turns given to other tasks so that the answer to `Shutdown` leaves before the process.
const LAST_TURNS: usize = 16;

/// Everything a server needs.
#[derive(Debug)]
pub(crate) struct Serving {
    /// Who asked for it, and how to reach them.
    pub(crate) request: Request,
    /// Bundle of the first container; the log fifo is there.
    pub(crate) bundle: PathBuf,
    /// The bound socket.
    pub(crate) listener: UnixListener,
    /// A connection that exists already.
    pub(crate) first: Option<std::os::unix::net::UnixStream>,
    /// The machine's control groups as this process sees them, where that is known.
    pub(crate) host: Option<lighter_oci::cgroup::Host>,
    /// A network namespace for the first container.
    pub(crate) network: Option<OwnedFd>,
    /// Where it is bound.
    pub(crate) socket: PathBuf,
    /// Directory of sockets.
    pub(crate) socket_dir: PathBuf,
}

/// The socket's file, removed when this is dropped and not again: a successor may have the name then.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        socket::remove(&self.0);
    }
}

/// The event loop that [`run`] wants.
///
/// # Errors
/// When the system is out of descriptors or memory.
pub(crate) fn event_loop() -> Result<Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(Error::system("start the event loop"))
}

/// Serves until told to end, then removes the socket.
pub(crate) fn run(serving: Serving, runtime: &Runtime) {
    let level = match (serving.request.debug, serving.request.quiet) {
        (true, _) => Level::DEBUG,
        (false, false) => Level::INFO,
        (false, true) => Level::WARN,
    };
    log::init(&serving.bundle, level);
    if let Err(error) = nix::sys::prctl::set_child_subreaper(true) {
        warn!(%error, "cannot adopt orphans: exits of containers will be missed");
    }
    if let Err(error) = runtime.block_on(serve(serving)) {
        error!(%error, "shim failed");
    }
}

async fn serve(serving: Serving) -> Result<()> {
    let Serving {
        request,
        listener,
        first,
        host,
        network,
        socket,
        socket_dir,
        ..
    } = serving;
    let socket = SocketFile(socket);
    let tracker = TaskTracker::new();
    let reaper = Reaper::default();
    let publisher = Publisher::new(request.namespace.clone(), &request.ttrpc_address);
    tracker.spawn(reaper.clone().run());
    tracker.spawn(publisher.clone().run());
    let core = Arc::new(Core {
        namespace: request.namespace,
        reaper,
        publisher: publisher.clone(),
        tracker: tracker.clone(),
        socket_dir,
        library: Library::knowing(host, network),
    });
    let end = CancellationToken::new();
    let shim = Shim::new(core, end.clone());
    let connections = Arc::new(AtomicUsize::new(0));
    listener
        .set_nonblocking(true)
        .map_err(Error::system("watch the socket"))?;
    let listener =
        tokio::net::UnixListener::from_std(listener).map_err(Error::system("watch the socket"))?;
    let first = first
        .map(Line::new)
        .transpose()
        .map_err(Error::system("watch the first connection"))?;
    let mut server = Server::new()
        .add_listener(accept(listener, first, connections.clone()))
        .register_service(shim.services());
    server
        .start()
        .await
        .map_err(|e| Error::Runtime(format!("serve: {e}")))?;
    info!(pid = std::process::id(), "shim serves");
    tracker.spawn(settle());
    let mut term = signal(SignalKind::terminate()).map_err(Error::system("listen to SIGTERM"))?;
    let mut int = signal(SignalKind::interrupt()).map_err(Error::system("listen to SIGINT"))?;
    tokio::select! {
        () = end.cancelled() => {}
        _ = term.recv() => info!("SIGTERM"),
        _ = int.recv() => info!("SIGINT"),
        () = idle(&shim, &connections) => info!("nothing to serve and nobody connected"),
    }
    // A container that joins the group from now on gets a shim of its own.
    drop(socket);
    for _ in 0..LAST_TURNS {
        tokio::task::yield_now().await;
    }
    if tokio::time::timeout(FLUSH_LIMIT, publisher.drained())
        .await
        .is_err()
    {
        warn!("the daemon did not take the last events");
    }
    Ok(())
}

/// Gives back what starting took. A container that is over by then never asks for it again.
async fn settle() {
    tokio::time::sleep(SETTLES_AFTER).await;
    sys::save_memory();
    sys::trim_heap();
}

/// Ends when there was neither a container nor a connection for a while.
async fn idle(shim: &Shim, connections: &AtomicUsize) {
    let mut quiet = false;
    loop {
        tokio::time::sleep(IDLE_LIMIT / 2).await;
        let now = shim.is_empty() && connections.load(Ordering::Relaxed) == 0;
        if now && quiet {
            return;
        }
        quiet = now;
    }
}

/// Connections of the same user or root; anybody else is turned away.
fn accept(
    listener: tokio::net::UnixListener,
    first: Option<Line>,
    connections: Arc<AtomicUsize>,
) -> Listener {
    let us = rustix::process::geteuid().as_raw();
    let first = first.map(|stream| Ok(Counted::new(stream, connections.clone())));
    let later = futures::stream::unfold(
        (listener, connections),
        move |(listener, connections)| async move {
            let accepted = loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let peer = stream.peer_cred().map(|cred| cred.uid());
                        if matches!(peer, Ok(uid) if uid == 0 || uid == us) {
                            let line = Line::try_from(stream);
                            break line.map(|line| Counted::new(line, connections.clone()));
                        }
                        warn!("connection of another user refused");
                    }
                    Err(error) => {
                        // Out of descriptors: trying at once again would only spin.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        break Err(error);
                    }
                }
            };
            Some((accepted, (listener, connections)))
        },
    );
    Listener::new(futures::stream::iter(first).chain(later))
}

/// A connection that is counted while it lives.
struct Counted {
    stream: Line,
    connections: Arc<AtomicUsize>,
}

impl Counted {
    fn new(stream: Line, connections: Arc<AtomicUsize>) -> Self {
        connections.fetch_add(1, Ordering::Relaxed);
        Self {
            stream,
            connections,
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
