//! A small HTTP/1.1 server whose answers may be cut, slow or wrong.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

pub(crate) struct Asked {
    pub(crate) method: String,
    /// Path with query.
    pub(crate) path: String,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Asked {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }
}

#[derive(Clone)]
pub(crate) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    cut_at: Option<usize>,
    drip: Option<(usize, Duration)>,
}

impl Reply {
    pub(crate) fn new(status: u16, body: &[u8]) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.to_vec(),
            cut_at: None,
            drip: None,
        }
    }
    pub(crate) fn ok(body: &[u8]) -> Self {
        Self::new(200, body)
    }
    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
    /// The connection ends after so many bytes of the body.
    pub(crate) fn cut_at(mut self, at: usize) -> Self {
        self.cut_at = Some(at);
        self
    }
    /// Only so many bytes at a time.
    pub(crate) fn drip(mut self, bytes: usize, every: Duration) -> Self {
        self.drip = Some((bytes, every));
        self
    }
}

type Handler = dyn Fn(&Asked) -> Reply + Send + Sync;

pub(crate) struct Server {
    port: u16,
    count: Arc<AtomicU32>,
    // Ends the server when the test does.
    _tasks: JoinSet<()>,
}

impl Server {
    pub(crate) async fn start(handler: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let port = listener.local_addr().expect("address").port();
        let count = Arc::new(AtomicU32::new(0));
        let handler: Arc<Handler> = Arc::new(handler);
        let mut tasks = JoinSet::new();
        let counted = Arc::clone(&count);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, Arc::clone(&handler), Arc::clone(&counted)));
            }
        });
        Self {
            port,
            count,
            _tasks: tasks,
        }
    }

    pub(crate) fn authority(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Requests answered.
    pub(crate) fn count(&self) -> u32 {
        self.count.load(Ordering::SeqCst)
    }
}

async fn serve(mut stream: TcpStream, handler: Arc<Handler>, count: Arc<AtomicU32>) {
    while let Some(asked) = read(&mut stream).await {
        count.fetch_add(1, Ordering::SeqCst);
        let reply = handler(&asked);
        if answer(&mut stream, &asked, reply).await.is_none() {
            return;
        }
    }
}

async fn read(stream: &mut TcpStream) -> Option<Asked> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
        if head.len() == 1 && !head[0].is_ascii_uppercase() {
            // A TLS hello: answer as plain servers do.
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
            return None;
        }
    }
    let text = String::from_utf8(head).ok()?;
    let mut lines = text.split("\r\n");
    let mut first = lines.next()?.split(' ');
    let (method, path) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(key, value)| (key.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let mut asked = Asked {
        method,
        path,
        headers,
        body: Vec::new(),
    };
    let length = asked
        .header("content-length")
        .and_then(|l| l.parse().ok())
        .unwrap_or(0);
    asked.body = vec![0; length];
    stream.read_exact(&mut asked.body).await.ok()?;
    Some(asked)
}

async fn answer(stream: &mut TcpStream, asked: &Asked, reply: Reply) -> Option<()> {
    let mut head = format!("HTTP/1.1 {} X\r\n", reply.status);
    for (key, value) in &reply.headers {
        head.push_str(&format!("{key}: {value}\r\n"));
    }
    if !reply.headers.iter().any(|(key, _)| key == "content-length") {
        head.push_str(&format!("content-length: {}\r\n", reply.body.len()));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await.ok()?;
    if asked.method == "HEAD" {
        return Some(());
    }
    let end = reply.cut_at.unwrap_or(reply.body.len());
    let body = &reply.body[..end];
    match reply.drip {
        None => stream.write_all(body).await.ok()?,
        Some((bytes, every)) => {
            for piece in body.chunks(bytes) {
                stream.write_all(piece).await.ok()?;
                tokio::time::sleep(every).await;
            }
        }
    }
    reply.cut_at.is_none().then_some(())
}
