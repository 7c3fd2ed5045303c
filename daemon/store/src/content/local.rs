//! Blobs and ingests in a directory, laid out as containerd lays out its own.
//!
//! ```text
//! blobs/<algorithm>/<hex>       a blob, not writable
//! ingest/<sha256 of ref>/       an ingest
//!     ref                       the ref, verbatim
//!     data                      bytes so far
//!     startedat, updatedat      RFC 3339; the data's mtime wins when it is later
//!     total                     decimal, when known
//! ```
//!
//! The small files of an ingest are replaced atomically but not synced: an ingest that a power cut
//! left unreadable is begun anew.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use async_trait::async_trait;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::task::spawn_blocking;

use super::ingest::{Hasher, LocalIngest, hash_file};
use super::locks::{RefGuard, RefLocks};
use super::{
    BlobReader, Ingest, IngestStatus, Open, Store, Stored, blob_exists, blob_not_found,
    ingest_not_found,
};
use crate::digest::Algorithm;
use crate::{Digest, Error};

/// Longest small file of an ingest that is read, in bytes.
const SMALL_FILE_BYTES: u64 = 64 << 10;

/// The content store in a directory of this machine.
#[derive(Debug, Clone)]
pub struct Local {
    layout: Arc<Layout>,
    locks: RefLocks,
    opened: SystemTime,
}

/// Where things are below the root.
#[derive(Debug)]
pub(super) struct Layout {
    root: PathBuf,
    /// Cleared once the filesystem said that it has no fs-verity.
    verity: AtomicBool,
}

impl Layout {
    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        let mut path = self.root.join("blobs");
        path.push(digest.algorithm().as_str());
        path.push(digest.hex());
        path
    }

    fn ingest(&self, reference: &str) -> PathBuf {
        let mut path = self.root.join("ingest");
        path.push(Digest::of(reference.as_bytes()).hex());
        path
    }

    /// Makes the directory of an algorithm's blobs, durably.
    pub(super) fn make_algorithm_dir(&self, algorithm: Algorithm) -> Result<(), Error> {
        let blobs = self.root.join("blobs");
        let path = blobs.join(algorithm.as_str());
        if path.is_dir() {
            return Ok(());
        }
        fs::create_dir_all(&path).map_err(|source| io_error("create", &path, source))?;
        for dir in [&blobs, &self.root] {
            File::open(dir)
                .and_then(|dir| dir.sync_all())
                .map_err(|source| io_error("sync", dir, source))?;
        }
        Ok(())
    }

    /// Turns on fs-verity where there is any.
    pub(super) fn protect(&self, path: &Path) {
        if !self.verity.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) =
            File::open(path).and_then(|file| lighter_snapshotter::enable_verity(&file))
        {
            match error.raw_os_error().map(nix::errno::Errno::from_raw) {
                Some(nix::errno::Errno::EEXIST) => {}
                Some(nix::errno::Errno::ETXTBSY) => {
                    tracing::debug!(path = %path.display(), "a blob is still open for writing");
                }
                _ => {
                    self.verity.store(false, Ordering::Relaxed);
                    tracing::debug!(%error, "no fs-verity for blobs");
                }
            }
        }
    }
}

impl Local {
    /// A store in directory `root`, which is made when it is not there.
    ///
    /// # Errors
    /// `Io` when the directories cannot be made.
    pub fn open(root: &Path) -> Result<Self, Error> {
        for dir in ["blobs", "ingest"] {
            let path = root.join(dir);
            fs::create_dir_all(&path).map_err(|source| io_error("create", &path, source))?;
        }
        Ok(Self {
            layout: Arc::new(Layout {
                root: root.to_owned(),
                verity: AtomicBool::new(true),
            }),
            locks: RefLocks::default(),
            opened: SystemTime::now(),
        })
    }

