//! The streaming server: exec, attach and port-forward for the kubelet's clients.
//!
//! The CRI call leaves a request here and gets a URL with a one-time token; the client connects to
//! it, switches to SPDY/3.1 or WebSocket, and the runtime's [`Backend`] does the rest.
//!
//! ```text
//! CRI call ── token ── URL          HTTP head ── take token ── upgrade ── streams ── Backend
//! ```
//!
//! One task per connection holds everything of its session, so ending the task ends all of it. A
//! client that goes away ends attach and port-forward at once; an exec keeps running until its
//! process exits, no longer counted against the sessions. Every queue is bounded.

mod backend;
mod channel;
mod forward;
mod http;
mod remote;
mod session;
mod spdy;
mod tls;
mod token;
mod upgrade;
mod websocket;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lighter_proto::errdefs::{Classify, ErrorKind};
use lighter_proto::runtime::v1::{AttachRequest, ExecRequest, PortForwardRequest};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::backend::{
    Backend, BackendError, BoxDuplex, BoxRead, BoxWrite, Duplex, ExecIo, ExitStatus, TerminalSize,
};
pub use self::tls::{KeyPair, TlsError};

use self::channel::Activity;
use self::remote::Command;
use self::token::Tokens;

/// Connections at once, of all clients.
const MAX_SESSIONS: usize = 1024;
/// Time for a TLS handshake and for a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Settings of the streaming server.
#[derive(Debug, Clone)]
pub struct Config {
    /// Address to listen on; empty for the one that this host's traffic leaves from.
    pub address: String,
    /// Port; 0 for any.
    pub port: u16,
    /// How long nothing may flow before a session ends.
    pub idle_timeout: Duration,
    /// Serve TLS with this key pair.
    pub tls: Option<KeyPair>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address: "127.0.0.1".to_owned(),
            port: 0,
            idle_timeout: Duration::from_secs(4 * 60 * 60),
            tls: None,
        }
    }
}

/// Why a request gets no URL, or the server does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request cannot be served as it is.
    #[error("{0}")]
    Invalid(&'static str),
    /// Too many requests wait for their client.
    #[error("maximum number of in-flight requests exceeded")]
    TooMany,
    /// The listener could not be opened.
    #[error("failed to listen on {address} for streaming: {source}")]
    Listen {
        /// Address as configured.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The key pair cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid(_) => ErrorKind::InvalidArgument,
            Self::TooMany => ErrorKind::ResourceExhausted,
            Self::Listen { .. } | Self::Tls(_) => ErrorKind::Unknown,
        }
    }
}

/// A request that waits for its client.
#[derive(Debug)]
enum Pending {
    Exec(Command),
    Attach(Command),
    PortForward { sandbox_id: String, ports: Vec<u16> },
}

/// The server. Requests are left by the CRI's calls, [`Server::serve`] answers the clients.
pub struct Server {
    backend: Arc<dyn Backend>,
    tokens: Mutex<Tokens<Pending>>,
    listener: TcpListener,
    base_url: String,
    tls: Option<TlsAcceptor>,
    idle_timeout: Duration,
    sessions: Arc<Semaphore>,
    tasks: TaskTracker,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("base_url", &self.base_url)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Opens the listener. Nothing is answered until [`Server::serve`] runs.
    ///
    /// # Errors
    /// An address that cannot be listened on, a key pair that cannot be used.
    pub async fn bind(config: &Config, backend: Arc<dyn Backend>) -> Result<Arc<Self>, Error> {
        let failed = |source| Error::Listen {
            address: format!("{}:{}", config.address, config.port),
            source,
        };
        let address = if config.address.is_empty() {
            outgoing_address().to_string()
        } else {
            config.address.clone()
        };
        let listener = TcpListener::bind((address.as_str(), config.port))
            .await
            .map_err(failed)?;
        let mut local = listener.local_addr().map_err(failed)?;
        if local.ip().is_unspecified() {
            local.set_ip(outgoing_address());
        }
        let tls = config.tls.as_ref().map(|pair| {
            let names = vec!["localhost".to_owned(), local.ip().to_string()];
            tls::acceptor(pair, names)
        });
        let scheme = if tls.is_some() { "https" } else { "http" };
        Ok(Arc::new(Self {
            backend,
            tokens: Mutex::default(),
            listener,
            base_url: format!("{scheme}://{local}"),
            tls: tls.transpose()?,
            idle_timeout: config.idle_timeout,
            sessions: Arc::new(Semaphore::new(MAX_SESSIONS)),
            tasks: TaskTracker::new(),
        }))
    }

    /// A URL at which a client can run the command.
    ///
    /// # Errors
    /// Options that contradict each other, or too many waiting requests.
    pub fn exec_url(&self, request: &ExecRequest) -> Result<String, Error> {
        let command = Command {
            container_id: request.container_id.clone(),
            exec: Some(request.cmd.clone()),
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            tty: request.tty,
        };
        check(&command)?;
        self.url("exec", Pending::Exec(command))
    }

    /// A URL at which a client can attach.
    ///
    /// # Errors
    /// As [`Server::exec_url`].
    pub fn attach_url(&self, request: &AttachRequest) -> Result<String, Error> {
        let command = Command {
            container_id: request.container_id.clone(),
            exec: None,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            tty: request.tty,
        };
        check(&command)?;
        self.url("attach", Pending::Attach(command))
    }

