//! Tar archives, read entry by entry: ustar, PAX, GNU and star, sparse files included.
//!
//! Written for hostile input: every name, list and attribute has a bound, and data is never held in
//! memory. Source: POSIX `pax`, "ustar Interchange Format"; GNU tar manual, "Sparse Formats".
//! The fields of a block are read in `header.rs`, extended headers in `pax.rs`, the maps of sparse
//! files in `sparse.rs`.

mod header;
mod pax;
mod sparse;

use std::io::{self, BufRead, Read};

use self::header::{Header, until_nul};
use self::pax::{Extensions, parse_pax};
use super::Error;

/// Bytes of a block.
pub(super) const BLOCK: usize = 512;
/// Longest extended header or long name accepted: far more than any filesystem can store.
const SPECIAL_MAX_BYTES: u64 = 1 << 20;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
    /// Anything else; the type flag.
    Other(u8),
}

/// Seconds and nanoseconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Time {
    pub(super) seconds: i64,
    pub(super) nanos: u32,
}

/// One member of an archive, extensions folded in.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) kind: Kind,
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) modified: Time,
    pub(super) accessed: Option<Time>,
    /// Length of the file; for a sparse one, holes included.
    pub(super) size_bytes: u64,
    pub(super) device: (u32, u32),
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the data of a sparse file goes: offset and length of each segment.
    pub(super) segments: Option<Vec<(u64, u64)>>,
}

/// Reads an archive; after [`Archive::next`], [`Archive::data`] gives the entry's bytes.
pub(super) struct Archive<R> {
    reader: R,
    /// Bytes of the current entry not read yet.
    left: u64,
    /// Bytes that fill the entry's last block.
    padding: u64,
    /// Whether the mark of its end was read.
    ended: bool,
}

fn malformed(path: &[u8], reason: &str) -> Error {
    Error::entry(path, format!("invalid tar header: {reason}"))
}

impl<R: BufRead> Archive<R> {
    pub(super) fn new(reader: R) -> Self {
        Self {
            reader,
            left: 0,
            padding: 0,
            ended: false,
        }
    }

    /// Whether the archive said that it ends: else its reader ended, which may have been cut off between
    /// two entries.
    pub(super) fn is_whole(&self) -> bool {
        self.ended
    }

