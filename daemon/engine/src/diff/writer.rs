//! Tar headers, byte for byte reproducible: ustar, with PAX records only for what ustar cannot say.
//!
//! The choices that the format leaves open (names of extended headers, zeros in their fields) are
//! those of Go's `archive/tar`, so that equal changes give the layer other tools would write.
//! Source: POSIX `pax`, "ustar Interchange Format" and "pax Extended Header".

use std::fs::File;
use std::io::{self, Read as _};

use super::Error;
use super::tar::BLOCK;

/// Bytes of the name and link fields.
const NAME_BYTES: usize = 100;

/// What a header says.
#[derive(Debug, Clone, Default)]
pub(super) struct Header {
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) flag: u8,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size_bytes: u64,
    /// Seconds since the epoch.
    pub(super) modified: i64,
    pub(super) device: (u32, u32),
    /// Value of attribute `security.capability`.
    pub(super) capability: Option<Vec<u8>>,
}

/// Hands `write` the data of an entry whose header says `size` bytes, padded to whole blocks. `shown`
/// names the file in errors; `buffer` is what is read at a time.
///
/// # Errors
/// When the file cannot be read or became shorter, and those of `write`.
pub(super) fn data(
    file: &mut File,
    size: u64,
    shown: &[u8],
    buffer: &mut [u8],
    write: &mut impl FnMut(&[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut left = size;
    while left > 0 {
        let want = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        match file.read(&mut buffer[..want]) {
            // The header already says otherwise.
            Ok(0) => return Err(Error::entry(shown, "file became shorter while it was read")),
            Ok(read) => {
                left -= read as u64;
                write(&buffer[..read])?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io("read", shown)(error)),
        }
    }
    let padding = size.next_multiple_of(BLOCK as u64) - size;
    write(&[0; BLOCK][..usize::try_from(padding).expect("less than a block")])
}

impl Header {
    /// The header, after an extended one where needed.
    pub(super) fn encode(&self) -> Vec<u8> {
        let records = self.records();
        let mut bytes = Vec::with_capacity(3 * BLOCK);
        if !records.is_empty() {
            let mut data: Vec<u8> = Vec::new();
            for (key, value) in &records {
                data.extend_from_slice(&record(key, value));
            }
            bytes.extend_from_slice(&block(&extended_name(&self.name), b'x', |block| {
                for field in [100..108, 108..116, 116..124, 136..148] {
                    octal(&mut block[field], 0);
                }
                octal(&mut block[124..136], data.len() as u64);
            }));
            bytes.extend_from_slice(&data);
            bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        }
        let plain = |text: &[u8]| -> Vec<u8> {
            let ascii = text.iter().copied().filter(u8::is_ascii);
            if records.is_empty() {
                text.to_vec()
            } else {
                ascii.collect()
            }
        };
        bytes.extend_from_slice(&block(&plain(&self.name), self.flag, |block| {
            octal(&mut block[100..108], self.mode.into());
            octal(&mut block[108..116], self.uid.into());
            octal(&mut block[116..124], self.gid.into());
            octal(&mut block[124..136], self.size_bytes);
            octal(
                &mut block[136..148],
                u64::try_from(self.modified).unwrap_or(0),
            );
            text(&mut block[157..257], &plain(&self.link));
            octal(&mut block[329..337], self.device.0.into());
            octal(&mut block[337..345], self.device.1.into());
        }));
        bytes
    }

    /// What ustar has no room for, by key.
    fn records(&self) -> Vec<(&'static str, Vec<u8>)> {
        let mut records = Vec::new();
        let mut number = |key, value: i128, bits: u32| {
            if value < 0 || value >> bits != 0 {
                records.push((key, value.to_string().into_bytes()));
            }
        };
        number("gid", self.gid.into(), 21);
        number("mtime", self.modified.into(), 33);
        number("size", self.size_bytes.into(), 33);
        number("uid", self.uid.into(), 21);
        for (key, value) in [("linkpath", &self.link), ("path", &self.name)] {
            if value.len() > NAME_BYTES || !value.is_ascii() {
                records.push((key, value.clone()));
            }
        }
        if let Some(value) = &self.capability {
            records.push(("SCHILY.xattr.security.capability", value.clone()));
        }
        records.sort_by_key(|(key, _)| *key);
        records
    }
}

fn record(key: &str, value: &[u8]) -> Vec<u8> {
    // Space, equals sign, newline.
    let rest = key.len() + value.len() + 3;
    let mut length = rest + rest.to_string().len();
    if length.to_string().len() + rest != length {
        length = rest + length.to_string().len();
    }
    let mut record = format!("{length} {key}=").into_bytes();
    record.extend_from_slice(value);
    record.push(b'\n');
    record
}

/// `PaxHeaders.0` beside the entry, cut to the field.
fn extended_name(name: &[u8]) -> Vec<u8> {
    let at = name
        .iter()
        .rposition(|b| *b == b'/')
        .map_or(0, |slash| slash + 1);
    let mut found = name[..at].to_vec();
    found.extend_from_slice(b"PaxHeaders.0");
    if at < name.len() {
        found.push(b'/');
        found.extend_from_slice(&name[at..]);
    }
    found.retain(u8::is_ascii);
    found.truncate(NAME_BYTES);
    while found.ends_with(b"/") {
        found.pop();
    }
    found
}

fn block(name: &[u8], flag: u8, fill: impl FnOnce(&mut [u8; BLOCK])) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    text(&mut block[..NAME_BYTES], name);
    block[156] = flag;
    block[257..265].copy_from_slice(b"ustar\x0000");
    fill(&mut block);
    block[148..156].copy_from_slice(b"        ");
    let sum: u64 = block.iter().map(|b| u64::from(*b)).sum();
    octal(&mut block[148..155], sum);
    block
}

/// The start of `value`; a cut name does not end in a slash, which would make it a directory.
fn text(field: &mut [u8], value: &[u8]) {
    let length = field.len().min(value.len());
    field[..length].copy_from_slice(&value[..length]);
    if value.len() > field.len() {
        while let Some(last) = field.iter().rposition(|b| *b != 0)
            && field[last] == b'/'
        {
            field[last] = 0;
        }
    }
}

/// Digits with leading zeros and a final NUL; zero for what does not fit, which a record then says.
fn octal(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    let value = if value >> (3 * digits).min(63) == 0 {
        value
    } else {
        0
    };
    let text = format!("{value:0digits$o}");
    field[..digits].copy_from_slice(text.as_bytes());
    field[digits] = 0;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_lengths_count_themselves() {
        assert_eq!(record("path", b"a"), b"9 path=a\n");
        // Where counting itself makes the length one digit longer.
        assert_eq!(record("path", b"ab"), b"11 path=ab\n");
        for length in 80..110 {
            let record = record("path", &vec![b'x'; length]);
            let said: usize =
                std::str::from_utf8(&record[..record.iter().position(|b| *b == b' ').unwrap()])
                    .unwrap()
                    .parse()
                    .unwrap();
            assert_eq!(said, record.len());
        }
    }

    #[test]
    fn plain_entries_are_one_block_of_ustar() {
        let header = Header {
            name: b"etc/hosts".to_vec(),
            flag: b'0',
            mode: 0o644,
            size_bytes: 5,
            modified: 1,
            ..Header::default()
        };
        let bytes = header.encode();
        assert_eq!(bytes.len(), BLOCK);
        assert_eq!(&bytes[100..108], b"0000644\0");
        assert_eq!(&bytes[124..148], b"00000000005\x0000000000001\0");
        assert_eq!(&bytes[257..265], b"ustar\x0000");
        assert_eq!(bytes[155], b' ');
    }
}
