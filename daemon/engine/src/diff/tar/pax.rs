//! Extended headers: records of keys and values that speak of the next entry.

use super::sparse::{SEGMENTS_MAX, Sparse};
use super::{Time, malformed};
use crate::diff::Error;

/// Extended attributes of one entry; Linux lists at most 64 KiB of names.
const XATTRS_MAX: usize = 1024;

/// What extension headers said about the next entry.
#[derive(Default)]
pub(super) struct Extensions {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) modified: Option<Time>,
    pub(super) accessed: Option<Time>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: Sparse,
}

/// Records of the form `<length> <key>=<value>\n`, where the length counts the whole record.
pub(super) fn parse_pax(mut data: &[u8], extensions: &mut Extensions) -> Result<(), Error> {
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
pub(super) fn pax_time(text: &[u8]) -> Option<Time> {
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
