//! Tar archives, read entry by entry: ustar, PAX, GNU and star, sparse files included.
//!
//! Written for hostile input: every name, list and attribute has a bound, and data is never held in
//! memory. Source: POSIX `pax`, "ustar Interchange Format"; GNU tar manual, "Sparse Formats".

use std::io::{self, BufRead, Read};

use super::Error;

/// Bytes of a block.
pub(super) const BLOCK: usize = 512;
/// Longest extended header or long name accepted: far more than any filesystem can store.
const SPECIAL_MAX_BYTES: u64 = 1 << 20;
/// Extended attributes of one entry; Linux lists at most 64 KiB of names.
const XATTRS_MAX: usize = 1024;
/// Data segments of one sparse file.
const SEGMENTS_MAX: usize = 1 << 17;

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
}

/// What extension headers said about the next entry.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    modified: Option<Time>,
    accessed: Option<Time>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: Sparse,
}

/// GNU's sparse extensions: versions 0.0 (pairs), 0.1 (map) and 1.0 (map before the data).
#[derive(Default)]
struct Sparse {
    version_1: bool,
    name: Option<Vec<u8>>,
    size: Option<u64>,
    numbers: Vec<u64>,
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
        }
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

    /// GNU's old form: the map is in the header and in blocks behind it.
    fn old_sparse(&mut self, header: &Header<'_>, entry: &mut Entry) -> Result<(), Error> {
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

    fn pax_sparse(&mut self, sparse: &mut Sparse, entry: &mut Entry) -> Result<(), Error> {
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

/// Checks a sparse map: in order, without overlap, within the file, and as long as the data.
fn segments(numbers: &[u64], size: u64, data: u64) -> Option<Vec<(u64, u64)>> {
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

struct Header<'a>(&'a [u8; BLOCK]);

impl Header<'_> {
    fn checksum_fits(&self) -> bool {
        let Some(stored) = self.number(148..156) else {
            return false;
        };
        let byte = |(index, byte): (usize, &u8)| {
            if (148..156).contains(&index) {
                b' '
            } else {
                *byte
            }
        };
        let unsigned: u64 = self.0.iter().enumerate().map(byte).map(u64::from).sum();
        // Some old programs summed signed bytes.
        let signed: i64 = self
            .0
            .iter()
            .enumerate()
            .map(byte)
            .map(|b| i64::from(b.cast_signed()))
            .sum();
        stored == unsigned || i64::try_from(stored) == Ok(signed)
    }

    fn path(&self) -> Vec<u8> {
        let name = until_nul(&self.0[..100]);
        if &self.0[257..263] != b"ustar\0" {
            return name;
        }
        // star keeps times where ustar has the end of the prefix.
        let prefix = if &self.0[508..512] == b"tar\0" {
            &self.0[345..476]
        } else {
            &self.0[345..500]
        };
        let mut path = until_nul(prefix);
        if path.is_empty() {
            return name;
        }
        path.push(b'/');
        path.extend_from_slice(&name);
        path
    }

    fn number(&self, range: std::ops::Range<usize>) -> Option<u64> {
        parse_number(&self.0[range])
    }

    fn signed(&self, range: std::ops::Range<usize>) -> Option<i64> {
        let field = &self.0[range];
        // Base 256, two's complement, with the sign in the second highest bit.
        if field[0] == 0xff {
            let low = field.last_chunk::<8>()?;
            return Some(i64::from_be_bytes(*low));
        }
        i64::try_from(parse_number(field)?).ok()
    }
}

/// Octal digits among spaces and NULs, or base 256 when the highest bit is set.
fn parse_number(field: &[u8]) -> Option<u64> {
    let (first, rest) = field.split_first()?;
    if *first == 0x80 {
        let high = rest.len().checked_sub(8);
        let (high, low) = rest.split_at(high.unwrap_or(0));
        return high.iter().all(|b| *b == 0).then(|| {
            low.iter()
                .fold(0, |number, byte| number << 8 | u64::from(*byte))
        });
    }
    let is_space = |b: &u8| matches!(b, b' ' | 0);
    let start = field
        .iter()
        .position(|b| !is_space(b))
        .unwrap_or(field.len());
    let field = &field[start..];
    let end = field.iter().position(is_space).unwrap_or(field.len());
    field[..end]
        .iter()
        .try_fold(0_u64, |number, byte| match byte {
            b'0'..=b'7' => number.checked_mul(8)?.checked_add(u64::from(byte - b'0')),
            _ => None,
        })
}

fn until_nul(field: &[u8]) -> Vec<u8> {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    field[..end].to_vec()
}

/// Records of the form `<length> <key>=<value>\n`, where the length counts the whole record.
fn parse_pax(mut data: &[u8], extensions: &mut Extensions) -> Result<(), Error> {
    let bad = || malformed(b"", "extended header record");
    while !data.is_empty() {
        let space = data
            .iter()
            .take(20)
            .position(|b| *b == b' ')
            .ok_or_else(bad)?;
        let length = decimal(&data[..space])
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| (space + 2..=data.len()).contains(n))
            .ok_or_else(bad)?;
        let (record, rest) = data.split_at(length);
        data = rest;
        let record = record[space + 1..].strip_suffix(b"\n").ok_or_else(bad)?;
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(bad)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        pax_record(key, value, extensions).ok_or_else(bad)?;
    }
    Ok(())
}

