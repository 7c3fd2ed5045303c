//! Image archives: tar files, plain or compressed, read as a stream of entries and written likewise.
//!
//! Archives come from anywhere: names are cleaned before they mean anything, and everything that is
//! held in memory is bounded.

use std::io::{self, BufReader, Read, Write};

use anyhow::Context as _;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Entries of an archive that are looked at.
const MAX_ENTRIES: usize = 100_000;
/// Longest name of an entry, bytes.
const MAX_NAME: usize = 4096;
/// Bytes handed over at a time.
const CHUNK: usize = 1 << 20;
/// Pieces read ahead of whoever takes them.
const AHEAD: usize = 4;

/// A piece of an archive that is being read.
#[derive(Debug)]
pub(crate) enum Piece {
    /// A file begins. `Data` follows until the next piece of another kind.
    File {
        /// Clean name: no leading `/`, no `.` and `..`.
        name: String,
        /// Size, bytes.
        size: u64,
    },
    /// Bytes of the file.
    Data(Bytes),
    /// A link, or a second name of a file.
    Link {
        /// Clean name.
        name: String,
        /// Clean name of what it means.
        target: String,
    },
}

/// Reads an archive in a thread; its pieces in order. The last one may be an error.
pub(crate) fn read<R: Read + Send + 'static>(source: R) -> mpsc::Receiver<anyhow::Result<Piece>> {
    let (pieces, receiver) = mpsc::channel(AHEAD);
    std::thread::spawn(move || {
        if let Err(error) = read_all(source, &pieces) {
            // Nobody listens when the reader gave up first.
            let _ = pieces.blocking_send(Err(error));
        }
    });
    receiver
}

fn read_all<R: Read + 'static>(
    source: R,
    pieces: &mpsc::Sender<anyhow::Result<Piece>>,
) -> anyhow::Result<()> {
    let mut archive = tar::Archive::new(decompressed(source)?);
    let give = |piece: Piece| pieces.blocking_send(Ok(piece)).is_ok();
    let wrap = "cannot read the archive: it is no tar file, or it is cut short";
    for (count, entry) in archive.entries().context(wrap)?.enumerate() {
        anyhow::ensure!(
            count < MAX_ENTRIES,
            "the archive has more than {MAX_ENTRIES} entries"
        );
        let mut entry = entry.context(wrap)?;
        let path = entry.path_bytes();
        let Some(name) = clean(&path) else { continue };
        let kind = entry.header().entry_type();
        if kind.is_symlink() || kind.is_hard_link() {
            let target = entry.link_name_bytes().unwrap_or_default();
            let target = match std::str::from_utf8(&target) {
                Ok(text) if kind.is_symlink() => beside(&name, text),
                _ => clean(&target),
            };
            if let Some(target) = target
                && !give(Piece::Link { name, target })
            {
                return Ok(());
            }
        } else if kind.is_file() {
            if !give(Piece::File {
                name,
                size: entry.size(),
            }) {
                return Ok(());
            }
            loop {
                let mut chunk = Vec::with_capacity(CHUNK);
                let most = u64::try_from(CHUNK).expect("a chunk is small");
                entry
                    .by_ref()
                    .take(most)
                    .read_to_end(&mut chunk)
                    .context(wrap)?;
                if chunk.is_empty() {
                    break;
                }
                if !give(Piece::Data(chunk.into())) {
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

/// Undoes gzip or zstd, told by their first bytes.
fn decompressed<R: Read + 'static>(source: R) -> anyhow::Result<Box<dyn Read>> {
    let mut source = BufReader::with_capacity(CHUNK, source);
    let magic = io::BufRead::fill_buf(&mut source).context("cannot read the archive")?;
    Ok(match compression(magic) {
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(source)),
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(source)?),
        Compression::None => Box::new(source),
    })
}

/// How bytes are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Compression {
    #[default]
    None,
    Gzip,
    Zstd,
}

/// Tells it by the first bytes.
pub(crate) fn compression(start: &[u8]) -> Compression {
    match start {
        [0x1f, 0x8b, 0x08, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
        _ => Compression::None,
    }
}

/// A name without `/` at its ends and `.` in it; `None` for one that leads elsewhere or is no text.
fn clean(name: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(name)
        .ok()
        .filter(|name| name.len() <= MAX_NAME)?;
    let parts: Vec<_> = name
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .collect();
    (!parts.is_empty() && !parts.contains(&"..")).then(|| parts.join("/"))
}

/// Where a symbolic link leads; `None` for out of the archive.
fn beside(name: &str, target: &str) -> Option<String> {
    let mut parts: Vec<_> = name.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    clean(parts.join("/").as_bytes())
}

/// An archive being written in a thread.
#[derive(Debug)]
pub(crate) struct ArchiveWriter {
    pieces: mpsc::Sender<Written>,
    thread: JoinHandle<anyhow::Result<()>>,
}

#[derive(Debug)]
enum Written {
    Directory(String),
    File { name: String, mode: u32, size: u64 },
    Data(Bytes),
}

impl ArchiveWriter {
    /// Writes to `sink`.
    pub(crate) fn new<W: Write + Send + 'static>(sink: W) -> Self {
        let (pieces, receiver) = mpsc::channel(AHEAD);
        let thread = tokio::task::spawn_blocking(move || write_all(sink, receiver));
        Self { pieces, thread }
    }

    /// Adds a directory.
    pub(crate) async fn directory(&self, name: &str) {
        self.give(Written::Directory(name.to_owned())).await;
    }

    /// Begins a file; exactly `size` bytes of data must follow.
    pub(crate) async fn file(&self, name: &str, mode: u32, size: u64) {
        self.give(Written::File {
            name: name.to_owned(),
            mode,
            size,
        })
        .await;
    }

    /// Adds bytes to the file.
    pub(crate) async fn data(&self, bytes: Bytes) {
        self.give(Written::Data(bytes)).await;
    }

    async fn give(&self, piece: Written) {
        // A thread that ended early has failed; `finish` says how.
        let _ = self.pieces.send(piece).await;
    }

    /// Ends the archive.
    pub(crate) async fn finish(self) -> anyhow::Result<()> {
        drop(self.pieces);
        self.thread.await?
    }
}

/// Reads the data of one file out of the pieces.
struct Data<'a> {
    pieces: &'a mut mpsc::Receiver<Written>,
    left: Bytes,
}

