//! Network namespaces that outlive every process in them, pinned by a bind mount.
//!
//! | path | what |
//! |---|---|
//! | `<dir>/cni-<uuid>` | empty file, with the namespace mounted over it |
//!
//! A namespace whose file is missing, or no longer a namespace, is *closed*. Namespaces belong to
//! threads, so whatever enters one runs on a thread made for it, which then ends.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};
use rand::Rng;
use tokio::net::{TcpSocket, TcpStream};

use crate::sys::NamespaceHolder;

/// Where pods' network namespaces are pinned unless the state directory is asked for.
pub const DEFAULT_DIR: &str = "/var/run/netns";
/// Prefix of the file names made here; only such files are ever removed as leftovers.
const PREFIX: &str = "cni-";
/// `NSFS_MAGIC` of `linux/magic.h`: the filesystem of namespace files.
const NSFS_MAGIC: i64 = 0x6e73_6673;
/// Stacked mounts taken off one file before giving up on it.
const MAX_MOUNTS: usize = 64;

/// Why an operation on a network namespace failed.
#[derive(Debug, thiserror::Error)]
#[error("{operation} network namespace {}: {source}", path.display())]
pub struct Error {
    /// What was tried, as a verb.
    operation: &'static str,
    /// File of the namespace.
    path: PathBuf,
    /// What the system said.
    source: io::Error,
}

impl Error {
    fn new(operation: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self {
            operation,
            path: path.to_owned(),
            source: source.into(),
        }
    }
}

/// Makes a network namespace with its loopback interface up, pinned below `dir`, and returns its
/// file. With `userns`, the namespace is owned by that user namespace.
///
/// # Errors
/// When the directory, the namespace or the mount cannot be made; nothing is left behind then.
///
/// # Cancellation
/// A dropped future may leave the namespace; [`leftovers`] finds it.
pub async fn create(dir: &Path, userns: Option<OwnedFd>) -> Result<PathBuf, Error> {
    let path = new_path(dir);
    create_named(&path, userns).await?;
    Ok(path)
}

/// A path below `dir` for a namespace that is not made yet.
#[must_use]
pub fn new_path(dir: &Path) -> PathBuf {
    dir.join(random_name())
}

/// Makes a network namespace at exactly `path`, on the calling thread's behalf.
///
/// # Errors
/// As [`create`]. A file that exists already is an error.
pub async fn create_named(path: &Path, userns: Option<OwnedFd>) -> Result<(), Error> {
    let target = path.to_owned();
    on_thread("create", path, move || create_at(&target, userns)).await
}

/// Takes the mount off and deletes the file. A namespace that is gone already counts as removed; a
/// busy one disappears when its last user does.
///
/// # Errors
/// When the file can neither be unmounted nor deleted.
pub async fn remove(path: &Path) -> Result<(), Error> {
    let target = path.to_owned();
    on_thread("remove", path, move || remove_at(&target)).await
}

/// Whether nothing is pinned at `path` any more.
#[must_use]
pub fn is_closed(path: &Path) -> bool {
    match nix::sys::statfs::statfs(path) {
        Ok(stat) => stat.filesystem_type().0 != NSFS_MAGIC,
        Err(_) => true,
    }
}

/// The namespaces below `dir` that have names of ours.
///
/// # Errors
/// When `dir` exists but cannot be listed.
pub fn leftovers(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::new("list", dir, e)),
    };
    let ours = |name: &str| name.strip_prefix(PREFIX).is_some_and(|id| id.len() == 36);
    Ok(entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_str().is_some_and(ours))
        .map(|entry| entry.path())
        .collect())
}

/// Raises `lo` in the namespace at `path`.
///
/// # Errors
/// When the namespace cannot be entered or the kernel refuses.
pub async fn raise_loopback(path: &Path) -> Result<(), Error> {
    run_in(path, "raise loopback in", raise_loopback_here).await
}

/// Runs `work` on a thread of its own inside the namespace at `path`.
///
/// # Errors
/// When the namespace cannot be entered, or `work` fails.
pub async fn run_in<T: Send + 'static>(
    path: &Path,
    operation: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Error> {
    let target = path.to_owned();
    on_thread(operation, path, move || {
        let namespace = std::fs::File::open(&target)?;
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
        work()
    })
    .await
}

