//! Sockets: bound before anything is served, owned by whom the configuration names.

use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, UnixListener, UnixStream};

use crate::config::Socket;

/// Longest path of a Unix socket, in bytes.
const MAX_PATH_BYTES: usize = 106;
/// Mode of the client sockets.
const MODE: u32 = 0o660;
/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// Why a socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Its path is too long for a socket.
    #[error("socket path {} is longer than {MAX_PATH_BYTES} bytes; choose a shorter one", .0.display())]
    TooLong(PathBuf),
    /// Somebody serves on it.
    #[error("{} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// The system refused.
    #[error("{operation} {address}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which address.
        address: String,
        /// Why it failed.
        source: io::Error,
    },
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let address = path.display().to_string();
    move |source| Error::Io {
        operation,
        address,
        source,
    }
}

/// Binds a Unix socket. A file left by a dead process is replaced, one that is served is not.
///
/// # Errors
/// [`Error::InUse`], [`Error::TooLong`], or what the system says.
pub(crate) async fn unix(socket: &Socket) -> Result<UnixListener, Error> {
    let path = &socket.address;
    if path.as_os_str().len() > MAX_PATH_BYTES {
        return Err(Error::TooLong(path.clone()));
    }
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(failed("create", dir))?;
    }
    if path.exists() {
        if UnixStream::connect(path).await.is_ok() {
            return Err(Error::InUse(path.clone()));
        }
        std::fs::remove_file(path).map_err(failed("remove", path))?;
    }
    // Bound under the umask of the process: nobody connects before the mode is set below, because
    // nothing is accepted before that either.
    let bound = socket2_listener(path).map_err(failed("listen on", path))?;
    let listener = UnixListener::from_std(bound).map_err(failed("listen on", path))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(MODE))
        .map_err(failed("set the mode of", path))?;
    chown(path, Some(socket.uid), Some(socket.gid)).map_err(failed("set the owner of", path))?;
    Ok(listener)
}

/// A non-blocking listener with a backlog that a burst of clients fits in.
fn socket2_listener(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
    };
    let fd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &UnixAddr::new(path)?)?;
    listen(
        &fd,
        Backlog::new(BACKLOG.cast_signed()).unwrap_or(Backlog::MAXCONN),
    )?;
    Ok(fd.into())
}

/// Binds a TCP port.
///
/// # Errors
/// What the system says.
pub(crate) async fn tcp(address: &str) -> Result<TcpListener, Error> {
    TcpListener::bind(address)
        .await
        .map_err(|source| Error::Io {
            operation: "listen on",
            address: address.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let socket = Socket {
            address: dir.path().join("sub/a.sock"),
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
        };
        let first = unix(&socket).await.unwrap();
        assert!(matches!(unix(&socket).await, Err(Error::InUse(_))));
        drop(first);
        let _second = unix(&socket).await.unwrap();
        let mode = std::fs::metadata(&socket.address)
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, MODE);
    }
}
