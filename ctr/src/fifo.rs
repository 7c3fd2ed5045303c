//! The named pipes that carry a process's standard streams.
//!
//! We make them, the shim opens the other ends. Reading ends are opened at once and without
//! blocking; end of file counts only after a writer has been there, so it does not matter when the
//! shim opens its ends. The writing end of stdin is opened for reading as well, for the same reason:
//! without a reader the kernel would refuse it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::net::unix::pipe;

/// Where root's fifos live, as upstream has them.
const ROOT_DIR: &str = "/run/containerd/fifo";

/// Paths of one process's streams, as they go into a request. Empty = none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Paths {
    /// What the process reads.
    pub(crate) stdin: String,
    /// What it writes; with a terminal, everything.
    pub(crate) stdout: String,
    /// What it writes to its error stream; empty with a terminal.
    pub(crate) stderr: String,
}

/// Fifos that we made. Removed on drop, unless kept.
#[derive(Debug)]
pub(crate) struct Fifos {
    dir: PathBuf,
    paths: Paths,
    keep: bool,
}

impl Fifos {
    /// Makes the fifos of process `id` in a new directory below `base` (or the usual place).
    pub(crate) fn create(base: Option<&Path>, id: &str, terminal: bool) -> anyhow::Result<Self> {
        let base = base.map_or_else(default_base, Path::to_path_buf);
        let wrap = || {
            format!(
                "cannot make fifos in {}: choose a directory with --fifo-dir",
                base.display()
            )
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&base)
            .with_context(wrap)?;
        let dir = base.join(format!("{:016x}", rand::random::<u64>()));
        DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .with_context(wrap)?;
        let mut fifos = Self {
            dir,
            paths: Paths::default(),
            keep: false,
        };
        fifos.paths.stdin = fifos.make(id, "stdin").with_context(wrap)?;
        fifos.paths.stdout = fifos.make(id, "stdout").with_context(wrap)?;
        if !terminal {
            fifos.paths.stderr = fifos.make(id, "stderr").with_context(wrap)?;
        }
        Ok(fifos)
    }

    fn make(&self, id: &str, stream: &str) -> anyhow::Result<String> {
        let path = self.dir.join(format!("{id}-{stream}"));
        mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0)?;
        path.into_os_string().into_string().map_err(|path| {
            anyhow::anyhow!("{} is not UTF-8, which a request must be", path.display())
        })
    }

    /// The paths to put in a request.
    pub(crate) fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Leaves the fifos for whoever attaches later.
    pub(crate) fn keep(mut self) {
        self.keep = true;
    }
}

impl Drop for Fifos {
    fn drop(&mut self) {
        if !self.keep {
            // Nothing to tell anyone: a leftover fifo is harmless and lies on a tmpfs.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// Removes the fifos of a process that is gone, which a detached run left for others. Only fifos,
/// and only in a directory that was made for them.
pub(crate) fn discard(paths: &Paths) {
    for path in [&paths.stdin, &paths.stdout, &paths.stderr].map(Path::new) {
        let Some(dir) = path.parent() else { continue };
        let ours = dir.parent().is_some_and(|base| base == default_base());
        let is_fifo = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_fifo());
        if ours && is_fifo {
            // A leftover is harmless; the directory goes with its last fifo.
            let _ = fs::remove_file(path);
            let _ = fs::remove_dir(dir);
        }
    }
}

/// `/run/containerd/fifo` for root, else the temporary directory.
fn default_base() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        PathBuf::from(ROOT_DIR)
    } else {
        std::env::temp_dir().join("containerd-fifo")
    }
}

/// Our ends of the streams.
#[derive(Debug)]
pub(crate) struct Ends {
    /// Where our input goes.
    pub(crate) stdin: Option<pipe::Sender>,
    /// Where its output comes from.
    pub(crate) stdout: Option<pipe::Receiver>,
    /// Where its error output comes from.
    pub(crate) stderr: Option<pipe::Receiver>,
}

impl Ends {
    /// Opens our ends. Never blocks, whoever has the other ends open.
    pub(crate) fn open(paths: &Paths) -> anyhow::Result<Self> {
        let receiver = |path: &str| -> anyhow::Result<Option<pipe::Receiver>> {
            if path.is_empty() {
                return Ok(None);
            }
            let opened = pipe::OpenOptions::new().open_receiver(path);
            Ok(Some(opened.with_context(|| {
                format!("cannot open the output fifo {path}")
            })?))
        };
        let stdin = if paths.stdin.is_empty() {
            None
        } else {
            let opened = pipe::OpenOptions::new()
                .read_write(true)
                .open_sender(&paths.stdin);
            Some(opened.with_context(|| format!("cannot open the input fifo {}", paths.stdin))?)
        };
        Ok(Self {
            stdin,
            stdout: receiver(&paths.stdout)?,
            stderr: receiver(&paths.stderr)?,
        })
    }
}

/// Reads what is there; 0 at the end, which can only come after a writer has been there.
///
/// # Cancellation
/// Safe: no byte is taken before the future is ready.
pub(crate) async fn read(pipe: &pipe::Receiver, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        pipe.readable().await?;
        match pipe.try_read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
    }
}

/// Writes all of it.
pub(crate) async fn write_all(pipe: &pipe::Sender, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        pipe.writable().await?;
        match pipe.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn end_of_file_waits_for_the_first_writer() {
        let base = tempfile::tempdir().unwrap();
        let fifos = Fifos::create(Some(base.path()), "c", false).unwrap();
        let ends = Ends::open(fifos.paths()).unwrap();
        let stdout = ends.stdout.unwrap();
        let mut buffer = [0; 16];
        let early = tokio::time::timeout(Duration::from_millis(20), read(&stdout, &mut buffer));
        assert!(
            early.await.is_err(),
            "no writer yet: neither bytes nor an end"
        );
        let mut shim = fs::OpenOptions::new()
            .write(true)
            .open(&fifos.paths().stdout)
            .unwrap();
        shim.write_all(b"hello").unwrap();
        assert_eq!(read(&stdout, &mut buffer).await.unwrap(), 5);
        drop(shim);
        assert_eq!(read(&stdout, &mut buffer).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn input_written_before_the_reader_came_is_kept() {
        let base = tempfile::tempdir().unwrap();
        let fifos = Fifos::create(Some(base.path()), "c", true).unwrap();
        assert_eq!(fifos.paths().stderr, "");
        let stdin = Ends::open(fifos.paths()).unwrap().stdin.unwrap();
        write_all(&stdin, b"early").await.unwrap();
        let shim = pipe::OpenOptions::new()
            .open_receiver(&fifos.paths().stdin)
            .unwrap();
        let mut buffer = [0; 16];
        assert_eq!(read(&shim, &mut buffer).await.unwrap(), 5);
        drop(stdin);
        assert_eq!(read(&shim, &mut buffer).await.unwrap(), 0);
    }

    #[test]
    fn the_directory_goes_with_the_fifos_unless_kept() {
        let base = tempfile::tempdir().unwrap();
        drop(Fifos::create(Some(base.path()), "c", false).unwrap());
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
        Fifos::create(Some(base.path()), "c", false).unwrap().keep();
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 1);
    }
}
