//! What a journal holds when it is opened.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::segment::{BLOCK, FRAME_HEAD, FRAMES, Frame, Header, Scan, frame_bytes, scan};
use super::{Medium, OnDisk, SEGMENTS};

/// Most damaged segments that are kept.
const KEPT: u32 = 100;

/// Acknowledged changes that cannot be read any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Damage {
    /// Places whose segment is not whole.
    pub(crate) segments: Vec<usize>,
    /// What is missing, for people.
    pub(crate) reason: String,
}

/// A journal that was read.
#[derive(Debug, Default)]
pub(crate) struct Found {
    bytes: [Vec<u8>; SEGMENTS],
    /// Place and frame, in the order they were written.
    frames: Vec<(usize, Frame)>,
    /// The newest number that the store below needs no replay for.
    checkpoint: u64,
    /// Header of the newest segment and where its next frame goes.
    pub(super) end: Option<(Header, u64)>,
    pub(crate) damage: Option<Damage>,
}

impl Found {
    /// The number of the newest commit, 0 when there is none.
    pub(crate) fn newest(&self) -> u64 {
        let last = self.frames.last().map_or(0, |(_, frame)| frame.sequence);
        last.max(self.checkpoint)
    }

    /// The number of the oldest frame that is still there.
    pub(crate) fn oldest(&self) -> Option<u64> {
        self.frames.first().map(|(_, frame)| frame.sequence)
    }

    /// Payloads that the store below may not have, in order.
    pub(crate) fn missing_below(&self) -> impl Iterator<Item = &[u8]> {
        self.after(self.checkpoint)
    }

    /// Payloads of all frames with a number above `sequence`, in order.
    pub(crate) fn after(&self, sequence: u64) -> impl Iterator<Item = &[u8]> {
        let newer = self
            .frames
            .iter()
            .filter(move |(_, frame)| frame.sequence > sequence);
        newer.map(|(place, frame)| &self.bytes[*place][frame.payload.clone()])
    }

    /// Puts together what the segments held.
    pub(crate) fn of(bytes: [Vec<u8>; SEGMENTS]) -> Self {
        let mut found = Self::default();
        let mut used = Vec::new();
        let mut damage = Vec::new();
        let blank = |bytes: &Vec<u8>| bytes.is_empty();
        for (place, bytes) in bytes.iter().enumerate() {
            match scan(bytes) {
                Scan::Blank => {}
                Scan::Unreadable => {
                    damage.push((place, "its header cannot be read".to_owned()));
                }
                Scan::Used { header, frames } => used.push((header, place, frames)),
            }
        }
        used.sort_by_key(|(header, ..)| header.generation);
        found.end = used.last().map(|(header, _, frames)| {
            let behind =
                |frame: &Frame| frame.payload.start - FRAME_HEAD + frame_bytes(frame.payload.len());
            (*header, frames.last().map_or(FRAMES, behind) as u64)
        });
        // Segments are laid together: one that is gone while the other was used was taken away.
        if !used.is_empty()
            && let Some(place) = bytes.iter().position(blank)
        {
            damage.push((place, "it is not there".to_owned()));
        }
        let begun: Vec<u64> = used.iter().map(|(header, ..)| header.checkpoint).collect();
        for (_, place, frames) in used {
            found
                .frames
                .extend(frames.into_iter().map(|frame| (place, frame)));
        }
        let checkpoints = found.frames.iter().map(|(_, frame)| frame.checkpoint);
        found.checkpoint = checkpoints.chain(begun).max().unwrap_or(0);
        let mut last = found.checkpoint;
        for (place, frame) in &found.frames {
            if frame.sequence <= found.checkpoint {
                continue;
            }
            if frame.sequence != last + 1 {
                let lost = format!("commits {} to {} are missing", last + 1, frame.sequence - 1);
                damage.push((*place, lost));
            }
            last = frame.sequence;
        }
        found.damage = (!damage.is_empty()).then(|| Damage {
            segments: damage.iter().map(|(place, _)| *place).collect(),
            reason: damage
                .iter()
                .map(|(place, reason)| format!("journal-{place}: {reason}"))
                .collect::<Vec<_>>()
                .join("; "),
        });
        found.bytes = bytes;
        found
    }
}

/// File of the segment in `place` of the database in `directory`.
pub(crate) fn path_of(directory: &Path, place: usize) -> PathBuf {
    directory.join(format!("journal-{place}"))
}

/// Reads the journal of the database in `directory`, if it has one.
pub(crate) fn read(directory: &Path) -> io::Result<Found> {
    let mut bytes = <[Vec<u8>; SEGMENTS]>::default();
    for (place, bytes) in bytes.iter_mut().enumerate() {
        match OnDisk::open(&path_of(directory, place)).and_then(|segment| segment.read()) {
            Ok(read) => *bytes = read,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Found::of(bytes))
}

/// Opens the segments of `directory`; those that are not there are laid, of `bytes` each. Returns
/// them and how many bytes both have.
pub(crate) fn lay(directory: &Path, bytes: u64) -> io::Result<([Arc<dyn Medium>; SEGMENTS], u64)> {
    let bytes = bytes.max((FRAMES + 4 * BLOCK) as u64);
    let mut capacity = bytes;
    let mut open = |place: usize| -> io::Result<Arc<dyn Medium>> {
        let path = path_of(directory, place);
        match fs::metadata(&path) {
            Ok(file) if file.len() > (FRAMES + 2 * BLOCK) as u64 => {
                capacity = capacity.min(file.len());
            }
            _ => OnDisk::lay(&path, bytes)?,
        }
        Ok(Arc::new(OnDisk::open(&path)?))
    };
    let segments = [open(0)?, open(1)?];
    fs::File::open(directory)?.sync_all()?;
    Ok((segments, capacity))
}

/// Removes the journal; the store below must have everything.
pub(crate) fn remove(directory: &Path) -> io::Result<()> {
    for place in 0..SEGMENTS {
        match fs::remove_file(path_of(directory, place)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Copies the damaged segment in `place` to a name of its own, if it is there.
pub(crate) fn keep_aside(directory: &Path, place: usize) -> io::Result<()> {
    let path = path_of(directory, place);
    let aside = (0..KEPT)
        .map(|n| directory.join(format!("journal-{place}.damaged-{n}")))
        .find(|candidate| !candidate.exists())
        .ok_or_else(|| io::Error::other("too many damaged segments are kept already"))?;
    match fs::copy(&path, &aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
