//! The HTTP/1.1 request that every stream begins with.

use std::collections::HashMap;

use anyhow::Context as _;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use crate::Result;

/// Largest body of a refusal that is read.
const MAX_BODY_BYTES: u64 = 64 << 10;

/// The server's answer.
#[derive(Debug)]
pub struct Answer {
    /// Status code; 101 when the connection was upgraded.
    pub status: u16,
    /// Headers, names in lower case, repeated ones joined by commas.
    pub headers: HashMap<String, String>,
    /// Body of an answer that is no upgrade.
    pub body: String,
    /// The connection, after the answer's head.
    pub stream: BufReader<TcpStream>,
}

/// Sends `method` with `headers` to an `http` URL.
///
/// # Errors
/// When the URL is not one, or the server does not answer HTTP.
pub async fn upgrade(method: &str, url: &str, headers: &[(&str, &str)]) -> Result<Answer> {
    let rest = url
        .strip_prefix("http://")
        .with_context(|| format!("{url}: not an http URL"))?;
    let (host, path) = rest.split_once('/').context("the URL has a path")?;
    let mut stream = TcpStream::connect(host)
        .await
        .context("dial the streaming server")?;
    stream.set_nodelay(true)?;
    let mut head = format!("{method} /{path} HTTP/1.1\r\nHost: {host}\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await?;
    let mut stream = BufReader::with_capacity(128 << 10, stream);
    let mut line = String::new();
    stream.read_line(&mut line).await?;
    let status = line
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .with_context(|| format!("{line:?}: not an HTTP status"))?;
    let mut found: HashMap<String, String> = HashMap::new();
    loop {
        line.clear();
        anyhow::ensure!(
            stream.read_line(&mut line).await? > 0,
            "the head is cut short"
        );
        let text = line.trim_end();
        if text.is_empty() {
            break;
        }
        let (name, value) = text.split_once(':').context("a header has a colon")?;
        let entry = found.entry(name.to_ascii_lowercase()).or_default();
        if !entry.is_empty() {
            entry.push(',');
        }
        entry.push_str(value.trim());
    }
    let mut body = String::new();
    if status != 101 {
        let length = found.get("content-length").and_then(|n| n.parse().ok());
        let limit = length.unwrap_or(0).min(MAX_BODY_BYTES);
        (&mut stream).take(limit).read_to_string(&mut body).await?;
    }
    Ok(Answer {
        status,
        headers: found,
        body,
        stream,
    })
}
