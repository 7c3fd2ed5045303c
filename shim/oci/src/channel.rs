//! The private line between the runtime and the process it makes: one message per packet, descriptors beside.
//!
//! ```text
//! child → parent   Spawned pid      (by a helper that made the real child in a joined user namespace)
//!                  Console + fd     the terminal's master
//!                  Mounted          waits for HooksDone
//!                  Listener fd-no.  waits for ListenerTaken
//!                  Ready            before it waits to be started (init only)
//!                  Failed text      then it exits
//! parent → child   Go pid           maps are written, control groups and limits set
//!                  Groups + fds     the control groups, made while the child set itself up
//!                  HooksDone, ListenerTaken
//! ```
//! An exec'd process has no `Ready`: the line closes when its program runs. Sending and receiving without descriptors
//! is write(2) and read(2), which seccomp profiles have to allow anyway.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use crate::error::{Context, Error, Result};

/// Longest text of a failure that is sent.
const MAX_MESSAGE: usize = 8192;
/// Most descriptors that go along with a message.
pub(crate) const MAX_FDS: usize = 24;

/// One message.
#[derive(Debug)]
pub(crate) enum Message {
    Spawned(i32),
    Console(OwnedFd),
    Mounted,
    Listener(i32),
    Ready,
    Failed(String),
    Go(i32),
    /// At most [`MAX_FDS`] files to write `0` into.
    Groups(Vec<OwnedFd>),
    HooksDone,
    ListenerTaken,
}

/// What [`Channel::poll`] found.
#[derive(Debug)]
pub(crate) enum Polled {
    Message(Message),
    /// Nothing for now.
    Nothing,
    /// Nothing any more.
    Closed,
}

/// One end of the line.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

impl Channel {
    pub(crate) fn pair() -> Result<(Self, Self)> {
        rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map(|(one, other)| (Self(one), Self(other)))
        .context(|| "socketpair")
    }

    /// Sends a message.
    pub(crate) fn send(&self, message: Message) -> Result<()> {
        let mut packet = Vec::with_capacity(16);
        match message {
            Message::Console(fd) => return self.send_fds(b'C', &[fd.as_fd()]),
            Message::Groups(files) => {
                let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                return self.send_fds(b'E', &files);
            }
            Message::Spawned(pid) => numbered(&mut packet, b'S', pid),
            Message::Listener(number) => numbered(&mut packet, b'L', number),
            Message::Go(pid) => numbered(&mut packet, b'G', pid),
            Message::Mounted => packet.push(b'M'),
            Message::Ready => packet.push(b'R'),
            Message::HooksDone => packet.push(b'H'),
            Message::ListenerTaken => packet.push(b'T'),
            Message::Failed(text) => {
                packet.push(b'F');
                let mut end = text.len().min(MAX_MESSAGE - 1);
                while !text.is_char_boundary(end) {
                    end -= 1;
                }
                packet.extend_from_slice(&text.as_bytes()[..end]);
            }
        }
        rustix::io::write(&self.0, &packet)
            .context(|| "send to the other process")
            .map(drop)
    }

    fn send_fds(&self, kind: u8, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(fds));
        rustix::net::sendmsg(
            &self.0,
            &[IoSlice::new(&[kind])],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .context(|| "send descriptors")
        .map(drop)
    }

    /// Receives a message; `None` when the other end is closed.
    pub(crate) fn receive(&self) -> Result<Option<Message>> {
        match self.receive_with(RecvFlags::empty())? {
            Polled::Message(message) => Ok(Some(message)),
            Polled::Nothing | Polled::Closed => Ok(None),
        }
    }

    /// Receives a message if one is there.
    pub(crate) fn poll(&self) -> Result<Polled> {
        self.receive_with(RecvFlags::DONTWAIT)
    }

    fn receive_with(&self, flags: RecvFlags) -> Result<Polled> {
        let mut packet = vec![0_u8; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut parts = [IoSliceMut::new(&mut packet)];
            let flags = flags | RecvFlags::CMSG_CLOEXEC;
            match rustix::net::recvmsg(&self.0, &mut parts, &mut control, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Polled::Nothing),
                Err(Errno::CONNRESET) => return Ok(Polled::Closed),
                other => break other.context(|| "receive from the other process")?,
            }
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(found) = message {
                fds.extend(found);
            }
        }
        let message = parse(&packet[..received.bytes], fds)?;
        Ok(message.map_or(Polled::Closed, Polled::Message))
    }

    /// Receives with read(2) only, which is all that a seccomp profile may leave.
    pub(crate) fn receive_plain(&self) -> Result<Option<Message>> {
        let mut packet = [0_u8; 64];
        loop {
            match rustix::io::read(&self.0, &mut packet) {
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(None),
                other => {
                    let length = other.context(|| "receive from the other process")?;
                    return parse(&packet[..length], Vec::new());
                }
            }
        }
    }
}

fn numbered(packet: &mut Vec<u8>, kind: u8, number: i32) {
    packet.push(kind);
    packet.extend_from_slice(&number.to_ne_bytes());
}

fn parse(packet: &[u8], mut fds: Vec<OwnedFd>) -> Result<Option<Message>> {
    let Some((kind, rest)) = packet.split_first() else {
        return Ok(None);
    };
    let number = || rest.try_into().map(i32::from_ne_bytes).ok();
    let message = match *kind {
        b'C' => fds.pop().map(Message::Console),
        b'E' => Some(Message::Groups(fds)),
        b'S' => number().map(Message::Spawned),
        b'L' => number().map(Message::Listener),
        b'G' => number().map(Message::Go),
        b'M' => Some(Message::Mounted),
        b'R' => Some(Message::Ready),
        b'H' => Some(Message::HooksDone),
        b'T' => Some(Message::ListenerTaken),
        b'F' => Some(Message::Failed(String::from_utf8_lossy(rest).into_owned())),
        _ => None,
    };
    message
        .map(Some)
        .ok_or_else(|| Error::Process("malformed message between runtime and container".into()))
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_whole_and_in_order() {
        let (one, other) = Channel::pair().unwrap();
        one.send(Message::Failed("x".repeat(MAX_MESSAGE * 2)))
            .unwrap();
        one.send(Message::Go(77)).unwrap();
        assert!(
            matches!(other.receive().unwrap(), Some(Message::Failed(text)) if text.len() == MAX_MESSAGE - 1)
        );
        assert!(matches!(
            other.receive_plain().unwrap(),
            Some(Message::Go(77))
        ));
        drop(one);
        assert!(other.receive().unwrap().is_none());
    }

    #[test]
    fn descriptors_travel() {
        let (one, other) = Channel::pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        one.send(Message::Console(writer)).unwrap();
        let Some(Message::Console(writer)) = other.receive().unwrap() else {
            panic!("no descriptor")
        };
        rustix::io::write(&writer, b"hi").unwrap();
        let mut got = [0; 2];
        rustix::io::read(&reader, &mut got).unwrap();
        assert_eq!(&got, b"hi");

        let ends = (0..MAX_FDS / 2).map(|_| rustix::pipe::pipe().unwrap());
        let files: Vec<_> = ends.flat_map(|(reader, writer)| [reader, writer]).collect();
        one.send(Message::Groups(files)).unwrap();
        let Some(Message::Groups(files)) = other.receive().unwrap() else {
            panic!("no descriptors")
        };
        assert_eq!(files.len(), MAX_FDS);
        one.send(Message::Groups(Vec::new())).unwrap();
        let none = other.receive().unwrap();
        assert!(matches!(none, Some(Message::Groups(files)) if files.is_empty()));
    }
}
