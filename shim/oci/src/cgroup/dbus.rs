//! The little of D-Bus that starting a scope takes: connect, authenticate, call a method of systemd's manager.
//! Spec: D-Bus specification, "Message Protocol" (marshalling, little endian) and "Authentication Protocol" (EXTERNAL).

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Context, Error, Result};

/// How long a reply may take.
const TIMEOUT: Duration = Duration::from_secs(25);

/// Largest message that is read, in bytes.
const MAX_MESSAGE: usize = 1 << 20;

const METHOD_CALL: u8 = 1;
const METHOD_RETURN: u8 = 2;
const ERROR: u8 = 3;

/// A property's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Text(String),
    Bool(bool),
    Unsigned(u64),
    /// `au`
    Numbers(Vec<u32>),
}

/// Marshalled arguments.
#[derive(Default)]
pub(super) struct Body {
    bytes: Vec<u8>,
}

impl Body {
    fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    fn u32(&mut self, value: u32) {
        self.align(4);
        self.bytes.extend(value.to_le_bytes());
    }

    pub(super) fn text(&mut self, value: &str) -> &mut Self {
        self.u32(u32::try_from(value.len()).expect("short strings"));
        self.bytes.extend(value.as_bytes());
        self.bytes.push(0);
        self
    }

    pub(super) fn boolean(&mut self, value: bool) -> &mut Self {
        self.u32(u32::from(value));
        self
    }

    fn signature(&mut self, value: &str) {
        self.bytes
            .push(u8::try_from(value.len()).expect("short signatures"));
        self.bytes.extend(value.as_bytes());
        self.bytes.push(0);
    }

    /// An array: its length counts from the first element, after the padding to the elements' alignment.
    fn array(&mut self, alignment: usize, fill: impl FnOnce(&mut Self)) -> &mut Self {
        self.u32(0);
        let length_at = self.bytes.len() - 4;
        self.align(alignment);
        let first = self.bytes.len();
        fill(self);
        let length = u32::try_from(self.bytes.len() - first).expect("short arrays");
        self.bytes[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
        self
    }

    fn variant(&mut self, value: &Value) {
        match value {
            Value::Text(text) => {
                self.signature("s");
                self.text(text);
            }
            Value::Bool(value) => {
                self.signature("b");
                self.boolean(*value);
            }
            Value::Unsigned(value) => {
                self.signature("t");
                self.align(8);
                self.bytes.extend(value.to_le_bytes());
            }
            Value::Numbers(values) => {
                self.signature("au");
                self.array(4, |body| values.iter().for_each(|value| body.u32(*value)));
            }
        }
    }

    /// `a(sv)`
    pub(super) fn properties(&mut self, properties: &[(&str, Value)]) -> &mut Self {
        self.array(8, |body| {
            for (name, value) in properties {
                body.align(8);
                body.text(name);
                body.variant(value);
            }
        })
    }

    /// An empty `a(sa(sv))`.
    pub(super) fn no_auxiliary_units(&mut self) -> &mut Self {
        self.array(8, |_| ())
    }
}

/// A message for systemd's manager or for the bus itself.
fn message(
    serial: u32,
    destination: &str,
    path: &str,
    interface: &str,
    member: &str,
    signature: &str,
    body: &Body,
) -> Vec<u8> {
    let mut header = Body::default();
    header.bytes.extend([b'l', METHOD_CALL, 0, 1]);
    header.u32(u32::try_from(body.bytes.len()).expect("short messages"));
    header.u32(serial);
    header.array(8, |header| {
        let mut field = |code: u8, kind: &str, value: &str| {
            header.align(8);
            header.bytes.push(code);
            header.signature(kind);
            if kind == "g" {
                header.signature(value);
            } else {
                header.text(value);
            }
        };
        field(1, "o", path);
        field(6, "s", destination);
        field(2, "s", interface);
        field(3, "s", member);
        if !signature.is_empty() {
            field(8, "g", signature);
        }
    });
    header.align(8);
    header.bytes.extend(&body.bytes);
    header.bytes
}

/// A connection to the bus.
pub(super) struct Bus {
    stream: UnixStream,
    serial: u32,
}

fn address() -> PathBuf {
    let parse = |text: String| {
        text.split(';').find_map(|one| {
            one.strip_prefix("unix:")?
                .split(',')
                .find_map(|pair| pair.strip_prefix("path="))
                .map(PathBuf::from)
        })
    };
    if crate::privilege::is_host_root() {
        return std::env::var("DBUS_SYSTEM_BUS_ADDRESS")
            .ok()
            .and_then(parse)
            .unwrap_or_else(|| "/run/dbus/system_bus_socket".into());
    }
    std::env::var("DBUS_SESSION_BUS_ADDRESS")
        .ok()
        .and_then(parse)
        .unwrap_or_else(|| {
            PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR").unwrap_or_default()).join("bus")
        })
}

impl Bus {
    pub(super) fn connect() -> Result<Self> {
        let address = address();
        let stream = UnixStream::connect(&address).context(|| {
            format!(
                "systemd cgroup driver: connect to D-Bus at {}",
                address.display()
            )
        })?;
        let mut bus = Self { stream, serial: 0 };
        bus.greet()
            .context(|| "systemd cgroup driver: D-Bus authentication")?;
        let hello = Body::default();
        bus.call_to(
            "org.freedesktop.DBus",
            "/org/freedesktop/DBus",
            "org.freedesktop.DBus",
            "Hello",
            "",
            &hello,
        )?;
        Ok(bus)
    }

