//! Group commit: one writer lock, one committer thread, tickets released together.
//!
//! ```text
//! update ──lock──► apply batch n ──► ticket(n) ──wait──────────────► released
//!                     │                                                 ▲
//!                     └─ wake ─► committer: sync, then `durable = n' ≥ n`┘
//! ```
//!
//! Batches applied while the committer syncs share its next sync. Hooks of a batch run on the
//! committer, in the order of the batches, after its sync and before its ticket is released. A
//! failed or panicking write or sync stops the database: what is on disk is no longer known, so
//! every pending and later ticket fails.
//!
//! The thread ends when the last handle is dropped, after a last sync of what was applied.
//!
//! Export file: `lighter-kv 1\n`, then per pair key length (u32 BE), value length (u32 BE), key,
//! value, and at the end a record of key length `u32::MAX` with the number of pairs (u64 BE).

use std::collections::VecDeque;
use std::fs::{self, File};
use std::future::Future;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::{Backend, Db, Error, Hook, Key, Value};

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

/// How often the free space is looked at while there are commits.
const SPACE_CHECK: Duration = Duration::from_millis(200);
/// With less than this free, in bytes, only batches that remove are accepted.
const LOW_SPACE_BYTES: u64 = 4 << 20;

pub(crate) struct Shared {
    backend: Box<dyn Backend>,
    writer: Mutex<()>,
    /// Number of the newest applied batch. Written under `writer`.
    applied: AtomicU64,
    /// Hooks of batches that are not durable yet, with their batch's number. Pushed under `writer`.
    hooks: Mutex<VecDeque<(u64, Hook)>>,
    /// The committer sleeps here; the flag says that there is work or that it should end.
    wake: (Mutex<Wake>, Condvar),
    /// Sender: the committer. Receivers: tickets. Closed when the database is gone.
    progress: watch::Sender<Progress>,
    failed: OnceLock<String>,
    low_space: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("backend", &self.backend)
            .field("applied", &self.applied)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Wake {
    work: bool,
    stop: bool,
}

/// The last handle's drop ends the committer.
#[derive(Debug)]
pub(crate) struct Handle {
    shared: Arc<Shared>,
    committer: Option<JoinHandle<()>>,
}

impl std::ops::Deref for Handle {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        lock(&self.shared.wake.0).stop = true;
        self.shared.wake.1.notify_one();
        let Some(committer) = self.committer.take() else {
            return;
        };
        // A hook may hold the last handle; the committer cannot wait for itself.
        if committer.thread().id() != std::thread::current().id() {
            let _ = committer.join();
        }
    }
}

impl Handle {
    pub(crate) fn start(backend: Box<dyn Backend>) -> Result<Self, Error> {
        let (progress, _) = watch::channel(Progress::Durable(0));
        let shared = Arc::new(Shared {
            backend,
            writer: Mutex::new(()),
            applied: AtomicU64::new(0),
            hooks: Mutex::default(),
            wake: (Mutex::default(), Condvar::new()),
            progress,
            failed: OnceLock::new(),
            low_space: AtomicBool::new(false),
        });
        let worker = shared.clone();
        let committer = std::thread::Builder::new()
            .name("committer".to_owned())
            .spawn(move || {
                let mut space_checked = Instant::now();
                worker.check_space();
                while worker.commit_next() {
                    if space_checked.elapsed() >= SPACE_CHECK {
                        worker.check_space();
                        space_checked = Instant::now();
                    }
                }
            })
            .map_err(|source| Error::Io {
                operation: "start the committer",
                source,
            })?;
        Ok(Self {
            shared,
            committer: Some(committer),
        })
    }
}

