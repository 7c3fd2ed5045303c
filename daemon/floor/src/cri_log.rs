//! Container logs in CRI's form. One record per line:
//!
//! ```text
//! 2026-01-02T15:04:05.000000000Z stdout F text
//! ```
//!
//! `F` ends a line, `P` is a piece of one longer than the limit, or text that the stream's end left
//! without a newline. `\r` before the newline is dropped.

use crate::timestamp::Rfc3339;

/// Longest line that is kept in memory, where a configuration sets no limit.
pub const MAX_LINE_BYTES: usize = 256 * 1024;

/// The limit of a configuration in which a negative number means none. At least 1.
#[must_use]
pub fn line_limit(configured: i64) -> usize {
    usize::try_from(configured).map_or(MAX_LINE_BYTES, |most| most.clamp(1, MAX_LINE_BYTES))
}

/// Which stream a record belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn tag(self) -> &'static [u8] {
        match self {
            Self::Stdout => b" stdout ",
            Self::Stderr => b" stderr ",
        }
    }
}

/// Cuts a stream into records.
#[derive(Debug)]
pub struct Cutter {
    tag: &'static [u8],
    limit: usize,
    /// The unfinished line, at most `limit + 1` bytes.
    line: Vec<u8>,
}

impl Cutter {
    /// Nothing read yet. `limit` is the longest line in bytes, at least 1.
    #[must_use]
    pub fn new(stream: Stream, limit: usize) -> Self {
        Self {
            tag: stream.tag(),
            limit: limit.max(1),
            line: Vec::new(),
        }
    }

    fn record(&self, out: &mut Vec<u8>, stamp: &Rfc3339, full: bool, text: &[u8]) {
        out.extend_from_slice(stamp.as_bytes());
        out.extend_from_slice(self.tag);
        out.extend_from_slice(if full { b"F " } else { b"P " });
        out.extend_from_slice(text);
        out.push(b'\n');
    }

    /// Appends the records that `bytes` complete.
    pub fn push(&mut self, bytes: &[u8], stamp: &Rfc3339, out: &mut Vec<u8>) {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&b| b == b'\n') {
            let (text, tail) = rest.split_at(end);
            rest = &tail[1..];
            if self.line.is_empty() {
                self.full(text, stamp, out);
            } else {
                self.line.extend_from_slice(text);
                let line = std::mem::take(&mut self.line);
                self.full(&line, stamp, out);
            }
        }
        self.line.extend_from_slice(rest);
        // A line of exactly the limit stays whole, so the byte after it decides; a `\r` does not,
        // it may belong to the newline.
        let mut start = 0;
        while self.cuttable(start) {
            self.record(out, stamp, false, &self.line[start..start + self.limit]);
            start += self.limit;
        }
        self.line.drain(..start);
    }

    fn cuttable(&self, start: usize) -> bool {
        let left = self.line.len() - start;
        left > self.limit + 1 || (left == self.limit + 1 && self.line.last() != Some(&b'\r'))
    }

    /// One whole line, without its newline.
    fn full(&self, line: &[u8], stamp: &Rfc3339, out: &mut Vec<u8>) {
        let mut text = line.strip_suffix(b"\r").unwrap_or(line);
        while text.len() > self.limit {
            let (piece, rest) = text.split_at(self.limit);
            self.record(out, stamp, false, piece);
            text = rest;
        }
        self.record(out, stamp, true, text);
    }

    /// What the end of the stream leaves.
    pub fn finish(&mut self, stamp: &Rfc3339, out: &mut Vec<u8>) {
        let line = std::mem::take(&mut self.line);
        for piece in line.chunks(self.limit) {
            self.record(out, stamp, false, piece);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use proptest::prelude::*;

    use super::*;

    const STAMP: &str = "1970-01-01T00:00:00.000000000Z stdout ";

    fn cut(limit: usize, blocks: &[&[u8]]) -> Vec<String> {
        let mut cutter = Cutter::new(Stream::Stdout, limit);
        let stamp = Rfc3339::of(UNIX_EPOCH);
        let mut out = Vec::new();
        for block in blocks {
            cutter.push(block, &stamp, &mut out);
        }
        cutter.finish(&stamp, &mut out);
        String::from_utf8(out)
            .unwrap()
            .lines()
            .map(|line| line.strip_prefix(STAMP).unwrap().to_owned())
            .collect()
    }

    #[test]
    fn lines_are_cut_where_the_limit_says() {
        assert_eq!(cut(4, &[b"abcd\n"]), ["F abcd"]);
        assert_eq!(cut(4, &[b"abcde\n"]), ["P abcd", "F e"]);
        assert_eq!(cut(4, &[b"abcdefgh\n"]), ["P abcd", "F efgh"]);
        assert_eq!(cut(4, &[b"abcd", b"\r\n", b"\n"]), ["F abcd", "F "]);
        assert_eq!(cut(4, &[b"ab\r\nc"]), ["F ab", "P c"]);
        assert_eq!(cut(4, &[b""]), Vec::<String>::new());
    }

    proptest! {
        #[test]
        fn the_split_of_the_stream_does_not_matter(
            text in "[ab\r\n]{0,80}", at in prop::collection::vec(0usize..80, 0..5), limit in 1usize..9
        ) {
            let bytes = text.as_bytes();
            let mut cuts: Vec<usize> = at.into_iter().filter(|&i| i < bytes.len()).collect();
            cuts.sort_unstable();
            let mut blocks = Vec::new();
            let mut start = 0;
            for cut in cuts {
                blocks.push(&bytes[start..cut]);
                start = cut;
            }
            blocks.push(&bytes[start..]);
            prop_assert_eq!(cut(limit, &blocks), cut(limit, &[bytes]));
        }

        #[test]
        fn the_unfinished_line_is_bounded(blocks in prop::collection::vec("[a\r]{0,50}", 0..20)) {
            let mut cutter = Cutter::new(Stream::Stdout, 8);
            let stamp = Rfc3339::of(UNIX_EPOCH);
            let mut out = Vec::new();
            for block in blocks {
                cutter.push(block.as_bytes(), &stamp, &mut out);
                prop_assert!(cutter.line.len() <= 9);
            }
        }
    }
}
