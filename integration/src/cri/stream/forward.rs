//! Port-forward over SPDY: pairs of streams on one connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::Result;
use crate::cri::stream::Spdy;
use crate::cri::stream::spdy::Frame;

/// Protocol of the streams.
const PROTOCOL: &str = "portforward.k8s.io";
/// Frames kept for a connection that reads slowly.
const BACKLOG: usize = 64;

type Routes = Arc<Mutex<HashMap<u32, mpsc::Sender<Vec<u8>>>>>;

/// A session that carries any number of connections.
#[derive(Debug)]
pub struct Forward {
    spdy: Spdy,
    routes: Routes,
    requests: u32,
    // Ends the reader with the session.
    _reader: JoinSet<()>,
}

/// One forwarded connection.
#[derive(Debug)]
pub struct Connection {
    spdy: Spdy,
    id: u32,
    data: mpsc::Receiver<Vec<u8>>,
    error: mpsc::Receiver<Vec<u8>>,
}

impl Forward {
    /// Connects to a URL of the server's.
    ///
    /// # Errors
    /// When it refuses.
    pub async fn open(url: &str) -> Result<Self> {
        let (spdy, mut reader) = Spdy::connect(url, PROTOCOL).await?;
        let routes = Routes::default();
        let shared = Arc::clone(&routes);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while let Ok(Some(frame)) = reader.next().await {
                let (id, bytes, last) = match frame {
                    Frame::Data { id, bytes, last } => (id, bytes, last),
                    Frame::Reset(id) => (id, Vec::new(), true),
                    Frame::Reply(_) => continue,
                };
                let route = shared.lock().map(|r| r.get(&id).cloned()).ok().flatten();
                if let Some(route) = route
                    && !bytes.is_empty()
                {
                    // A connection that nobody reads any more.
                    let _ = route.send(bytes).await;
                }
                if last && let Ok(mut routes) = shared.lock() {
                    routes.remove(&id);
                }
            }
            if let Ok(mut routes) = shared.lock() {
                routes.clear();
            }
        });
        Ok(Self {
            spdy,
            routes,
            requests: 0,
            _reader: tasks,
        })
    }

    /// Opens a connection to a port of the pod.
    ///
    /// # Errors
    /// When the session is gone.
    pub async fn connect(&mut self, port: u16) -> Result<Connection> {
        let (port, request) = (port.to_string(), self.requests.to_string());
        self.requests += 1;
        let mut channels = Vec::new();
        for kind in ["error", "data"] {
            let headers = [
                ("streamType", kind),
                ("port", port.as_str()),
                ("requestID", request.as_str()),
            ];
            let id = self.spdy.open(&headers).await?;
            let (sender, receiver) = mpsc::channel(BACKLOG);
            if let Ok(mut routes) = self.routes.lock() {
                routes.insert(id, sender);
            }
            if kind == "error" {
                // A client has nothing to say there.
                self.spdy.close(id).await?;
            }
            channels.push((id, receiver));
        }
        let [(_, error), (id, data)]: [_; 2] = channels
            .try_into()
            .map_err(|_| anyhow::anyhow!("two streams were opened"))?;
        Ok(Connection {
            spdy: self.spdy.clone(),
            id,
            data,
            error,
        })
    }
}

impl Connection {
    /// Sends bytes.
    ///
    /// # Errors
    /// When the session is gone.
    pub async fn write(&self, bytes: &[u8]) -> Result<()> {
        self.spdy.send(self.id, bytes).await
    }

    /// Ends this side.
    ///
    /// # Errors
    /// When the session is gone.
    pub async fn close(&self) -> Result<()> {
        self.spdy.close(self.id).await
    }

    /// A handle that can write while this one reads.
    #[must_use]
    pub fn writer(&self) -> (Spdy, u32) {
        (self.spdy.clone(), self.id)
    }

    /// The next bytes; `None` at the end.
    pub async fn read(&mut self) -> Option<Vec<u8>> {
        self.data.recv().await
    }

    /// Everything until the end.
    pub async fn read_all(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(bytes) = self.read().await {
            all.extend(bytes);
        }
        all
    }

    /// What the server said went wrong; empty when nothing did.
    pub async fn error(&mut self) -> String {
        let mut all = Vec::new();
        while let Some(bytes) = self.error.recv().await {
            all.extend(bytes);
        }
        String::from_utf8_lossy(&all).into_owned()
    }
}
