//! What is in a journal's segment, byte by byte. All numbers are big-endian.
//!
//! ```text
//! block 0, block 1   header, twice: "lighter journal\n" (16), version (u32), generation (u64),
//!                    salt (u64), checkpoint (u64), CRC-32 of the bytes before (u32)
//! block 2 …          frames, each from the start of a block
//!
//! frame              "LtrF" (4), CRC-32 (u32), sequence (u64), checkpoint (u64),
//!                    length of the payload (u64), payload, zeros to the end of the block
//! payload            changes: length of the key (u32), length of the value (u32), key, value;
//!                    a value of length `u32::MAX` has no bytes and means that the key is removed
//! ```
//!
//! A block is 4,096 bytes: no write ever touches a sector that holds a frame somebody relies on. The
//! CRC of a frame covers the generation and the salt of its segment, then all bytes after the CRC
//! up to the end of the payload: what an earlier generation left behind, or a value that looks like
//! a frame, does not pass. `checkpoint` is the newest sequence number that needs no replay.
//!
//! A frame is written after the one before it is on disk. A bad frame at the end was therefore
//! never acknowledged; one with a good frame after it was, and is damage.
//!
//! The second header is written when the first is on disk, so that a crash spoils one of them only.

/// Unit of everything in a segment, in bytes.
pub(crate) const BLOCK: usize = 4096;
/// Where the frames begin.
pub(crate) const FRAMES: usize = 2 * BLOCK;
/// Bytes before the payload of a frame.
pub(crate) const FRAME_HEAD: usize = 32;

const SEGMENT_MAGIC: &[u8; 16] = b"lighter journal\n";
const FRAME_MAGIC: &[u8; 4] = b"LtrF";
const VERSION: u32 = 1;
/// Bytes of a header that its CRC covers.
const HEADER_BYTES: usize = 44;
/// Length that stands for a removed key.
const REMOVED: u32 = u32::MAX;

/// What a segment says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// Grows by one with every segment that is begun.
    pub(crate) generation: u64,
    /// A random number.
    pub(crate) salt: u64,
    /// The newest frame that needed no replay when the segment was begun.
    pub(crate) checkpoint: u64,
}

impl Header {
    pub(crate) fn encode(self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        block[..16].copy_from_slice(SEGMENT_MAGIC);
        block[16..20].copy_from_slice(&VERSION.to_be_bytes());
        block[20..28].copy_from_slice(&self.generation.to_be_bytes());
        block[28..36].copy_from_slice(&self.salt.to_be_bytes());
        block[36..44].copy_from_slice(&self.checkpoint.to_be_bytes());
        let crc = crc32fast::hash(&block[..HEADER_BYTES]);
        block[44..48].copy_from_slice(&crc.to_be_bytes());
        block
    }

    fn parse(block: &[u8]) -> Option<Self> {
        let whole = block.get(..16)? == SEGMENT_MAGIC
            && u32_at(block, 16)? == VERSION
            && u32_at(block, 44)? == crc32fast::hash(&block[..HEADER_BYTES]);
        whole.then_some(Self {
            generation: u64_at(block, 20)?,
            salt: u64_at(block, 28)?,
            checkpoint: u64_at(block, 36)?,
        })
    }

    /// CRC of a frame's bytes from its sequence number to the end of its payload.
    fn crc(self, covered: &[u8]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.generation.to_be_bytes());
        hasher.update(&self.salt.to_be_bytes());
        hasher.update(covered);
        hasher.finalize()
    }
}

/// A frame found in a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) sequence: u64,
    pub(crate) checkpoint: u64,
    /// Where its payload is in the segment.
    pub(crate) payload: std::ops::Range<usize>,
}

/// A segment that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Scan {
    /// Never used.
    Blank,
    /// Neither header can be read.
    Unreadable,
    /// In use; the good frames in order.
    Used { header: Header, frames: Vec<Frame> },
}

/// Bytes that a frame with this much payload takes.
pub(crate) fn frame_bytes(payload: usize) -> usize {
    (FRAME_HEAD + payload).next_multiple_of(BLOCK)
}

