//! A blob open for reading.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use rustix::io::ReadWriteFlags;

use crate::Error;

/// A blob open for reading; clones share the descriptor.
#[derive(Debug, Clone)]
pub struct BlobReader {
    source: Source,
    size_bytes: u64,
}

#[derive(Debug, Clone)]
enum Source {
    File(Arc<File>, Arc<PathBuf>),
    Remote(Arc<dyn ReadAt>),
}

/// Reading from a blob in another process.
#[async_trait]
pub(crate) trait ReadAt: Send + Sync + std::fmt::Debug {
    /// Exactly `length` bytes from `offset`; the caller stays inside the blob.
    async fn read_at(&self, offset: u64, length: usize) -> Result<Bytes, Error>;
}

impl BlobReader {
    pub(super) fn of_file(file: File, path: PathBuf, size_bytes: u64) -> Self {
        Self {
            source: Source::File(Arc::new(file), Arc::new(path)),
            size_bytes,
        }
    }

    pub(crate) fn of_remote(remote: Arc<dyn ReadAt>, size_bytes: u64) -> Self {
        Self {
            source: Source::Remote(remote),
            size_bytes,
        }
    }

    /// Bytes of the blob.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Up to `length` bytes from `offset`; empty at the end.
    ///
    /// # Errors
    /// `Io`; `DataLoss` when the file is shorter than it was.
    pub async fn read_at(&self, offset: u64, length: usize) -> Result<Bytes, Error> {
        let left = self.size_bytes.saturating_sub(offset);
        let length = usize::try_from(left).map_or(length, |left| left.min(length));
        if length == 0 {
            return Ok(Bytes::new());
        }
        match &self.source {
            Source::Remote(remote) => remote.read_at(offset, length).await,
            Source::File(file, path) => {
                let (file, path) = (file.clone(), path.clone());
                let read = move || read_exact(&file, offset, length);
                let read = tokio::task::spawn_blocking(read).await;
                read.map_err(io::Error::other)
                    .and_then(|read| read)
                    .map_err(|source| match source.kind() {
                        io::ErrorKind::UnexpectedEof => Error::Damaged {
                            what: format!("blob {}", path.display()),
                        },
                        _ => Error::Io {
                            operation: "read",
                            path: path.to_path_buf(),
                            source,
                        },
                    })
            }
        }
    }

    /// Fills `buffer` from `offset`, inside the blob, if that takes no waiting for a disk. False when
    /// it may: the buffer then holds nothing of use.
    pub fn read_cached(&self, offset: u64, buffer: &mut [u8]) -> bool {
        let Source::File(file, _) = &self.source else {
            return false;
        };
        let mut done = 0;
        while done < buffer.len() {
            let slices = &mut [io::IoSliceMut::new(&mut buffer[done..])];
            let at = offset + done as u64;
            match rustix::io::preadv2(file, slices, at, ReadWriteFlags::NOWAIT) {
                Ok(0) | Err(_) => return false,
                Ok(count) => done += count,
            }
        }
        true
    }

    /// A blocking reader of the whole, for code on a blocking thread.
    ///
    /// # Errors
    /// `Unimplemented` where the blob is in another process.
    pub fn into_std(self) -> Result<Box<dyn Read + Send>, Error> {
        match self.source {
            Source::File(file, _) => Ok(Box::new(Sequential { file, at: 0 })),
            Source::Remote(_) => Err(Error::Unimplemented {
                what: "blocking reads of a remote blob".to_owned(),
            }),
        }
    }
}

/// Reads without clearing the buffer first.
fn read_exact(file: &File, offset: u64, length: usize) -> io::Result<Bytes> {
    let mut buffer = Vec::with_capacity(length);
    while buffer.len() < length {
        let at = offset + buffer.len() as u64;
        match rustix::io::pread(file, rustix::buffer::spare_capacity(&mut buffer), at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    buffer.truncate(length);
    Ok(Bytes::from(buffer))
}

/// Its own position over a shared descriptor.
struct Sequential {
    file: Arc<File>,
    at: u64,
}

impl Read for Sequential {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = rustix::io::pread(&*self.file, buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}