    /// The next entry; `None` at the end of the archive.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, Error> {
        let mut extensions = Extensions::default();
        loop {
            self.skip(self.left)?;
            self.left = 0;
            // Some writers end after the last byte of data, without filling its block.
            if self.padding > 0 && self.reader.fill_buf().map_err(Error::Stream)?.is_empty() {
                return Ok(None);
            }
            self.skip(self.padding)?;
            self.padding = 0;
            let Some(block) = self.block()? else {
                return Ok(None);
            };
            if block == [0; BLOCK] {
                // Two empty blocks end an archive; what follows them is of no concern.
                self.ended = true;
                return match self.block()? {
                    Some(second) if second != [0; BLOCK] => {
                        Err(malformed(b"", "data after an empty block"))
                    }
                    _ => Ok(None),
                };
            }
            let header = Header(&block);
            if !header.checksum_fits() {
                return Err(malformed(&header.path(), "wrong checksum"));
            }
            let size = header
                .number(124..136)
                .ok_or_else(|| malformed(&header.path(), "size"))?;
            match block[156] {
                b'x' => parse_pax(&self.special(size)?, &mut extensions)?,
                // Global headers say nothing that a layer needs.
                b'g' => self.expect(size),
                b'L' => extensions.path = Some(until_nul(&self.special(size)?)),
                b'K' => extensions.link = Some(until_nul(&self.special(size)?)),
                _ => return self.entry(&header, size, extensions).map(Some),
            }
        }
    }

    /// The rest of the current entry's data.
    pub(super) fn data(&mut self) -> Data<'_, R> {
        Data { archive: self }
    }

    fn expect(&mut self, size: u64) {
        self.left = size;
        self.padding = size.next_multiple_of(BLOCK as u64).wrapping_sub(size);
    }

    fn entry(
        &mut self,
        header: &Header<'_>,
        size: u64,
        mut extensions: Extensions,
    ) -> Result<Entry, Error> {
        let mut path = extensions.path.take().unwrap_or_else(|| header.path());
        let bad = |what: &str| malformed(&header.path(), what);
        let flag = header.0[156];
        let kind = match flag {
            b'0' | 0 if path.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => Kind::Other(other),
        };
        let size = extensions.size.unwrap_or(size);
        if size > u64::MAX / 4 {
            return Err(bad("size"));
        }
        // Only files have data; other types may carry a size that means nothing.
        let has_data = matches!(kind, Kind::File | Kind::Other(_));
        self.expect(if has_data { size } else { 0 });
        let mut entry = Entry {
            kind,
            link: extensions
                .link
                .take()
                .unwrap_or_else(|| until_nul(&header.0[157..257])),
            mode: u32::try_from(header.number(100..108).ok_or_else(|| bad("mode"))? & 0o7777)
                .expect("twelve bits"),
            uid: pick(extensions.uid, || header.number(108..116)).ok_or_else(|| bad("uid"))?,
            gid: pick(extensions.gid, || header.number(116..124)).ok_or_else(|| bad("gid"))?,
            modified: match extensions.modified {
                Some(time) => time,
                None => Time {
                    seconds: header.signed(136..148).ok_or_else(|| bad("mtime"))?,
                    nanos: 0,
                },
            },
            accessed: extensions.accessed,
            size_bytes: if has_data { size } else { 0 },
            device: (0, 0),
            xattrs: std::mem::take(&mut extensions.xattrs),
            segments: None,
            path: Vec::new(),
        };
        if matches!(kind, Kind::CharDevice | Kind::BlockDevice) {
            let number = |range, what| {
                let number = header.number(range).and_then(|n| u32::try_from(n).ok());
                number.ok_or_else(|| bad(what))
            };
            entry.device = (
                number(329..337, "device major")?,
                number(337..345, "device minor")?,
            );
        }
        if flag == b'S' {
            self.old_sparse(header, &mut entry)?;
        } else if kind == Kind::File {
            self.pax_sparse(&mut extensions.sparse, &mut entry)?;
            if let Some(name) = extensions.sparse.name.take() {
                path = name;
            }
        }
        entry.path = path;
        Ok(entry)
    }

    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, Error> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.reader.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(Error::Stream(io::ErrorKind::UnexpectedEof.into())),
                Ok(more) => filled += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Stream(error)),
            }
        }
        Ok(Some(block))
    }

    fn special(&mut self, size: u64) -> Result<Vec<u8>, Error> {
        if size > SPECIAL_MAX_BYTES {
            return Err(malformed(b"", "extended header is larger than 1 MiB"));
        }
        self.expect(size);
        let mut data = Vec::new();
        self.data().read_to_end(&mut data).map_err(Error::Stream)?;
        Ok(data)
    }

    fn skip(&mut self, mut bytes: u64) -> Result<(), Error> {
        while bytes > 0 {
            let available = self.reader.fill_buf().map_err(Error::Stream)?.len();
            if available == 0 {
                return Err(Error::Stream(io::ErrorKind::UnexpectedEof.into()));
            }
            let step = usize::try_from(bytes).map_or(available, |b| b.min(available));
            self.reader.consume(step);
            bytes -= step as u64;
        }
        Ok(())
    }
}

fn pick(first: Option<u64>, second: impl FnOnce() -> Option<u64>) -> Option<u64> {
    first.or_else(second)
}

/// The data of the current entry.
pub(super) struct Data<'a, R> {
    archive: &'a mut Archive<R>,
}

impl<R: BufRead> BufRead for Data<'_, R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.archive.left == 0 {
            return Ok(&[]);
        }
        let left = usize::try_from(self.archive.left).unwrap_or(usize::MAX);
        let available = self.archive.reader.fill_buf()?;
        if available.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(&available[..available.len().min(left)])
    }

    fn consume(&mut self, amount: usize) {
        self.archive.reader.consume(amount);
        self.archive.left -= amount as u64;
    }
}

impl<R: BufRead> Read for Data<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(buf.len());
        buf[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}

#[cfg(test)]
mod tests;
