//! Frames of SPDY/3.1 as bytes. Nothing here does I/O.

use std::io;

use bytes::Bytes;

const VERSION: u16 = 3;
const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;
/// Flag of data, `SYN_STREAM`, `SYN_REPLY` and `HEADERS`.
const FLAG_FIN: u8 = 1;
/// Setting: bytes that may be sent on a new stream.
const SETTING_INITIAL_WINDOW: u32 = 7;
/// Status of a reset: the stream was not begun.
pub(super) const REFUSED_STREAM: u32 = 3;
/// Stream ids have 31 bits.
const ID_MASK: u32 = 0x7fff_ffff;

/// The first eight bytes of a frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Head {
    Data { id: u32, last: bool, length: usize },
    Control { kind: u16, flags: u8, length: usize },
}

/// A control frame of a client.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Control<'a> {
    SynStream {
        id: u32,
        last: bool,
        block: &'a [u8],
    },
    /// Headers of a stream that exists; they mean nothing here but belong to the context.
    Headers {
        block: &'a [u8],
    },
    Reset {
        id: u32,
    },
    InitialWindow {
        size: i64,
    },
    Ping {
        id: u32,
    },
    GoAway,
    WindowUpdate {
        id: u32,
        delta: i64,
    },
    /// Unknown kinds must be ignored.
    Other,
}

pub(super) fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

pub(super) fn head(bytes: [u8; 8]) -> io::Result<Head> {
    let [a, b, c, d, flags, e, f, g] = bytes;
    let length = usize::try_from(u32::from_be_bytes([0, e, f, g])).unwrap_or(usize::MAX);
    let word = u32::from_be_bytes([a, b, c, d]);
    if word & !ID_MASK == 0 {
        return Ok(Head::Data {
            id: word,
            last: flags & FLAG_FIN != 0,
            length,
        });
    }
    if u16::from_be_bytes([a & 0x7f, b]) != VERSION {
        return Err(invalid("not SPDY/3"));
    }
    Ok(Head::Control {
        kind: u16::from_be_bytes([c, d]),
        flags,
        length,
    })
}

/// Reads the body of a control frame.
pub(super) fn control(kind: u16, flags: u8, body: &[u8]) -> io::Result<Control<'_>> {
    let word = |at: usize| {
        let bytes = body.get(at..at + 4).and_then(|b| b.try_into().ok());
        bytes
            .map(u32::from_be_bytes)
            .ok_or_else(|| invalid("control frame is cut short"))
    };
    let after = |at: usize| {
        body.get(at..)
            .ok_or_else(|| invalid("control frame is cut short"))
    };
    Ok(match kind {
        SYN_STREAM => Control::SynStream {
            id: word(0)? & ID_MASK,
            last: flags & FLAG_FIN != 0,
            block: after(10)?,
        },
        SYN_REPLY | HEADERS => Control::Headers { block: after(4)? },
        RST_STREAM => Control::Reset {
            id: word(0)? & ID_MASK,
        },
        SETTINGS => {
            let entries = body.get(4..).unwrap_or_default().chunks_exact(8);
            let window = entries.filter_map(|entry| {
                let number = u32::from_be_bytes(entry[..4].try_into().ok()?) & 0x00ff_ffff;
                let value = u32::from_be_bytes(entry[4..].try_into().ok()?);
                (number == SETTING_INITIAL_WINDOW).then_some(value)
            });
            match window.reduce(|_, later| later) {
                Some(size) => Control::InitialWindow {
                    size: i64::from(size),
                },
                None => Control::Other,
            }
        }
        PING => Control::Ping { id: word(0)? },
        GOAWAY => Control::GoAway,
        WINDOW_UPDATE => Control::WindowUpdate {
            id: word(0)? & ID_MASK,
            delta: i64::from(word(4)? & ID_MASK),
        },
        _ => Control::Other,
    })
}

pub(super) fn data_head(id: u32, last: bool, length: usize) -> [u8; 8] {
    let [a, b, c, d] = (id & ID_MASK).to_be_bytes();
    let [_, e, f, g] = length_word(length);
    [a, b, c, d, if last { FLAG_FIN } else { 0 }, e, f, g]
}

fn length_word(length: usize) -> [u8; 4] {
    u32::try_from(length)
        .expect("frames are small")
        .to_be_bytes()
}

fn build(kind: u16, flags: u8, parts: &[&[u8]]) -> Bytes {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut frame = Vec::with_capacity(8 + length);
    frame.extend_from_slice(&(VERSION | 0x8000).to_be_bytes());
    frame.extend_from_slice(&kind.to_be_bytes());
    frame.push(flags);
    frame.extend_from_slice(&length_word(length)[1..]);
    for part in parts {
        frame.extend_from_slice(part);
    }
    frame.into()
}

pub(super) fn syn_reply(id: u32, block: &[u8]) -> Bytes {
    build(SYN_REPLY, 0, &[&id.to_be_bytes(), block])
}

pub(super) fn reset(id: u32, status: u32) -> Bytes {
    build(RST_STREAM, 0, &[&id.to_be_bytes(), &status.to_be_bytes()])
}

pub(super) fn ping(id: u32) -> Bytes {
    build(PING, 0, &[&id.to_be_bytes()])
}

pub(super) fn goaway() -> Bytes {
    build(GOAWAY, 0, &[&[0; 8]])
}

pub(super) fn window_update(id: u32, delta: usize) -> Bytes {
    build(WINDOW_UPDATE, 0, &[&id.to_be_bytes(), &length_word(delta)])
}

#[cfg(test)]
pub(super) fn syn_stream(id: u32, block: &[u8]) -> Bytes {
    build(SYN_STREAM, 0, &[&id.to_be_bytes(), &[0; 6], block])
}

#[cfg(test)]
pub(super) fn initial_window(size: u32) -> Bytes {
    let entry = [SETTING_INITIAL_WINDOW.to_be_bytes(), size.to_be_bytes()].concat();
    build(SETTINGS, 0, &[&1_u32.to_be_bytes(), &entry])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop, proptest};

    use super::*;

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(
            first in any::<[u8; 8]>(),
            kind in 0_u16..12,
            body in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let _ = head(first);
            let _ = control(kind, first[0], &body);
        }

        #[test]
        fn data_heads_round_trip(id in 1_u32..=ID_MASK, last: bool, length in 0_usize..1 << 24) {
            let read = head(data_head(id, last, length)).unwrap();
            assert_eq!(read, Head::Data { id, last, length });
        }
    }
}
