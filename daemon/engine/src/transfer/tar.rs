//! Tar archives of images, read and written as streams with bounded memory.
//!
//! Reading knows ustar, GNU long names and PAX paths, links and sizes: what `docker save`, skopeo
//! and containerd write. Writing makes ustar, the same bytes for the same content.

use std::collections::BTreeMap;

use bytes::{Buf as _, Bytes, BytesMut};
use futures::{Stream, StreamExt as _};
use tokio::io::{AsyncWrite, AsyncWriteExt as _};

use super::Error;

const BLOCK: usize = 512;
/// Bytes of the name field of a header.
const NAME_FIELD: usize = 100;
/// Most bytes of a long name or a PAX header.
const MAX_EXTENSION_BYTES: u64 = 64 << 10;
/// Entries of one archive, at most.
const MAX_ENTRIES: usize = 200_000;
/// Longest name, in bytes.
const MAX_NAME_BYTES: usize = 4096;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    /// To a path relative to the entry's directory.
    Symlink(String),
    /// To another entry.
    Hardlink(String),
    /// Directories and the rest: of no interest in an archive of images.
    Other,
}

/// One entry; its data follows in the reader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Clean relative path: no leading `/` or `./`, no `..`.
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) size_bytes: u64,
}

/// Reads entries from a stream of bytes.
pub(super) struct Reader<S> {
    source: futures::stream::Fuse<S>,
    buffer: BytesMut,
    /// Data of the current entry not read yet, and the padding after it.
    left: u64,
    padding: u64,
    entries: usize,
}

impl<S: Stream<Item = std::io::Result<Bytes>> + Unpin> Reader<S> {
    pub(super) fn new(source: S) -> Self {
        Self {
            // A cut archive is noticed by asking once more.
            source: source.fuse(),
            buffer: BytesMut::new(),
            left: 0,
            padding: 0,
            entries: 0,
        }
    }

    /// Whether more bytes came.
    async fn more(&mut self) -> Result<bool, Error> {
        match self.source.next().await {
            None => Ok(false),
            Some(Ok(piece)) => {
                self.buffer.extend_from_slice(&piece);
                Ok(true)
            }
            Some(Err(source)) => Err(Error::Io {
                operation: "read archive",
                source,
            }),
        }
    }

    /// The next piece of the current entry's data; `None` at its end.
    pub(super) async fn data(&mut self) -> Result<Option<Bytes>, Error> {
        if self.left == 0 {
            return Ok(None);
        }
        while self.buffer.is_empty() {
            if !self.more().await? {
                return Err(Error::archive(
                    "archive ends within an entry: unexpected EOF",
                ));
            }
        }
        let take = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(self.buffer.len());
        self.left -= take as u64;
        Ok(Some(self.buffer.split_to(take).freeze()))
    }

    /// All data of the current entry, which must be at most `limit_bytes`.
    pub(super) async fn all(&mut self, limit_bytes: u64) -> Result<Vec<u8>, Error> {
        if self.left > limit_bytes {
            return Err(Error::archive(format!(
                "archive entry of {} bytes where at most {limit_bytes} may be",
                self.left
            )));
        }
        let mut all = Vec::new();
        while let Some(piece) = self.data().await? {
            all.extend_from_slice(&piece);
        }
        Ok(all)
    }

    /// Reads over what is left of the current entry.
    async fn skip(&mut self) -> Result<(), Error> {
        while self.data().await?.is_some() {}
        while self.padding > 0 {
            if self.buffer.is_empty() && !self.more().await? {
                // Some writers leave the last padding out.
                self.padding = 0;
                break;
            }
            let take = usize::try_from(self.padding)
                .unwrap_or(BLOCK)
                .min(self.buffer.len());
            self.buffer.advance(take);
            self.padding -= take as u64;
        }
        Ok(())
    }

    async fn block(&mut self) -> Result<Option<[u8; BLOCK]>, Error> {
        while self.buffer.len() < BLOCK {
            if !self.more().await? {
                if self.buffer.is_empty() {
                    return Ok(None);
                }
                return Err(Error::archive(
                    "archive ends within a header: unexpected EOF",
                ));
            }
        }
        let mut block = [0; BLOCK];
        self.buffer.copy_to_slice(&mut block);
        Ok(Some(block))
    }

