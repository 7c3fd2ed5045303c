//! What is kept of a container between invocations: one directory per container.
//!
//! | entry | content |
//! |---|---|
//! | the directory | mode 0700; its `flock` is the container's lock |
//! | `state.json` | [`Record`] and what runc needs, replaced by rename; absent until the process exists |
//! | `exec.fifo` | init reads its process id (4 bytes) from it to start; absent once started |
//! | `start.err` | why init failed after the start; empty if it did not |

use std::fs;
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::error::{Context, Error, Result};
use crate::record::Record;

const STATE_FILE: &str = "state.json";
const START_FIFO: &str = "exec.fifo";
const FAILURE_FILE: &str = "start.err";

/// Bytes of a start failure that are read.
const MAX_FAILURE: usize = 8192;

/// Checks a container id.
///
/// # Errors
/// `Spec` if it is empty, too long or not made of letters, digits and `_+-.`.
pub(crate) fn check_id(id: &str) -> Result<()> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
    if id.is_empty() || id.len() > 1024 || !id.bytes().all(fine) || id == "." || id == ".." {
        return Err(Error::Spec(format!("invalid container ID format: {id:?}")));
    }
    Ok(())
}

/// A container's directory.
#[derive(Debug)]
pub(crate) struct Directory {
    pub(crate) path: PathBuf,
    fd: OwnedFd,
}

impl Directory {
    /// Makes the directory of a new container.
    pub(crate) fn make(root: &Path, id: &str) -> Result<Self> {
        let path = root.join(id);
        let mode = Mode::from_raw_mode(0o700);
        match rustix::fs::mkdir(&path, mode) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => return Err(Error::Exists { id: id.to_owned() }),
            Err(rustix::io::Errno::NOENT) => {
                fs::create_dir_all(root).context(|| format!("mkdir {}", root.display()))?;
                rustix::fs::chmod(root, mode).context(|| format!("chmod {}", root.display()))?;
                rustix::fs::mkdir(&path, mode).context(|| format!("mkdir {}", path.display()))?;
            }
            Err(error) => return Err(error).context(|| format!("mkdir {}", path.display())),
        }
        Self::open_path(path, id)
    }

    /// Opens the directory of an existing container.
    pub(crate) fn open(root: &Path, id: &str) -> Result<Self> {
        check_id(id)?;
        Self::open_path(root.join(id), id)
    }

    fn open_path(path: PathBuf, id: &str) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(fd) => Ok(Self { path, fd }),
            Err(rustix::io::Errno::NOENT) => Err(Error::NotFound { id: id.to_owned() }),
            Err(error) => Err(error).context(|| format!("open {}", path.display())),
        }
    }

    /// Waits for the container's lock; it is held until the directory is dropped or [`unlock`](Self::unlock)ed.
    pub(crate) fn lock(&self) -> Result<()> {
        rustix::fs::flock(&self.fd, FlockOperation::LockExclusive)
            .context(|| format!("lock {}", self.path.display()))
    }

    /// As [`lock`](Self::lock) without waiting; `false` if somebody else has it.
    pub(crate) fn try_lock(&self) -> Result<bool> {
        match rustix::fs::flock(&self.fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error).context(|| format!("lock {}", self.path.display())),
        }
    }

    pub(crate) fn unlock(&self) {
        rustix::fs::flock(&self.fd, FlockOperation::Unlock).ok();
    }

    pub(crate) fn read(&self, id: &str) -> Result<Record> {
        let path = self.path.join(STATE_FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::NotFound { id: id.to_owned() });
            }
            Err(error) => return Err(error).context(|| format!("read {}", path.display())),
        };
        let record: Record = serde_json::from_slice(&text)
            .map_err(|error| Error::State(format!("{}: {error}", path.display())))?;
        if record.version != Record::VERSION {
            return Err(Error::State(format!(
                "{} is of version {}, this runtime knows {}",
                path.display(),
                record.version,
                Record::VERSION
            )));
        }
        Ok(record)
    }

    /// Replaces the record. Not synced to disk: containers do not outlive a power cut either.
    pub(crate) fn write(&self, record: &Record) -> Result<()> {
        let text = record.text();
        let what = || format!("write {}", self.path.join(STATE_FILE).display());
        let temporary = self.path.join("state.new");
        let mut options = fs::File::options();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .context(what)?;
        file.write_all(&text).context(what)?;
        rustix::fs::rename(&temporary, self.path.join(STATE_FILE)).context(what)
    }

    /// Makes the fifo and opens it for init.
    pub(crate) fn make_start(&self) -> Result<OwnedFd> {
        let what = || format!("make {}", self.path.join(START_FIFO).display());
        rustix::fs::mknodat(
            &self.fd,
            START_FIFO,
            rustix::fs::FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .context(what)?;
        rustix::fs::openat(
            &self.fd,
            START_FIFO,
            OFlags::RDWR | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .context(what)
    }

    pub(crate) fn make_failure(&self) -> Result<fs::File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        rustix::fs::openat(&self.fd, FAILURE_FILE, flags, Mode::RUSR | Mode::WUSR)
            .context(|| format!("make {}", self.path.join(FAILURE_FILE).display()))
            .map(fs::File::from)
    }

    /// Why init failed after its start, if it did.
    pub(crate) fn failure(&self) -> Option<String> {
        let file = rustix::fs::openat(
            &self.fd,
            FAILURE_FILE,
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .ok()?;
        let mut text = vec![0; MAX_FAILURE];
        let length = rustix::io::read(&file, &mut text).ok()?;
        text.truncate(length);
        (!text.is_empty()).then(|| String::from_utf8_lossy(&text).into_owned())
    }

    pub(crate) fn has_record(&self) -> bool {
        rustix::fs::statat(&self.fd, STATE_FILE, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    pub(crate) fn waits_for_start(&self) -> bool {
        rustix::fs::statat(&self.fd, START_FIFO, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// The writing end towards init. `None` if nobody reads.
    pub(crate) fn open_start(&self) -> Result<Option<OwnedFd>> {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match rustix::fs::openat(self.fd.as_fd(), START_FIFO, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(fd)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(error) => {
                Err(error).context(|| format!("open {}", self.path.join(START_FIFO).display()))
            }
        }
    }

    pub(crate) fn remove_start(&self) {
        rustix::fs::unlinkat(&self.fd, START_FIFO, rustix::fs::AtFlags::empty()).ok();
    }

    /// Removes the directory with everything in it.
    pub(crate) fn remove(&self) -> Result<()> {
        for name in [STATE_FILE, START_FIFO, FAILURE_FILE] {
            rustix::fs::unlinkat(&self.fd, name, rustix::fs::AtFlags::empty()).ok();
        }
        match rustix::fs::rmdir(&self.path) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(_) => {
                fs::remove_dir_all(&self.path).context(|| format!("remove {}", self.path.display()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_cannot_be_paths() {
        for wrong in ["", ".", "..", "a/b", "a b", "ü", "a\n"] {
            assert!(check_id(wrong).is_err(), "{wrong:?}");
        }
        check_id("abc_1.2-3+x").unwrap();
    }
}
