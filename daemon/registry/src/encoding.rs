//! Undoes a response's `Content-Encoding`, piece by piece and with bounded memory.

use std::io::{self, Write};

use bytes::Bytes;
use http::HeaderMap;
use http::header::CONTENT_ENCODING;

/// Bytes decoded of one encoded piece at a time: small pieces in, so that a bomb comes out in
/// small pieces as well.
const PIECE_BYTES: usize = 16 << 10;

/// A decoder of one body.
pub enum Decoder {
    /// As sent.
    Identity,
    /// Gzip.
    Gzip(flate2::write::MultiGzDecoder<Vec<u8>>),
    /// Zlib, which HTTP calls deflate.
    Zlib(flate2::write::ZlibDecoder<Vec<u8>>),
    /// Zstandard.
    Zstd(zstd::stream::write::Decoder<'static, Vec<u8>>),
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Identity => "Identity",
            Self::Gzip(_) => "Gzip",
            Self::Zlib(_) => "Zlib",
            Self::Zstd(_) => "Zstd",
        })
    }
}

impl Decoder {
    /// The decoder that the headers ask for; `Err` holds an encoding we do not know.
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, String> {
        let Some(value) = headers.get(CONTENT_ENCODING) else {
            return Ok(Self::Identity);
        };
        let name = value
            .to_str()
            .unwrap_or_default()
            .trim()
            .to_ascii_lowercase();
        Ok(match name.as_str() {
            "" | "identity" => Self::Identity,
            "gzip" | "x-gzip" => Self::gzip(),
            "deflate" => Self::Zlib(flate2::write::ZlibDecoder::new(Vec::new())),
            "zstd" => Self::zstd().map_err(|error| error.to_string())?,
            _ => return Err(name),
        })
    }

    /// A decoder of gzip, several members after one another included.
    pub fn gzip() -> Self {
        Self::Gzip(flate2::write::MultiGzDecoder::new(Vec::new()))
    }

    /// A decoder of zstd frames.
    ///
    /// # Errors
    /// When the library has no memory for it.
    pub fn zstd() -> io::Result<Self> {
        zstd::stream::write::Decoder::new(Vec::new()).map(Self::Zstd)
    }

    /// Whether bytes on the wire are the bytes of the blob.
    pub(super) fn is_identity(&self) -> bool {
        matches!(self, Self::Identity)
    }

    /// Decodes the next piece of the wire.
    ///
    /// # Errors
    /// When the bytes are no such encoding.
    pub fn decode(&mut self, piece: Bytes) -> io::Result<Vec<Bytes>> {
        if self.is_identity() {
            return Ok(vec![piece]);
        }
        let mut out = Vec::new();
        for part in piece.chunks(PIECE_BYTES) {
            let decoded = match self {
                Self::Identity => Vec::new(),
                Self::Gzip(decoder) => {
                    decoder.write_all(part)?;
                    std::mem::take(decoder.get_mut())
                }
                Self::Zlib(decoder) => {
                    decoder.write_all(part)?;
                    std::mem::take(decoder.get_mut())
                }
                Self::Zstd(decoder) => {
                    decoder.write_all(part)?;
                    std::mem::take(decoder.get_mut())
                }
            };
            if !decoded.is_empty() {
                out.push(decoded.into());
            }
        }
        Ok(out)
    }

    /// What is left at the end of the body.
    ///
    /// # Errors
    /// When the encoding ends too early.
    pub fn finish(self) -> io::Result<Bytes> {
        Ok(match self {
            Self::Identity => Bytes::new(),
            Self::Gzip(decoder) => decoder.finish()?.into(),
            Self::Zlib(decoder) => decoder.finish()?.into(),
            Self::Zstd(mut decoder) => {
                decoder.flush()?;
                decoder.into_inner().into()
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn decoded(encoding: &'static str, wire: &[u8], step: usize) -> Vec<u8> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static(encoding));
        let mut decoder = Decoder::of(&headers).expect("known");
        let mut out = Vec::new();
        for piece in wire.chunks(step) {
            for bytes in decoder
                .decode(Bytes::copy_from_slice(piece))
                .expect("decodes")
            {
                out.extend_from_slice(&bytes);
            }
        }
        out.extend_from_slice(&decoder.finish().expect("ends"));
        out
    }

    #[test]
    fn any_split_of_an_encoded_body_gives_the_same_bytes() {
        let plain: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).expect("writes");
        let gzip = gzip.finish().expect("ends");
        let zstd = zstd::encode_all(plain.as_slice(), 1).expect("encodes");
        for step in [1000, 4096, 1 << 20] {
            assert_eq!(decoded("gzip", &gzip, step), plain);
            assert_eq!(decoded("zstd", &zstd, step), plain);
            assert_eq!(decoded("identity", &plain, step), plain);
        }
    }
}
