//! Group commit: one writer lock, one committer thread, tickets released together.
//!
//! ```text
//! update ──lock──► apply batch n ──► ticket(n) ──wait──────────────► released
//!                     │                                                 ▲
//!                     └─ wake ─► committer: sync, then `durable = n' ≥ n`┘
//! ```
//!
//! Batches applied while the committer syncs share its next sync. A failed sync stops the database:
//! what is on disk is no longer known, so every pending and later ticket fails.
//!
//! Export file: `lighter-kv 1\n`, then per pair key length (u32 BE), value length (u32 BE), key,
//! value, and at the end a record of key length `u32::MAX` with the number of pairs (u64 BE).

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::watch;

use crate::{Backend, Db, Error, Key, Value};

/// First line of an export; the number is the version of its format.
const EXPORT_HEADER: &[u8] = b"lighter-kv 1\n";
/// Key length that marks the end record of an export.
const EXPORT_END: u32 = u32::MAX;
/// Pairs read at a time while exporting.
const EXPORT_PAGE: usize = 1024;
/// Longest key or value an import accepts, in bytes.
const IMPORT_MAX_BYTES: u32 = 64 << 20;

/// Progress of the committer, as everyone who waits sees it.
#[derive(Debug, Clone)]
enum Progress {
    /// Batches up to this number are durable.
    Durable(u64),
    /// The database failed.
    Failed(String),
}

#[derive(Debug)]
pub(crate) struct Shared {
    backend: Box<dyn Backend>,
    writer: Mutex<()>,
    /// Number of the newest applied batch. Written under `writer`.
    applied: AtomicU64,
    /// The committer sleeps here; the flag says that there is work or that it should end.
    wake: (Mutex<Wake>, Condvar),
    /// Sender: the committer. Receivers: tickets. Closed when the committer is gone.
    progress: watch::Sender<Progress>,
    failed: OnceLock<String>,
}

#[derive(Debug, Default)]
struct Wake {
    work: bool,
    stop: bool,
}

impl Shared {
    pub(crate) fn start(backend: Box<dyn Backend>) -> Result<Arc<Self>, Error> {
        let (progress, _) = watch::channel(Progress::Durable(0));
        let shared = Arc::new(Self {
            backend,
            writer: Mutex::new(()),
            applied: AtomicU64::new(0),
            wake: (Mutex::default(), Condvar::new()),
            progress,
            failed: OnceLock::new(),
        });
        let weak = Arc::downgrade(&shared);
        std::thread::Builder::new()
            .name("committer".to_owned())
            .spawn(move || {
                // The thread holds the state only while it works, so that the last handle's drop
                // can end it.
                while let Some(shared) = weak.upgrade() {
                    if !shared.commit_next() {
                        break;
                    }
                }
            })
            .map_err(|source| Error::Io {
                operation: "start the committer",
                source,
            })?;
        Ok(shared)
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    pub(crate) fn writer(&self) -> Writer<'_> {
        Writer {
            shared: self,
            _guard: lock(&self.writer),
        }
    }

    /// Waits for work up to a while, then syncs once. False when the thread should end.
    fn commit_next(&self) -> bool {
        {
            let wake = lock(&self.wake.0);
            let (mut wake, _) = self
                .wake
                .1
                .wait_timeout_while(wake, IDLE_CHECK, |w| !w.work && !w.stop)
                .unwrap_or_else(PoisonError::into_inner);
            if wake.stop {
                return false;
            }
            if !wake.work {
                return true;
            }
            wake.work = false;
        }
        let target = self.applied.load(Ordering::Acquire);
        match self.backend.sync() {
            Ok(()) => {
                self.progress.send_replace(Progress::Durable(target));
                true
            }
            Err(error) => {
                let reason = lighter_proto::errdefs::render(&error);
                tracing::error!(%reason, "database commit failed; no more writes are accepted");
                let _ = self.failed.set(reason.clone());
                self.progress.send_replace(Progress::Failed(reason));
                false
            }
        }
    }
}

/// How often an idle committer looks whether anyone still holds the database.
const IDLE_CHECK: std::time::Duration = std::time::Duration::from_secs(1);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The right to write, held for one change.
pub(crate) struct Writer<'a> {
    shared: &'a Shared,
    _guard: MutexGuard<'a, ()>,
}

impl Writer<'_> {
    pub(crate) fn apply(&mut self, batch: &[(Key, Option<Value>)]) -> Result<Durable, Error> {
        if let Some(reason) = self.shared.failed.get() {
            return Err(Error::Stopped {
                reason: reason.clone(),
            });
        }
        if !batch.is_empty() {
            self.shared.backend.apply(batch)?;
            self.shared.applied.fetch_add(1, Ordering::Release);
        }
        Ok(self.ticket())
    }

    pub(crate) fn ticket(&self) -> Durable {
        let number = self.shared.applied.load(Ordering::Acquire);
        let progress = self.shared.progress.subscribe();
        if !is_durable(&progress.borrow(), number) {
            lock(&self.shared.wake.0).work = true;
            self.shared.wake.1.notify_one();
        }
        Durable { number, progress }
    }
}

