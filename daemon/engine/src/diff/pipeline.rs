//! One plain stream to two readers: a hash and a consumer.
//!
//! ```text
//! source ─ read, inflate ─▶ chunk ─┬─▶ hash            (own thread)
//!  (own thread)                    └─▶ consumer        (calling thread)
//! ```
//! Chunks are shared, not copied, and their buffers are used again. A stream that fits one chunk
//! takes no threads at all.

use std::io::{self, BufRead, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use sha2::{Digest as _, Sha256};

use super::Error;

/// Bytes of a chunk: large enough to make handing over cheap, small enough for the caches.
const CHUNK_BYTES: usize = 256 << 10;
/// Chunks on their way to each reader; bounds memory to about twice as many.
const CHUNKS_MAX: usize = 8;

/// What the whole stream was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hashed {
    /// `sha256:<hex>`.
    pub(super) digest: String,
    /// Length in bytes.
    pub(super) size_bytes: u64,
}

/// `sha256:<hex>` of a finished hash.
pub(super) fn digest_text(hash: Sha256) -> String {
    format!("sha256:{}", hex::encode(hash.finalize()))
}

type Pool = Arc<Mutex<Vec<Vec<u8>>>>;

struct Chunk {
    data: Vec<u8>,
    pool: Pool,
}

impl Drop for Chunk {
    fn drop(&mut self) {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        pool.push(std::mem::take(&mut self.data));
    }
}

type Message = Result<Arc<Chunk>, Error>;

/// Reads `source` to its end, hands it to `consume` and hashes all of it, also what `consume` leaves.
///
/// `check` sees the number of bytes so far and may stop everything.
pub(super) fn run<R, T>(
    mut source: R,
    check: impl Fn(u64) -> Result<(), Error> + Send,
    consume: impl FnOnce(&mut dyn BufRead) -> Result<T, Error>,
) -> Result<(T, Hashed), Error>
where
    R: Read + Send,
{
    let mut first = Vec::new();
    let more = fill(&mut source, &mut first)?;
    check(first.len() as u64)?;
    if !more {
        let result = consume(&mut first.as_slice())?;
        let hashed = Hashed {
            digest: digest_text(Sha256::new_with_prefix(&first)),
            size_bytes: first.len() as u64,
        };
        return Ok((result, hashed));
    }
    thread::scope(|scope| {
        let (to_hash, hash_chunks) = sync_channel(CHUNKS_MAX);
        let (to_consumer, chunks) = sync_channel(CHUNKS_MAX);
        scope.spawn(move || produce(source, first, &check, &to_hash, &to_consumer));
        let hash = scope.spawn(move || hash_all(&hash_chunks));
        let mut reader = Chunks::new(chunks);
        let result = consume(&mut reader);
        // An error of the stream is the cause of whatever the consumer made of it.
        let drained = if result.is_ok() {
            reader.drain()
        } else {
            Ok(())
        };
        let failed = reader.failed.take();
        drop(reader);
        let hashed = hash.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
        if let Some(error) = failed {
            return Err(error);
        }
        drained.map_err(Error::Stream)?;
        Ok((result?, hashed))
    })
}

/// Fills `buffer` up to a chunk. Whether there may be more.
fn fill(source: &mut impl Read, buffer: &mut Vec<u8>) -> Result<bool, Error> {
    buffer.resize(CHUNK_BYTES, 0);
    let mut filled = 0;
    while filled < CHUNK_BYTES {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => {
                buffer.truncate(filled);
                return Ok(false);
            }
            Ok(more) => filled += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::Stream(error)),
        }
    }
    Ok(true)
}

