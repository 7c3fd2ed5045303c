//! WebSocket, the server's side: channels in messages, as Kubernetes' subprotocols define them.
//!
//! Spec: RFC 6455. Messages are handled piece by piece, so a large one needs no more memory than a
//! small one. Channel 0 of the raw codec carries bytes without any channel numbers.

use std::future::Future;
use std::io;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use sha1::{Digest, Sha1};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter};
use tokio::sync::mpsc;

use super::channel::{
    Activity, ChannelReader, ChannelState, ChannelWriter, MAX_CHUNK, OUTBOUND_CHUNKS, Outgoing,
};

/// Appended to the client's key, by RFC 6455 section 1.3.
const KEY_SUFFIX: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;
const NORMAL_CLOSURE: u16 = 1000;
const PROTOCOL_ERROR: u16 = 1002;
/// The channel of `v5` whose payload names a channel that the client has finished.
const CLOSE_CHANNEL: u8 = 255;
/// Replies waiting to be sent.
const CONTROL_QUEUE: usize = 16;

/// How channels are put into messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codec {
    /// Binary messages that begin with the channel's byte.
    Binary,
    /// As `Binary`, with the client's half-close on channel 255.
    BinaryWithClose,
    /// Text messages: the channel's digit, then base64.
    Base64,
    /// Binary messages without channels.
    Raw,
}

/// The value of `Sec-WebSocket-Accept` for a client's key.
pub(super) fn accept_key(key: &str) -> String {
    STANDARD.encode(Sha1::digest(format!("{key}{KEY_SUFFIX}")))
}

/// The application's side of a connection: one reader and one writer for each channel.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) readers: Vec<Option<ChannelReader>>,
    pub(super) writers: Vec<Option<ChannelWriter>>,
}

/// Serves a connection of `channels` channels. The future drives it, and ends when the client is
/// gone.
pub(super) fn serve<S: AsyncRead + AsyncWrite + Send + 'static>(
    stream: S,
    codec: Codec,
    channels: u8,
    activity: Arc<Activity>,
) -> (impl Future<Output = ()> + Send, Connection) {
    let (queue, outgoing) = mpsc::channel(OUTBOUND_CHUNKS);
    let (control, replies) = mpsc::channel(CONTROL_QUEUE);
    let (senders, readers) = (0..channels)
        .map(|_| {
            let (sender, reader) = ChannelReader::new();
            (Some(sender), Some(reader))
        })
        .unzip();
    let writer = |channel| {
        let state = ChannelState::new(Vec::new());
        Some(ChannelWriter::new(queue.clone(), channel, state))
    };
    let writers = (0..u32::from(channels)).map(writer).collect();
    drop(queue);
    let driver = async move {
        let (reader, writer) = tokio::io::split(stream);
        let read = Reader {
            reader,
            codec,
            inbound: senders,
            control,
            message: Message::default(),
            activity: activity.clone(),
        };
        let read = read.run();
        let write = write_all(writer, codec, outgoing, replies, activity);
        tokio::pin!(read, write);
        let ended = tokio::select! {
            ended = &mut read => {
                // Unless the client just vanished, it is told with a close frame, queued by now.
                if !matches!(ended, Ok(End::Vanished)) {
                    let _ = tokio::time::timeout(super::session::LINGER, write).await;
                }
                ended.map(drop)
            }
            // Everything is sent: wait for the client's own close frame.
            ended = &mut write => match ended {
                Ok(()) => read.await.map(drop),
                Err(e) => Err(e),
            },
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "streaming connection");
        }
    };
    (driver, Connection { readers, writers })
}

/// The message being read.
#[derive(Debug, Default)]
struct Message {
    /// A first frame came and the last has not.
    open: bool,
    channel: Option<u8>,
    /// Base64 characters that are not a whole group yet.
    carry: Vec<u8>,
}

struct Reader<R> {
    reader: R,
    codec: Codec,
    /// To each channel's reader; dropped at its end.
    inbound: Vec<Option<mpsc::Sender<Bytes>>>,
    /// Replies for the writer.
    control: mpsc::Sender<Outgoing>,
    message: Message,
    activity: Arc<Activity>,
}

struct FrameHead {
    last: bool,
    opcode: u8,
    length: u64,
    mask: [u8; 4],
}

