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
            Message::Console(fd) => return self.send_fd(b'C', fd.as_fd()),
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

    fn send_fd(&self, kind: u8, fd: BorrowedFd<'_>) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        rustix::net::sendmsg(
            &self.0,
            &[IoSlice::new(&[kind])],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .context(|| "send a descriptor")
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
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
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
        let mut fd = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                fd = fds.into_iter().next();
            }
        }
        let message = parse(&packet[..received.bytes], fd)?;
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
                    return parse(&packet[..length], None);
                }
            }
        }
    }
}

fn numbered(packet: &mut Vec<u8>, kind: u8, number: i32) {
    packet.push(kind);
    packet.extend_from_slice(&number.to_ne_bytes());
}

fn parse(packet: &[u8], fd: Option<OwnedFd>) -> Result<Option<Message>> {
    let Some((kind, rest)) = packet.split_first() else {
        return Ok(None);
    };
    let number = || rest.try_into().map(i32::from_ne_bytes).ok();
    let message = match (*kind, fd) {
        (b'C', Some(fd)) => Some(Message::Console(fd)),
        (b'S', _) => number().map(Message::Spawned),
        (b'L', _) => number().map(Message::Listener),
        (b'G', _) => number().map(Message::Go),
        (b'M', _) => Some(Message::Mounted),
        (b'R', _) => Some(Message::Ready),
        (b'H', _) => Some(Message::HooksDone),
        (b'T', _) => Some(Message::ListenerTaken),
        (b'F', _) => Some(Message::Failed(String::from_utf8_lossy(rest).into_owned())),
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
    }
}
