//! The journal, the overlay and the store below as one backend.
//!
//! ```text
//! apply ──► overlay (readers see it) ──sync──► journal (durable) ──checkpoint──► store below
//! ```
//!
//! A commit is one frame in the journal: one write to blocks that exist, one `fdatasync`. The store
//! below is written by checkpoints only: when a segment of the journal is full, when nothing was
//! committed for a while, and when the database is closed. They run on a thread of their own;
//! a commit waits for one only when it needs the segment that the checkpoint is to free.
//!
//! Between checkpoints the store below is untouched and synced, so that a power cut rarely finds it
//! in the middle of something.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::journal::{self, Found, Journal};
use crate::overlay::{Overlay, Table};
use crate::{Backend, Change, Error, Value};

/// Changes, in bytes, after which a checkpoint syncs the store below: commits wait for the same disk, and what
/// it has to write down at once they wait for.
const SYNC_BYTES: usize = 128 << 10;
/// Bytes handed to the store below at a time.
const CHUNK_BYTES: usize = 4 << 10;
/// With less than this free, in bytes, a checkpoint that can wait does: its changes are safe in the
/// journal, and the reserve that it would use up is needed to open the database again.
const QUIET_FREE_BYTES: u64 = 16 << 20;
/// A commit that takes longer than this waits for a disk that has more to do than it can.
const SLOW_COMMIT: Duration = Duration::from_millis(20);
/// Largest buffer kept for the next frame, in bytes.
const SPARE_BYTES: usize = 256 << 10;

/// A backend whose commits go to a journal first.
#[derive(Debug)]
pub(crate) struct Layered {
    parts: Arc<Parts>,
    log: Mutex<Log>,
}

/// What commits, checkpoints and readers share.
#[derive(Debug)]
struct Parts {
    below: Box<dyn Backend>,
    /// Held for reading over a scan; a checkpoint takes it for writing before it begins.
    scans: RwLock<()>,
    overlay: RwLock<Overlay>,
    /// A checkpoint is under way.
    copying: AtomicBool,
    /// A good part of the active segment is used up.
    filling: AtomicBool,
    /// When the commit under way began.
    committing: Mutex<Option<Instant>>,
}

/// The writing end; the committer has it.
#[derive(Debug)]
struct Log {
    journal: Journal,
    /// Newest frame that the store below has everything of.
    checkpoint: u64,
    /// The newest frame says so.
    noted: bool,
    running: Option<Running>,
    spare: Vec<u8>,
}

/// A checkpoint under way.
#[derive(Debug)]
struct Running {
    /// The newest frame whose changes it copies.
    covers: u64,
    thread: JoinHandle<Result<(), Error>>,
}

/// Makes the journal of `directory` ready to go on. The store below must have everything that
/// `found` has. `sequence` is the newest number of the journal that this one succeeds, 0 for none.
///
/// Damaged segments are kept aside.
pub(crate) fn prepare(
    directory: &Path,
    found: &Found,
    bytes: u64,
    sequence: u64,
) -> Result<Journal, Error> {
    let failed = |source| Error::io("open the journal", source);
    let (media, capacity) = journal::lay(directory, bytes).map_err(failed)?;
    let mut journal = Journal::resume(media, capacity, found).map_err(failed)?;
    journal.skip_to(sequence);
    if found.missing_below().next().is_some() || found.damage.is_some() {
        // From here on the old frames are not needed.
        note(&mut journal).map_err(failed)?;
    }
    if let Some(damage) = &found.damage {
        for place in &damage.segments {
            journal::keep_aside(directory, *place).map_err(failed)?;
        }
        for _ in 0..journal::SEGMENTS {
            let newest = journal.sequence();
            journal.begin(newest).map_err(failed)?;
            note(&mut journal).map_err(failed)?;
        }
    }
    Ok(journal)
}

/// Notes that the store below has everything.
fn note(journal: &mut Journal) -> std::io::Result<()> {
    let own = journal.sequence() + 1;
    journal.append(&mut vec![0; journal::FRAME_HEAD], own)
}

impl Layered {
    /// Over a store that has everything up to the journal's newest frame.
    pub(crate) fn over(below: Box<dyn Backend>, journal: Journal) -> Self {
        let checkpoint = journal.sequence();
        Self {
            parts: Arc::new(Parts {
                below,
                scans: RwLock::default(),
                overlay: RwLock::default(),
                copying: AtomicBool::new(false),
                filling: AtomicBool::new(false),
                committing: Mutex::default(),
            }),
            log: Mutex::new(Log {
                journal,
                checkpoint,
                noted: true,
                running: None,
                spare: Vec::new(),
            }),
        }
    }

    fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what is pending as one frame.
    fn commit(&self, log: &mut Log) -> Result<(), Error> {
        if log.running.as_ref().is_some_and(|r| r.thread.is_finished()) {
            log.finish_checkpoint()?;
        }
        let mut overlay = self.parts.overlay_mut();
        if overlay.pending_bytes() == 0 {
            return Ok(());
        }
        let full = !log.journal.fits(overlay.pending_bytes());
        if full {
            drop(overlay);
            log.finish_checkpoint()?;
            log.journal
                .begin(log.checkpoint)
                .map_err(|e| Error::io("begin a segment of the journal", e))?;
            overlay = self.parts.overlay_mut();
        }
        let mut frame = overlay.take_pending(std::mem::take(&mut log.spare));
        // With this frame: the changes of a checkpoint must be in the journal before they go down.
        let frozen = full.then(|| overlay.freeze());
        drop(overlay);
        let room = || self.parts.below.make_room();
        log.append(&mut frame, room)?;
        let filling = log.journal.is_filling();
        self.parts.filling.store(filling, Ordering::Relaxed);
        frame.clear();
        frame.shrink_to(SPARE_BYTES);
        log.spare = frame;
        match frozen {
            Some(frozen) => self.start_checkpoint(log, &frozen),
            None => Ok(()),
        }
    }

    fn start_checkpoint(&self, log: &mut Log, frozen: &Arc<Table>) -> Result<(), Error> {
        let covers = log.journal.sequence();
        let (parts, table) = (self.parts.clone(), frozen.clone());
        parts.copying.store(true, Ordering::Relaxed);
        let thread = std::thread::Builder::new().name("checkpoint".to_owned());
        match thread.spawn(move || parts.copy_down(&table)) {
            Ok(thread) => log.running = Some(Running { covers, thread }),
            Err(_no_thread) => {
                self.parts.copy_down(frozen)?;
                log.checkpoint = covers;
            }
        }
        Ok(())
    }
}

impl Log {
    fn append(&mut self, frame: &mut Vec<u8>, make_room: impl Fn() -> bool) -> Result<(), Error> {
        let failed = |e| Error::io("write to the journal", e);
        match self.journal.append(frame, self.checkpoint).map_err(failed) {
            Err(Error::Full) if make_room() => {
                self.journal
                    .append(frame, self.checkpoint)
                    .map_err(failed)?;
            }
            other => other?,
        }
        self.noted = false;
        Ok(())
    }

    /// Waits for the checkpoint under way.
    fn finish_checkpoint(&mut self) -> Result<(), Error> {
        let Some(Running { covers, thread }) = self.running.take() else {
            return Ok(());
        };
        thread.join().unwrap_or_else(|_| {
            Err(Error::Io {
                operation: "checkpoint",
                source: std::io::Error::other("the database panicked"),
            })
        })?;
        self.checkpoint = covers;
        Ok(())
    }

    /// Tells the next open that there is nothing to replay.
    fn note_checkpoint(&mut self) -> Result<(), Error> {
        if self.noted || self.checkpoint != self.journal.sequence() {
            return Ok(());
        }
        self.checkpoint += 1;
        self.append(&mut vec![0; journal::FRAME_HEAD], || false)?;
        self.noted = true;
        Ok(())
    }
}

impl Parts {
    fn commit_began(&self, at: Option<Instant>) {
        let committing = self.committing.lock();
        *committing.unwrap_or_else(PoisonError::into_inner) = at;
    }

    fn commit_is_slow(&self) -> bool {
        let committing = self.committing.lock();
        let began = *committing.unwrap_or_else(PoisonError::into_inner);
        began.is_some_and(|began| began.elapsed() > SLOW_COMMIT)
    }

    fn overlay(&self) -> RwLockReadGuard<'_, Overlay> {
        self.overlay.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn overlay_mut(&self) -> RwLockWriteGuard<'_, Overlay> {
        self.overlay.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies what is frozen to the store below, and forgets it.
    fn copy_down(&self, frozen: &Table) -> Result<(), Error> {
        // A scan never sees half of what a batch changed. One that began before the freeze may have
        // seen none of it and ends first; a later one takes all of it from what is frozen, however
        // far the copy is.
        drop(self.scans.write().unwrap_or_else(PoisonError::into_inner));
        let pairs = frozen
            .iter()
            .map(|(key, entry)| (key.as_ref(), entry.as_deref()));
        let copied = copy(self.below.as_ref(), pairs).and_then(|()| self.below.sync());
        self.copying.store(false, Ordering::Relaxed);
        copied?;
        let _ = self.overlay_mut().thaw();
        Ok(())
    }
}

