//! Port forwarding over either protocol: pairs of a data and an error stream, one per connection.

use std::collections::HashMap;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use std::{io, mem};

use futures::stream::{FuturesUnordered, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::Instant;

use super::backend::Backend;
use super::channel::{ChannelReader, ChannelWriter};
use super::{spdy, websocket};

/// How long the second stream of a pair may take.
const PAIRING: Duration = Duration::from_secs(30);
/// Forwarded connections at once, for one client.
const MAX_PAIRS: usize = 512;

/// A channel in both directions.
struct Pipe {
    reader: ChannelReader,
    writer: ChannelWriter,
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, buf)
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}

/// Forwards one connection, and tells a failure on its error stream.
async fn forward(
    backend: &dyn Backend,
    sandbox_id: &str,
    port: u16,
    data: Pipe,
    mut error: ChannelWriter,
) {
    let closer = data.writer.closer();
    if let Err(failure) = backend.port_forward(sandbox_id, port, Box::new(data)).await {
        let text = format!("error forwarding port {port} to pod {sandbox_id}: {failure}");
        // Fails only when the client is gone.
        let _ = error.write_all(text.as_bytes()).await;
    }
    if let Some(closer) = closer {
        closer.close().await;
    }
    let _ = error.shutdown().await;
}

/// A pair of which one stream has come.
struct Half {
    stream: spdy::Stream,
    is_error: bool,
    port: u16,
    since: Instant,
}

/// Forwards everything that a SPDY client asks for, until it hangs up.
pub(super) async fn over_spdy(
    mut connection: spdy::Connection,
    backend: &dyn Backend,
    sandbox_id: &str,
) {
    let mut halves: HashMap<String, Half> = HashMap::new();
    let mut running = FuturesUnordered::new();
    loop {
        let oldest = halves.values().map(|half| half.since).min();
        let expiry = async {
            match oldest {
                Some(since) => tokio::time::sleep_until(since + PAIRING).await,
                None => std::future::pending().await,
            }
        };
        // All branches are cancel-safe.
        let stream = tokio::select! {
            stream = connection.streams.recv() => match stream {
                Some(stream) => stream,
                None => break,
            },
            Some(()) = running.next() => continue,
            () = expiry => {
                let late = |half: &Half| half.since + PAIRING <= Instant::now();
                for (_, half) in halves.extract_if(|_, half| late(half)) {
                    spdy::refuse(&connection, &half.stream).await;
                }
                continue;
            }
        };
        let Some((request, half)) = classify(stream, &connection, running.len()).await else {
            continue;
        };
        match halves.remove(&request) {
            Some(other) if other.is_error != half.is_error && other.port == half.port => {
                let (data, error) = if half.is_error {
                    (other, half)
                } else {
                    (half, other)
                };
                let port = data.port;
                let pipe = Pipe {
                    reader: data.stream.reader,
                    writer: data.stream.writer,
                };
                running.push(forward(
                    backend,
                    sandbox_id,
                    port,
                    pipe,
                    error.stream.writer,
                ));
            }
            Some(other) => {
                spdy::refuse(&connection, &half.stream).await;
                halves.insert(request, other);
            }
            None => {
                halves.insert(request, half);
            }
        }
    }
    // The client begins no more; what it began goes on until it hangs up.
    drop(mem::take(&mut halves));
    while running.next().await.is_some() {}
    drop(running);
    connection.finish().await;
}

/// Reads a stream's headers; refuses one that cannot be half of a pair.
async fn classify(
    stream: spdy::Stream,
    connection: &spdy::Connection,
    running: usize,
) -> Option<(String, Half)> {
    let is_error = match stream.header("streamtype") {
        Some("error") => Some(true),
        Some("data") => Some(false),
        _ => None,
    };
    let port = stream.header("port").and_then(|port| port.parse().ok());
    let (Some(is_error), Some(port @ 1..), true) = (is_error, port, running < MAX_PAIRS) else {
        spdy::refuse(connection, &stream).await;
        return None;
    };
    // Old clients name no request: their error stream comes first, the data stream right after.
    let request = match stream.header("requestid") {
        Some(request) if !request.is_empty() => request.to_owned(),
        _ if is_error => stream.id.to_string(),
        _ => stream.id.wrapping_sub(2).to_string(),
    };
    let since = Instant::now();
    let half = Half {
        stream,
        is_error,
        port,
        since,
    };
    Some((request, half))
}

/// Forwards the ports of a WebSocket client: channels `2i` and `2i + 1` for the i-th one.
pub(super) async fn over_websocket(
    mut connection: websocket::Connection,
    backend: &dyn Backend,
    sandbox_id: &str,
    ports: &[u16],
) {
    let mut running = FuturesUnordered::new();
    let readers = mem::take(&mut connection.readers);
    let writers = mem::take(&mut connection.writers);
    let mut readers = readers.into_iter().flatten();
    let mut writers = writers.into_iter().flatten();
    for port in ports {
        let (Some(reader), Some(mut data)) = (readers.next(), writers.next()) else {
            break;
        };
        let (Some(_), Some(mut error)) = (readers.next(), writers.next()) else {
            break;
        };
        // Each stream begins with its port. Fails only when the client is gone.
        let _ = data.write_all(&port.to_le_bytes()).await;
        let _ = error.write_all(&port.to_le_bytes()).await;
        let pipe = Pipe {
            reader,
            writer: data,
        };
        running.push(forward(backend, sandbox_id, *port, pipe, error));
    }
    while running.next().await.is_some() {}
}
