//! The authority of requests, which means nothing where one daemon answers all of them.
//!
//! Clients send what they please as `:authority`; gRPC for Go, for one, the escaped path of the socket
//! (`%2Frun%2Fcontainerd.sock`). The HTTP library refuses what is no host and port. So whatever comes
//! is replaced, before that library sees it, by as many letters: no length changes, so nothing needs
//! to be put together anew, and no byte is held back.
//!
//! Specs: RFC 9113, 4.1 and 6.2 (frames); RFC 7541, 5 and 6 (header fields).

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::connection::Eager;

/// Bytes that every client begins with.
const PREFACE_BYTES: usize = 24;
/// Bytes of a frame's header.
const FRAME_BYTES: usize = 9;
/// Types of the frames that carry header fields.
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
/// Flags of the former: something precedes the fields.
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// Bytes of a priority.
const PRIORITY_BYTES: usize = 5;
/// Place of `:authority` in the static table.
const AUTHORITY: u8 = 1;
/// What an authority becomes.
const LETTER: u8 = b'l';
/// Bits of a number's further bytes that are the number's: longer numbers are no lengths.
const LONGEST_SHIFT: u32 = 28;

/// Which string of a field it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Name,
    Value,
    /// A value, that of `:authority`.
    Authority,
}

/// Where in the fields of a request the next byte is.
#[derive(Debug, Clone, Copy)]
enum Field {
    First,
    /// In an index that takes more bytes; whether a value follows.
    Index(bool),
    Length(Part),
    /// In a length that takes more bytes.
    MoreLength {
        part: Part,
        so_far: u64,
        shift: u32,
    },
    Text {
        part: Part,
        left: u64,
    },
    /// No sense in it: the library is to say so.
    Lost,
}

/// Where in the stream the next byte is.
#[derive(Debug)]
enum Frame {
    Preface(usize),
    Header([u8; FRAME_BYTES], usize),
    /// In the length of the padding; bytes left of the frame, and of what precedes the fields.
    Padding(usize, usize),
    /// Bytes left to pass by, of fields, and to pass by after them.
    Payload {
        before: usize,
        fields: usize,
        after: usize,
    },
}

/// Finds authorities in what a client sends.
#[derive(Debug)]
struct Finder {
    frame: Frame,
    field: Field,
}

impl Finder {
    fn new() -> Self {
        Self {
            frame: Frame::Preface(PREFACE_BYTES),
            field: Field::First,
        }
    }

    /// Replaces authorities in the bytes that come next.
    fn replace(&mut self, mut bytes: &mut [u8]) {
        while !bytes.is_empty() {
            let taken = self.step(bytes);
            bytes = &mut bytes[taken..];
        }
    }

    /// Looks at some of `bytes`, of which there are; how many it was.
    fn step(&mut self, bytes: &mut [u8]) -> usize {
        match &mut self.frame {
            Frame::Preface(left) => {
                let taken = bytes.len().min(*left);
                *left -= taken;
                if *left == 0 {
                    self.frame = Frame::Header([0; FRAME_BYTES], 0);
                }
                taken
            }
            Frame::Header(header, have) => {
                let taken = bytes.len().min(FRAME_BYTES - *have);
                header[*have..*have + taken].copy_from_slice(&bytes[..taken]);
                *have += taken;
                if *have == FRAME_BYTES {
                    let header = *header;
                    self.begin(header);
                }
                taken
            }
            Frame::Padding(left, before) => {
                let after = usize::from(bytes[0]);
                let (before, rest) = (*before, *left - 1);
                let fields = rest.saturating_sub(before + after);
                self.payload(
                    before.min(rest),
                    fields,
                    rest.saturating_sub(before + fields),
                );
                1
            }
            Frame::Payload { before, .. } if *before > 0 => {
                let taken = bytes.len().min(*before);
                *before -= taken;
                self.ended();
                taken
            }
            Frame::Payload { fields, .. } if *fields > 0 => {
                let taken = bytes.len().min(*fields);
                *fields -= taken;
                let fields = &mut bytes[..taken];
                self.field = read_fields(self.field, fields);
                self.ended();
                taken
            }
            Frame::Payload { after, .. } => {
                let taken = bytes.len().min(*after);
                *after -= taken;
                self.ended();
                taken
            }
        }
    }

