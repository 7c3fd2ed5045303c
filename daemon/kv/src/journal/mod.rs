//! The journal in front of the store: what a commit writes, and what a crash leaves to replay.
//!
//! ```text
//! commit ──► frame ──► active segment ──full──► the other one is begun
//!                                                    │
//!                      store below ◄── checkpoint ◄──┘  of all that the full one holds
//! ```
//!
//! | file beside the store's | what |
//! |---|---|
//! | `journal-0` | segments of even generations |
//! | `journal-1` | segments of odd generations |
//! | `journal-<n>.damaged-<m>` | a segment that could not be read whole, kept for whoever looks |
//!
//! The layout of a segment is in `segment.rs`; its header has the version. A database without these
//! files opens, and gets them. A program that does not know them must not open a database that was
//! not closed: the newest changes are in the journal only.
//!
//! A segment is begun anew only when the store below has everything the old one held; until then
//! its frames stay readable, which is what a damaged store is mended with.

mod medium;
mod replay;
mod segment;

use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::sync::Arc;

pub(crate) use medium::{Medium, OnDisk};
pub(crate) use replay::{Found, keep_aside, lay, read, remove};
pub(crate) use segment::{FRAME_HEAD, changes, push};

use segment::{BLOCK, FRAMES, Header, frame_bytes, seal};

/// Segments of a journal.
pub(crate) const SEGMENTS: usize = 2;

/// The writing end.
#[derive(Debug)]
pub(crate) struct Journal {
    media: [Arc<dyn Medium>; SEGMENTS],
    /// Bytes of a segment; one commit that needs more makes its segment longer for the while.
    capacity: u64,
    header: Header,
    /// Where the next frame goes.
    offset: u64,
    /// Number of the newest frame.
    sequence: u64,
}

impl Journal {
    /// Goes on where the journal that was found ends.
    pub(crate) fn resume(
        media: [Arc<dyn Medium>; SEGMENTS],
        capacity: u64,
        found: &Found,
    ) -> io::Result<Self> {
        let mut journal = Self {
            media,
            capacity,
            header: Header {
                generation: 0,
                salt: 0,
                checkpoint: 0,
            },
            offset: 0,
            sequence: found.newest(),
        };
        match found.end {
            Some((header, offset)) => (journal.header, journal.offset) = (header, offset),
            None => journal.begin(found.newest())?,
        }
        Ok(journal)
    }

    /// Begins the next segment. The store below has everything up to `checkpoint`, and so of what is
    /// in that place nothing is needed any more.
    pub(crate) fn begin(&mut self, checkpoint: u64) -> io::Result<()> {
        let generation = self.header.generation + 1;
        self.header = Header {
            generation,
            salt: RandomState::new().hash_one(generation),
            checkpoint,
        };
        self.offset = FRAMES as u64;
        let medium = self.medium();
        medium.cut(self.capacity)?;
        for copy in 0..2 {
            medium.write(copy * BLOCK as u64, &self.header.encode())?;
            medium.sync()?;
        }
        Ok(())
    }

    /// Number of the newest frame.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// So that commits go on with numbers above `sequence`, which another journal gave out.
    pub(crate) fn skip_to(&mut self, sequence: u64) {
        self.sequence = self.sequence.max(sequence);
    }

    /// Whether a frame with this much payload fits the active segment, and after it one without
    /// any, which tells of a checkpoint.
    pub(crate) fn fits(&self, payload: usize) -> bool {
        self.offset + (frame_bytes(payload) + frame_bytes(0)) as u64 <= self.capacity
    }

    /// Whether a good part of the active segment is used up.
    pub(crate) fn is_filling(&self) -> bool {
        self.offset > self.capacity / 4
    }

    /// Writes a frame and waits for the disk. `buffer` has [`FRAME_HEAD`] bytes of room before the
    /// payload, and is used up. A frame that failed may be tried again.
    pub(crate) fn append(&mut self, buffer: &mut Vec<u8>, checkpoint: u64) -> io::Result<()> {
        let payload = buffer.len();
        seal(buffer, self.header, self.sequence + 1, checkpoint);
        let written = self.medium().write(self.offset, buffer);
        if written.is_err() {
            buffer.truncate(payload);
        }
        written?;
        self.medium().sync()?;
        self.sequence += 1;
        self.offset += buffer.len() as u64;
        Ok(())
    }

    fn medium(&self) -> &dyn Medium {
        self.media[place_of(self.header.generation)].as_ref()
    }
}

/// Which of the segments a generation is in.
fn place_of(generation: u64) -> usize {
    usize::from(!generation.is_multiple_of(2))
}

#[cfg(test)]
pub(crate) mod tests;
