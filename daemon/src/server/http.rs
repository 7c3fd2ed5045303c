//! The smallest HTTP server that answers `GET`: for metrics and for the debug socket.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Most bytes of a request's head.
const MAX_HEAD_BYTES: usize = 8192;
/// Longest that one exchange may take.
const EXCHANGE_LIMIT: Duration = Duration::from_secs(10);
/// Pause after a failed accept, so that a lack of descriptors does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Content type and body; `None` for 404.
pub(crate) type Page = Option<(&'static str, String)>;
/// What a path answers.
pub(crate) type Pages = Arc<dyn Fn(&str) -> BoxFuture<'static, Page> + Send + Sync>;

/// Serves `pages` on a TCP port until `stop`.
pub(crate) async fn serve_tcp(listener: TcpListener, pages: Pages, stop: CancellationToken) {
    let tracker = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => drop(tracker.spawn(exchange(stream, Arc::clone(&pages)))),
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Serves `pages` on a Unix socket until `stop`.
pub(crate) async fn serve_unix(listener: UnixListener, pages: Pages, stop: CancellationToken) {
    let tracker = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => drop(tracker.spawn(exchange(stream, Arc::clone(&pages)))),
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// One request and its answer; whatever goes wrong ends the connection and nothing else.
async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, pages: Pages) {
    let talk = async {
        let head = read_head(&mut stream).await?;
        let answer = answer(&head, &pages).await;
        stream.write_all(answer.as_bytes()).await.ok()?;
        stream.shutdown().await.ok()
    };
    let _ended = tokio::time::timeout(EXCHANGE_LIMIT, talk).await;
}

async fn read_head<S: AsyncRead + Unpin>(stream: &mut S) -> Option<Vec<u8>> {
    let mut head = Vec::with_capacity(512);
    while !head.windows(4).any(|w| w == b"\r\n\r\n") {
        if head.len() >= MAX_HEAD_BYTES || stream.read_buf(&mut head).await.ok()? == 0 {
            return None;
        }
    }
    Some(head)
}

async fn answer(head: &[u8], pages: &Pages) -> String {
    let line = head.split(|b| *b == b'\r').next().unwrap_or_default();
    let mut words = std::str::from_utf8(line).unwrap_or_default().split(' ');
    let (method, target) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let path = target.split('?').next().unwrap_or_default();
    let (status, kind, body) = if method != "GET" {
        (
            "405 Method Not Allowed",
            "text/plain",
            "only GET\n".to_owned(),
        )
    } else {
        match pages(path).await {
            Some((kind, body)) => ("200 OK", kind, body),
            None => ("404 Not Found", "text/plain", format!("no page {path}\n")),
        }
    };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_get_of_known_pages_is_answered() {
        let pages: Pages = Arc::new(|path| {
            let found = (path == "/a").then(|| ("text/plain", "x".to_owned()));
            Box::pin(std::future::ready(found))
        });
        for (request, status) in [
            (&b"GET /a?b=c HTTP/1.1\r\n\r\n"[..], "HTTP/1.1 200 OK"),
            (b"GET /b HTTP/1.1\r\n\r\n", "HTTP/1.1 404"),
            (b"POST /a HTTP/1.1\r\n\r\n", "HTTP/1.1 405"),
            (b"\xff\xfe", "HTTP/1.1 405"),
        ] {
            assert!(
                answer(request, &pages).await.starts_with(status),
                "{status}"
            );
        }
    }
}
