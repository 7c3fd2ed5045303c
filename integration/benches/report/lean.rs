//! The leanest client that gRPC has: blocking, one thread, frames by hand (RFC 9113, RFC 7541).
//!
//! A client of full size takes more time for a call than the daemon does, and on the same two
//! processors: what is then compared is mostly the client with itself.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{bail, ensure};
use lighter_integration::Result;
use prost::Message;

/// Window of every stream and of the connection: what a Go client's grows to under load.
const WINDOW_BYTES: u32 = 16 << 20;
/// Payload of the frames it sends, as a Go client's.
const FRAME_BYTES: usize = 16 << 10;
const SEND_BUFFER_BYTES: usize = 32 << 10;
/// Room for any frame that it allows (RFC 9113, 4.2), and much of what a socket holds.
const READ_BUFFER_BYTES: usize = 512 << 10;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const INITIAL_WINDOW_SIZE: u16 = 4;

/// A connection; streams are driven by its caller.
pub(crate) struct Lean {
    socket: UnixStream,
    namespace: String,
    next_stream: u32,
    /// Bytes read and not yet taken apart: `begin..end` of it.
    read: Vec<u8>,
    begin: usize,
    end: usize,
    /// Bytes that wait to be written.
    write: Vec<u8>,
    /// Read since the last window update.
    unacknowledged: u32,
    /// What may still be sent, on the connection, and on a fresh stream.
    send_window: i64,
    initial_window: i64,
}

/// What came for a stream.
enum Event {
    Data(u32, usize),
    End(u32),
    Window(u32, i64),
}

impl Lean {
    pub(crate) fn connect(address: &Path, namespace: &str) -> Result<Self> {
        let mut lean = Self {
            socket: UnixStream::connect(address)?,
            namespace: namespace.to_owned(),
            next_stream: 1,
            read: vec![0; READ_BUFFER_BYTES],
            begin: 0,
            end: 0,
            write: Vec::with_capacity(2 * SEND_BUFFER_BYTES),
            unacknowledged: 0,
            send_window: 65_535,
            initial_window: 65_535,
        };
        lean.write
            .extend_from_slice(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        let mut settings = INITIAL_WINDOW_SIZE.to_be_bytes().to_vec();
        settings.extend_from_slice(&WINDOW_BYTES.to_be_bytes());
        lean.frame(SETTINGS, 0, 0, &settings);
        lean.frame(WINDOW_UPDATE, 0, 0, &(WINDOW_BYTES - 65_535).to_be_bytes());
        Ok(lean)
    }

    fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
        self.write.extend_from_slice(&length[1..]);
        self.write.extend_from_slice(&[kind, flags]);
        self.write.extend_from_slice(&stream.to_be_bytes());
        self.write.extend_from_slice(payload);
    }

    fn flush(&mut self) -> Result {
        self.socket.write_all(&self.write)?;
        self.write.clear();
        Ok(())
    }

    /// Opens a stream for a method: `/package.Service/Method`.
    fn open(&mut self, method: &str) -> u32 {
        let mut block = vec![0x83, 0x86];
        let mut literal = |name: &[u8], value: &str| {
            block.extend_from_slice(name);
            block.push(u8::try_from(value.len()).unwrap_or(0x7f));
            block.extend_from_slice(value.as_bytes());
        };
        literal(&[0x04], method);
        literal(&[0x01], "localhost");
        literal(&[0x0f, 0x10], "application/grpc");
        literal(b"\0\x02te", "trailers");
        literal(b"\0\x14containerd-namespace", &self.namespace.clone());
        let stream = self.next_stream;
        self.next_stream += 2;
        self.frame(HEADERS, END_HEADERS, stream, &block);
        stream
    }

    /// One whole request of a unary or server-streaming method.
    fn request(&mut self, method: &str, message: &[u8]) -> u32 {
        let stream = self.open(method);
        let framed = framed(message);
        // Small beside any window that is given back at once.
        self.frame(DATA, END_STREAM, stream, &framed);
        stream
    }

    fn event(&mut self) -> Result<Event> {
        loop {
            while self.end - self.begin < 9 {
                self.fill()?;
            }
            let head = &self.read[self.begin..self.begin + 9];
            let length =
                usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            let (kind, flags) = (head[3], head[4]);
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            while self.end - self.begin < 9 + length {
                self.fill()?;
            }
            let begin = self.begin + 9;
            self.begin = begin + length;
            let payload = &self.read[begin..self.begin];
            match kind {
                DATA => {
                    self.unacknowledged += u32::try_from(length)?;
                    if self.unacknowledged >= WINDOW_BYTES / 4 {
                        let bytes = std::mem::take(&mut self.unacknowledged).to_be_bytes();
                        self.frame(WINDOW_UPDATE, 0, 0, &bytes);
                        self.frame(WINDOW_UPDATE, 0, stream, &bytes);
                        self.flush()?;
                    }
                    return Ok(Event::Data(stream, length));
                }
                HEADERS if flags & END_STREAM != 0 => return Ok(Event::End(stream)),
                RST_STREAM | GOAWAY => {
                    bail!("the daemon ended the stream: frame {kind} {payload:?}")
                }
                SETTINGS if flags & ACK == 0 => {
                    let mut grown = 0;
                    for setting in payload.chunks_exact(6) {
                        if u16::from_be_bytes([setting[0], setting[1]]) == INITIAL_WINDOW_SIZE {
                            let value = [setting[2], setting[3], setting[4], setting[5]];
                            let window = i64::from(u32::from_be_bytes(value));
                            grown = window - std::mem::replace(&mut self.initial_window, window);
                        }
                    }
                    self.frame(SETTINGS, ACK, 0, &[]);
                    self.flush()?;
                    return Ok(Event::Window(u32::MAX, grown));
                }
                PING if flags & ACK == 0 => {
                    let payload = payload.to_vec();
                    self.frame(PING, ACK, 0, &payload);
                    self.flush()?;
                }
                WINDOW_UPDATE => {
                    let more = i64::from(u32::from_be_bytes(payload.try_into()?));
                    if stream == 0 {
                        self.send_window += more;
                    }
                    return Ok(Event::Window(stream, more));
                }
                _ => {}
            }
        }
    }