/// Hands changes to a store in parts.
fn copy<'a>(below: &dyn Backend, changes: impl Iterator<Item = Change<'a>>) -> Result<(), Error> {
    let (mut part, mut bytes, mut unsynced) = (Vec::new(), 0, 0);
    for change in changes {
        bytes += change.0.len() + change.1.map_or(0, <[u8]>::len);
        part.push(change);
        if bytes >= CHUNK_BYTES {
            below.copy(&part)?;
            part.clear();
            unsynced += bytes;
            bytes = 0;
        }
        if unsynced >= SYNC_BYTES {
            below.sync()?;
            unsynced = 0;
        }
    }
    below.copy(&part)
}

/// Gives a store what a journal has and it may lack. Once or twice makes no difference.
pub(crate) fn replay<'a>(
    below: &dyn Backend,
    payloads: impl Iterator<Item = &'a [u8]>,
) -> Result<(), Error> {
    let mut newest = std::collections::BTreeMap::new();
    let mut any = false;
    for payload in payloads {
        any = true;
        newest.extend(journal::changes(payload).ok_or_else(|| Error::Io {
            operation: "replay the journal",
            source: std::io::Error::other("a frame holds something else than changes"),
        })?);
    }
    if any {
        copy(below, newest.into_iter())?;
        below.sync()?;
    }
    Ok(())
}

impl Backend for Layered {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, Error> {
        if let Some(entry) = self.parts.overlay().get(key) {
            return Ok(entry.as_ref().map(|value| value.to_vec()));
        }
        self.parts.below.get(key)
    }

    fn visit(
        &self,
        start: &[u8],
        end: Option<&[u8]>,
        limit: usize,
        seen: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), Error> {
        let scan = self.parts.scans.read();
        let _scan = scan.unwrap_or_else(PoisonError::into_inner);
        if limit == 0 || end.is_some_and(|end| start >= end) {
            return Ok(());
        }
        let recent = self.parts.overlay().range(start, end, limit);
        let removed = recent.iter().filter(|(_, entry)| entry.is_none()).count();
        let mut recent = recent.into_iter().peekable();
        let mut left = limit;
        let mut tell = |key: &[u8], value: &[u8]| {
            left -= 1;
            seen(key, value) && left > 0
        };
        let mut more = true;
        let below = limit.saturating_add(removed);
        self.parts
            .below
            .visit(start, end, below, &mut |key, value| {
                while more
                    && let Some((newer, entry)) = recent.next_if(|(newer, _)| newer.as_ref() <= key)
                {
                    let same = newer.as_ref() == key;
                    if let Some(entry) = entry {
                        more = tell(&newer, &entry);
                    }
                    if same {
                        return more;
                    }
                }
                more = more && tell(key, value);
                more
            })?;
        for (key, entry) in recent {
            if !more {
                break;
            }
            if let Some(value) = entry {
                more = tell(&key, &value);
            }
        }
        Ok(())
    }

    fn apply(&self, batch: &[Change<'_>]) -> Result<(), Error> {
        self.parts.overlay_mut().apply(batch)
    }

    fn sync(&self) -> Result<(), Error> {
        self.parts.commit_began(Some(Instant::now()));
        let done = self.commit(&mut self.log());
        self.parts.commit_began(None);
        done
    }

    fn is_crowded(&self) -> bool {
        let parts = &self.parts;
        let full = parts.copying.load(Ordering::Relaxed) && parts.filling.load(Ordering::Relaxed);
        full || parts.commit_is_slow()
    }

    fn free_bytes(&self) -> Option<u64> {
        self.parts.below.free_bytes()
    }

    fn sequence(&self) -> u64 {
        self.log().journal.sequence()
    }

    fn unsettled(&self) -> bool {
        let noted = self.log().noted;
        !noted || !self.parts.overlay().is_empty()
    }

    fn settle(&self) -> Result<(), Error> {
        let mut log = self.log();
        self.commit(&mut log)?;
        if log.running.is_some() {
            return Ok(());
        }
        let mut overlay = self.parts.overlay_mut();
        if overlay.is_empty() {
            drop(overlay);
            return log.note_checkpoint();
        }
        let free = self.parts.below.free_bytes();
        if free.is_some_and(|free| free < QUIET_FREE_BYTES) {
            return Ok(());
        }
        // Changes that came since are not in the journal: next time.
        if overlay.pending_bytes() == 0 {
            let frozen = overlay.freeze();
            drop(overlay);
            self.start_checkpoint(&mut log, &frozen)?;
        }
        Ok(())
    }

    fn close(&self) -> Result<(), Error> {
        let mut log = self.log();
        self.commit(&mut log)?;
        log.finish_checkpoint()?;
        let frozen = self.parts.overlay_mut().freeze();
        self.parts.copy_down(&frozen)?;
        log.checkpoint = log.journal.sequence();
        log.note_checkpoint()
    }
}

#[cfg(test)]
mod tests;
