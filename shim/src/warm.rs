//! `warm`: shims that were started before anybody needed one.
//!
//! Only a daemon of ours asks for it, with a SEQPACKET socket as standard input. This process, the
//! *nursery*, keeps a few forked children ready; each waits on the same socket, so that the kernel
//! gives every frame to exactly one of them. One frame is one server:
//!
//! ```text
//! u32 params | params bytes | bundle path bytes        with one stream socket (the line) beside it
//! ```
//!
//! Numbers are big-endian, the parameters a `BootstrapParams`. The child enters the bundle, binds the
//! group's socket and answers on the line `u32 length | u8 status | bytes`, where the length counts
//! the status and the bytes:
//!
//! | status | bytes | then |
//! |---|---|---|
//! | 0 | a `BootstrapResult` | the line is the server's first connection |
//! | 1 | an error text | the child ends |
//! | 2 | a `BootstrapResult` of the server that the group has already | the child ends |
//!
//! Nothing about a container is read before its frame arrives, so what is ready serves anybody. What
//! every container needs is made before: a child holds an empty network namespace, the most expensive
//! part of a clone, which only its own first container enters, or nobody. An
//! idle child keeps the writing end of a pipe; when that closes it was taken (or died) and the
//! nursery forks another, a moment later, to leave the processors to the start under way. When
//! nobody is ready and a frame is waiting it forks at once.
//!
//! End of file on that socket ends the nursery and every idle child: they die with their daemon,
//! servers do not. A daemon whose shim was upgraded closes the socket and starts a new nursery.
//! Servers are reaped by the nursery without being waited for, and by init after its end.

use std::io::{IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lighter_oci::cgroup::Host;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::args::Flags;
use crate::bootstrap::{self, Request};
use crate::error::{Error, Result};
use crate::serve::{self, Serving};
use crate::socket::{self, Bound};
use crate::start::{detach_from_daemon, join_shim_cgroup, place, url};
use crate::sys::{self, Fork, Title};

/// Largest frame.
const MAX_FRAME_BYTES: usize = 64 << 10;
/// Most children that are kept ready.
const MAX_READY: usize = 64;
/// How long after a child was taken the next one is forked.
const REFILL_AFTER: Duration = Duration::from_millis(10);
/// Heap and stack, in bytes, that the start of a container writes to.
const HEAP_BYTES: usize = 128 << 10;
const STACK_BYTES: usize = 56 << 10;
/// Taken from the heap at a time, below what the allocator maps apart.
const BLOCK_BYTES: usize = 32 << 10;
/// Pause after a fork that failed.
const FORK_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// What a child says on its line.
#[derive(Debug, Clone, Copy)]
enum Status {
    Served = 0,
    Failed = 1,
    Elsewhere = 2,
}

/// One server to become.
struct Order {
    request: Request,
    bundle: PathBuf,
    line: UnixStream,
}

/// Keeps children ready until the daemon is gone; comes back in every child that served, once it has
/// ended.
///
/// # Errors
/// When standard input is no such socket.
pub(crate) fn run(flags: &Flags) -> Result<()> {
    let daemon = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3)
        .map_err(Error::system("take over standard input"))?;
    if rustix::net::sockopt::socket_type(&daemon) != Ok(rustix::net::SocketType::SEQPACKET) {
        return Err(Error::InvalidArgument(
            "warm: standard input is no SEQPACKET socket".to_owned(),
        ));
    }
    // Nobody else may keep the socket open.
    detach_from_daemon(false);
    let ready = flags.ready.parse::<usize>().unwrap_or(1);
    let ready = ready.clamp(1, MAX_READY);
    // Away from the daemon's terminal and process group: its signals are none of ours.
    let _ = rustix::process::setsid();
    sys::tune_allocator();
    let title = Title::find();
    // Looked at once for every child.
    let host = Host::detect().ok();
    lighter_oci::look_ahead();
    sys::reap_children_unseen();
    let mut idle: Vec<OwnedFd> = Vec::with_capacity(ready);
    let mut wanted = ready;
    loop {
        while idle.len() < wanted {
            match breed() {
                Ok(Bred::Child(token)) => {
                    drop(idle);
                    return wait(daemon, token, title.as_ref(), host);
                }
                Ok(Bred::Parent(token)) => idle.push(token),
                Err(_) => {
                    std::thread::sleep(FORK_AGAIN_AFTER);
                    break;
                }
            }
        }
        if !watch(&daemon, &mut idle, &mut wanted, ready)? {
            return Ok(());
        }
    }
}