/// The promise that a change will be durable; await it before saying that the change stands.
///
/// Dropping it does not undo the change.
#[derive(Debug)]
#[must_use = "a change is durable only when its ticket was awaited"]
pub struct Durable {
    number: u64,
    progress: watch::Receiver<Progress>,
}

impl Durable {
    /// Waits until the change is on disk.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the commit failed.
    ///
    /// # Cancellation
    /// Safe to drop; the change stays applied and becomes durable with the next commit.
    pub async fn wait(mut self) -> Result<(), Error> {
        let number = self.number;
        let reached = self
            .progress
            .wait_for(|p| matches!(p, Progress::Failed(_)) || is_durable(p, number))
            .await;
        match reached.as_deref() {
            Ok(Progress::Durable(_)) => Ok(()),
            Ok(Progress::Failed(reason)) => Err(Error::Stopped {
                reason: reason.clone(),
            }),
            Err(_) => Err(Error::Stopped {
                reason: "the database was closed".to_owned(),
            }),
        }
    }

    /// [`Durable::wait`] for code outside the async runtime.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the commit failed.
    pub fn wait_blocking(self) -> Result<(), Error> {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .map_err(|source| Error::Io {
                operation: "wait for a commit",
                source,
            })?
            .block_on(self.wait())
    }
}

fn is_durable(progress: &Progress, number: u64) -> bool {
    matches!(progress, Progress::Durable(n) if *n >= number)
}

pub(crate) fn export(backend: &dyn Backend, path: &Path) -> Result<u64, Error> {
    let failed = |source| Error::Io {
        operation: "write export",
        source,
    };
    let temporary = path.with_extension("tmp");
    let mut out = BufWriter::new(File::create(&temporary).map_err(failed)?);
    out.write_all(EXPORT_HEADER).map_err(failed)?;
    let mut count = 0_u64;
    let mut start: Key = Vec::new();
    loop {
        let page = backend.range(&start, None, EXPORT_PAGE)?;
        let Some((last, _)) = page.last() else { break };
        start = last.clone();
        start.push(0);
        for (key, value) in &page {
            write_pair(&mut out, key, value).map_err(failed)?;
            count += 1;
        }
    }
    out.write_all(&EXPORT_END.to_be_bytes()).map_err(failed)?;
    out.write_all(&count.to_be_bytes()).map_err(failed)?;
    let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
    file.sync_all().map_err(failed)?;
    fs::rename(&temporary, path).map_err(failed)?;
    if let Some(parent) = path.parent() {
        File::open(parent)
            .and_then(|dir| dir.sync_all())
            .map_err(failed)?;
    }
    Ok(count)
}

fn write_pair(out: &mut impl Write, key: &[u8], value: &[u8]) -> io::Result<()> {
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).map_err(io::Error::other);
    out.write_all(&length(key)?.to_be_bytes())?;
    out.write_all(&length(value)?.to_be_bytes())?;
    out.write_all(key)?;
    out.write_all(value)
}

pub(crate) fn import(db: &Db, path: &Path) -> Result<u64, Error> {
    let damaged = |reason: &str| Error::Corrupt {
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    let file = File::open(path).map_err(|source| Error::Io {
        operation: "open export",
        source,
    })?;
    let mut input = BufReader::new(file);
    let mut header = vec![0; EXPORT_HEADER.len()];
    input
        .read_exact(&mut header)
        .map_err(|_| damaged("no header"))?;
    if header != EXPORT_HEADER {
        return Err(damaged("unknown header"));
    }
    let mut pairs = Vec::new();
    loop {
        let key_length = read_u32(&mut input).map_err(|_| damaged("cut short"))?;
        if key_length == EXPORT_END {
            let mut count = [0; 8];
            input
                .read_exact(&mut count)
                .map_err(|_| damaged("cut short"))?;
            if u64::from_be_bytes(count) != pairs.len() as u64 {
                return Err(damaged("wrong number of pairs"));
            }
            break;
        }
        let value_length = read_u32(&mut input).map_err(|_| damaged("cut short"))?;
        if key_length > IMPORT_MAX_BYTES || value_length > IMPORT_MAX_BYTES {
            return Err(damaged("a record is too long"));
        }
        let mut key = vec![0; key_length as usize];
        let mut value = vec![0; value_length as usize];
        input
            .read_exact(&mut key)
            .map_err(|_| damaged("cut short"))?;
        input
            .read_exact(&mut value)
            .map_err(|_| damaged("cut short"))?;
        pairs.push((key, value));
    }
    let count = pairs.len() as u64;
    let ((), ticket) = db.update(|tx| {
        for (key, value) in pairs {
            tx.put(key, value);
        }
        Ok::<_, Error>(())
    })?;
    ticket.wait_blocking()?;
    Ok(count)
}

fn read_u32(input: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    input.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}
