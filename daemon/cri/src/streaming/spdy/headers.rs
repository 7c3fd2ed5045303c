//! Header blocks of SPDY/3.1: name and value lists, deflated with one context per direction.
//!
//! Spec: SPDY protocol draft 3.1, section 2.6.10, "Name/Value Header Block".

use std::io;

use flate2::{Decompress, FlushDecompress, Status};

/// Bytes of one block once inflated.
const MAX_BLOCK: usize = 64 << 10;
/// Headers in one block.
const MAX_PAIRS: usize = 256;

/// RFC 1950: deflate with a 32 KiB window, and a dictionary that both sides know.
const STREAM_HEAD: [u8; 2] = [0x78, 0xbb];
/// Adler-32 of the dictionary, which names it.
const DICTIONARY_ID: u32 = 0xe3c6_a7c2;

/// Words of the shared dictionary, each of which is preceded there by its length in four bytes.
const WORDS: [&str; 64] = [
    "options",
    "head",
    "post",
    "put",
    "delete",
    "trace",
    "accept",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "accept-ranges",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "connection",
    "content-base",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-md5",
    "content-range",
    "content-type",
    "date",
    "etag",
    "expect",
    "expires",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "location",
    "max-forwards",
    "pragma",
    "proxy-authenticate",
    "proxy-authorization",
    "range",
    "referer",
    "retry-after",
    "server",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
    "vary",
    "via",
    "warning",
    "www-authenticate",
    "method",
    "get",
    "status",
    "200 OK",
    "version",
    "HTTP/1.1",
    "url",
    "public",
    "set-cookie",
    "keep-alive",
];
/// The last word with a length, kept apart only because the rest of the text follows it.
const LAST_WORD: &str = "origin";
/// The dictionary's end, plain text.
const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416\
417502504505203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 \
Unauthorized403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service \
UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, \
Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,\
text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,\
utf-,*,enq=0.";

/// The dictionary that both directions begin with.
fn dictionary() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1423);
    for word in WORDS.iter().chain([&LAST_WORD]) {
        let length = u32::try_from(word.len()).expect("words are short");
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(word.as_bytes());
    }
    bytes.extend_from_slice(TAIL.as_bytes());
    bytes
}

fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Reads header blocks.
#[derive(Debug)]
pub(super) struct Inflater {
    context: Decompress,
}

impl Inflater {
    pub(super) fn new() -> Self {
        Self {
            context: Decompress::new(true),
        }
    }

    /// Reads one block. Names are in lower case on the wire.
    pub(super) fn read(&mut self, block: &[u8]) -> io::Result<Vec<(String, String)>> {
        let plain = self.inflate(block)?;
        let mut rest = plain.as_slice();
        let count = take_length(&mut rest)?;
        if count > MAX_PAIRS {
            return Err(malformed("too many headers"));
        }
        let mut pairs = Vec::with_capacity(count);
        for _ in 0..count {
            let name = take_text(&mut rest)?;
            let value = take_text(&mut rest)?;
            pairs.push((name, value));
        }
        Ok(pairs)
    }

    fn inflate(&mut self, block: &[u8]) -> io::Result<Vec<u8>> {
        let mut plain = Vec::new();
        let mut buffer = [0_u8; 4096];
        let mut rest = block;
        loop {
            let (read, written) = (self.context.total_in(), self.context.total_out());
            let result = self
                .context
                .decompress(rest, &mut buffer, FlushDecompress::Sync);
            let consumed = usize::try_from(self.context.total_in() - read).unwrap_or(0);
            let produced = usize::try_from(self.context.total_out() - written).unwrap_or(0);
            rest = rest.get(consumed..).unwrap_or_default();
            plain.extend_from_slice(buffer.get(..produced).unwrap_or_default());
            if plain.len() > MAX_BLOCK {
                return Err(malformed("header block is too large"));
            }
            match result {
                Err(e) if e.needs_dictionary().is_some() => {
                    self.context
                        .set_dictionary(&dictionary())
                        .map_err(|_| malformed("unknown header dictionary"))?;
                }
                Err(_) => return Err(malformed("malformed header block")),
                Ok(Status::StreamEnd) => return Err(malformed("header stream ended")),
                Ok(Status::Ok | Status::BufError) => {
                    if rest.is_empty() && produced < buffer.len() {
                        return Ok(plain);
                    }
                    if consumed == 0 && produced == 0 {
                        return Err(malformed("malformed header block"));
                    }
                }
            }
        }
    }
}