enum Bred {
    Child(OwnedFd),
    Parent(OwnedFd),
}

fn breed() -> std::io::Result<Bred> {
    let (watched, token) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    Ok(match sys::fork()? {
        Fork::Child => Bred::Child(token),
        Fork::Parent(_) => Bred::Parent(watched),
    })
}

/// Waits until another child is wanted; `false` when the daemon is gone.
fn watch(
    daemon: &OwnedFd,
    idle: &mut Vec<OwnedFd>,
    wanted: &mut usize,
    ready: usize,
) -> Result<bool> {
    let what = || Error::system("wait for the daemon");
    // A frame is looked for only when no child takes it; the daemon's end always shows.
    let frames = if idle.is_empty() {
        PollFlags::IN
    } else {
        PollFlags::empty()
    };
    let mut polled = vec![PollFd::new(daemon, frames)];
    polled.extend(idle.iter().map(|token| PollFd::new(token, PollFlags::IN)));
    let limit = (idle.len() < ready).then_some(Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(REFILL_AFTER.subsec_nanos()),
    });
    let found = match rustix::event::poll(&mut polled, limit.as_ref()) {
        Err(rustix::io::Errno::INTR) => return Ok(true),
        other => other.map_err(what())?,
    };
    let over = PollFlags::HUP | PollFlags::ERR;
    if polled[0].revents().intersects(over) {
        return Ok(false);
    }
    let urgent = polled[0].revents().contains(PollFlags::IN);
    let taken: Vec<bool> = polled[1..]
        .iter()
        .map(|token| !token.revents().is_empty())
        .collect();
    drop(polled);
    let mut taken = taken.into_iter();
    idle.retain(|_| !taken.next().unwrap_or(false));
    *wanted = if found == 0 {
        ready
    } else {
        // One for the frame that waits; the others when it is quiet again.
        idle.len() + usize::from(urgent)
    };
    Ok(true)
}

/// The life of a child: waits for a frame, then serves.
fn wait(daemon: OwnedFd, token: OwnedFd, title: Option<&Title>, host: Option<Host>) -> Result<()> {
    sys::reap_children_ourselves();
    let _ = rustix::process::setsid();
    crate::start::adjust_oom_score();
    // Its first container enters it, if it is to have one of its own.
    let network =
        lighter_oci::spare_network().map_err(|error| Error::Runtime(error.to_string()))?;
    let event_loop = serve::event_loop()?;
    touch_memory();
    let order = receive(&daemon)?;
    drop(daemon);
    drop(token);
    let Some(order) = order else {
        return Ok(());
    };
    let Order {
        request,
        bundle,
        mut line,
    } = order;
    if let Some(title) = title {
        title.set(&[
            "-namespace",
            &request.namespace,
            "-address",
            &request.address,
            "-id",
            &request.id,
            "start",
        ]);
    }
    detach_from_daemon(true);
    join_shim_cgroup(&request);
    match take_on(&request, &bundle) {
        Ok(Taken::Serve(address, mut serving)) => {
            reply(&mut line, Status::Served, &bootstrap::result(&address))?;
            serving.first = Some(line);
            serving.network = network;
            // A shim in a cgroup of its own sees other paths.
            serving.host = host.filter(|_| request.options.shim_cgroup.is_empty());
            serve::run(*serving, &event_loop);
            Ok(())
        }
        Ok(Taken::Elsewhere(address)) => {
            reply(&mut line, Status::Elsewhere, &bootstrap::result(&address))
        }
        Err(error) => {
            let text = lighter_proto::errdefs::render(&error);
            reply(&mut line, Status::Failed, text.as_bytes())
        }
    }
}