    /// The next entry; `None` at the end of the archive.
    pub(super) async fn next(&mut self) -> Result<Option<Entry>, Error> {
        let mut long_name = None;
        let mut long_link = None;
        let mut pax = BTreeMap::new();
        loop {
            self.skip().await?;
            let Some(header) = self.block().await? else {
                return Ok(None);
            };
            if header.iter().all(|b| *b == 0) {
                return Ok(None);
            }
            self.entries += 1;
            if self.entries > MAX_ENTRIES {
                return Err(Error::archive(format!(
                    "more than {MAX_ENTRIES} archive entries"
                )));
            }
            check_sum(&header)?;
            let size_bytes = number(&header[124..136])?;
            self.enter(size_bytes);
            match header[156] {
                b'L' => long_name = Some(text(&self.all(MAX_EXTENSION_BYTES).await?)),
                b'K' => long_link = Some(text(&self.all(MAX_EXTENSION_BYTES).await?)),
                b'x' => pax = pax_records(&self.all(MAX_EXTENSION_BYTES).await?),
                b'g' => drop(self.all(MAX_EXTENSION_BYTES).await?),
                flag => {
                    let size_bytes = match pax.get("size") {
                        Some(size) => {
                            let size = size.parse();
                            size.map_err(|_| Error::archive("malformed size in a PAX header"))?
                        }
                        None => size_bytes,
                    };
                    let name = pax
                        .remove("path")
                        .or(long_name)
                        .unwrap_or_else(|| ustar_name(&header));
                    let link = pax.remove("linkpath").or(long_link);
                    let link = link.unwrap_or_else(|| text(&header[157..257]));
                    let kind = match flag {
                        0 | b'0' | b'7' => Kind::File,
                        b'1' => Kind::Hardlink(link),
                        b'2' => Kind::Symlink(link),
                        _ => Kind::Other,
                    };
                    // Only files have data, whatever a link's header says.
                    let size_bytes = if kind == Kind::File { size_bytes } else { 0 };
                    self.enter(size_bytes);
                    let kind_of = |clean: Option<String>| match clean {
                        Some(name) => (name, kind),
                        None => (String::new(), Kind::Other),
                    };
                    let (name, kind) = kind_of(clean(&name));
                    return Ok(Some(Entry {
                        name,
                        kind,
                        size_bytes,
                    }));
                }
            }
        }
    }

    fn enter(&mut self, size_bytes: u64) {
        self.left = size_bytes;
        self.padding = size_bytes.wrapping_neg() % BLOCK as u64;
    }
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn ustar_name(header: &[u8; BLOCK]) -> String {
    let name = text(&header[..100]);
    let is_ustar = &header[257..263] == b"ustar\0";
    let prefix = if is_ustar {
        text(&header[345..500])
    } else {
        String::new()
    };
    if prefix.is_empty() {
        name
    } else {
        format!("{prefix}/{name}")
    }
}

/// Octal, or GNU's base 256.
fn number(field: &[u8]) -> Result<u64, Error> {
    let bad = || Error::archive("malformed number in an archive header");
    if field[0] & 0x80 != 0 {
        let mut value = u64::from(field[0] & 0x7f);
        for byte in &field[1..] {
            value = value
                .checked_mul(256)
                .and_then(|v| v.checked_add(u64::from(*byte)))
                .ok_or_else(bad)?;
        }
        return if i64::try_from(value).is_ok() {
            Ok(value)
        } else {
            Err(bad())
        };
    }
    let digits = text(field);
    let digits = digits.trim();
    if digits.is_empty() {
        return Ok(0);
    }
    u64::from_str_radix(digits, 8).map_err(|_| bad())
}

fn check_sum(header: &[u8; BLOCK]) -> Result<(), Error> {
    let sum: u64 = header
        .iter()
        .enumerate()
        .map(|(at, byte)| {
            if (148..156).contains(&at) {
                32
            } else {
                u64::from(*byte)
            }
        })
        .sum();
    if number(&header[148..156])? == sum {
        Ok(())
    } else {
        Err(Error::archive(
            "archive header with a wrong checksum: not a tar",
        ))
    }
}

fn pax_records(data: &[u8]) -> BTreeMap<String, String> {
    let mut records = BTreeMap::new();
    let mut rest = data;
    while let Some(space) = rest.iter().position(|b| *b == b' ') {
        let length = std::str::from_utf8(&rest[..space])
            .ok()
            .and_then(|l| l.parse::<usize>().ok());
        let Some(length) = length.filter(|l| (space + 1..=rest.len()).contains(l)) else {
            break;
        };
        let record = String::from_utf8_lossy(&rest[space + 1..length]).into_owned();
        if let Some((key, value)) = record.trim_end_matches('\n').split_once('=') {
            records.insert(key.to_owned(), value.to_owned());
        }
        rest = &rest[length..];
    }
    records
}

/// The path without `.`, leading and double slashes; `None` for one that goes up, is empty or too
/// long.
pub(super) fn clean(path: &str) -> Option<String> {
    if path.len() > MAX_NAME_BYTES {
        return None;
    }
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => return None,
            part => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// Writes an archive.
pub(super) struct Writer<W> {
    out: W,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out }
    }