fn take_length(rest: &mut &[u8]) -> io::Result<usize> {
    let (head, tail) = rest
        .split_first_chunk::<4>()
        .ok_or_else(|| malformed("header block is cut short"))?;
    *rest = tail;
    usize::try_from(u32::from_be_bytes(*head)).map_err(|_| malformed("header is too long"))
}

fn take_text(rest: &mut &[u8]) -> io::Result<String> {
    let length = take_length(rest)?;
    if length > rest.len() {
        return Err(malformed("header block is cut short"));
    }
    let (text, tail) = rest.split_at(length);
    *rest = tail;
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// Writes header blocks, as stored blocks of the deflate format: replies have nothing to compress,
/// and a compressor's context would be most of a session's memory.
#[derive(Debug, Default)]
pub(super) struct Deflater {
    begun: bool,
}

impl Deflater {
    /// Writes one block.
    pub(super) fn write(&mut self, pairs: &[(&str, &str)]) -> io::Result<Vec<u8>> {
        let mut plain = Vec::new();
        let count = u32::try_from(pairs.len()).map_err(|_| malformed("too many headers"))?;
        plain.extend_from_slice(&count.to_be_bytes());
        for text in pairs.iter().flat_map(|(name, value)| [name, value]) {
            let length = u32::try_from(text.len()).map_err(|_| malformed("header too long"))?;
            plain.extend_from_slice(&length.to_be_bytes());
            plain.extend_from_slice(text.as_bytes());
        }
        let mut block = Vec::with_capacity(plain.len() + 16);
        if !self.begun {
            self.begun = true;
            block.extend_from_slice(&STREAM_HEAD);
            block.extend_from_slice(&DICTIONARY_ID.to_be_bytes());
        }
        // The empty block at the end is what a compressor's flush leaves. Readers such as Go's hand
        // nothing on before they see it.
        for piece in plain.chunks(usize::from(u16::MAX)).chain([&[][..]]) {
            let length = u16::try_from(piece.len()).expect("pieces have at most 16 bits");
            // Not the last block, stored; its length and the complement, both little-endian.
            block.push(0);
            block.extend_from_slice(&length.to_le_bytes());
            block.extend_from_slice(&(!length).to_le_bytes());
            block.extend_from_slice(piece);
        }
        Ok(block)
    }
}

#[cfg(test)]
mod tests {
    use flate2::{Compress, Compression, FlushCompress};

    use super::*;

    #[test]
    fn compressed_blocks_are_read_piece_by_piece() {
        let mut context = Compress::new(Compression::best(), true);
        context.set_dictionary(&dictionary()).unwrap();
        let mut back = Inflater::new();
        for n in 0..50_u32 {
            let value = "requestid ".repeat(n as usize * 20);
            let mut plain = vec![0, 0, 0, 1, 0, 0, 0, 1, b'a'];
            plain.extend_from_slice(&u32::try_from(value.len()).unwrap().to_be_bytes());
            plain.extend_from_slice(value.as_bytes());
            let mut block = Vec::with_capacity(1 << 16);
            context
                .compress_vec(&plain, &mut block, FlushCompress::Sync)
                .unwrap();
            assert_eq!(back.read(&block).unwrap(), [("a".to_owned(), value)]);
        }
    }

    #[test]
    fn the_dictionary_is_the_standard_one() {
        assert_eq!(dictionary().len(), 1423);
        let mut context = Compress::new(Compression::fast(), true);
        assert_eq!(
            context.set_dictionary(&dictionary()).unwrap(),
            DICTIONARY_ID
        );
    }

    #[test]
    fn blocks_share_one_context() {
        let (mut out, mut back) = (Deflater::default(), Inflater::new());
        for n in 0..200 {
            let value = n.to_string();
            let pairs = [("streamtype", "error"), ("requestid", value.as_str())];
            let block = out.write(&pairs).unwrap();
            assert!(block.ends_with(&[0, 0, 0, 0xff, 0xff]), "flushed");
            let read = back.read(&block).unwrap();
            assert_eq!(read[0], ("streamtype".to_owned(), "error".to_owned()));
            assert_eq!(read[1].1, value);
        }
        let large = "x".repeat(20_000);
        let block = out.write(&[("a", &large)]).unwrap();
        assert_eq!(back.read(&block).unwrap()[0].1, large);
    }

    #[test]
    fn hostile_blocks_are_refused() {
        let bomb = "x".repeat(200_000);
        let block = Deflater::default().write(&[("a", &bomb)]).unwrap();
        assert!(Inflater::new().read(&block).is_err());
        for block in [&b""[..], b"nonsense", &[0x78, 0xbb, 1, 2, 3, 4, 5]] {
            assert!(Inflater::new().read(block).is_err());
        }
    }
}
