//! Shims of ours that were started before anybody needed one.
//!
//! A nursery is a process of our shim's `warm` action, one per shim binary. It keeps a few forked
//! children ready, all of them waiting on one SEQPACKET socket whose other end is here; a frame on
//! that socket, with a stream socket beside it, makes one of them the server of a bundle, and the
//! stream its first connection. That saves a start both executions of the binary and a connect; the
//! request to create the task goes along with the frame, which saves the wait for the answer.
//!
//! Frame and answer are described with the shim's `warm` action. What holds here:
//!
//! - A nursery serves as long as the binary at its path is the file it was started from; a start
//!   after an upgrade finds another inode, time or size, closes the socket, and a new one is made.
//! - The socket is the nursery's life line: it and its idle children end when this process does,
//!   however it ends. Servers do not; they have a session of their own and nothing of ours open.
//! - A nursery that does not work costs nothing but its advantage: whatever goes wrong before a
//!   child answered, the binary's `start` action is run instead, as for any other shim. One that
//!   ended before it ever served is not tried again until the binary changes.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::{BoxFuture, MaybeDone};
use lighter_proto::containerd::task::v3::CreateTaskResponse;
use lighter_proto::errdefs::WireError;
use lighter_proto::line::Line;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use tokio::process::{Child, Command};
use tracing::{debug, info, warn};

use super::binary::Identity;
use super::early::Early;

/// Largest frame that the shim takes.
const MAX_FRAME_BYTES: usize = 64 << 10;
/// Longest that a child may take to answer: it makes a handful of system calls.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Binaries that have a nursery at the same time.
const MAX_NURSERIES: usize = 4;
/// Room in the command line for what a server writes there once it knows what it serves.
const TITLE_BYTES: usize = 448;

#[derive(Debug)]
struct Nursery {
    /// Frames go in here; closing it ends the process.
    socket: OwnedFd,
    process: Child,
    /// Whether it ever answered.
    proven: bool,
}

#[derive(Debug)]
enum State {
    /// Being started; meanwhile `start` is run.
    Starting,
    Ready(Nursery),
    /// This file has no working `warm` action.
    Useless,
}

/// What a child answered.
#[derive(Debug)]
pub(super) enum Answer {
    /// It serves the bundle, on this connection; the bytes are its bootstrap.
    Served(Vec<u8>, Early),
    /// The group has a server already; the bytes are that one's bootstrap.
    Elsewhere(Vec<u8>),
    /// It cannot, and this is why.
    Refused(String),
}

/// The first call of a server, under way or answered.
pub(super) type First = MaybeDone<BoxFuture<'static, Result<CreateTaskResponse, WireError>>>;

/// The nurseries of this daemon, by binary.
#[derive(Debug)]
pub(super) struct Nurseries {
    /// Children each keeps ready; 0 for no nurseries at all.
    ready: usize,
    by_path: Mutex<HashMap<PathBuf, (Identity, State)>>,
}