impl Read for Data<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.left.is_empty() {
            match self.pieces.blocking_recv() {
                Some(Written::Data(bytes)) => self.left = bytes,
                _ => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let count = buffer.len().min(self.left.len());
        buffer[..count].copy_from_slice(&self.left.split_to(count));
        Ok(count)
    }
}

fn write_all<W: Write>(sink: W, mut pieces: mpsc::Receiver<Written>) -> anyhow::Result<()> {
    let mut archive = tar::Builder::new(io::BufWriter::with_capacity(CHUNK, sink));
    while let Some(piece) = pieces.blocking_recv() {
        let mut header = tar::Header::new_gnu();
        match piece {
            Written::Directory(name) => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(0o755);
                header.set_size(0);
                archive.append_data(&mut header, format!("{name}/"), io::empty())?;
            }
            Written::File { name, mode, size } => {
                header.set_entry_type(tar::EntryType::Regular);
                header.set_mode(mode);
                header.set_size(size);
                let mut data = Data {
                    pieces: &mut pieces,
                    left: Bytes::new(),
                };
                archive
                    .append_data(&mut header, &name, data.by_ref().take(size))
                    .with_context(|| format!("cannot write {name} to the archive"))?;
                anyhow::ensure!(data.left.is_empty(), "{name} is larger than announced");
            }
            Written::Data(bytes) if bytes.is_empty() => {}
            Written::Data(_) => anyhow::bail!("content is larger than its descriptor says"),
        }
    }
    archive
        .into_inner()
        .and_then(|mut sink| sink.flush())
        .context("cannot write the archive")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cleaned_and_escapes_dropped() {
        assert_eq!(
            clean(b"./blobs//sha256/x/"),
            Some("blobs/sha256/x".to_owned())
        );
        assert_eq!(clean(b"/etc/passwd"), Some("etc/passwd".to_owned()));
        for name in [&b"../x"[..], b"a/../../x", b"", b"/", b"\xff"] {
            assert_eq!(clean(name), None);
        }
        assert_eq!(
            beside("a/layer.tar", "../b/layer.tar"),
            Some("b/layer.tar".to_owned())
        );
        assert_eq!(beside("a", "../../x"), None);
    }

    async fn round_trip(wrap: impl Fn(Vec<u8>) -> Vec<u8>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let writer = ArchiveWriter::new(file.reopen().unwrap());
        writer.directory("dir").await;
        writer.file("dir/a", 0o444, 5).await;
        writer.data(Bytes::from_static(b"he")).await;
        writer.data(Bytes::from_static(b"llo")).await;
        writer.file("empty", 0o644, 0).await;
        writer.finish().await.unwrap();
        let bytes = wrap(std::fs::read(file.path()).unwrap());
        let mut pieces = read(io::Cursor::new(bytes));
        let mut seen = String::new();
        while let Some(piece) = pieces.recv().await {
            match piece.unwrap() {
                Piece::File { name, size } => seen.push_str(&format!("{name}:{size} ")),
                Piece::Data(data) => seen.push_str(std::str::from_utf8(&data).unwrap()),
                Piece::Link { .. } => unreachable!(),
            }
        }
        assert_eq!(seen, "dir/a:5 helloempty:0 ");
    }

    #[tokio::test]
    async fn what_was_written_is_read_plain_and_compressed() {
        round_trip(|bytes| bytes).await;
        round_trip(|bytes| zstd::encode_all(bytes.as_slice(), 1).unwrap()).await;
        round_trip(|bytes| {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(&bytes).unwrap();
            gzip.finish().unwrap()
        })
        .await;
    }

    #[tokio::test]
    async fn a_file_shorter_or_longer_than_announced_fails() {
        for data in [&b"hell"[..], b"hello!"] {
            for split in [0, 4, data.len().min(5)] {
                let writer = ArchiveWriter::new(io::sink());
                writer.file("a", 0o644, 5).await;
                writer.data(Bytes::copy_from_slice(&data[..split])).await;
                writer.data(Bytes::copy_from_slice(&data[split..])).await;
                assert!(writer.finish().await.is_err(), "{data:?} at {split}");
            }
        }
    }

    #[tokio::test]
    async fn what_is_no_archive_is_an_error() {
        let mut pieces = read(io::Cursor::new(vec![7; 2000]));
        assert!(pieces.recv().await.unwrap().is_err());
    }
}
