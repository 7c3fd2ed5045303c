//! Compressed streams: told by media type, checked by magic.

use std::io::{self, BufRead, BufReader, Read, Write};

use flate2::bufread::MultiGzDecoder;

/// Compressed bytes read at once.
const READ_BYTES: usize = 128 << 10;
/// Window sizes up to 2^27 (128 MiB) are accepted from zstd, its own default for decoders.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// One or more gzip members.
    Gzip,
    /// One or more zstd frames, skippable ones included.
    Zstd,
}

impl Compression {
    /// What the first bytes say; anything unknown is taken as uncompressed.
    #[must_use]
    pub fn sniff(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, 0x08, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // Skippable frames: 0x184D2A50 to 0x184D2A5F, little endian.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    /// Whether a blob of this media type is a tar that may be compressed, which is then sniffed;
    /// `false` for types that need a stream processor.
    #[must_use]
    pub fn is_built_in(media_type: &str) -> bool {
        let base = media_type
            .strip_suffix("+gzip")
            .or_else(|| media_type.strip_suffix("+zstd"))
            .unwrap_or(media_type);
        match base {
            "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar" => true,
            "application/vnd.docker.image.rootfs.diff.tar"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.zstd" => base == media_type,
            _ => false,
        }
    }
}

/// The plain stream behind `reader`, whatever its compression; an empty stream stays empty.
///
/// # Errors
/// When the first bytes cannot be read, or the decompressor cannot be set up.
pub fn decompress<'a, R: Read + Send + 'a>(reader: R) -> io::Result<Box<dyn Read + Send + 'a>> {
    let mut reader = BufReader::with_capacity(READ_BYTES, Eager(reader));
    let start = reader.fill_buf()?;
    Ok(match Compression::sniff(start) {
        Compression::None => Box::new(reader),
        Compression::Gzip => Box::new(MultiGzDecoder::new(reader)),
        Compression::Zstd => {
            let mut decoder = zstd::Decoder::with_buffer(reader)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            Box::new(decoder)
        }
    })
}

/// Fills the buffer as far as the stream goes, so that a magic is never seen by halves.
struct Eager<R>(R);

impl<R: Read> Read for Eager<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        /// The longest magic.
        const ENOUGH_BYTES: usize = 4;
        let mut filled = 0;
        while filled < ENOUGH_BYTES.min(buf.len()) {
            match self.0.read(&mut buf[filled..]) {
                Ok(0) => break,
                Ok(more) => filled += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }
}

/// A writer that compresses into another; [`Compressor::finish`] writes the end.
pub enum Compressor<W: Write> {
    /// As it comes.
    None(W),
    /// One gzip member without name and time, so that equal input gives equal output.
    Gzip(Box<flate2::write::GzEncoder<W>>),
    /// One zstd frame.
    Zstd(zstd::Encoder<'static, W>),
}

impl<W: Write> std::fmt::Debug for Compressor<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None(_) => "Compressor::None",
            Self::Gzip(_) => "Compressor::Gzip",
            Self::Zstd(_) => "Compressor::Zstd",
        })
    }
}

impl<W: Write> Compressor<W> {
    /// Compresses into `out` at each format's usual level.
    ///
    /// # Errors
    /// When the compressor cannot be set up.
    pub fn new(compression: Compression, out: W) -> io::Result<Self> {
        /// "Unknown", as other tools that aim at reproducible output write.
        const GZIP_OS: u8 = 255;
        Ok(match compression {
            Compression::None => Self::None(out),
            Compression::Gzip => Self::Gzip(Box::new(
                flate2::GzBuilder::new()
                    .operating_system(GZIP_OS)
                    .write(out, flate2::Compression::default()),
            )),
            Compression::Zstd => {
                let mut encoder = zstd::Encoder::new(out, zstd::DEFAULT_COMPRESSION_LEVEL)?;
                encoder.include_checksum(true)?;
                Self::Zstd(encoder)
            }
        })
    }

    /// Writes what is left and gives the inner writer back.
    ///
    /// # Errors
    /// When the inner writer fails.
    pub fn finish(self) -> io::Result<W> {
        match self {
            Self::None(out) => Ok(out),
            Self::Gzip(encoder) => encoder.finish(),
            Self::Zstd(encoder) => encoder.finish(),
        }
    }
}

impl<W: Write> Write for Compressor<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::None(out) => out.write(buf),
            Self::Gzip(encoder) => encoder.write(buf),
            Self::Zstd(encoder) => encoder.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::None(out) => out.flush(),
            Self::Gzip(encoder) => encoder.flush(),
            Self::Zstd(encoder) => encoder.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compressed(compression: Compression, data: &[u8]) -> Vec<u8> {
        let mut writer = Compressor::new(compression, Vec::new()).unwrap();
        writer.write_all(data).unwrap();
        writer.finish().unwrap()
    }

    /// Gives one byte at a time, as a slow network would.
    struct Trickle<'a>(&'a [u8]);

    impl Read for Trickle<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let limit = buf.len().min(1);
            self.0.read(&mut buf[..limit])
        }
    }

    #[test]
    fn every_form_comes_back_even_in_parts_and_in_trickles() {
        let data: Vec<u8> = (0..300_000_u32)
            .flat_map(|n| (n / 7).to_le_bytes())
            .collect();
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let (first, second) = data.split_at(data.len() / 3);
            let mut blob = compressed(compression, first);
            blob.extend(compressed(compression, second));
            assert_eq!(Compression::sniff(&blob), compression);
            let mut plain = Vec::new();
            decompress(Trickle(&blob))
                .unwrap()
                .read_to_end(&mut plain)
                .unwrap();
            assert!(plain == data, "{compression:?}");
        }
    }

    #[test]
    fn truncated_streams_fail_and_empty_ones_are_empty() {
        for compression in [Compression::Gzip, Compression::Zstd] {
            let blob = compressed(compression, &[7; 100_000]);
            let cut = &blob[..blob.len() - 5];
            let read = decompress(cut).unwrap().read_to_end(&mut Vec::new());
            assert!(read.is_err(), "{compression:?}");
        }
        assert_eq!(
            decompress(&b""[..])
                .unwrap()
                .read_to_end(&mut Vec::new())
                .unwrap(),
            0
        );
    }

    #[test]
    fn a_skippable_frame_is_zstd() {
        let mut blob = vec![0x53, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9];
        blob.extend(compressed(Compression::Zstd, b"after"));
        let mut plain = String::new();
        decompress(&blob[..])
            .unwrap()
            .read_to_string(&mut plain)
            .unwrap();
        assert_eq!(plain, "after");
    }

    #[test]
    fn output_is_the_same_every_time() {
        for compression in [Compression::Gzip, Compression::Zstd] {
            assert_eq!(
                compressed(compression, b"abc"),
                compressed(compression, b"abc")
            );
        }
        assert_eq!(
            compressed(Compression::Gzip, b"")[4..10],
            [0, 0, 0, 0, 0, 255]
        );
    }

    #[test]
    fn only_tar_types_are_built_in() {
        for fine in [
            "application/vnd.oci.image.layer.v1.tar",
            "application/vnd.oci.image.layer.v1.tar+zstd",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        ] {
            assert!(Compression::is_built_in(fine), "{fine}");
        }
        for other in [
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            "application/vnd.docker.image.rootfs.diff.tar.gzip+gzip",
            "application/vnd.erofs.layer.v1",
            "",
        ] {
            assert!(!Compression::is_built_in(other), "{other}");
        }
    }
}