/// Takes the page faults of a container's start before anybody waits for them.
fn touch_memory() {
    let heap: Vec<Vec<u8>> = (0..HEAP_BYTES / BLOCK_BYTES)
        .map(|_| vec![1; BLOCK_BYTES])
        .collect();
    std::hint::black_box(&heap);
    let mut stack = [1_u8; STACK_BYTES];
    std::hint::black_box(&mut stack);
}

enum Taken {
    Serve(String, Box<Serving>),
    Elsewhere(String),
}

fn take_on(request: &Request, bundle: &Path) -> Result<Taken> {
    std::env::set_current_dir(bundle).map_err(Error::io("enter", bundle))?;
    let (path, dir) = place(request, bundle)?;
    socket::make_directory(&dir)?;
    let address = url(&path);
    let bound = socket::bind(&path)?;
    Ok(match bound {
        Bound::Existing => Taken::Elsewhere(address),
        Bound::Server(listener) => Taken::Serve(
            address,
            Box::new(Serving {
                request: request.clone(),
                bundle: bundle.to_owned(),
                listener,
                first: None,
                host: None,
                network: None,
                socket: path,
                socket_dir: dir,
            }),
        ),
    })
}

/// Takes one frame; `None` when the daemon is gone.
fn receive(daemon: &OwnedFd) -> Result<Option<Order>> {
    let mut frame = vec![0; MAX_FRAME_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut frame)];
        match rustix::net::recvmsg(daemon, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other.map_err(Error::system("hear from the daemon"))?.bytes,
        }
    };
    if received == 0 {
        return Ok(None);
    }
    frame.truncate(received);
    let line = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let line = line.ok_or_else(|| Error::InvalidArgument("warm: frame without a line".into()))?;
    let (request, bundle) = parse(&frame)?;
    Ok(Some(Order {
        request,
        bundle,
        line: UnixStream::from(line),
    }))
}

fn parse(frame: &[u8]) -> Result<(Request, PathBuf)> {
    let invalid = |what: &str| Error::InvalidArgument(format!("warm: {what}"));
    let (length, rest) = frame
        .split_first_chunk::<4>()
        .ok_or_else(|| invalid("frame without a length"))?;
    let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
    if length > rest.len() {
        return Err(invalid("parameters are longer than the frame"));
    }
    let (params, bundle) = rest.split_at(length);
    let bundle = std::str::from_utf8(bundle)
        .ok()
        .filter(|path| path.starts_with('/'))
        .ok_or_else(|| invalid("the bundle is no absolute path"))?;
    Ok((bootstrap::from_message(params)?, PathBuf::from(bundle)))
}

fn reply(line: &mut UnixStream, status: Status, bytes: &[u8]) -> Result<()> {
    let length = u32::try_from(bytes.len() + 1).unwrap_or(u32::MAX);
    let mut frame = length.to_be_bytes().to_vec();
    frame.push(status as u8);
    frame.extend_from_slice(bytes);
    line.write_all(&frame)
        .map_err(Error::system("answer the daemon"))
}

#[cfg(test)]
mod tests {
    use lighter_proto::containerd::runtime::bootstrap::v1::BootstrapParams;
    use prost::Message as _;

    use super::*;

    fn frame(params: &[u8], bundle: &str) -> Vec<u8> {
        let mut frame = u32::try_from(params.len()).unwrap().to_be_bytes().to_vec();
        frame.extend_from_slice(params);
        frame.extend_from_slice(bundle.as_bytes());
        frame
    }

    #[test]
    fn a_frame_names_a_container_and_its_bundle() {
        let params = BootstrapParams {
            instance_id: "c".into(),
            namespace: "n".into(),
            ..BootstrapParams::default()
        }
        .encode_to_vec();
        let (request, bundle) = parse(&frame(&params, "/run/b")).unwrap();
        assert_eq!(
            (request.id.as_str(), bundle),
            ("c", PathBuf::from("/run/b"))
        );
        assert!(parse(&frame(&params, "b")).is_err());
        assert!(parse(&frame(b"\xff", "/run/b")).is_err());
        assert!(parse(&[0, 0, 1]).is_err());
        assert!(parse(&[0xff; 64]).is_err());
    }
}