    /// The store's directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.layout.root
    }

    /// Runs `work` on a blocking thread.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let this = self.clone();
        spawn_blocking(move || work(&this))
            .await
            .unwrap_or_else(|error| {
                Err(Error::Io {
                    operation: "work in",
                    path: self.layout.root.clone(),
                    source: io::Error::other(error),
                })
            })
    }

    fn open_ingest(&self, open: &Open, lock: RefGuard) -> Result<LocalIngest, Error> {
        let directory = self.layout.ingest(&open.reference);
        let algorithm = open
            .expected
            .as_ref()
            .map_or(Algorithm::Sha256, Digest::algorithm);
        let mut hasher = Hasher::new(algorithm);
        let mut status = match self.resume(&directory, open, &mut hasher) {
            Ok(status) => status,
            Err(reason) => {
                if let Some(reason) = reason {
                    tracing::info!(reference = open.reference, reason, "ingest begun anew");
                }
                hasher = Hasher::new(algorithm);
                begin(&directory, open)?
            }
        };
        status.expected.clone_from(&open.expected);
        let data = directory.join("data");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&data)
            .map_err(|source| io_error("open", &data, source))?;
        let layout = self.layout.clone();
        Ok(LocalIngest::new(
            layout, directory, file, hasher, status, lock,
        ))
    }

    /// Takes up what is in `directory`. The error says why not, `None` when there is nothing.
    fn resume(
        &self,
        directory: &Path,
        open: &Open,
        hasher: &mut Hasher,
    ) -> Result<IngestStatus, Option<&'static str>> {
        if !directory.exists() {
            return Err(None);
        }
        let mut status = read_status(directory).map_err(|_| Some("its files cannot be read"))?;
        if status.reference != open.reference {
            return Err(Some("another ref has its directory"));
        }
        if open.total_bytes > 0 && status.total_bytes > 0 && status.total_bytes != open.total_bytes
        {
            return Err(Some("its total changed"));
        }
        status.total_bytes = status.total_bytes.max(open.total_bytes);
        let data = File::open(directory.join("data")).map_err(|_| Some("it has no data"))?;
        status.offset_bytes =
            hash_file(&data, hasher).map_err(|_| Some("its data cannot be read"))?;
        Ok(status)
    }
}

/// Makes the directory of an ingest from scratch.
fn begin(directory: &Path, open: &Open) -> Result<IngestStatus, Error> {
    match fs::remove_dir_all(directory) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(io_error("remove", directory, source));
        }
        _ => {}
    }
    let made = (|| {
        fs::create_dir_all(directory)?;
        let now = SystemTime::now();
        let stamp = OffsetDateTime::from(now)
            .format(&Rfc3339)
            .map_err(io::Error::other)?;
        fs::write(directory.join("ref"), &open.reference)?;
        replace(directory, "startedat", &stamp)?;
        replace(directory, "updatedat", &stamp)?;
        if open.total_bytes > 0 {
            replace(directory, "total", &open.total_bytes.to_string())?;
        }
        Ok(now)
    })();
    match made {
        Ok(now) => Ok(IngestStatus {
            reference: open.reference.clone(),
            offset_bytes: 0,
            total_bytes: open.total_bytes,
            expected: None,
            started_at: now,
            updated_at: now,
        }),
        Err(source) => {
            let _ = fs::remove_dir_all(directory);
            Err(io_error("begin ingest in", directory, source))
        }
    }
}

fn replace(directory: &Path, name: &str, text: &str) -> io::Result<()> {
    let temporary = directory.join(format!("{name}.tmp"));
    fs::write(&temporary, text)?;
    fs::rename(temporary, directory.join(name))
}

fn read_small(path: &Path) -> io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    File::open(path)?
        .take(SMALL_FILE_BYTES)
        .read_to_string(&mut text)?;
    Ok(text)
}

fn read_time(path: &Path) -> io::Result<SystemTime> {
    let text = read_small(path)?;
    OffsetDateTime::parse(text.trim(), &Rfc3339)
        .map(SystemTime::from)
        .map_err(io::Error::other)
}

