//! `/proc/self/mountinfo`, as far as unmounting needs it.
//!
//! Source: `proc(5)`, "mountinfo".

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount of this mount namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Type of filesystem.
    pub fstype: String,
    /// Source as the filesystem shows it.
    pub source: String,
    /// Options of the superblock.
    pub super_options: String,
}

/// The mounts at `path` and below it, oldest first.
///
/// # Errors
/// When the table cannot be read.
pub fn entries_below(path: &Path) -> io::Result<Vec<Entry>> {
    let mut reader = BufReader::new(File::open("/proc/self/mountinfo")?);
    let mut line = Vec::new();
    let mut found = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        if let Some(entry) = parse(line.strip_suffix(b"\n").unwrap_or(&line))
            && entry.mountpoint.starts_with(path)
        {
            found.push(entry);
        }
        line.clear();
    }
    Ok(found)
}

/// Whether something is mounted exactly at `path`.
///
/// # Errors
/// When the table cannot be read.
pub fn is_mountpoint(path: &Path) -> io::Result<bool> {
    Ok(entries_below(path)?
        .iter()
        .any(|entry| entry.mountpoint == path))
}

fn parse(line: &[u8]) -> Option<Entry> {
    let mut fields = line.split(|b| *b == b' ');
    let mountpoint = unescape(fields.nth(4)?);
    // Optional fields end with a single dash.
    fields.find(|field| *field == b"-")?;
    let text = |field: &[u8]| unescape(field).to_string_lossy().into_owned();
    Some(Entry {
        mountpoint: PathBuf::from(mountpoint),
        fstype: text(fields.next()?),
        source: text(fields.next()?),
        super_options: text(fields.next().unwrap_or_default()),
    })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        rest = tail;
        let octal = |b: &u8| (b'0'..=b'7').contains(b);
        match tail {
            [a @ b'0'..=b'3', b, c, after @ ..] if *first == b'\\' && octal(b) && octal(c) => {
                plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => plain.push(*first),
        }
    }
    OsString::from_vec(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaped_paths_and_optional_fields_are_read() {
        let line: &[u8] = br"36 35 98:0 /m1 /mnt/a\040b\134c rw,noatime shared:1 master:2 - ext4 /dev/r\011t rw,errors=continue";
        let entry = parse(line).unwrap();
        assert_eq!(entry.mountpoint, PathBuf::from(r"/mnt/a b\c"));
        assert_eq!(
            (entry.fstype.as_str(), entry.source.as_str()),
            ("ext4", "/dev/r\tt")
        );
        assert_eq!(entry.super_options, "rw,errors=continue");
        assert_eq!(parse(b"36 35 98:0 / /mnt rw no dash"), None);
    }
}