fn produce(
    mut source: impl Read,
    first: Vec<u8>,
    check: &impl Fn(u64) -> Result<(), Error>,
    to_hash: &SyncSender<Arc<Chunk>>,
    to_consumer: &SyncSender<Message>,
) {
    let pool = Pool::default();
    let mut data = first;
    let mut total = 0_u64;
    let mut more = true;
    loop {
        total += data.len() as u64;
        if let Err(error) = check(total) {
            let _ = to_consumer.send(Err(error));
            return;
        }
        let chunk = Arc::new(Chunk {
            data,
            pool: Arc::clone(&pool),
        });
        // A reader that is gone has failed: nobody wants the rest.
        if to_hash.send(Arc::clone(&chunk)).is_err() || to_consumer.send(Ok(chunk)).is_err() {
            return;
        }
        if !more {
            return;
        }
        let spare = pool.lock().unwrap_or_else(PoisonError::into_inner).pop();
        data = spare.unwrap_or_default();
        match fill(&mut source, &mut data) {
            Ok(left) => more = left,
            Err(error) => {
                let _ = to_consumer.send(Err(error));
                return;
            }
        }
    }
}

fn hash_all(chunks: &Receiver<Arc<Chunk>>) -> Hashed {
    let mut hash = Sha256::new();
    let mut size_bytes = 0;
    while let Ok(chunk) = chunks.recv() {
        hash.update(&chunk.data);
        size_bytes += chunk.data.len() as u64;
    }
    Hashed {
        digest: digest_text(hash),
        size_bytes,
    }
}

/// The consumer's end.
struct Chunks {
    chunks: Receiver<Message>,
    current: Option<Arc<Chunk>>,
    at: usize,
    /// Why the stream broke; the consumer only sees a generic error.
    failed: Option<Error>,
}

impl Chunks {
    fn new(chunks: Receiver<Message>) -> Self {
        Self {
            chunks,
            current: None,
            at: 0,
            failed: None,
        }
    }

    fn drain(&mut self) -> io::Result<()> {
        loop {
            let length = self.fill_buf()?.len();
            if length == 0 {
                return Ok(());
            }
            self.consume(length);
        }
    }
}

impl BufRead for Chunks {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let spent = self
            .current
            .as_ref()
            .is_none_or(|c| self.at == c.data.len());
        if spent {
            // Let go of the old buffer first, so that it can be filled again.
            self.current = None;
            self.at = 0;
            match self.chunks.recv() {
                Ok(Ok(chunk)) => self.current = Some(chunk),
                Ok(Err(error)) => {
                    self.failed = Some(error);
                    return Err(io::Error::other("the layer's stream broke"));
                }
                // The producer is done.
                Err(_) => {}
            }
        }
        Ok(self.current.as_ref().map_or(&[], |c| &c.data[self.at..]))
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount;
    }
}

impl Read for Chunks {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(buf.len());
        buf[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fine(_: u64) -> Result<(), Error> {
        Ok(())
    }

    #[test]
    fn the_hash_covers_what_the_consumer_leaves() {
        for length in [
            0,
            1,
            CHUNK_BYTES - 1,
            CHUNK_BYTES,
            CHUNK_BYTES + 1,
            40 * CHUNK_BYTES + 7,
        ] {
            let data: Vec<u8> = (0..=250).cycle().take(length).collect();
            let (seen, hashed) = run(data.as_slice(), fine, |reader| {
                let mut start = vec![0; length.min(1000)];
                reader.read_exact(&mut start).map_err(Error::Stream)?;
                Ok(start)
            })
            .unwrap();
            assert_eq!(seen, data[..seen.len()]);
            assert_eq!(hashed.size_bytes, length as u64);
            assert_eq!(hashed.digest, digest_text(Sha256::new_with_prefix(&data)));
        }
    }

    #[test]
    fn a_bound_stops_everything_and_names_itself() {
        let check = |total: u64| {
            if total > 5 << 20 {
                return Err(Error::TooLarge {
                    limit: "5 MiB".to_owned(),
                });
            }
            Ok(())
        };
        let result = run(io::repeat(0), check, |reader| {
            io::copy(reader, &mut io::sink()).map_err(Error::Stream)
        });
        assert!(matches!(result, Err(Error::TooLarge { .. })), "{result:?}");
    }

    #[test]
    fn a_failing_consumer_ends_the_stream() {
        let result: Result<((), _), _> =
            run(io::repeat(0), fine, |_| Err(Error::entry(b"x", "no")));
        assert!(matches!(result, Err(Error::Entry { .. })));
    }
}
