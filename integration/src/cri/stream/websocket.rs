//! WebSocket (RFC 6455), a client's side.

use std::sync::Arc;

use anyhow::Context as _;
use tokio::io::AsyncWriteExt as _;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::Mutex;

use crate::Result;
use crate::cri::stream::http::{Answer, upgrade};
use crate::cri::stream::inbound::Inbound;

/// Last frame of a message.
const FIN: u8 = 0x80;
/// Largest message taken.
const MAX_MESSAGE_BYTES: u64 = 64 << 20;

/// The writing half; clones share it.
#[derive(Debug, Clone)]
pub struct WebSocket {
    shared: Arc<Mutex<OwnedWriteHalf>>,
}

/// The reading half.
#[derive(Debug)]
pub struct Reader {
    inbound: Inbound,
    answer: WebSocket,
}

/// What arrived.
#[derive(Debug, PartialEq, Eq)]
pub enum Message {
    /// A text message.
    Text(Vec<u8>),
    /// A binary message.
    Binary(Vec<u8>),
    /// The server closed, with this code.
    Close(u16),
}

impl WebSocket {
    /// Asks for an upgrade with these subprotocols, none when empty.
    ///
    /// # Errors
    /// When the server cannot be reached.
    pub async fn ask(url: &str, protocols: &str) -> Result<Answer> {
        let mut headers = vec![
            ("Connection", "Upgrade"),
            ("Upgrade", "websocket"),
            ("Sec-WebSocket-Version", "13"),
            ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("Origin", "http://localhost"),
        ];
        if !protocols.is_empty() {
            headers.push(("Sec-WebSocket-Protocol", protocols));
        }
        upgrade("GET", url, &headers).await
    }

    /// Connects. Returns both halves.
    ///
    /// # Errors
    /// When the server refuses, proves nothing, or picks another protocol.
    pub async fn connect(url: &str, protocol: &str) -> Result<(Self, Reader)> {
        let answer = Self::ask(url, protocol).await?;
        anyhow::ensure!(answer.status == 101, "{}: {}", answer.status, answer.body);
        let header = |name: &str| answer.headers.get(name).map_or("", String::as_str);
        // RFC 6455, section 1.3, has this answer to this key.
        let proof = header("sec-websocket-accept");
        anyhow::ensure!(proof == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", "proof: {proof}");
        let picked = header("sec-websocket-protocol");
        anyhow::ensure!(picked == protocol, "protocol: {picked}");
        let early = answer.stream.buffer().to_vec();
        let (read, write) = answer.stream.into_inner().into_split();
        let socket = Self {
            shared: Arc::new(Mutex::new(write)),
        };
        let reader = Reader {
            inbound: Inbound::new(read, early),
            answer: socket.clone(),
        };
        Ok((socket, reader))
    }

    /// Sends a binary message.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn binary(&self, bytes: &[u8]) -> Result<()> {
        self.frame(2, bytes).await
    }

    /// Sends a text message.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn text(&self, text: &str) -> Result<()> {
        self.frame(1, text.as_bytes()).await
    }

    /// Says goodbye.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn close(&self) -> Result<()> {
        self.frame(8, &1000_u16.to_be_bytes()).await
    }

    async fn frame(&self, opcode: u8, bytes: &[u8]) -> Result<()> {
        let mut frame = vec![FIN | opcode];
        match bytes.len() {
            short @ 0..=125 => frame.push(0x80 | u8::try_from(short)?),
            middle @ 126..=65535 => {
                frame.push(0x80 | 126);
                frame.extend_from_slice(&u16::try_from(middle)?.to_be_bytes());
            }
            long => {
                frame.push(0x80 | 127);
                frame.extend_from_slice(&u64::try_from(long)?.to_be_bytes());
            }
        }
        let mask = rand::random::<[u8; 4]>();
        frame.extend_from_slice(&mask);
        frame.extend(bytes.iter().zip(mask.iter().cycle()).map(|(b, m)| b ^ m));
        Ok(self.shared.lock().await.write_all(&frame).await?)
    }
}

impl Reader {
    /// The next message; `None` when the connection ended without a goodbye.
    ///
    /// # Errors
    /// For what is not WebSocket.
    pub async fn next(&mut self) -> Result<Option<Message>> {
        let (mut kind, mut message) = (0, Vec::new());
        loop {
            let mut head = [0; 2];
            if self.inbound.fill(&mut head).await.is_err() {
                return Ok(None);
            }
            anyhow::ensure!(head[1] & 0x80 == 0, "servers do not mask");
            let length = match head[1] {
                126 => {
                    let mut long = [0; 2];
                    self.inbound.fill(&mut long).await?;
                    u64::from(u16::from_be_bytes(long))
                }
                127 => {
                    let mut long = [0; 8];
                    self.inbound.fill(&mut long).await?;
                    u64::from_be_bytes(long)
                }
                short => u64::from(short),
            };
            anyhow::ensure!(length <= MAX_MESSAGE_BYTES, "a message of {length} bytes");
            let mut body = vec![0; usize::try_from(length)?];
            self.inbound
                .fill(&mut body)
                .await
                .context("a frame is cut short")?;
            match head[0] & 0x0f {
                8 => {
                    let code = body.first_chunk::<2>().copied().map(u16::from_be_bytes);
                    return Ok(Some(Message::Close(code.unwrap_or(1005))));
                }
                9 => self.answer.frame(10, &body).await?,
                10 => {}
                opcode => {
                    if opcode != 0 {
                        kind = opcode;
                    }
                    message.append(&mut body);
                    if head[0] & FIN != 0 {
                        return Ok(Some(if kind == 1 {
                            Message::Text(message)
                        } else {
                            Message::Binary(message)
                        }));
                    }
                }
            }
        }
    }
}
