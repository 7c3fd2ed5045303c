//! Descriptors passed to programs that wait for them at a Unix socket.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};

/// Sends `bytes`, and `fd` with them, to whoever listens at `path`.
pub(crate) fn send_to(path: &str, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let bytes = [IoSlice::new(bytes)];
    rustix::net::sendmsg(&socket, &bytes, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}