/// Connects to a port on `localhost` inside the namespace at `path`, over IPv4, then over IPv6.
///
/// # Errors
/// When the namespace cannot be entered; else the IPv4 failure, when neither family answers.
pub async fn connect_localhost(path: &Path, port: u16) -> Result<TcpStream, Error> {
    let sockets = run_in(path, "open sockets in", || {
        let open = |family| {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            socket(family, SockType::Stream, flags, SockProtocol::Tcp)
        };
        // A kernel without IPv6 still forwards over IPv4.
        Ok((open(AddressFamily::Inet)?, open(AddressFamily::Inet6).ok()))
    })
    .await?;
    let failed = |e| Error::new("connect to localhost in", path, e);
    let dial = |fd: OwnedFd, ip: std::net::IpAddr| {
        TcpSocket::from_std_stream(std::net::TcpStream::from(fd)).connect((ip, port).into())
    };
    let first = match dial(sockets.0, std::net::Ipv4Addr::LOCALHOST.into()).await {
        Ok(stream) => return Ok(stream),
        Err(e) => e,
    };
    if let Some(fd) = sockets.1
        && let Ok(stream) = dial(fd, std::net::Ipv6Addr::LOCALHOST.into()).await
    {
        return Ok(stream);
    }
    Err(failed(first))
}

/// Runs `work` on a fresh thread. Threads that changed namespace must not be reused.
async fn on_thread<T: Send + 'static>(
    operation: &'static str,
    path: &Path,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Error> {
    let (done, result) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("netns".to_owned())
        .stack_size(128 * 1024)
        .spawn(move || {
            // The caller may have given up; then nobody needs the result.
            let _ = done.send(work());
        })
        .map_err(|e| Error::new(operation, path, e))?;
    result
        .await
        .unwrap_or_else(|_| Err(io::Error::other("the worker thread died")))
        .map_err(|e| Error::new(operation, path, e))
}

fn random_name() -> String {
    let mut bytes: [u8; 16] = rand::rng().random();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let text = hex::encode(bytes);
    format!(
        "{PREFIX}{}-{}-{}-{}-{}",
        &text[..8],
        &text[8..12],
        &text[12..16],
        &text[16..20],
        &text[20..]
    )
}

fn create_at(path: &Path, userns: Option<OwnedFd>) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    std::fs::File::create_new(path)?;
    let made = match userns {
        None => unshare(CloneFlags::CLONE_NEWNET)
            .map_err(io::Error::from)
            .and_then(|()| pin("/proc/thread-self/ns/net", path))
            .and_then(|()| raise_loopback_here()),
        Some(userns) => NamespaceHolder::net_in_userns(userns.as_fd())
            .and_then(|holder| pin(&holder.net_path(), path))
            .and_then(|()| {
                setns(std::fs::File::open(path)?.as_fd(), CloneFlags::CLONE_NEWNET)?;
                raise_loopback_here()
            }),
    };
    if made.is_err()
        && let Err(error) = remove_at(path)
    {
        tracing::warn!(path = %path.display(), %error, "half-made network namespace stays");
    }
    made
}

fn pin(source: &str, target: &Path) -> io::Result<()> {
    let none = None::<&str>;
    Ok(mount(Some(source), target, none, MsFlags::MS_BIND, none)?)
}

fn remove_at(path: &Path) -> io::Result<()> {
    for _ in 0..MAX_MOUNTS {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point (any more), or no such file.
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            Err(e) => return Err(e.into()),
        }
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Sets `IFF_UP` on interface 1, which is `lo` in every network namespace, by one netlink request.
fn raise_loopback_here() -> io::Result<()> {
    const LOOPBACK_INDEX: i32 = 1;
    let up = u32::try_from(libc::IFF_UP).expect("IFF_UP is a small positive flag");
    let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_ACK).expect("flags are 16 bits");
    // struct nlmsghdr (16 bytes) and struct ifinfomsg (16 bytes), in host byte order.
    let mut message = Vec::with_capacity(32);
    message.extend_from_slice(&32_u32.to_ne_bytes());
    message.extend_from_slice(&libc::RTM_NEWLINK.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&1_u32.to_ne_bytes());
    message.extend_from_slice(&0_u32.to_ne_bytes());
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&LOOPBACK_INDEX.to_ne_bytes());
    message.extend_from_slice(&up.to_ne_bytes());
    message.extend_from_slice(&up.to_ne_bytes());
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&netlink);
    bind(fd, &NetlinkAddr::new(0, 0))?;
    send(fd, &message, MsgFlags::empty())?;
    let mut answer = [0_u8; 256];
    let length = recv(fd, &mut answer, MsgFlags::empty())?;
    // struct nlmsgerr follows the header: a negated errno, 0 for an acknowledgement.
    let code = answer
        .get(16..20)
        .filter(|_| length >= 20)
        .and_then(|b| b.try_into().ok())
        .map(i32::from_ne_bytes)
        .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
    match code {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(-errno)),
    }
}

#[cfg(test)]
mod tests;
