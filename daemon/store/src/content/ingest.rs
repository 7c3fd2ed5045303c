//! A local ingest being written: file, running hash, commit.
//!
//! Hashing runs on a blocking thread beside the write of the same chunk and up to the next write,
//! and writeback is started every [`FLUSH_BYTES`], so that a commit waits for little.

use std::fs::{self, File, FileTimes, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use sha2::Digest as _;
use tokio::task::{JoinHandle, spawn_blocking};

use super::local::{Layout, io_error};
use super::locks::RefGuard;
use super::{Ingest, IngestStatus, digest_mismatch, size_mismatch};
use crate::digest::Algorithm;
use crate::{Digest, Error};

/// Bytes written between starts of writeback.
const FLUSH_BYTES: u64 = 8 << 20;
/// Chunks below this are hashed and written on one thread.
const SMALL_BYTES: usize = 64 << 10;

/// A running hash of any algorithm.
#[derive(Debug, Clone)]
pub(super) enum Hasher {
    Sha256(sha2::Sha256),
    Sha384(sha2::Sha384),
    Sha512(sha2::Sha512),
}

impl Hasher {
    pub(super) fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Sha256 => Self::Sha256(sha2::Sha256::new()),
            Algorithm::Sha384 => Self::Sha384(sha2::Sha384::new()),
            Algorithm::Sha512 => Self::Sha512(sha2::Sha512::new()),
        }
    }

    fn algorithm(&self) -> Algorithm {
        match self {
            Self::Sha256(_) => Algorithm::Sha256,
            Self::Sha384(_) => Algorithm::Sha384,
            Self::Sha512(_) => Algorithm::Sha512,
        }
    }

    pub(super) fn update(&mut self, data: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(data),
            Self::Sha384(hasher) => hasher.update(data),
            Self::Sha512(hasher) => hasher.update(data),
        }
    }

    fn digest(&self) -> Digest {
        match self.clone() {
            Self::Sha256(hasher) => Digest::from_raw(Algorithm::Sha256, &hasher.finalize()),
            Self::Sha384(hasher) => Digest::from_raw(Algorithm::Sha384, &hasher.finalize()),
            Self::Sha512(hasher) => Digest::from_raw(Algorithm::Sha512, &hasher.finalize()),
        }
    }
}

/// The hash of the bytes so far, or the thread that is at it.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one per open ingest")]
enum Hashing {
    Idle(Hasher),
    Busy(JoinHandle<Hasher>),
    /// A hash was lost with its future.
    Lost,
}

#[derive(Debug)]
pub(super) struct LocalIngest {
    layout: Arc<Layout>,
    directory: PathBuf,
    file: Arc<File>,
    hashing: Hashing,
    flush: Option<JoinHandle<()>>,
    unflushed_bytes: u64,
    status: IngestStatus,
    /// Held by the threads that write as well: the ref is free only when they are done.
    lock: Arc<RefGuard>,
}

impl LocalIngest {
    pub(super) fn new(
        layout: Arc<Layout>,
        directory: PathBuf,
        file: File,
        hasher: Hasher,
        status: IngestStatus,
        lock: RefGuard,
    ) -> Self {
        Self {
            layout,
            directory,
            file: Arc::new(file),
            hashing: Hashing::Idle(hasher),
            flush: None,
            unflushed_bytes: 0,
            status,
            lock: Arc::new(lock),
        }
    }

    async fn hasher(&mut self) -> Result<Hasher, Error> {
        if let Hashing::Busy(job) = &mut self.hashing {
            let done = job.await;
            self.hashing = done.map_or(Hashing::Lost, Hashing::Idle);
        }
        match std::mem::replace(&mut self.hashing, Hashing::Lost) {
            Hashing::Idle(hasher) => Ok(hasher),
            Hashing::Busy(_) | Hashing::Lost => Err(Error::Damaged {
                what: format!("running hash of ref {:?}", self.status.reference),
            }),
        }
    }

    fn failed(&self, operation: &'static str, source: io::Error) -> Error {
        io_error(operation, &self.directory.join("data"), source)
    }

    /// Starts writeback of what was written, unless one is under way.
    fn flush_behind(&mut self) {
        if self.unflushed_bytes < FLUSH_BYTES
            || self
                .flush
                .as_ref()
                .is_some_and(|flush| !flush.is_finished())
        {
            return;
        }
        self.unflushed_bytes = 0;
        let file = self.file.clone();
        self.flush = Some(spawn_blocking(move || {
            // Only a head start: the sync at commit reports errors.
            let _ = file.sync_data();
        }));
    }
}

#[async_trait]
impl Ingest for LocalIngest {
    fn status(&self) -> IngestStatus {
        self.status.clone()
    }

    async fn digest(&mut self) -> Result<Digest, Error> {
        let hasher = self.hasher().await?;
        let digest = hasher.digest();
        self.hashing = Hashing::Idle(hasher);
        Ok(digest)
    }

    async fn write(&mut self, data: Bytes) -> Result<(), Error> {
        if data.is_empty() {
            return Ok(());
        }
        let mut hasher = self.hasher().await?;
        let (file, lock, at) = (
            self.file.clone(),
            self.lock.clone(),
            self.status.offset_bytes,
        );
        let length = data.len();
        let written = if length < SMALL_BYTES {
            let job = spawn_blocking(move || {
                let _lock = lock;
                file.write_all_at(&data, at)?;
                hasher.update(&data);
                Ok(hasher)
            });
            let done = job.await.map_err(io::Error::other).flatten();
            done.map(|hasher| self.hashing = Hashing::Idle(hasher))
        } else {
            let hashed = data.clone();
            self.hashing = Hashing::Busy(spawn_blocking(move || {
                hasher.update(&hashed);
                hasher
            }));
            let job = spawn_blocking(move || {
                let _lock = lock;
                file.write_all_at(&data, at)
            });
            job.await.map_err(io::Error::other).flatten()
        };
        written.map_err(|source| self.failed("write", source))?;
        self.status.offset_bytes += length as u64;
        self.status.updated_at = SystemTime::now();
        self.unflushed_bytes += length as u64;
        self.flush_behind();
        Ok(())
    }