    /// A frame begins.
    fn begin(&mut self, header: [u8; FRAME_BYTES]) {
        let [a, b, c, kind, flags, ..] = header;
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        match kind {
            HEADERS => {
                self.field = Field::First;
                let before = if flags & PRIORITY == 0 {
                    0
                } else {
                    PRIORITY_BYTES.min(length)
                };
                if flags & PADDED == 0 {
                    self.payload(before, length - before, 0);
                } else if length > 0 {
                    self.frame = Frame::Padding(length, before);
                } else {
                    self.payload(0, 0, 0);
                }
            }
            CONTINUATION => self.payload(0, length, 0),
            _ => self.payload(length, 0, 0),
        }
    }

    fn payload(&mut self, before: usize, fields: usize, after: usize) {
        self.frame = Frame::Payload {
            before,
            fields,
            after,
        };
        self.ended();
    }

    /// Goes on with the next frame once this one is over.
    fn ended(&mut self) {
        if let Frame::Payload {
            before: 0,
            fields: 0,
            after: 0,
        } = self.frame
        {
            self.frame = Frame::Header([0; FRAME_BYTES], 0);
        }
    }
}

/// Reads on in the fields of a request.
fn read_fields(mut at: Field, mut bytes: &mut [u8]) -> Field {
    while !bytes.is_empty() {
        if let Field::Text { part, left } = at {
            let taken = usize::try_from(left).map_or(bytes.len(), |n| n.min(bytes.len()));
            let (text, rest) = bytes.split_at_mut(taken);
            if part == Part::Authority {
                text.fill(LETTER);
            }
            bytes = rest;
            at = text_of(part, left - taken as u64);
            continue;
        }
        let Some((first, rest)) = bytes.split_first_mut() else {
            break;
        };
        at = match at {
            Field::Text { .. } | Field::Lost => return at,
            Field::First => begin_field(*first),
            Field::Index(_) if *first & 0x80 != 0 => at,
            Field::Index(true) => Field::Length(Part::Value),
            Field::Index(false) => Field::First,
            Field::Length(part) => {
                let length = *first & 0x7f;
                if part == Part::Authority {
                    // Letters as they are, not Huffman's code.
                    *first = length;
                }
                match length {
                    0x7f => Field::MoreLength {
                        part,
                        so_far: 0x7f,
                        shift: 0,
                    },
                    _ => text_of(part, length.into()),
                }
            }
            Field::MoreLength { shift, .. } if shift > LONGEST_SHIFT => Field::Lost,
            Field::MoreLength {
                part,
                so_far,
                shift,
            } => {
                let so_far = so_far + (u64::from(*first & 0x7f) << shift);
                if *first & 0x80 == 0 {
                    text_of(part, so_far)
                } else {
                    let shift = shift + 7;
                    Field::MoreLength {
                        part,
                        so_far,
                        shift,
                    }
                }
            }
        };
        bytes = rest;
    }
    at
}

/// What the first byte of a field says.
fn begin_field(byte: u8) -> Field {
    let (bits, literal) = match byte {
        0x80.. => (0x7f, false),
        0x40..0x80 => (0x3f, true),
        0x20..0x40 => (0x1f, false),
        0..0x20 => (0x0f, true),
    };
    match (byte & bits, literal) {
        (index, _) if index == bits => Field::Index(literal),
        (_, false) => Field::First,
        (0, true) => Field::Length(Part::Name),
        (AUTHORITY, true) => Field::Length(Part::Authority),
        (_, true) => Field::Length(Part::Value),
    }
}

/// In a string of which `left` bytes are to come.
fn text_of(part: Part, left: u64) -> Field {
    match (left, part) {
        (0, Part::Name) => Field::Length(Part::Value),
        (0, Part::Value | Part::Authority) => Field::First,
        _ => Field::Text { part, left },
    }
}

/// A stream of HTTP/2 whose requests all have an authority that the library takes.
#[derive(Debug)]
pub(super) struct AnyAuthority<S> {
    stream: S,
    finder: Finder,
}