    async fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.out.write_all(bytes).await.map_err(|source| Error::Io {
            operation: "write archive",
            source,
        })
    }

    async fn long_name(&mut self, name: &str) -> Result<(), Error> {
        if name.len() <= NAME_FIELD {
            return Ok(());
        }
        let record = pax_path(name);
        let size_bytes = record.len() as u64;
        self.put(&header("pax_header", 0o644, size_bytes, b'x'))
            .await?;
        self.put(&record).await?;
        self.end(size_bytes).await
    }

    /// A directory, 0755.
    pub(super) async fn directory(&mut self, name: &str) -> Result<(), Error> {
        let name = format!("{name}/");
        self.long_name(&name).await?;
        self.put(&header(&name, 0o755, 0, b'5')).await
    }

    /// Begins a file of `size_bytes`; exactly so many bytes must follow by [`Writer::piece`].
    pub(super) async fn begin(
        &mut self,
        name: &str,
        mode: u32,
        size_bytes: u64,
    ) -> Result<(), Error> {
        self.long_name(name).await?;
        self.put(&header(name, mode, size_bytes, b'0')).await
    }

    pub(super) async fn piece(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.put(bytes).await
    }

    /// Ends a file of `size_bytes`.
    pub(super) async fn end(&mut self, size_bytes: u64) -> Result<(), Error> {
        let padding = size_bytes.wrapping_neg() % BLOCK as u64;
        let zeros = [0; BLOCK];
        let padding = usize::try_from(padding).expect("less than a block");
        self.put(&zeros[..padding]).await
    }

    pub(super) async fn file(&mut self, name: &str, mode: u32, bytes: &[u8]) -> Result<(), Error> {
        self.begin(name, mode, bytes.len() as u64).await?;
        self.piece(bytes).await?;
        self.end(bytes.len() as u64).await
    }

    /// The end of the archive.
    pub(super) async fn finish(mut self) -> Result<(), Error> {
        self.put(&[0; 2 * BLOCK]).await?;
        self.out.shutdown().await.map_err(|source| Error::Io {
            operation: "write archive",
            source,
        })
    }
}

/// The header of one entry; `name` is cut to its field, a longer one needs [`pax_path`] before it.
fn header(name: &str, mode: u32, size_bytes: u64, flag: u8) -> [u8; BLOCK] {
    let mut header = [0u8; BLOCK];
    let kept = &name.as_bytes()[..name.len().min(NAME_FIELD)];
    header[..kept.len()].copy_from_slice(kept);
    fill(&mut header, mode, size_bytes, flag);
    header
}

/// A PAX record for a long name. Its length counts its own digits.
fn pax_path(name: &str) -> Vec<u8> {
    let body = format!(" path={name}\n");
    let mut length = body.len() + 1;
    while length != body.len() + length.to_string().len() {
        length = body.len() + length.to_string().len();
    }
    format!("{length}{body}").into_bytes()
}