    async fn truncate(&mut self, size_bytes: u64) -> Result<(), Error> {
        if size_bytes != 0 {
            return Err(Error::Unimplemented {
                what: format!("truncation of an ingest to {size_bytes} bytes"),
            });
        }
        if self.status.offset_bytes == 0 {
            return Ok(());
        }
        let algorithm = self.hasher().await?.algorithm();
        self.file
            .set_len(0)
            .map_err(|source| self.failed("truncate", source))?;
        self.hashing = Hashing::Idle(Hasher::new(algorithm));
        self.status.offset_bytes = 0;
        self.status.updated_at = SystemTime::now();
        Ok(())
    }

    async fn commit(
        mut self: Box<Self>,
        size_bytes: u64,
        expected: Option<&Digest>,
    ) -> Result<Digest, Error> {
        let expected = expected.or(self.status.expected.as_ref()).cloned();
        if let Some(flush) = self.flush.take() {
            let _ = flush.await;
        }
        // The disk and the hash finish side by side.
        let file = self.file.clone();
        let synced = spawn_blocking(move || file.sync_all());
        let hasher = self.hasher().await?;
        let synced = synced.await.map_err(io::Error::other).flatten();
        synced.map_err(|source| self.failed("sync", source))?;
        let job = spawn_blocking(move || finish(*self, &hasher, size_bytes, expected.as_ref()));
        job.await.map_err(|error| Error::Io {
            operation: "commit",
            path: PathBuf::new(),
            source: io::Error::other(error),
        })?
    }
}

/// Who finds the ingest later, or the blob it became, sees the time that its writer was told: the
/// one that the filesystem keeps is that of its last tick.
impl Drop for LocalIngest {
    fn drop(&mut self) {
        let at = self.status.updated_at;
        let times = FileTimes::new().set_accessed(at).set_modified(at);
        if let Err(error) = self.file.set_times(times) {
            tracing::warn!(%error, reference = self.status.reference, "times of an ingest");
        }
    }
}

/// The part of a commit that follows the sync of the data. Holds the ref's lock to its end.
fn finish(
    mut ingest: LocalIngest,
    hasher: &Hasher,
    size_bytes: u64,
    expected: Option<&Digest>,
) -> Result<Digest, Error> {
    let data = ingest.directory.join("data");
    let actual_bytes = ingest
        .file
        .metadata()
        .map_err(|source| ingest.failed("stat", source))?
        .len();
    if size_bytes > 0 && size_bytes != actual_bytes {
        return Err(size_mismatch(actual_bytes, size_bytes));
    }
    if actual_bytes != ingest.status.offset_bytes {
        return Err(size_mismatch(actual_bytes, ingest.status.offset_bytes));
    }
    let digest = match expected {
        Some(expected) if expected.algorithm() != hasher.algorithm() => {
            let mut other = Hasher::new(expected.algorithm());
            hash_file(&ingest.file, &mut other).map_err(|source| ingest.failed("read", source))?;
            other.digest()
        }
        _ => hasher.digest(),
    };
    if let Some(expected) = expected
        && *expected != digest
    {
        return Err(digest_mismatch(&digest, expected));
    }
    let target = ingest.layout.blob(&digest);
    ingest.layout.make_algorithm_dir(digest.algorithm())?;
    // Of several commits of the same bytes one wins, however close they come.
    let placed = match renameat_with(CWD, &data, CWD, &target, RenameFlags::NOREPLACE) {
        // A filesystem that cannot say so: the bytes are the same anyway.
        Err(Errno::INVAL | Errno::NOSYS) if !target.exists() => fs::rename(&data, &target),
        Err(Errno::INVAL | Errno::NOSYS) => Err(Errno::EXIST.into()),
        other => other.map_err(Into::into),
    };
    match placed {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let _ = fs::remove_dir_all(&ingest.directory);
            return Err(super::blob_exists(&digest));
        }
        other => other.map_err(|source| io_error("commit", &target, source))?,
    }
    // From here on the blob is there, whatever else goes wrong.
    if let Some(parent) = target.parent()
        && let Err(error) = File::open(parent).and_then(|dir| dir.sync_all())
    {
        tracing::warn!(%error, %digest, "sync of the blob's directory");
    }
    ingest.status.updated_at = SystemTime::now();
    if let Err(error) = fs::remove_dir_all(&ingest.directory) {
        tracing::warn!(%error, %digest, "removal of a finished ingest");
    }
    let mode = ingest
        .file
        .metadata()
        .map_or(0o444, |m| m.permissions().mode() & 0o444);
    if let Err(error) = fs::set_permissions(&target, Permissions::from_mode(mode)) {
        tracing::warn!(%error, %digest, "mode of a blob");
    }
    let layout = ingest.layout.clone();
    drop(ingest);
    layout.protect(&target);
    Ok(digest)
}

/// Adds the whole file to a hash; returns its length.
pub(super) fn hash_file(file: &File, hasher: &mut Hasher) -> io::Result<u64> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        let read = file.read_at(&mut buffer, at)?;
        if read == 0 {
            return Ok(at);
        }
        hasher.update(&buffer[..read]);
        at += read as u64;
    }
}
