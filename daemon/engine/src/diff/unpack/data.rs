//! What is in a file of an archive.

use std::io::{BufRead, Seek as _, SeekFrom, Write as _};

use crate::diff::Error;
use crate::diff::tar::{Archive, Entry};

/// Writes the bytes of `entry`, which come next in `archive`, to its file; holes stay holes.
pub(in crate::diff) fn write_data<R: BufRead>(
    entry: &Entry,
    path: &[u8],
    file: &mut std::fs::File,
    archive: &mut Archive<R>,
) -> Result<(), Error> {
    let mut data = archive.data();
    let mut copy = |file: &mut std::fs::File, mut length: u64| -> Result<(), Error> {
        while length > 0 {
            let bytes = data.fill_buf().map_err(Error::Stream)?;
            if bytes.is_empty() {
                return Err(Error::Stream(std::io::ErrorKind::UnexpectedEof.into()));
            }
            let step = usize::try_from(length).map_or(bytes.len(), |l| l.min(bytes.len()));
            file.write_all(&bytes[..step])
                .map_err(Error::io("write", path))?;
            data.consume(step);
            length -= step as u64;
        }
        Ok(())
    };
    let Some(segments) = &entry.segments else {
        return copy(file, entry.size_bytes);
    };
    for (offset, length) in segments {
        file.seek(SeekFrom::Start(*offset))
            .map_err(Error::io("seek in", path))?;
        copy(file, *length)?;
    }
    file.set_len(entry.size_bytes)
        .map_err(Error::io("set size of", path))
}
