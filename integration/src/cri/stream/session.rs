//! Exec and attach: the five channels of a process, whatever carries them.

use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::Result;
use crate::cri::stream::spdy::{self, Frame};
use crate::cri::stream::websocket::{self, Message};
use crate::cri::stream::{Spdy, Transport, WebSocket};

/// A channel, numbered as in WebSocket messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Channel {
    /// To the process.
    Stdin,
    /// From the process.
    Stdout,
    /// From the process.
    Stderr,
    /// How it ended.
    Error,
    /// Sizes of the terminal.
    Resize,
}

impl Channel {
    const ALL: [Self; 5] = [
        Self::Stdin,
        Self::Stdout,
        Self::Stderr,
        Self::Error,
        Self::Resize,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Stdin => "stdin",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Error => "error",
            Self::Resize => "resize",
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Stdin => 0,
            Self::Stdout => 1,
            Self::Stderr => 2,
            Self::Error => 3,
            Self::Resize => 4,
        }
    }

    fn of(number: u8) -> Result<Self> {
        let known = Self::ALL.into_iter().find(|c| c.number() == number);
        known.ok_or_else(|| anyhow::anyhow!("channel {number}"))
    }
}

/// The streams that were asked for.
#[derive(Debug, Clone, Copy, Default)]
#[allow(clippy::struct_excessive_bools, reason = "the request's fields")]
pub struct Streams {
    /// Input.
    pub stdin: bool,
    /// Output.
    pub stdout: bool,
    /// Error output.
    pub stderr: bool,
    /// A terminal, which has sizes.
    pub tty: bool,
}

/// What arrived.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes of a channel.
    Data(Channel, Vec<u8>),
    /// A channel ended.
    Closed(Channel),
}

/// Both directions of a session.
#[derive(Debug)]
pub struct Session {
    /// To the server.
    pub sink: Sink,
    /// From the server.
    pub source: Source,
}

/// To the server.
#[derive(Debug, Clone)]
pub enum Sink {
    /// Over SPDY, with the stream of each channel.
    Spdy(Spdy, HashMap<Channel, u32>),
    /// Over WebSocket, in text messages or binary ones.
    WebSocket(WebSocket, bool),
}

/// From the server.
#[derive(Debug)]
pub enum Source {
    /// Over SPDY, with the channel of each stream.
    Spdy(spdy::Reader, HashMap<u32, Channel>),
    /// Over WebSocket, in text messages or binary ones.
    WebSocket(websocket::Reader, bool),
}

/// Everything that arrived until the end.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Output.
    pub stdout: Vec<u8>,
    /// Error output.
    pub stderr: Vec<u8>,
    /// The error channel.
    pub error: String,
}

impl Ended {
    /// The exit code that the error channel tells of.
    ///
    /// # Errors
    /// When it tells of another failure.
    pub fn code(&self) -> Result<i32> {
        let status: serde_json::Value = serde_json::from_str(&self.error)
            .map_err(|e| anyhow::anyhow!("{:?}: {e}", self.error))?;
        if status["status"] == "Success" {
            return Ok(0);
        }
        anyhow::ensure!(status["reason"] == "NonZeroExitCode", "{status}");
        let causes = status["details"]["causes"].as_array();
        let code = causes
            .into_iter()
            .flatten()
            .find(|cause| cause["reason"] == "ExitCode")
            .and_then(|cause| cause["message"].as_str()?.parse().ok());
        code.ok_or_else(|| anyhow::anyhow!("no exit code in {status}"))
    }

    /// Output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl Session {
    /// Opens the streams that were asked for at a URL of the server's.
    ///
    /// # Errors
    /// When it refuses.
    pub async fn open(url: &str, transport: Transport, streams: Streams) -> Result<Self> {
        match transport {
            Transport::Spdy(protocol) => Self::over_spdy(url, protocol, streams).await,
            Transport::WebSocket(protocol) => {
                let text = protocol.contains("base64");
                let (socket, reader) = WebSocket::connect(url, protocol).await?;
                Ok(Self {
                    sink: Sink::WebSocket(socket, text),
                    source: Source::WebSocket(reader, text),
                })
            }
        }
    }

    async fn over_spdy(url: &str, protocol: &str, streams: Streams) -> Result<Self> {
        let (spdy, reader) = Spdy::connect(url, protocol).await?;
        let wanted = [
            (Channel::Error, true),
            (Channel::Stdin, streams.stdin),
            (Channel::Stdout, streams.stdout),
            (Channel::Stderr, streams.stderr && !streams.tty),
            (Channel::Resize, streams.tty),
        ];
        let mut ids = HashMap::new();
        for (channel, _) in wanted.into_iter().filter(|(_, wanted)| *wanted) {
            let id = spdy.open(&[("streamType", channel.name())]).await?;
            ids.insert(channel, id);
        }
        let channels = ids.iter().map(|(channel, id)| (*id, *channel)).collect();
        Ok(Self {
            sink: Sink::Spdy(spdy, ids),
            source: Source::Spdy(reader, channels),
        })
    }