fn pax_record(key: &[u8], value: &[u8], extensions: &mut Extensions) -> Option<()> {
    let sparse = &mut extensions.sparse;
    // A NUL in a name would be cut off somewhere below, and mean another file.
    let name = || (!value.contains(&0)).then(|| value.to_vec());
    match key {
        // An empty value takes the field back.
        b"path" => extensions.path = Some(name()?).filter(|v| !v.is_empty()),
        b"linkpath" => extensions.link = Some(name()?).filter(|v| !v.is_empty()),
        b"size" if !value.is_empty() => extensions.size = Some(decimal(value)?),
        b"uid" if !value.is_empty() => extensions.uid = Some(decimal(value)?),
        b"gid" if !value.is_empty() => extensions.gid = Some(decimal(value)?),
        b"mtime" if !value.is_empty() => extensions.modified = Some(pax_time(value)?),
        b"atime" if !value.is_empty() => extensions.accessed = Some(pax_time(value)?),
        b"GNU.sparse.major" => sparse.version_1 = value == b"1",
        b"GNU.sparse.name" => sparse.name = Some(name()?),
        b"GNU.sparse.size" | b"GNU.sparse.realsize" => sparse.size = Some(decimal(value)?),
        b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => sparse.numbers.push(decimal(value)?),
        b"GNU.sparse.map" if !value.is_empty() => {
            sparse.numbers = value
                .split(|b| *b == b',')
                .map(decimal)
                .collect::<Option<_>>()?;
        }
        _ => {
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                if name.is_empty() || name.contains(&0) {
                    return None;
                }
                if extensions.xattrs.len() >= XATTRS_MAX {
                    return None;
                }
                extensions.xattrs.retain(|(have, _)| have != name);
                extensions.xattrs.push((name.to_vec(), value.to_vec()));
            }
        }
    }
    (sparse.numbers.len() <= SEGMENTS_MAX * 2).then_some(())
}

fn decimal(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds with an optional fraction and sign.
fn pax_time(text: &[u8]) -> Option<Time> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanos: u32 = digits.parse().ok()?;
    // A negative time counts its fraction downwards.
    Some(if whole.starts_with('-') && nanos > 0 {
        Time {
            seconds: seconds.checked_sub(1)?,
            nanos: 1_000_000_000 - nanos,
        }
    } else {
        Time { seconds, nanos }
    })
}

#[cfg(test)]
mod tests;