fn fill(header: &mut [u8; BLOCK], mode: u32, size_bytes: u64, flag: u8) {
    let octal = |field: &mut [u8], value: u64| {
        let digits = format!("{value:0width$o}", width = field.len() - 1);
        if digits.len() < field.len() {
            field[..digits.len()].copy_from_slice(digits.as_bytes());
        } else {
            let at = field.len() - 8;
            field[at..].copy_from_slice(&value.to_be_bytes());
            field[0] = 0x80;
        }
    };
    octal(&mut header[100..108], u64::from(mode));
    octal(&mut header[108..116], 0);
    octal(&mut header[116..124], 0);
    octal(&mut header[124..136], size_bytes);
    octal(&mut header[136..148], 0);
    header[148..156].fill(b' ');
    header[156] = flag;
    header[257..263].copy_from_slice(b"ustar\0");
    header[263..265].copy_from_slice(b"00");
    let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
    octal(&mut header[148..155], sum);
    header[155] = b' ';
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reader(
        bytes: &[u8],
        step: usize,
    ) -> Reader<impl Stream<Item = std::io::Result<Bytes>> + Unpin + use<>> {
        let pieces: Vec<_> = bytes
            .chunks(step)
            .map(|c| Ok(Bytes::copy_from_slice(c)))
            .collect();
        Reader::new(futures::stream::iter(pieces))
    }

    async fn archive() -> Vec<u8> {
        let mut out = Vec::new();
        let mut writer = Writer::new(&mut out);
        writer.directory("blobs").await.expect("writes");
        writer
            .file("blobs/a", 0o444, b"hello")
            .await
            .expect("writes");
        writer
            .file(
                &format!("blobs/sha512/{}", "a".repeat(128)),
                0o444,
                &[7; 600],
            )
            .await
            .expect("writes");
        writer.finish().await.expect("ends");
        out
    }

    #[tokio::test]
    async fn what_is_written_is_read_in_any_split() {
        let bytes = archive().await;
        assert_eq!(bytes.len() % BLOCK, 0);
        for step in [1, 7, 512, 100_000] {
            let mut reader = reader(&bytes, step);
            let mut seen = Vec::new();
            while let Some(entry) = reader.next().await.expect("reads") {
                let data = reader.all(1000).await.expect("reads");
                seen.push((entry.name, data.len()));
            }
            let long = format!("blobs/sha512/{}", "a".repeat(128));
            let want = [
                ("blobs".to_owned(), 0),
                ("blobs/a".to_owned(), 5),
                (long, 600),
            ];
            assert_eq!(seen, want, "step {step}");
        }
    }

    #[tokio::test]
    async fn tar_of_the_system_agrees() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("a.tar");
        std::fs::write(&path, archive().await).expect("write");
        let listed = std::process::Command::new("tar")
            .arg("-tf")
            .arg(&path)
            .output()
            .expect("tar");
        let text = String::from_utf8(listed.stdout).expect("text");
        assert!(listed.status.success());
        assert_eq!(text.lines().count(), 3, "{text}");
    }

    #[tokio::test]
    async fn long_extensions_and_cut_archives_are_refused() {
        let huge = header("x", 0o644, MAX_EXTENSION_BYTES + 1, b'L');
        assert!(reader(&huge, 512).next().await.is_err());
        let mut cut = reader(&header("x", 0o644, 1000, b'0'), 512);
        assert!(cut.next().await.expect("an entry").is_some());
        assert!(cut.data().await.is_err());
        assert!(reader(&[1; 512], 512).next().await.is_err());
    }

    #[test]
    fn names_that_go_up_are_of_no_use() {
        assert_eq!(clean("./a//b/").as_deref(), Some("a/b"));
        assert_eq!(clean("/a").as_deref(), Some("a"));
        for bad in ["../a", "a/../b", "", "/", "."] {
            assert_eq!(clean(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..2000), fix in any::<bool>()) {
            // A right checksum lets the rest of the header be looked at.
            if fix && bytes.len() >= BLOCK {
                let mut block = [0; BLOCK];
                block.copy_from_slice(&bytes[..BLOCK]);
                let sum: u64 = block.iter().enumerate().map(|(at, b)| if (148..156).contains(&at) { 32 } else { u64::from(*b) }).sum();
                bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
            runtime.block_on(async {
                let mut reader = reader(&bytes, 300);
                while let Ok(Some(_)) = reader.next().await {}
            });
        }
    }
}