/// How a client ended a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// By a close frame.
    Closed,
    /// By hanging up.
    Vanished,
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl<R: AsyncRead + Unpin> Reader<R> {
    /// Reads until the client closes. Dropping the channels' senders tells their readers.
    async fn run(mut self) -> io::Result<End> {
        let ended = self.read_frames().await;
        if let Err(e) = &ended
            && e.kind() == io::ErrorKind::InvalidData
        {
            let _ = self
                .control
                .send(Outgoing::Raw(close_frame(PROTOCOL_ERROR)))
                .await;
        }
        ended
    }

    async fn read_frames(&mut self) -> io::Result<End> {
        loop {
            let head = match self.head().await {
                Ok(head) => head,
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(End::Vanished),
                Err(e) => return Err(e),
            };
            if head.opcode >= CLOSE {
                if self.control_frame(&head).await? {
                    return Ok(End::Closed);
                }
                continue;
            }
            match (head.opcode, self.message.open) {
                (CONTINUATION, true) => {}
                (TEXT | BINARY, false) => {
                    self.message = Message {
                        open: true,
                        ..Message::default()
                    };
                }
                _ => return Err(invalid("unexpected frame")),
            }
            self.payload(&head).await?;
            if head.last {
                self.message.open = false;
            }
        }
    }

    async fn head(&mut self) -> io::Result<FrameHead> {
        let mut first = [0; 2];
        self.reader.read_exact(&mut first).await?;
        let [flags, size] = first;
        if flags & 0x70 != 0 {
            return Err(invalid("reserved bits are set"));
        }
        if size & 0x80 == 0 {
            return Err(invalid("frame is not masked"));
        }
        let length = match size & 0x7f {
            126 => u64::from(self.reader.read_u16().await?),
            127 => self.reader.read_u64().await?,
            small => u64::from(small),
        };
        let mut mask = [0; 4];
        self.reader.read_exact(&mut mask).await?;
        Ok(FrameHead {
            last: flags & 0x80 != 0,
            opcode: flags & 0x0f,
            length,
            mask,
        })
    }

    /// Answers a control frame; true when it closes the connection.
    async fn control_frame(&mut self, head: &FrameHead) -> io::Result<bool> {
        if head.length > 125 || !head.last {
            return Err(invalid("malformed control frame"));
        }
        let mut body = vec![0; usize::try_from(head.length).unwrap_or(0)];
        self.reader.read_exact(&mut body).await?;
        unmask(&mut body, head.mask, 0);
        let reply = match head.opcode {
            CLOSE => close_frame(NORMAL_CLOSURE),
            PING => frame(PONG, &[&body]),
            PONG => return Ok(false),
            _ => return Err(invalid("unknown frame")),
        };
        let _ = self.control.send(Outgoing::Raw(reply)).await;
        Ok(head.opcode == CLOSE)
    }

    async fn payload(&mut self, head: &FrameHead) -> io::Result<()> {
        let mut done: u64 = 0;
        while done < head.length {
            let left = usize::try_from(head.length - done).unwrap_or(usize::MAX);
            let mut chunk = vec![0; left.min(MAX_CHUNK)];
            self.reader.read_exact(&mut chunk).await?;
            unmask(&mut chunk, head.mask, done);
            done += chunk.len() as u64;
            self.activity.touch();
            self.deliver(&chunk).await?;
        }
        Ok(())
    }

    async fn deliver(&mut self, chunk: &[u8]) -> io::Result<()> {
        let mut data = chunk;
        let channel = match (self.codec, self.message.channel) {
            (Codec::Raw, _) => 0,
            (_, Some(channel)) => channel,
            (codec, None) => {
                let Some((first, rest)) = data.split_first() else {
                    return Ok(());
                };
                data = rest;
                let channel = match codec {
                    Codec::Base64 => first.wrapping_sub(b'0'),
                    Codec::Binary | Codec::BinaryWithClose | Codec::Raw => *first,
                };
                self.message.channel = Some(channel);
                channel
            }
        };
        if self.codec == Codec::BinaryWithClose && channel == CLOSE_CHANNEL {
            for finished in data {
                if let Some(sender) = self.inbound.get_mut(usize::from(*finished)) {
                    *sender = None;
                }
            }
            return Ok(());
        }
        let decoded = match self.codec {
            Codec::Base64 => self.message.decode(data)?,
            Codec::Binary | Codec::BinaryWithClose | Codec::Raw => Bytes::copy_from_slice(data),
        };
        let Some(slot) = self.inbound.get(usize::from(channel)) else {
            return Err(invalid("unknown channel"));
        };
        if let Some(sender) = slot
            && !decoded.is_empty()
        {
            // Nobody reading any more is no error: the rest is dropped.
            let _ = sender.send(decoded).await;
        }
        Ok(())
    }
}