    fn greet(&mut self) -> std::io::Result<()> {
        self.stream.set_read_timeout(Some(TIMEOUT))?;
        self.stream.set_write_timeout(Some(TIMEOUT))?;
        // The bus sees the peer from outside of the user namespace.
        let uid: String = crate::privilege::outside_uid()
            .to_string()
            .bytes()
            .map(|digit| format!("{digit:02x}"))
            .collect();
        self.stream
            .write_all(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes())?;
        let mut line = Vec::new();
        let mut byte = [0];
        while !line.ends_with(b"\r\n") && line.len() < 512 {
            self.stream.read_exact(&mut byte)?;
            line.push(byte[0]);
        }
        if !line.starts_with(b"OK ") {
            return Err(std::io::Error::other(
                String::from_utf8_lossy(&line).trim().to_owned(),
            ));
        }
        self.stream.write_all(b"BEGIN\r\n")
    }

    /// Calls a method of systemd's manager.
    pub(super) fn call(&mut self, member: &str, signature: &str, body: &Body) -> Result<()> {
        self.call_to(
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
            "org.freedesktop.systemd1.Manager",
            member,
            signature,
            body,
        )
    }

    fn call_to(
        &mut self,
        to: &str,
        path: &str,
        interface: &str,
        member: &str,
        signature: &str,
        body: &Body,
    ) -> Result<()> {
        self.serial += 1;
        let what = || format!("systemd cgroup driver: {member}");
        let packet = message(self.serial, to, path, interface, member, signature, body);
        self.stream.write_all(&packet).context(what)?;
        loop {
            let (kind, reply_to, text) = self.read_message().context(what)?;
            if reply_to != Some(self.serial) {
                continue;
            }
            return match kind {
                METHOD_RETURN => Ok(()),
                ERROR => Err(Error::State(format!("{}: {text}", what()))),
                _ => continue,
            };
        }
    }

    /// (type, serial it answers, error name and text)
    fn read_message(&mut self) -> std::io::Result<(u8, Option<u32>, String)> {
        let wrong = || std::io::Error::other("malformed D-Bus message");
        let mut start = [0; 16];
        self.stream.read_exact(&mut start)?;
        if start[0] != b'l' {
            return Err(wrong());
        }
        let number = |at: usize| {
            u32::from_le_bytes(start[at..at + 4].try_into().expect("four bytes")) as usize
        };
        let (body_length, fields_length) = (number(4), number(12));
        if body_length > MAX_MESSAGE || fields_length > MAX_MESSAGE {
            return Err(wrong());
        }
        let mut rest = vec![0; fields_length.next_multiple_of(8) + body_length];
        self.stream.read_exact(&mut rest)?;
        let (fields, body) = rest.split_at(fields_length.next_multiple_of(8));
        let (reply_to, name) = parse_fields(&fields[..fields_length]).ok_or_else(wrong)?;
        let mut text = name.unwrap_or_default();
        if let Some(detail) = read_text(body, 0) {
            text = format!("{text}: {detail}");
        }
        Ok((start[1], reply_to, text))
    }
}

fn read_text(bytes: &[u8], at: usize) -> Option<String> {
    let length = u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize;
    String::from_utf8(
        bytes
            .get(at + 4..at.checked_add(4)?.checked_add(length)?)?
            .to_vec(),
    )
    .ok()
}

/// The reply serial and the error name among the header fields, whose values are all of type s, o, g or u.
fn parse_fields(bytes: &[u8]) -> Option<(Option<u32>, Option<String>)> {
    let (mut reply_to, mut name) = (None, None);
    let mut at = 0;
    while at < bytes.len() {
        at = usize::next_multiple_of(at, 8);
        let Some(code) = bytes.get(at) else { break };
        let kind = bytes.get(at + 2)?;
        // code, signature length, one letter, zero
        at += 4;
        match kind {
            b'u' => {
                let value = u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?);
                if *code == 5 {
                    reply_to = Some(value);
                }
                at += 4;
            }
            b's' | b'o' => {
                let value = read_text(bytes, at)?;
                at += 4 + value.len() + 1;
                if *code == 4 {
                    name = Some(value);
                }
            }
            b'g' => at += usize::from(*bytes.get(at)?) + 2,
            _ => return None,
        }
    }
    Some((reply_to, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_are_marshalled_with_their_padding() {
        let mut body = Body::default();
        body.text("a").properties(&[("P", Value::Unsigned(5))]);
        let expected: &[u8] = &[
            1, 0, 0, 0, b'a', 0, 0, 0, // string and padding
            24, 0, 0, 0, 0, 0, 0, 0, // array length, padding to 8
            1, 0, 0, 0, b'P', 0, 1, b't', 0, 0, 0, 0, 0, 0, 0, 0, // name, signature, padding
            5, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(body.bytes, expected);
    }

    #[test]
    fn header_fields_are_found() {
        let mut header = Body::default();
        header.bytes.extend([4, 1, b's', 0]);
        header.text("org.example.Error");
        header.align(8);
        header.bytes.extend([5, 1, b'u', 0]);
        header.u32(7);
        assert_eq!(
            parse_fields(&header.bytes),
            Some((Some(7), Some("org.example.Error".into())))
        );
        assert_eq!(parse_fields(&[4, 1, b's']), None);
    }
}