/// Makes a frame of `buffer`, which holds room for the head and then the payload.
pub(crate) fn seal(buffer: &mut Vec<u8>, header: Header, sequence: u64, checkpoint: u64) {
    let payload = (buffer.len() - FRAME_HEAD) as u64;
    buffer[..4].copy_from_slice(FRAME_MAGIC);
    buffer[8..16].copy_from_slice(&sequence.to_be_bytes());
    buffer[16..24].copy_from_slice(&checkpoint.to_be_bytes());
    buffer[24..32].copy_from_slice(&payload.to_be_bytes());
    let crc = header.crc(&buffer[8..]);
    buffer[4..8].copy_from_slice(&crc.to_be_bytes());
    buffer.resize(buffer.len().next_multiple_of(BLOCK), 0);
}

/// Appends a change to a payload; `None` removes the key.
///
/// # Errors
/// When key or value are longer than the format can say.
pub(crate) fn push(
    payload: &mut Vec<u8>,
    key: &[u8],
    value: Option<&[u8]>,
) -> Result<(), std::num::TryFromIntError> {
    let length = match value {
        Some(value) => u32::try_from(value.len())?,
        None => REMOVED,
    };
    payload.extend_from_slice(&u32::try_from(key.len())?.to_be_bytes());
    payload.extend_from_slice(&length.to_be_bytes());
    payload.extend_from_slice(key);
    payload.extend_from_slice(value.unwrap_or_default());
    Ok(())
}

/// The changes of a payload; `None` for bytes that [`push`] did not write.
pub(crate) fn changes(mut payload: &[u8]) -> Option<Vec<crate::Change<'_>>> {
    let mut found = Vec::new();
    while !payload.is_empty() {
        let key_length = u32_at(payload, 0)? as usize;
        let value_length = u32_at(payload, 4)?;
        let (key, rest) = payload.get(8..)?.split_at_checked(key_length)?;
        if value_length == REMOVED {
            found.push((key, None));
            payload = rest;
        } else {
            let (value, rest) = rest.split_at_checked(value_length as usize)?;
            found.push((key, Some(value)));
            payload = rest;
        }
    }
    Some(found)
}

/// Finds the good frames of a segment, those behind a bad one as well.
pub(crate) fn scan(bytes: &[u8]) -> Scan {
    let headers = [bytes.get(..BLOCK), bytes.get(BLOCK..FRAMES)];
    let newest = headers
        .into_iter()
        .filter_map(|block| Header::parse(block?))
        .max_by_key(|header| header.generation);
    let Some(header) = newest else {
        return if bytes.iter().all(|byte| *byte == 0) {
            Scan::Blank
        } else {
            Scan::Unreadable
        };
    };
    let mut frames: Vec<Frame> = Vec::new();
    let mut offset = FRAMES;
    while offset < bytes.len() {
        match parse_frame(bytes, offset, header) {
            Some(frame) if frames.last().is_none_or(|l| l.sequence < frame.sequence) => {
                offset += frame_bytes(frame.payload.len());
                frames.push(frame);
            }
            _ => offset += BLOCK,
        }
    }
    Scan::Used { header, frames }
}

fn parse_frame(bytes: &[u8], offset: usize, header: Header) -> Option<Frame> {
    let frame = bytes.get(offset..)?;
    if frame.get(..4)? != FRAME_MAGIC {
        return None;
    }
    let length = usize::try_from(u64_at(frame, 24)?).ok()?;
    let covered = frame.get(8..FRAME_HEAD.checked_add(length)?)?;
    if u32_at(frame, 4)? != header.crc(covered) {
        return None;
    }
    let start = offset + FRAME_HEAD;
    Some(Frame {
        sequence: u64_at(frame, 8)?,
        checkpoint: u64_at(frame, 16)?,
        payload: start..start + length,
    })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    bytes.try_into().ok().map(u32::from_be_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + 8)?;
    bytes.try_into().ok().map(u64::from_be_bytes)
}
