//! Sparse files: which parts of a file the data of an entry is.

use std::io::BufRead;

use super::header::{Header, parse_number};
use super::{Archive, BLOCK, Entry, malformed};
use crate::diff::Error;

/// Data segments of one sparse file.
pub(super) const SEGMENTS_MAX: usize = 1 << 17;

/// GNU's sparse extensions: versions 0.0 (pairs), 0.1 (map) and 1.0 (map before the data).
#[derive(Default)]
pub(super) struct Sparse {
    pub(super) version_1: bool,
    pub(super) name: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) numbers: Vec<u64>,
}

impl<R: BufRead> Archive<R> {
    /// GNU's old form: the map is in the header and in blocks behind it.
    pub(super) fn old_sparse(
        &mut self,
        header: &Header<'_>,
        entry: &mut Entry,
    ) -> Result<(), Error> {
        let bad = || malformed(&header.path(), "sparse map");
        let mut numbers = Vec::new();
        let mut take = |fields: &[u8], count: usize| -> Result<bool, Error> {
            for field in fields.chunks_exact(12).take(count * 2) {
                if field[0] == 0 {
                    return Ok(false);
                }
                numbers.push(parse_number(field).ok_or_else(bad)?);
            }
            if numbers.len() > SEGMENTS_MAX * 2 {
                return Err(bad());
            }
            Ok(true)
        };
        take(&header.0[386..482], 4)?;
        let mut extended = header.0[482] != 0;
        while extended {
            let block = self.block()?.ok_or_else(bad)?;
            take(&block[..504], 21)?;
            extended = block[504] != 0;
        }
        entry.size_bytes = header.number(483..495).ok_or_else(bad)?;
        entry.segments = Some(segments(&numbers, entry.size_bytes, self.left).ok_or_else(bad)?);
        Ok(())
    }

    /// The map that extended headers gave or announced.
    pub(super) fn pax_sparse(
        &mut self,
        sparse: &mut Sparse,
        entry: &mut Entry,
    ) -> Result<(), Error> {
        let Some(size) = sparse.size else {
            return Ok(());
        };
        let bad = || malformed(&entry.path, "sparse map");
        if sparse.version_1 {
            sparse.numbers = self.map_before_data().map_err(|e| e.unwrap_or_else(bad))?;
        }
        entry.size_bytes = size;
        entry.segments = Some(segments(&sparse.numbers, size, self.left).ok_or_else(bad)?);
        Ok(())
    }

    /// Version 1.0: decimal numbers, one a line, in whole blocks before the data.
    fn map_before_data(&mut self) -> Result<Vec<u64>, Option<Error>> {
        let mut numbers = Vec::new();
        let mut wanted = None;
        let mut current: Option<u64> = None;
        loop {
            if self.left < BLOCK as u64 {
                return Err(None);
            }
            let block = self.block().map_err(Some)?.ok_or(None)?;
            self.left -= BLOCK as u64;
            for byte in block {
                match byte {
                    b'0'..=b'9' => {
                        let digit = u64::from(byte - b'0');
                        let more = current.unwrap_or(0).checked_mul(10);
                        current = Some(more.and_then(|n| n.checked_add(digit)).ok_or(None)?);
                    }
                    b'\n' => {
                        let number = current.take().ok_or(None)?;
                        match wanted {
                            None => {
                                let count = usize::try_from(number).map_err(|_| None)?;
                                if count > SEGMENTS_MAX {
                                    return Err(None);
                                }
                                wanted = Some(count * 2);
                            }
                            Some(_) => numbers.push(number),
                        }
                        if wanted == Some(numbers.len()) {
                            return Ok(numbers);
                        }
                    }
                    _ => return Err(None),
                }
            }
        }
    }
}

/// Checks a sparse map: in order, without overlap, within the file, and as long as the data.
pub(super) fn segments(numbers: &[u64], size: u64, data: u64) -> Option<Vec<(u64, u64)>> {
    if !numbers.len().is_multiple_of(2) {
        return None;
    }
    let mut end = 0_u64;
    let mut total = 0_u64;
    let mut found = Vec::with_capacity(numbers.len() / 2);
    for pair in numbers.chunks_exact(2) {
        let (offset, length) = (pair[0], pair[1]);
        if offset < end {
            return None;
        }
        end = offset.checked_add(length)?;
        total = total.checked_add(length)?;
        if length > 0 {
            found.push((offset, length));
        }
    }
    (end <= size && total == data).then_some(found)
}