impl<S> AnyAuthority<S> {
    /// Over a new connection.
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            finder: Finder::new(),
        }
    }
}

impl<S: Eager> Eager for AnyAuthority<S> {
    fn look(&mut self) -> bool {
        self.stream.look()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for AnyAuthority<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        self.finder.replace(&mut buffer.filled_mut()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AnyAuthority<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use hyper::server::conn::http2;
    use hyper::service::service_fn;
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut frame = vec![
            length[1], length[2], length[3], kind, flags, 0, 0, 0, stream,
        ];
        frame.extend_from_slice(payload);
        frame
    }

    /// `POST http /a`, and an authority that is no host.
    fn fields(authority: &str) -> Vec<u8> {
        let mut block = vec![0x83, 0x86, 0x44, 2, b'/', b'a', 0x41];
        if authority.len() < 0x7f {
            block.push(u8::try_from(authority.len()).unwrap());
        } else {
            let rest = authority.len() - 0x7f;
            block.extend([0x7f, u8::try_from(rest & 0x7f).unwrap() | 0x80]);
            block.push(u8::try_from(rest >> 7).unwrap());
        }
        block.extend_from_slice(authority.as_bytes());
        // A field with a new name; one never to be indexed.
        block.extend_from_slice(b"\x40\x02te\x08trailers\x1f\x10\x01x");
        block
    }

    fn opening() -> Vec<u8> {
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        bytes.extend(frame(4, 0, 0, &[]));
        bytes
    }

    fn stream(authority: &str) -> Vec<u8> {
        let mut bytes = opening();
        let block = fields(authority);
        // Whole; with padding and priority; cut in two.
        bytes.extend(frame(1, 5, 1, &block));
        let mut padded = vec![3, 0, 0, 0, 0, 16];
        padded.extend_from_slice(&block);
        padded.extend_from_slice(&[0; 3]);
        bytes.extend(frame(1, 5 | PADDED | PRIORITY, 3, &padded));
        bytes.extend(frame(1, 1, 5, &block[..9]));
        bytes.extend(frame(9, 4, 5, &block[9..]));
        bytes
    }

    #[test]
    fn every_authority_is_replaced_however_it_comes() {
        for name in ["%2Frun%2Fx.sock".to_owned(), "%2F".repeat(300)] {
            let wanted = stream(&"l".repeat(name.len()));
            for size in [1, 2, 7, 64, 100_000] {
                let (mut finder, mut got) = (Finder::new(), stream(&name));
                for part in got.chunks_mut(size) {
                    finder.replace(part);
                }
                assert!(got == wanted, "in parts of {size}");
            }
        }
    }

    #[test]
    fn what_is_no_http_does_no_harm() {
        for seed in 0_u32..200 {
            let mut state = seed;
            let mut noise: Vec<u8> = std::iter::repeat_with(|| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_be_bytes()[0]
            })
            .take(4096)
            .collect();
            // Frames of fields among it.
            noise.splice(24..33, frame(1, noise[5], 1, &[]));
            noise[25] = 4;
            Finder::new().replace(&mut noise);
        }
    }

    #[tokio::test]
    async fn a_path_as_authority_is_answered() {
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        let service =
            service_fn(|_| async { Ok::<_, Infallible>(http::Response::new(String::new())) });
        let serving = http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(AnyAuthority::new(ours)), service);
        let asking = async {
            let mut request = opening();
            request.extend(frame(1, 5, 1, &fields("%2Frun%2Fx.sock")));
            theirs.write_all(&request).await.unwrap();
            loop {
                let mut header = [0; FRAME_BYTES];
                theirs.read_exact(&mut header).await.unwrap();
                let length = usize::from(header[1]) << 8 | usize::from(header[2]);
                let mut payload = vec![0; length];
                theirs.read_exact(&mut payload).await.unwrap();
                if header[8] == 1 {
                    // Neither reset nor anything else: status 200.
                    assert_eq!((header[3], payload[0]), (HEADERS, 0x88));
                    return;
                }
            }
        };
        tokio::select! {
            ended = serving => panic!("the server ended: {ended:?}"),
            () = asking => {}
        }
    }
}