impl Nurseries {
    pub(super) fn new(ready: usize) -> Self {
        Self {
            ready,
            by_path: Mutex::default(),
        }
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<PathBuf, (Identity, State)>> {
        self.by_path.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `binary` ready before it is needed. `command` is its command line up to the action.
    pub(super) async fn prepare(&self, binary: &Path, command: Command) {
        if self.ready > 0
            && let Some(identity) = Identity::of(binary)
            && self.reserve(binary, identity)
        {
            self.start(binary, identity, command).await;
        }
    }

    /// Asks a child to serve a bundle, and sends `first` along: that runs on, if the answer is that
    /// it serves. `None` when the binary's `start` must be run instead.
    pub(super) async fn ask(
        &self,
        binary: &Path,
        params: &[u8],
        bundle: &Path,
        command: impl FnOnce() -> Command,
        first: impl FnOnce(&Early) -> Option<First>,
    ) -> Option<(Answer, Option<First>)> {
        if self.ready == 0 {
            return None;
        }
        let frame = frame(params, bundle)?;
        let identity = Identity::of(binary)?;
        let line = match self.order(binary, identity, &frame) {
            Some(line) => line,
            None if self.reserve(binary, identity) => {
                self.start(binary, identity, command()).await;
                self.order(binary, identity, &frame)?
            }
            None => return None,
        };
        let early = Early::over(Line::new(line).ok()?);
        let mut first = first(&early);
        match tokio::time::timeout(ANSWER_LIMIT, answer(early, first.as_mut())).await {
            Ok(Ok(answer)) => {
                if let Some((_, State::Ready(nursery))) = self.locked().get_mut(binary) {
                    nursery.proven = true;
                }
                Some((answer, first))
            }
            Ok(Err(error)) => {
                debug!(%error, "a warm shim did not answer; starting one");
                None
            }
            Err(_) => {
                warn!(limit = ?ANSWER_LIMIT, "a warm shim is silent; starting one");
                self.locked().remove(binary);
                None
            }
        }
    }

    /// Claims the making of a nursery for a binary that has none that works.
    fn reserve(&self, binary: &Path, identity: Identity) -> bool {
        let mut nurseries = self.locked();
        let full = nurseries.len() >= MAX_NURSERIES;
        match nurseries.get_mut(binary) {
            Some((known, State::Starting | State::Useless)) if *known == identity => return false,
            Some((known, State::Ready(nursery))) if *known == identity => {
                // Only what ended is replaced.
                if !matches!(nursery.process.try_wait(), Ok(Some(_)) | Err(_)) {
                    return false;
                }
                if !nursery.proven {
                    warn!(shim = %binary.display(), "no warm shims of this binary");
                    nurseries.insert(binary.to_owned(), (identity, State::Useless));
                    return false;
                }
            }
            None if full => return false,
            _ => {}
        }
        nurseries.insert(binary.to_owned(), (identity, State::Starting));
        true
    }

    async fn start(&self, binary: &Path, identity: Identity, mut command: Command) {
        let ready = self.ready;
        // The fork waits until the binary is loaded: not on a thread that serves requests.
        let spawned = tokio::task::spawn_blocking(move || {
            let (ours, theirs) = rustix::net::socketpair(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )?;
            rustix::io::ioctl_fionbio(&ours, true)?;
            let process = command
                .arg("-ready")
                .arg(ready.to_string())
                .arg("warm")
                .arg(" ".repeat(TITLE_BYTES))
                .current_dir("/")
                .stdin(Stdio::from(theirs))
                .stdout(Stdio::null())
                .spawn()?;
            Ok::<_, io::Error>(Nursery {
                socket: ours,
                process,
                proven: false,
            })
        });
        let state = match spawned.await {
            Ok(Ok(nursery)) => {
                info!(shim = %binary.display(), pid = nursery.process.id(), ready, "warm shims");
                State::Ready(nursery)
            }
            Ok(Err(error)) => {
                warn!(shim = %binary.display(), %error, "cannot keep warm shims");
                State::Useless
            }
            Err(_stopping) => State::Useless,
        };
        self.locked().insert(binary.to_owned(), (identity, state));
    }

    /// Sends the frame to the nursery of exactly this file; the line to the child that takes it.
    fn order(&self, binary: &Path, identity: Identity, frame: &[u8]) -> Option<UnixStream> {
        let nurseries = self.locked();
        let (known, State::Ready(nursery)) = nurseries.get(binary)? else {
            return None;
        };
        if *known != identity {
            return None;
        }
        let (ours, theirs) = UnixStream::pair().ok()?;
        // A full socket is as good as none: whoever starts so many at once gains from `start`.
        match send(&nursery.socket, frame, &theirs.into()) {
            Ok(()) => Some(ours),
            Err(error) => {
                debug!(%error, "no warm shim takes orders");
                None
            }
        }
    }
}

fn frame(params: &[u8], bundle: &Path) -> Option<Vec<u8>> {
    let bundle = bundle.as_os_str().as_encoded_bytes();
    let mut frame = u32::try_from(params.len()).ok()?.to_be_bytes().to_vec();
    frame.extend_from_slice(params);
    frame.extend_from_slice(bundle);
    (frame.len() <= MAX_FRAME_BYTES).then_some(frame)
}

fn send(socket: &OwnedFd, frame: &[u8], line: &OwnedFd) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [line.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    rustix::net::sendmsg(
        socket,
        &[IoSlice::new(frame)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Waits for the answer while the first call is made.
async fn answer(mut early: Early, mut first: Option<&mut First>) -> io::Result<Answer> {
    let answered = std::future::poll_fn(|context| {
        if let Some(first) = &mut first {
            // Whether it is over already is asked later.
            let _pending = Pin::new(&mut **first).poll(context);
        }
        early.poll_answer(context)
    });
    let (status, bytes) = answered.await?;
    match status {
        0 => Ok(Answer::Served(bytes, early)),
        1 => Ok(Answer::Refused(
            String::from_utf8_lossy(&bytes).trim().to_owned(),
        )),
        2 => Ok(Answer::Elsewhere(bytes)),
        other => Err(io::Error::other(format!("answer of kind {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(path: &Path, body: &str) {
        // By rename, as an upgrade does it.
        let temp = path.with_extension("new");
        lighter_testing::executable(&temp, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::rename(&temp, path).unwrap();
    }

    fn state(nurseries: &Nurseries, path: &Path) -> Option<&'static str> {
        Some(match nurseries.locked().get(path)?.1 {
            State::Starting => "starting",
            State::Ready(_) => "ready",
            State::Useless => "useless",
        })
    }

    #[tokio::test]
    async fn a_binary_without_the_action_is_tried_once_until_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (shim, log) = (dir.path().join("shim"), dir.path().join("log"));
        let body = format!("echo run >> {}; exit 1", log.display());
        script(&shim, &body);
        let nurseries = Nurseries::new(1);
        let runs = || {
            std::fs::read_to_string(&log)
                .unwrap_or_default()
                .lines()
                .count()
        };
        // Its end is noticed at the first question after it.
        for n in 0..500 {
            let asked = nurseries.ask(
                &shim,
                b"",
                Path::new("/b"),
                || Command::new(&shim),
                |_| None,
            );
            assert!(asked.await.is_none());
            if n >= 3 && state(&nurseries, &shim) == Some("useless") {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!((runs(), state(&nurseries, &shim)), (1, Some("useless")));
        script(&shim, &body);
        let asked = nurseries.ask(
            &shim,
            b"",
            Path::new("/b"),
            || Command::new(&shim),
            |_| None,
        );
        assert!(asked.await.is_none());
        assert_eq!(runs(), 2);
    }

    #[tokio::test]
    async fn a_nursery_ends_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let (shim, end) = (dir.path().join("shim"), dir.path().join("end"));
        // `cat` ends with its input.
        script(&shim, &format!("cat >/dev/null; touch {}", end.display()));
        let nurseries = Nurseries::new(1);
        nurseries.prepare(&shim, Command::new(&shim)).await;
        assert_eq!(state(&nurseries, &shim), Some("ready"));
        assert!(!end.exists());
        drop(nurseries);
        for _ in 0..1000 {
            if end.exists() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the nursery lives on");
    }

    #[test]
    fn no_nurseries_are_kept_when_none_are_wanted() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let asked = Nurseries::new(0);
        let none = runtime.block_on(asked.ask(
            Path::new("/bin/true"),
            b"",
            Path::new("/b"),
            || unreachable!("nothing is started"),
            |_| None,
        ));
        assert!(none.is_none());
    }
}
