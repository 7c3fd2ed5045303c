//! The one HTTP/1.1 exchange that precedes a stream: request head in, upgrade or refusal out.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

/// Bytes of a request's head.
const MAX_HEAD: usize = 32 << 10;
/// Header lines of a request.
const MAX_HEADERS: usize = 64;

/// A request's head.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) method: String,
    /// Path without query.
    pub(super) path: String,
    headers: Vec<(String, String)>,
}

impl Request {
    /// The first value of a header, by lower-case name.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.values(name).next()
    }

    fn values<'a, 'n>(&'a self, name: &'n str) -> impl Iterator<Item = &'a str> + use<'a, 'n> {
        let matching = self.headers.iter().filter(move |(n, _)| n == name);
        matching.map(|(_, value)| value.as_str())
    }

    /// All values of a header that may be repeated or hold a comma-separated list.
    pub(super) fn list(&self, name: &str) -> Vec<&str> {
        let parts = self.values(name).flat_map(|value| value.split(','));
        parts.map(str::trim).collect()
    }

    /// Whether the client asks to switch to `protocol`.
    pub(super) fn upgrades_to(&self, protocol: &str) -> bool {
        let has = |name: &str, wanted: &str| {
            self.list(name)
                .iter()
                .any(|value| value.eq_ignore_ascii_case(wanted))
        };
        has("connection", "upgrade") && has("upgrade", protocol)
    }
}

/// Reads one request head. What follows it stays readable in the stream returned.
///
/// # Errors
/// A head that is malformed, too long, or cut off.
pub(super) async fn read_request<S: AsyncRead + Unpin>(
    mut stream: S,
) -> io::Result<(Request, Prefixed<S>)> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let mut buffer = BytesMut::with_capacity(4096);
    loop {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Request::new(&mut headers);
        match parsed.parse(&buffer) {
            Err(e) => return Err(invalid(format!("malformed request: {e}"))),
            Ok(httparse::Status::Complete(length)) => {
                let target = parsed.path.unwrap_or_default();
                let path = target.split('?').next().unwrap_or_default();
                let text = |header: &httparse::Header<'_>| {
                    let value = String::from_utf8_lossy(header.value).into_owned();
                    (header.name.to_ascii_lowercase(), value)
                };
                let request = Request {
                    method: parsed.method.unwrap_or_default().to_owned(),
                    path: path.to_owned(),
                    headers: parsed.headers.iter().map(text).collect(),
                };
                buffer.advance(length);
                let prefix = buffer;
                return Ok((request, Prefixed { prefix, stream }));
            }
            Ok(httparse::Status::Partial) => {}
        }
        if buffer.len() >= MAX_HEAD {
            return Err(invalid("request head is too long".to_owned()));
        }
        if stream.read_buf(&mut buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Writes a response without a body that is not an upgrade, and ends the connection's writing.
pub(super) async fn refuse<S: AsyncWrite + Unpin>(
    stream: &mut S,
    status: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> io::Result<()> {
    let mut head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n",
        body.len()
    );
    push_headers(&mut head, headers);
    head.push_str(body);
    stream.write_all(head.as_bytes()).await?;
    stream.shutdown().await
}

/// Agrees to switch protocols.
pub(super) async fn upgrade<S: AsyncWrite + Unpin>(
    stream: &mut S,
    protocol: &str,
    headers: &[(&str, &str)],
) -> io::Result<()> {
    let mut head = format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n"
    );
    push_headers(&mut head, headers);
    stream.write_all(head.as_bytes()).await?;
    stream.flush().await
}

fn push_headers(head: &mut String, headers: &[(&str, &str)]) {
    for (name, value) in headers {
        head.push_str(name);
        head.push_str(": ");
        head.push_str(value);
        head.push_str("\r\n");
    }
    head.push_str("\r\n");
}

/// A stream whose first bytes have been read already.
#[derive(Debug)]
pub(super) struct Prefixed<S> {
    prefix: BytesMut,
    stream: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let count = self.prefix.len().min(buf.remaining());
        buf.put_slice(&self.prefix.split_to(count));
        if self.prefix.is_empty() {
            self.prefix = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
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
}
