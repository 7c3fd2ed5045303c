//! The whole database in one file, to rebuild it from and to move it.
//!
//! Export file: `lighter-kv 2\n`, the number of the newest commit it has whole (u64 BE), then per pair
//! key length (u32 BE), value length (u32 BE), key, value, and at the end a record of key length
//! `u32::MAX` with the number of pairs (u64 BE). Version 1 has no number.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;

use crate::{Backend, Error, Key, Value};

/// First line of an export; the number is the version of its format.
const EXPORT_HEADER: &[u8] = b"lighter-kv 2\n";
/// First line of the format without a number.
const EXPORT_HEADER_1: &[u8] = b"lighter-kv 1\n";
/// Key length that marks the end record of an export.
const EXPORT_END: u32 = u32::MAX;
/// Pairs read at a time while exporting.
const EXPORT_PAGE: usize = 1024;
/// Longest key or value an import accepts, in bytes.
const IMPORT_MAX_BYTES: u32 = 64 << 20;

/// What an export holds.
#[derive(Debug, Default)]
pub(crate) struct Export {
    pub(crate) pairs: Vec<(Key, Value)>,
    /// The newest commit that it has whole; 0 when it does not say.
    pub(crate) sequence: u64,
}

/// Writes all pairs of `backend`, atomically and durably. Returns how many.
pub(crate) fn write(backend: &dyn Backend, path: &Path) -> Result<u64, Error> {
    let failed = |source| Error::Io {
        operation: "write export",
        source,
    };
    let temporary = path.with_extension("tmp");
    let mut out = BufWriter::new(File::create(&temporary).map_err(failed)?);
    out.write_all(EXPORT_HEADER).map_err(failed)?;
    // Before the first pair is read: what changes meanwhile is in the journal behind this number.
    let sequence = backend.sequence();
    out.write_all(&sequence.to_be_bytes()).map_err(failed)?;
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

/// Reads a whole export.
pub(crate) fn read(path: &Path) -> Result<Export, Error> {
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
    let sequence = if header == EXPORT_HEADER {
        read_u64(&mut input).map_err(|_| damaged("cut short"))?
    } else if header == EXPORT_HEADER_1 {
        0
    } else {
        return Err(damaged("unknown header"));
    };
    let mut pairs = Vec::new();
    loop {
        let key_length = read_u32(&mut input).map_err(|_| damaged("cut short"))?;
        if key_length == EXPORT_END {
            let count = read_u64(&mut input).map_err(|_| damaged("cut short"))?;
            if count != pairs.len() as u64 {
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
    Ok(Export { pairs, sequence })
}

fn read_u32(input: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    input.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn read_u64(input: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    input.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}
