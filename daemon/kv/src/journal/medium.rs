//! What a segment lies on: a file, or in the tests something that fails like a disk.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Bytes of zeros written at a time when a segment is laid.
const ZEROS: usize = 1 << 20;

/// Where the bytes of a segment are.
pub(crate) trait Medium: Send + Sync + std::fmt::Debug {
    /// All of them.
    fn read(&self) -> io::Result<Vec<u8>>;
    /// Writes; durable after a later `sync`. Longer than the medium makes it longer.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes all writes durable.
    fn sync(&self) -> io::Result<()>;
    /// Cuts off what is behind `length`.
    fn cut(&self, length: u64) -> io::Result<()>;
}

/// A segment in a file.
#[derive(Debug)]
pub(crate) struct OnDisk(File);

impl OnDisk {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        Ok(Self(file))
    }

    /// Makes a segment of zeros. They are written out and synced, and the name is given at the end:
    /// a segment that is there is whole, and syncing a write to it changes neither its size nor
    /// where its blocks are.
    pub(crate) fn lay(path: &Path, bytes: u64) -> io::Result<()> {
        let temporary = path.with_extension("tmp");
        let laid = File::create(&temporary).and_then(|mut file| {
            let zeros = vec![0; ZEROS];
            let mut left = bytes;
            while left > 0 {
                let part = usize::try_from(left).unwrap_or(ZEROS).min(ZEROS);
                file.write_all(&zeros[..part])?;
                left -= part as u64;
            }
            file.sync_all()?;
            fs::rename(&temporary, path)
        });
        if laid.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        laid
    }
}

impl Medium for OnDisk {
    fn read(&self) -> io::Result<Vec<u8>> {
        let length = usize::try_from(self.0.metadata()?.len()).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        self.0.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn cut(&self, length: u64) -> io::Result<()> {
        if self.0.metadata()?.len() > length {
            self.0.set_len(length)?;
        }
        Ok(())
    }
}
