//! SPDY/3.1, the part that Kubernetes' clients use.
//!
//! Header blocks go out as stored blocks of the deflate format, which every inflater reads; those of
//! replies carry nothing that a client needs. Flow control is not announced, so servers send freely.

use std::sync::Arc;

use anyhow::Context as _;
use tokio::io::AsyncWriteExt as _;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::Mutex;

use crate::Result;
use crate::cri::stream::http::{Answer, upgrade};
use crate::cri::stream::inbound::Inbound;

/// RFC 1950: deflate with a 32 KiB window and a preset dictionary.
const STREAM_HEAD: [u8; 2] = [0x78, 0xbb];
/// Adler-32 of SPDY's dictionary, of which stored blocks use nothing.
const DICTIONARY_ID: u32 = 0xe3c6_a7c2;
/// First half-word of a control frame.
const CONTROL: u16 = 0x8003;
/// The frame is the stream's last.
const FIN: u8 = 1;
/// Bytes in one data frame.
const CHUNK: usize = 32 << 10;

/// The writing half; clones share it.
#[derive(Debug, Clone)]
pub struct Spdy {
    shared: Arc<Mutex<Writer>>,
}

#[derive(Debug)]
struct Writer {
    stream: OwnedWriteHalf,
    next: u32,
    begun: bool,
}

/// The reading half.
#[derive(Debug)]
pub struct Reader {
    inbound: Inbound,
    answer: Spdy,
}

/// What arrived.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// Bytes of a stream.
    Data {
        /// Which.
        id: u32,
        /// The bytes.
        bytes: Vec<u8>,
        /// Whether they are its last.
        last: bool,
    },
    /// A stream was refused or broken off.
    Reset(u32),
    /// A stream was accepted.
    Reply(u32),
}

impl Spdy {
    /// Asks for an upgrade with these stream protocols.
    ///
    /// # Errors
    /// When the server cannot be reached.
    pub async fn ask(url: &str, protocols: &[&str]) -> Result<Answer> {
        let mut headers = vec![("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")];
        headers.extend(protocols.iter().map(|p| ("X-Stream-Protocol-Version", *p)));
        upgrade("POST", url, &headers).await
    }

    /// Connects. Returns both halves.
    ///
    /// # Errors
    /// When the server refuses the upgrade or picks another protocol.
    pub async fn connect(url: &str, protocol: &str) -> Result<(Self, Reader)> {
        let answer = Self::ask(url, &[protocol]).await?;
        anyhow::ensure!(answer.status == 101, "{}: {}", answer.status, answer.body);
        let picked = answer.headers.get("x-stream-protocol-version");
        anyhow::ensure!(
            picked.is_some_and(|p| p == protocol),
            "protocol: {picked:?}"
        );
        let early = answer.stream.buffer().to_vec();
        let (read, write) = answer.stream.into_inner().into_split();
        let spdy = Self {
            shared: Arc::new(Mutex::new(Writer {
                stream: write,
                next: 1,
                begun: false,
            })),
        };
        let reader = Reader {
            inbound: Inbound::new(read, early),
            answer: spdy.clone(),
        };
        Ok((spdy, reader))
    }

    /// Opens a stream.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn open(&self, headers: &[(&str, &str)]) -> Result<u32> {
        let mut writer = self.shared.lock().await;
        let id = writer.next;
        writer.next += 2;
        let block = writer.block(headers)?;
        let mut body = Vec::new();
        body.extend_from_slice(&id.to_be_bytes());
        body.extend_from_slice(&[0; 6]);
        body.extend_from_slice(&block);
        writer.control(1, &body).await?;
        Ok(id)
    }

    /// Sends bytes on a stream.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn send(&self, id: u32, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(CHUNK) {
            self.data(id, 0, chunk).await?;
        }
        Ok(())
    }

    /// Ends this side of a stream.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn close(&self, id: u32) -> Result<()> {
        self.data(id, FIN, &[]).await
    }

    async fn data(&self, id: u32, flags: u8, bytes: &[u8]) -> Result<()> {
        let mut frame = Vec::with_capacity(bytes.len() + 8);
        frame.extend_from_slice(&id.to_be_bytes());
        frame.extend_from_slice(&with_flags(flags, bytes.len())?);
        frame.extend_from_slice(bytes);
        let mut writer = self.shared.lock().await;
        Ok(writer.stream.write_all(&frame).await?)
    }
}

impl Writer {
    async fn control(&mut self, kind: u16, body: &[u8]) -> Result<()> {
        let mut frame = Vec::with_capacity(body.len() + 8);
        frame.extend_from_slice(&CONTROL.to_be_bytes());
        frame.extend_from_slice(&kind.to_be_bytes());
        frame.extend_from_slice(&with_flags(0, body.len())?);
        frame.extend_from_slice(body);
        Ok(self.stream.write_all(&frame).await?)
    }

    fn block(&mut self, headers: &[(&str, &str)]) -> Result<Vec<u8>> {
        let mut plain = u32::try_from(headers.len())?.to_be_bytes().to_vec();
        for (name, value) in headers {
            // Names are in lower case on the wire.
            for text in [name.to_ascii_lowercase(), (*value).to_owned()] {
                plain.extend_from_slice(&u32::try_from(text.len())?.to_be_bytes());
                plain.extend_from_slice(text.as_bytes());
            }
        }
        let mut block = Vec::new();
        if !self.begun {
            self.begun = true;
            block.extend_from_slice(&STREAM_HEAD);
            block.extend_from_slice(&DICTIONARY_ID.to_be_bytes());
        }
        // One stored block, and the empty one that a compressor's flush would leave.
        for piece in [plain.as_slice(), &[]] {
            let length = u16::try_from(piece.len())?;
            block.push(0);
            block.extend_from_slice(&length.to_le_bytes());
            block.extend_from_slice(&(!length).to_le_bytes());
            block.extend_from_slice(piece);
        }
        Ok(block)
    }
}

fn with_flags(flags: u8, length: usize) -> Result<[u8; 4]> {
    let [top, a, b, c] = u32::try_from(length)?.to_be_bytes();
    anyhow::ensure!(top == 0, "a frame has at most 16 MiB");
    Ok([flags, a, b, c])
}

impl Reader {
    /// The next frame; `None` at the connection's end.
    ///
    /// # Errors
    /// For what is not SPDY.
    pub async fn next(&mut self) -> Result<Option<Frame>> {
        loop {
            let mut head = [0; 8];
            if self.inbound.fill(&mut head).await.is_err() {
                return Ok(None);
            }
            let [a, b, c, d, flags, e, f, g] = head;
            let length = usize::try_from(u32::from_be_bytes([0, e, f, g]))?;
            let mut body = vec![0; length];
            self.inbound
                .fill(&mut body)
                .await
                .context("a frame is cut short")?;
            if a & 0x80 == 0 {
                return Ok(Some(Frame::Data {
                    id: u32::from_be_bytes([a, b, c, d]),
                    bytes: body,
                    last: flags & FIN != 0,
                }));
            }
            anyhow::ensure!(u16::from_be_bytes([a, b]) == CONTROL, "not SPDY/3.1");
            let first = body.first_chunk::<4>().copied().map(u32::from_be_bytes);
            match (u16::from_be_bytes([c, d]), first) {
                (2, Some(id)) => return Ok(Some(Frame::Reply(id))),
                (3, Some(id)) => return Ok(Some(Frame::Reset(id))),
                (6, Some(_)) => self.answer.shared.lock().await.control(6, &body).await?,
                // Settings, goodbyes and windows change nothing here.
                _ => {}
            }
        }
    }
}
