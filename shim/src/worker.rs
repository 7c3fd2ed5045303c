//! Short-lived helper processes that call the OCI runtime library.
//!
//! The library clones containers and goes on running Rust code in the clones, so it must be called
//! from a process with one thread; its calls may block, in hooks for seconds. The shim has one
//! thread and must not block: it forks a worker per call. That is as sound as a process forked before
//! the event loop, costs no memory between calls (what a call allocates dies with its worker), and
//! two containers of a group never wait for one another. Containers are cloned as the worker's
//! siblings, that is as children of the shim.
//!
//! A worker answers with one message, whose first byte says what follows:
//!
//! | byte | rest |
//! |---|---|
//! | 0 | done; a pid in 4 bytes, little-endian, or nothing. A terminal comes along as a descriptor |
//! | else | an [`ErrorKind`](Fault)'s number; the text |

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

use crate::error::{Error, Result};
use crate::io::pipe;
use crate::reaper::Reaper;
use crate::sys::{self, Fork};

/// Longest error text that is passed on.
const MAX_TEXT_BYTES: usize = 16 * 1024;

/// What a worker achieved.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// The process it made.
    pub(crate) pid: u32,
    /// That process's terminal.
    pub(crate) terminal: Option<OwnedFd>,
}

/// Why a worker failed, as far as the shim tells failures apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// No such container.
    NotFound = 1,
    /// It does not run.
    NotRunning = 2,
    /// Anything else.
    Other = 3,
}

/// A failure in a worker.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Its kind.
    pub(crate) fault: Fault,
    /// Its text.
    pub(crate) text: String,
}

/// Runs `work` in a worker and returns its answer; the inner result is the work's own.
///
/// # Errors
/// When there can be no worker, or it dies.
pub(crate) async fn call(
    reaper: &Reaper,
    work: impl FnOnce() -> std::result::Result<Answer, Failure> + Send,
) -> Result<std::result::Result<Answer, Failure>> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(Error::system("create a socket pair"))?;
    let ours = pipe::watch(ours)?;
    match sys::fork().map_err(Error::system("fork a worker"))? {
        Fork::Child => {
            // A panic must not unwind into the event loop that this process is a copy of.
            let outcome = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
                Err(Failure {
                    fault: Fault::Other,
                    text: "the runtime panicked".to_owned(),
                })
            });
            send(&theirs, outcome);
            sys::exit_now(0)
        }
        Fork::Parent(pid) => {
            // Its end is reaped; only its answer matters.
            drop(reaper.claim(pid));
        }
    }
    drop(theirs);
    // What the work owned (descriptors of the new process) is the worker's now.
    drop(work);
    receive(&ours).await
}

fn send(socket: &OwnedFd, outcome: std::result::Result<Answer, Failure>) {
    let (head, body, terminal) = match outcome {
        Ok(answer) => (0, answer.pid.to_le_bytes().to_vec(), answer.terminal),
        Err(failure) => {
            let mut text = failure.text.into_bytes();
            text.truncate(MAX_TEXT_BYTES);
            (failure.fault as u8, text, None)
        }
    };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = terminal.iter().map(AsFd::as_fd).collect();
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    let head = [head];
    let parts = [IoSlice::new(&head), IoSlice::new(&body)];
    // A shim that is gone needs no answer.
    let _ = rustix::net::sendmsg(socket, &parts, &mut ancillary, SendFlags::NOSIGNAL);
}

async fn receive(
    socket: &tokio::io::unix::AsyncFd<OwnedFd>,
) -> Result<std::result::Result<Answer, Failure>> {
    let (message, terminal) = loop {
        let mut ready = socket
            .readable()
            .await
            .map_err(Error::system("wait for a worker"))?;
        let attempt = ready.try_io(|socket| {
            let mut bytes = vec![0; 1 + MAX_TEXT_BYTES];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let received = rustix::net::recvmsg(
                socket.get_ref(),
                &mut [IoSliceMut::new(&mut bytes)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            )?;
            bytes.truncate(received.bytes);
            let terminal = ancillary.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            });
            Ok((bytes, terminal))
        });
        match attempt {
            Ok(received) => break received.map_err(Error::system("hear from a worker"))?,
            Err(_would_block) => {}
        }
    };
    match message.split_first() {
        Some((0, pid)) => {
            let pid = pid
                .first_chunk::<4>()
                .map_or(0, |bytes| u32::from_le_bytes(*bytes));
            Ok(Ok(Answer { pid, terminal }))
        }
        Some((fault, text)) => {
            let fault = match fault {
                1 => Fault::NotFound,
                2 => Fault::NotRunning,
                _ => Fault::Other,
            };
            Ok(Err(Failure {
                fault,
                text: String::from_utf8_lossy(text).into_owned(),
            }))
        }
        None => Err(Error::Runtime("the runtime's worker died".to_owned())),
    }
}