impl Message {
    /// Decodes the whole groups of four characters; the rest waits for the next piece.
    fn decode(&mut self, data: &[u8]) -> io::Result<Bytes> {
        self.carry
            .extend(data.iter().filter(|c| !c.is_ascii_whitespace()));
        let whole = self.carry.len() / 4 * 4;
        let decoded = STANDARD.decode(&self.carry[..whole]);
        self.carry.drain(..whole);
        decoded
            .map(Bytes::from)
            .map_err(|_| invalid("malformed base64"))
    }
}

fn unmask(bytes: &mut [u8], mask: [u8; 4], offset: u64) {
    for (index, byte) in bytes.iter_mut().enumerate() {
        let at = (offset + index as u64) % 4;
        *byte ^= mask[usize::try_from(at).unwrap_or(0)];
    }
}

fn frame(opcode: u8, parts: &[&[u8]]) -> Bytes {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut out = Vec::with_capacity(length + 10);
    out.push(0x80 | opcode);
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(small @ 0..126), _) => out.push(small),
        (_, Ok(medium)) => {
            out.push(126);
            out.extend_from_slice(&medium.to_be_bytes());
        }
        _ => {
            out.push(127);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    for part in parts {
        out.extend_from_slice(part);
    }
    out.into()
}

fn close_frame(code: u16) -> Bytes {
    frame(CLOSE, &[&code.to_be_bytes()])
}

fn encode(codec: Codec, channel: u32, data: &[u8]) -> Bytes {
    let channel = u8::try_from(channel).expect("channels are bytes");
    match codec {
        Codec::Raw => frame(BINARY, &[data]),
        Codec::Binary | Codec::BinaryWithClose => frame(BINARY, &[&[channel], data]),
        Codec::Base64 => frame(TEXT, &[&[b'0' + channel], STANDARD.encode(data).as_bytes()]),
    }
}

/// Sends replies first, then data, until every channel's writer is gone; then closes.
async fn write_all<W: AsyncWrite + Unpin>(
    writer: W,
    codec: Codec,
    mut outgoing: mpsc::Receiver<Outgoing>,
    mut replies: mpsc::Receiver<Outgoing>,
    activity: Arc<Activity>,
) -> io::Result<()> {
    let mut writer = BufWriter::with_capacity(MAX_CHUNK + 16, writer);
    loop {
        if outgoing.is_empty() && replies.is_empty() {
            writer.flush().await?;
        }
        // Both branches are cancel-safe: a message is taken only by the branch that runs.
        let next = tokio::select! {
            biased;
            Some(reply) = replies.recv() => Some(reply),
            data = outgoing.recv() => data,
        };
        match next {
            Some(Outgoing::Raw(frame)) => {
                writer.write_all(&frame).await?;
                if frame[0] & 0x0f == CLOSE {
                    break;
                }
            }
            Some(Outgoing::Data { last: true, .. }) => {}
            Some(Outgoing::Data { channel, data, .. }) => {
                activity.touch();
                writer.write_all(&encode(codec, channel, &data)).await?;
            }
            None => {
                writer.write_all(&close_frame(NORMAL_CLOSURE)).await?;
                break;
            }
        }
    }
    writer.flush().await?;
    writer.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_answered_as_the_standard_shows() {
        assert_eq!(
            accept_key("dGhlIHNhbXBsZSBub25jZQ=="),
            "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        );
    }

    #[test]
    fn base64_is_decoded_across_pieces() {
        let mut message = Message::default();
        let mut out = Vec::new();
        for piece in ["aG", "VsbG", "8gd29y", "bGQ="] {
            out.extend_from_slice(&message.decode(piece.as_bytes()).unwrap());
        }
        assert_eq!(out, b"hello world");
        assert!(Message::default().decode(b"!!!!").is_err());
    }

    #[test]
    fn every_length_has_its_form() {
        for (length, head) in [(0, 2), (125, 2), (126, 4), (65535, 4), (65536, 10)] {
            assert_eq!(frame(BINARY, &[&vec![0; length]]).len(), head + length);
        }
    }
}
