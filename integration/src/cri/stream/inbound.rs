//! The reading half of an upgraded connection.

use std::io;

use tokio::io::{AsyncReadExt as _, BufReader};
use tokio::net::tcp::OwnedReadHalf;

/// Bytes read from the connection at once.
const READ_BYTES: usize = 128 << 10;

/// What arrives, from the first byte behind the head of the answer.
#[derive(Debug)]
pub(super) struct Inbound {
    stream: BufReader<OwnedReadHalf>,
    /// What the head's reader had read beyond it.
    early: Vec<u8>,
}

impl Inbound {
    pub(super) fn new(stream: OwnedReadHalf, early: Vec<u8>) -> Self {
        Self {
            stream: BufReader::with_capacity(READ_BYTES, stream),
            early,
        }
    }

    /// Reads as many bytes as `buffer` has.
    pub(super) async fn fill(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let take = buffer.len().min(self.early.len());
        let rest = self.early.split_off(take);
        buffer[..take].copy_from_slice(&self.early);
        self.early = rest;
        self.stream.read_exact(&mut buffer[take..]).await.map(drop)
    }
}