    /// A URL at which a client can forward ports.
    ///
    /// # Errors
    /// A missing sandbox id, a port that is none, or too many waiting requests.
    pub fn port_forward_url(&self, request: &PortForwardRequest) -> Result<String, Error> {
        if request.pod_sandbox_id.is_empty() {
            return Err(Error::Invalid("missing required pod_sandbox_id"));
        }
        let port = |port: &i32| u16::try_from(*port).ok().filter(|port| *port > 0);
        let ports: Option<Vec<u16>> = request.port.iter().map(port).collect();
        let ports = ports.ok_or(Error::Invalid("ports must be between 1 and 65535"))?;
        let sandbox_id = request.pod_sandbox_id.clone();
        self.url("portforward", Pending::PortForward { sandbox_id, ports })
    }

    fn url(&self, kind: &str, pending: Pending) -> Result<String, Error> {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let token = tokens
            .insert(pending, Instant::now())
            .ok_or(Error::TooMany)?;
        Ok(format!("{}/{kind}/{token}", self.base_url))
    }

    /// Where clients are sent.
    #[must_use]
    pub fn base_url(&self) -> &str {
        &self.base_url
    }

    /// Answers clients until cancelled, then ends every session.
    pub async fn serve(self: Arc<Self>, cancel: CancellationToken) {
        loop {
            let accepted = tokio::select! {
                () = cancel.cancelled() => break,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let (server, cancel) = (self.clone(), cancel.clone());
                    self.tasks.spawn(async move {
                        tokio::select! {
                            () = cancel.cancelled() => {}
                            () = server.connection(stream) => {}
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "streaming listener");
                    // Out of descriptors: wait for sessions to end.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
        self.tasks.close();
        self.tasks.wait().await;
    }

    async fn connection(&self, stream: TcpStream) {
        let Ok(permit) = self.sessions.clone().try_acquire_owned() else {
            let mut stream = stream;
            let body = "too many streaming sessions, try again later\n";
            let _ = http::refuse(&mut stream, "503 Service Unavailable", &[], body).await;
            return;
        };
        // A keystroke must not wait for the next one.
        let _ = stream.set_nodelay(true);
        let activity = Activity::new(stream.as_fd().try_clone_to_owned().ok());
        let ended = match &self.tls {
            None => self.request(stream, permit, &activity).await,
            Some(tls) => match timeout(HEAD_TIMEOUT, tls.accept(stream)).await {
                Ok(Ok(stream)) => self.request(stream, permit, &activity).await,
                Ok(Err(error)) => Err(error),
                Err(_) => return,
            },
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "streaming request");
        }
    }

    /// Reads one request, answers it, and serves what follows.
    async fn request<S>(
        &self,
        stream: S,
        permit: OwnedSemaphorePermit,
        activity: &Arc<Activity>,
    ) -> std::io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Ok(read) = timeout(HEAD_TIMEOUT, http::read_request(stream)).await else {
            return Ok(());
        };
        let (request, mut stream) = read?;
        let mut segments = request.path.trim_start_matches('/').split('/');
        let (kind, token) = (segments.next().unwrap_or_default(), segments.next());
        let known = matches!(kind, "exec" | "attach" | "portforward") && segments.next().is_none();
        let not_found = "404 Not Found";
        let Some(token) = token.filter(|_| known) else {
            return http::refuse(&mut stream, not_found, &[], "404: Page Not Found\n").await;
        };
        if !matches!(request.method.as_str(), "GET" | "POST") {
            let status = "405 Method Not Allowed";
            let allow = [("Allow", "GET, POST")];
            return http::refuse(&mut stream, status, &allow, "405: Method Not Allowed\n").await;
        }
        let pending = {
            let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
            tokens.take(token, Instant::now())
        };
        match (kind, pending) {
            ("exec", Some(Pending::Exec(command))) | ("attach", Some(Pending::Attach(command))) => {
                self.remote(&request, stream, &command, permit, activity)
                    .await
            }
            ("portforward", Some(Pending::PortForward { sandbox_id, ports })) => {
                self.forward(&request, stream, &sandbox_id, &ports, activity)
                    .await
            }
            _ => http::refuse(&mut stream, not_found, &[], "404: Page Not Found\n").await,
        }
    }
}

fn check(command: &Command) -> Result<(), Error> {
    if command.container_id.is_empty() {
        return Err(Error::Invalid("missing required container_id"));
    }
    if command.tty && command.stderr {
        return Err(Error::Invalid("tty and stderr cannot both be true"));
    }
    if !(command.stdin || command.stdout || command.stderr) {
        return Err(Error::Invalid(
            "one of stdin, stdout, or stderr must be set",
        ));
    }
    Ok(())
}

/// The address that this host's traffic leaves from; nothing is sent to find it.
fn outgoing_address() -> IpAddr {
    let probe = || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        // A documentation address: connecting a datagram socket only looks the route up.
        socket.connect(SocketAddr::from(([192, 0, 2, 1], 9)))?;
        socket.local_addr()
    };
    probe().map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |address| address.ip())
}

#[cfg(test)]
mod tests;