impl Shared {
    pub(crate) fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    pub(crate) fn writer(&self) -> Writer<'_> {
        Writer {
            shared: self,
            _guard: lock(&self.writer),
        }
    }

    pub(crate) fn applied(&self) -> u64 {
        self.applied.load(Ordering::Acquire)
    }

    /// Why the database stopped, once it did.
    pub(crate) async fn stopped(&self) -> String {
        let mut progress = self.progress.subscribe();
        loop {
            if let Some(reason) = self.failed.get() {
                return reason.clone();
            }
            if progress.changed().await.is_err() {
                return "the database was closed".to_owned();
            }
        }
    }

    /// Waits for work, then syncs once. False when the thread should end.
    fn commit_next(&self) -> bool {
        let stop = {
            let wake = lock(&self.wake.0);
            let mut wake = self
                .wake
                .1
                .wait_while(wake, |w| !w.work && !w.stop)
                .unwrap_or_else(PoisonError::into_inner);
            wake.work = false;
            wake.stop
        };
        let target = self.applied.load(Ordering::Acquire);
        if stop && is_durable(&self.progress.borrow(), target) {
            return false;
        }
        match guarded("sync", || self.backend.sync()) {
            Ok(()) => {
                self.run_hooks(target);
                self.progress.send_replace(Progress::Durable(target));
                !stop
            }
            Err(error) => {
                self.fail(&error);
                false
            }
        }
    }

    fn run_hooks(&self, target: u64) {
        loop {
            let hook = {
                let mut hooks = lock(&self.hooks);
                match hooks.front() {
                    Some((number, _)) if *number <= target => hooks.pop_front(),
                    _ => None,
                }
            };
            let Some((_, hook)) = hook else { return };
            if catch_unwind(AssertUnwindSafe(hook)).is_err() {
                tracing::error!("a hook on a durable change panicked");
            }
        }
    }

    fn fail(&self, error: &Error) {
        let reason = lighter_proto::errdefs::render(error);
        tracing::error!(%reason, "database failed; no more writes are accepted");
        let _ = self.failed.set(reason.clone());
        self.progress.send_replace(Progress::Failed(reason));
    }

    fn check_space(&self) {
        let low = self
            .backend
            .free_bytes()
            .is_some_and(|free| free < LOW_SPACE_BYTES);
        if low != self.low_space.swap(low, Ordering::Relaxed) {
            tracing::warn!(low, "room for the database");
        }
    }
}

/// Runs a backend's call with its panics turned into errors: sled panics on some damage.
fn guarded<T>(
    operation: &'static str,
    call: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| {
        Err(Error::Io {
            operation,
            source: io::Error::other("the database panicked"),
        })
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The right to write, held for one change.
pub(crate) struct Writer<'a> {
    shared: &'a Shared,
    _guard: MutexGuard<'a, ()>,
}

impl Writer<'_> {
    pub(crate) fn apply(
        &mut self,
        batch: &[(Key, Option<Value>)],
        hooks: Vec<Hook>,
    ) -> Result<Durable, Error> {
        let shared = self.shared;
        if let Some(reason) = shared.failed.get() {
            return Err(Error::Stopped {
                reason: reason.clone(),
            });
        }
        if batch.is_empty() && hooks.is_empty() {
            return Ok(self.ticket());
        }
        if shared.low_space.load(Ordering::Relaxed) && batch.iter().any(|(_, v)| v.is_some()) {
            // Removing is how room is made again; look anew, the disk may have been cleared.
            shared.check_space();
            if shared.low_space.load(Ordering::Relaxed) {
                return Err(Error::Full);
            }
        }
        if !batch.is_empty()
            && let Err(error) = guarded("write", || shared.backend.apply(batch))
        {
            shared.fail(&error);
            return Err(error);
        }
        let number = shared.applied.fetch_add(1, Ordering::Release) + 1;
        lock(&shared.hooks).extend(hooks.into_iter().map(|hook| (number, hook)));
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
        let waker = Arc::new(Unpark(std::thread::current())).into();
        let mut context = Context::from_waker(&waker);
        let mut wait = std::pin::pin!(self.wait());
        loop {
            match wait.as_mut().poll(&mut context) {
                Poll::Ready(result) => return result,
                Poll::Pending => std::thread::park(),
            }
        }
    }
}

/// Wakes a thread that waits for a ticket.
struct Unpark(std::thread::Thread);

impl std::task::Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
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
