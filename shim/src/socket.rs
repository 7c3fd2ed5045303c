//! The shim's socket: its address, and who may bind it.
//!
//! Every container of a group computes the same path from the daemon's address, the namespace and
//! the group, so a second `start` finds the first one's server by failing to bind.

use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, umask};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Directory of sockets for root, when the daemon names none.
const SOCKET_DIR: &str = "/run/containerd/s";
/// Longest socket directory; with the hash and the separator it still fits a socket address.
const MAX_DIR_BYTES: usize = 42;

/// Outcome of trying to become a group's server.
#[derive(Debug)]
pub(crate) enum Bound {
    /// We are.
    Server(UnixListener),
    /// Somebody serves there already.
    Existing,
}

/// Where the sockets are.
///
/// # Errors
/// `InvalidArgument` for a configured directory that is too long or relative.
pub(crate) fn directory(configured: Option<&str>) -> Result<PathBuf> {
    if let Some(dir) = configured.filter(|dir| !dir.is_empty()) {
        if dir.len() > MAX_DIR_BYTES || !dir.starts_with('/') {
            return Err(Error::InvalidArgument(format!(
                "socket_dir {dir:?}: must be absolute and at most {MAX_DIR_BYTES} bytes"
            )));
        }
        return Ok(PathBuf::from(dir));
    }
    let uid = rustix::process::geteuid().as_raw();
    if uid == 0 {
        return Ok(PathBuf::from(SOCKET_DIR));
    }
    if let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
        return Ok(PathBuf::from(dir).join("containerd/s"));
    }
    let run = PathBuf::from(format!("/run/{uid}"));
    if run.is_dir() {
        return Ok(run.join("containerd/s"));
    }
    Ok(PathBuf::from(format!("/tmp/containerd-s-{uid}")))
}

/// The socket of a group.
pub(crate) fn path(dir: &Path, address: &str, namespace: &str, group: &str) -> PathBuf {
    let name = Path::new(address).join(namespace).join(group);
    let hash = Sha256::digest(name.as_os_str().as_encoded_bytes());
    dir.join(hex::encode(hash))
}

/// Makes the directory of sockets, open to nobody else.
///
/// # Errors
/// `Io`.
pub(crate) fn make_directory(dir: &Path) -> Result<()> {
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir);
    made.map_err(Error::io("create socket directory", dir))
}

/// Binds the socket, or finds that it is served.
///
/// The directory is locked meanwhile: a socket that is bound and does not listen yet would look dead
/// to another `start` of the group.
///
/// # Errors
/// `Io`.
pub(crate) fn bind(path: &Path) -> Result<Bound> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let lock = std::fs::File::open(dir).map_err(Error::io("open", dir))?;
    lock.lock().map_err(Error::io("lock", dir))?;
    // The second attempt follows the removal of what a dead shim left.
    for _ in 0..2 {
        // Nobody can connect between the bind and a chmod: the mask makes it 0600 at once.
        let before = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(path);
        umask(before);
        match bound {
            Ok(listener) => return Ok(Bound::Server(listener)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if UnixStream::connect(path).is_ok() {
                    return Ok(Bound::Existing);
                }
                remove(path);
            }
            Err(error) => return Err(Error::io("bind", path)(error)),
        }
    }
    Err(Error::io("bind", path)(io::ErrorKind::AddrInUse.into()))
}

/// Removes a socket, and nothing that is none.
pub(crate) fn remove(path: &Path) {
    if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
        let _ = std::fs::remove_file(path);
    }
}

/// Removes a socket that nobody serves.
pub(crate) fn remove_dead(path: &Path) {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let Ok(lock) = std::fs::File::open(dir) else {
        return;
    };
    if lock.lock().is_err() {
        return;
    }
    if UnixStream::connect(path).is_err() {
        remove(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_is_taken_over_and_a_live_one_joined() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(dir.path(), "/run/x.sock", "ns", "id");
        let Bound::Server(first) = bind(&path).unwrap() else {
            panic!("nobody was there")
        };
        assert!(matches!(bind(&path).unwrap(), Bound::Existing));
        drop(first);
        assert!(matches!(bind(&path).unwrap(), Bound::Server(_)));
    }

    #[test]
    fn the_address_is_the_hash_of_the_names() {
        // sha256 of "/run/containerd/containerd.sock/default/x".
        let path = path(
            Path::new("/s"),
            "/run/containerd/containerd.sock",
            "default",
            "x",
        );
        let expected = hex::encode(Sha256::digest(b"/run/containerd/containerd.sock/default/x"));
        assert_eq!(path, Path::new("/s").join(expected));
    }
}