    /// Sends bytes to the process.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn write(&self, bytes: &[u8]) -> Result<()> {
        self.sink.send(Channel::Stdin, bytes).await
    }

    /// Sets the terminal's size.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn resize(&self, width: u16, height: u16) -> Result<()> {
        let size = format!("{{\"Width\":{width},\"Height\":{height}}}");
        self.sink.send(Channel::Resize, size.as_bytes()).await
    }

    /// Reads until this text came in on standard output. Returns everything up to there.
    ///
    /// # Errors
    /// When the session ends before.
    pub async fn until(&mut self, text: &str) -> Result<String> {
        let mut seen = String::new();
        while !seen.contains(text) {
            match self.source.next().await? {
                Some(Event::Data(Channel::Stdout, bytes)) => {
                    seen.push_str(&String::from_utf8_lossy(&bytes));
                }
                Some(_) => {}
                None => anyhow::bail!("ended without {text:?}: {seen:?}"),
            }
        }
        Ok(seen)
    }

    /// Reads to the end.
    ///
    /// # Errors
    /// For what is not of the protocol.
    pub async fn finish(self) -> Result<Ended> {
        let Self { sink, mut source } = self;
        let mut ended = Ended::default();
        let mut open: Vec<Channel> = match &sink {
            Sink::Spdy(_, ids) => ids
                .keys()
                .copied()
                .filter(|c| !matches!(c, Channel::Stdin | Channel::Resize))
                .collect(),
            Sink::WebSocket(..) => vec![Channel::Error],
        };
        while let Some(event) = source.next().await? {
            match event {
                Event::Data(Channel::Stdout, bytes) => ended.stdout.extend(bytes),
                Event::Data(Channel::Stderr, bytes) => ended.stderr.extend(bytes),
                Event::Data(Channel::Error, bytes) => {
                    ended.error.push_str(&String::from_utf8_lossy(&bytes));
                }
                Event::Data(channel, _) => anyhow::bail!("data on {channel:?}"),
                Event::Closed(channel) => {
                    open.retain(|c| *c != channel);
                    if open.is_empty() {
                        break;
                    }
                }
            }
        }
        Ok(ended)
    }
}

impl Sink {
    /// Sends bytes on a channel.
    ///
    /// # Errors
    /// When the connection is gone or has no such channel.
    pub async fn send(&self, channel: Channel, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Spdy(spdy, ids) => {
                let id = ids.get(&channel);
                let id = id.ok_or_else(|| anyhow::anyhow!("{channel:?} is not open"))?;
                spdy.send(*id, bytes).await
            }
            Self::WebSocket(socket, false) => {
                let mut message = vec![channel.number()];
                message.extend_from_slice(bytes);
                socket.binary(&message).await
            }
            Self::WebSocket(socket, true) => {
                let text = format!("{}{}", channel.number(), STANDARD.encode(bytes));
                socket.text(&text).await
            }
        }
    }

    /// Ends a channel, where the protocol can say so.
    ///
    /// # Errors
    /// When the connection is gone, or the protocol cannot end one channel.
    pub async fn close(&self, channel: Channel) -> Result<()> {
        match self {
            Self::Spdy(spdy, ids) => match ids.get(&channel) {
                Some(id) => spdy.close(*id).await,
                None => Ok(()),
            },
            Self::WebSocket(..) => anyhow::bail!("v4 cannot end one channel"),
        }
    }

    /// Ends a channel as `v5.channel.k8s.io` does.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn close_v5(&self, channel: Channel) -> Result<()> {
        match self {
            Self::WebSocket(socket, _) => socket.binary(&[255, channel.number()]).await,
            Self::Spdy(..) => self.close(channel).await,
        }
    }
}

impl Source {
    /// What comes next; `None` at the end of the session.
    ///
    /// # Errors
    /// For what is not of the protocol.
    pub async fn next(&mut self) -> Result<Option<Event>> {
        match self {
            Self::Spdy(reader, channels) => loop {
                let (id, event) = match reader.next().await? {
                    None => return Ok(None),
                    Some(Frame::Reply(_)) => continue,
                    Some(Frame::Reset(id)) => (id, None),
                    Some(Frame::Data { id, bytes, last }) => {
                        anyhow::ensure!(!last || bytes.is_empty(), "data in a last frame");
                        (id, (!last).then_some(bytes))
                    }
                };
                let channel = channels.get(&id).copied();
                let channel = channel.ok_or_else(|| anyhow::anyhow!("stream {id}"))?;
                return Ok(Some(match event {
                    Some(bytes) => Event::Data(channel, bytes),
                    None => Event::Closed(channel),
                }));
            },
            Self::WebSocket(reader, text) => loop {
                let (number, bytes) = match (reader.next().await?, *text) {
                    (None | Some(Message::Close(_)), _) => return Ok(None),
                    (Some(Message::Binary(message)), false) => match message.split_first() {
                        Some((number, bytes)) => (*number, bytes.to_vec()),
                        None => continue,
                    },
                    (Some(Message::Text(message)), true) => match message.split_first() {
                        Some((digit, bytes)) => (digit.wrapping_sub(b'0'), STANDARD.decode(bytes)?),
                        None => continue,
                    },
                    (Some(other), _) => anyhow::bail!("{other:?}"),
                };
                // The server begins with an empty message, to show that it is there.
                if !bytes.is_empty() {
                    return Ok(Some(Event::Data(Channel::of(number)?, bytes)));
                }
            },
        }
    }
}