    fn fill(&mut self) -> Result {
        if self.begin == self.end {
            (self.begin, self.end) = (0, 0);
        } else if self.begin > READ_BUFFER_BYTES / 2 {
            self.read.copy_within(self.begin..self.end, 0);
            (self.begin, self.end) = (0, self.end - self.begin);
        }
        let came = self.socket.read(&mut self.read[self.end..])?;
        self.end += came;
        ensure!(came > 0, "the daemon closed the connection");
        Ok(())
    }

    /// Calls a method and reads its answer to the end: how many bytes of messages came.
    pub(crate) fn call(&mut self, method: &str, message: &impl Message) -> Result<usize> {
        self.answer(method, message, |_| {})
    }

    /// Calls a method that has one answer.
    pub(crate) fn ask<M: Message + Default>(
        &mut self,
        method: &str,
        message: &impl Message,
    ) -> Result<M> {
        let mut framed = Vec::new();
        self.answer(method, message, |bytes| framed.extend_from_slice(bytes))?;
        // One byte says that it is not compressed, four how long it is.
        Ok(M::decode(framed.get(5..).unwrap_or_default())?)
    }

    fn answer(
        &mut self,
        method: &str,
        message: &impl Message,
        mut each: impl FnMut(&[u8]),
    ) -> Result<usize> {
        self.request(method, &message.encode_to_vec());
        self.flush()?;
        let mut bytes = 0;
        loop {
            match self.event()? {
                Event::Data(_, length) => {
                    bytes += length;
                    each(&self.read[self.begin - length..self.begin]);
                }
                Event::End(_) => break,
                Event::Window(..) => {}
            }
        }
        // Only a refusal has no message at all.
        ensure!(bytes > 0, "{method} was refused");
        Ok(bytes)
    }

    /// Calls in `slots` chains at a time: `next` names the next call of a chain, until it has none.
    ///
    /// Returns how many calls were answered.
    pub(crate) fn chains(
        &mut self,
        slots: usize,
        mut next: impl FnMut(usize) -> Option<(&'static str, Vec<u8>)>,
    ) -> Result<usize> {
        let mut under_way: HashMap<u32, (usize, bool)> = HashMap::new();
        let mut idle: Vec<usize> = (0..slots).collect();
        let mut answered = 0;
        loop {
            for slot in idle.drain(..) {
                if let Some((method, message)) = next(slot) {
                    under_way.insert(self.request(method, &message), (slot, false));
                }
            }
            if under_way.is_empty() {
                return Ok(answered);
            }
            self.flush()?;
            // Whatever has come by now is one batch.
            loop {
                match self.event()? {
                    Event::Data(stream, _) => {
                        if let Some((_, heard)) = under_way.get_mut(&stream) {
                            *heard = true;
                        }
                    }
                    Event::End(stream) => {
                        let (slot, heard) = under_way.remove(&stream).unwrap_or_default();
                        ensure!(heard, "a call was refused");
                        answered += 1;
                        idle.push(slot);
                    }
                    Event::Window(..) => {}
                }
                if self.begin == self.end {
                    break;
                }
            }
        }
    }

    /// Sends `messages` on one stream, reads the answers to the end: how many bytes came.
    pub(crate) fn stream(&mut self, method: &str, messages: &[impl Message]) -> Result<usize> {
        let stream = self.open(method);
        let (mut window, mut bytes) = (self.initial_window, 0);
        for (n, message) in messages.iter().enumerate() {
            let framed = framed(&message.encode_to_vec());
            let mut rest = framed.as_slice();
            while !rest.is_empty() {
                let allowed = usize::try_from(window.min(self.send_window).max(0))?;
                let length = rest.len().min(FRAME_BYTES).min(allowed);
                if length == 0 {
                    self.flush()?;
                    match self.event()? {
                        Event::Window(to, more) if to != 0 => window += more,
                        Event::End(_) => bail!("{method} was refused"),
                        Event::Data(_, length) => bytes += length,
                        Event::Window(..) => {}
                    }
                    continue;
                }
                let now;
                (now, rest) = rest.split_at(length);
                let last = n + 1 == messages.len() && rest.is_empty();
                self.frame(DATA, if last { END_STREAM } else { 0 }, stream, now);
                window -= i64::try_from(length)?;
                self.send_window -= i64::try_from(length)?;
                if self.write.len() >= SEND_BUFFER_BYTES {
                    self.flush()?;
                }
            }
        }
        self.flush()?;
        loop {
            match self.event()? {
                Event::Data(_, length) => bytes += length,
                Event::End(_) => break,
                Event::Window(..) => {}
            }
        }
        ensure!(bytes > 0, "{method} was refused");
        Ok(bytes)
    }
}

/// A message as gRPC carries it: not compressed, its length before it.
fn framed(message: &[u8]) -> Vec<u8> {
    let mut framed = Vec::with_capacity(message.len() + 5);
    framed.push(0);
    framed.extend_from_slice(&u32::try_from(message.len()).unwrap_or(0).to_be_bytes());
    framed.extend_from_slice(message);
    framed
}