fn read_status(directory: &Path) -> io::Result<IngestStatus> {
    let reference = read_small(&directory.join("ref"))?;
    let started_at = read_time(&directory.join("startedat"))?;
    let mut updated_at = read_time(&directory.join("updatedat")).unwrap_or(started_at);
    let offset_bytes = match fs::metadata(directory.join("data")) {
        Ok(data) => {
            updated_at = updated_at.max(data.modified()?);
            data.len()
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let total_bytes = match read_small(&directory.join("total")) {
        Ok(text) => text.trim().parse().map_err(io::Error::other)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    Ok(IngestStatus {
        reference,
        offset_bytes,
        total_bytes,
        expected: None,
        started_at,
        updated_at,
    })
}

/// The entries of a directory; none when it is not there.
fn entries(path: &Path) -> Result<Vec<fs::DirEntry>, Error> {
    match fs::read_dir(path) {
        Ok(entries) => entries
            .collect::<io::Result<_>>()
            .map_err(|source| io_error("list", path, source)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(io_error("list", path, source)),
    }
}

pub(super) fn io_error(operation: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

fn stored(digest: Digest, metadata: &fs::Metadata) -> Stored {
    Stored {
        digest,
        size_bytes: metadata.len(),
        created_at: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
    }
}

#[async_trait]
impl Store for Local {
    async fn info(&self, digest: &Digest) -> Result<Stored, Error> {
        // One stat of a name that is hot in the kernel's cache: cheaper than changing threads.
        let path = self.layout.blob(digest);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(stored(digest.clone(), &metadata)),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Err(blob_not_found(digest)),
            Err(source) => Err(io_error("stat", &path, source)),
        }
    }

    async fn reader(&self, digest: &Digest) -> Result<BlobReader, Error> {
        let digest = digest.clone();
        self.blocking(move |this| {
            let path = this.layout.blob(&digest);
            let opened = File::open(&path).and_then(|file| {
                let size = file.metadata()?.len();
                Ok((file, size))
            });
            match opened {
                Ok((file, size)) => Ok(BlobReader::of_file(file, path, size)),
                Err(source) if source.kind() == io::ErrorKind::NotFound => {
                    Err(blob_not_found(&digest))
                }
                Err(source) => Err(io_error("open", &path, source)),
            }
        })
        .await
    }

    async fn remove(&self, digest: &Digest) -> Result<(), Error> {
        let digest = digest.clone();
        self.blocking(move |this| {
            let path = this.layout.blob(&digest);
            match fs::remove_file(&path) {
                Err(source) if source.kind() == io::ErrorKind::NotFound => {
                    Err(blob_not_found(&digest))
                }
                other => other.map_err(|source| io_error("remove", &path, source)),
            }
        })
        .await
    }

    async fn walk(&self) -> Result<Vec<Stored>, Error> {
        self.blocking(|this| {
            let mut found = Vec::new();
            for algorithm in Algorithm::ALL {
                let dir = this.layout.root.join("blobs").join(algorithm.as_str());
                for entry in entries(&dir)? {
                    let name = entry.file_name();
                    let text = format!("{}:{}", algorithm.as_str(), name.to_string_lossy());
                    // What is no blob is not ours; what vanished meanwhile is no blob.
                    if let (Ok(digest), Ok(metadata)) = (Digest::parse(&text), entry.metadata()) {
                        found.push(stored(digest, &metadata));
                    }
                }
            }
            Ok(found)
        })
        .await
    }

    async fn status(&self, reference: &str) -> Result<IngestStatus, Error> {
        let reference = reference.to_owned();
        self.blocking(move |this| {
            let directory = this.layout.ingest(&reference);
            match read_status(&directory) {
                Ok(status) if status.reference == reference => Ok(status),
                Ok(_) => Err(ingest_not_found(&reference)),
                Err(source) if source.kind() == io::ErrorKind::NotFound => {
                    Err(ingest_not_found(&reference))
                }
                Err(source) => Err(io_error("read", &directory, source)),
            }
        })
        .await
    }

    async fn statuses(&self) -> Result<Vec<IngestStatus>, Error> {
        self.blocking(|this| {
            let found = entries(&this.layout.root.join("ingest"))?;
            // One that is just being made or removed has no status.
            Ok(found
                .iter()
                .filter_map(|entry| read_status(&entry.path()).ok())
                .collect())
        })
        .await
    }

    async fn heal(&self) -> Result<u64, Error> {
        self.blocking(|this| {
            let mut removed = 0;
            for entry in entries(&this.layout.root.join("ingest"))? {
                // What was touched since this store was opened may be just being made.
                let modified = entry.metadata().and_then(|meta| meta.modified());
                if modified.is_ok_and(|at| at < this.opened)
                    && read_status(&entry.path()).is_err()
                    && fs::remove_dir_all(entry.path()).is_ok()
                {
                    tracing::warn!(path = %entry.path().display(),
                        "an ingest that cannot be read was removed");
                    removed += 1;
                }
            }
            Ok(removed)
        })
        .await
    }

    async fn abort(&self, reference: &str) -> Result<(), Error> {
        let reference = reference.to_owned();
        self.blocking(move |this| {
            let directory = this.layout.ingest(&reference);
            match fs::remove_dir_all(&directory) {
                Err(source) if source.kind() == io::ErrorKind::NotFound => {
                    Err(ingest_not_found(&reference))
                }
                other => other.map_err(|source| io_error("remove", &directory, source)),
            }
        })
        .await
    }

    async fn writer(&self, open: Open) -> Result<Box<dyn Ingest>, Error> {
        if open.reference.is_empty() {
            return Err(Error::Invalid {
                reason: "ref must not be empty".to_owned(),
            });
        }
        let lock = self.locks.take(&open.reference, &open.holder)?;
        if let Some(expected) = &open.expected
            && self.info(expected).await.is_ok()
        {
            return Err(blob_exists(expected));
        }
        self.blocking(move |this| {
            let ingest = this.open_ingest(&open, lock)?;
            Ok(Box::new(ingest) as Box<dyn Ingest>)
        })
        .await
    }
}

impl Local {}
