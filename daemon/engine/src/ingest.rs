//! Blobs written by code that blocks: a plain writer on one side, an ingest on the other.

use std::io::{self, Write};

use bytes::Bytes;
use lighter_proto::errdefs::{Classify, ErrorKind, WireError};
use lighter_store::metadata::Content;
use lighter_store::{Digest, Error as StoreError, Labels, Scope};
use tokio::sync::mpsc;

/// Bytes handed on at once.
const CHUNK_BYTES: usize = 1 << 20;
/// Chunks that wait to be written.
const CHUNKS: usize = 4;

/// A blob that was written.
#[derive(Debug, Clone)]
pub(crate) struct Ingested<T> {
    /// Its digest.
    pub(crate) digest: Digest,
    /// Its size.
    pub(crate) size_bytes: u64,
    /// What the producer returned.
    pub(crate) made: T,
    /// Whether the namespace had it before.
    pub(crate) existed: bool,
}

fn wire<E: Classify>(error: &E) -> WireError {
    WireError::of(error)
}

/// Runs `produce` on a blocking thread and commits what it writes, with the labels that `labels`
/// derives from what it returned. A failure leaves no ingest behind.
///
/// # Errors
/// What the producer says, or why the store refused.
///
/// # Cancellation
/// The ingest is removed in the background; a commit that was begun is finished.
pub(crate) async fn ingest<T, F, L>(
    content: &Content,
    scope: &Scope,
    reference: &str,
    produce: F,
    labels: L,
) -> Result<Ingested<T>, WireError>
where
    T: Send + 'static,
    F: FnOnce(&mut Chunks) -> Result<T, WireError> + Send + 'static,
    L: FnOnce(&T) -> Labels,
{
    let mut unfinished = content
        .unfinished(scope, reference)
        .await
        .map_err(|e| wire(&e))?;
    let writer = unfinished.writer();
    if writer.status().offset_bytes > 0 {
        writer.truncate(0).await.map_err(|e| wire(&e))?;
    }
    let (sender, mut chunks) = mpsc::channel(CHUNKS);
    let work = tokio::task::spawn_blocking(move || {
        let mut chunks = Chunks::new(sender);
        let made = produce(&mut chunks)?;
        chunks
            .flush()
            .map_err(|e| WireError::new(ErrorKind::Internal, e.to_string()))?;
        Ok::<T, WireError>(made)
    });
    let mut written = Ok(());
    while let Some(chunk) = chunks.recv().await {
        written = writer.write(chunk).await.map_err(|e| wire(&e));
        if written.is_err() {
            break;
        }
    }
    // Lets a producer that still writes fail instead of waiting for ever.
    drop(chunks);
    let made = work
        .await
        .map_err(|e| WireError::new(ErrorKind::Internal, e.to_string()))?;
    // A store that refused explains what the producer then ran into.
    let made = match written.and(made) {
        Ok(made) => made,
        Err(error) => {
            // Waited for: who tries again at once finds the ref free.
            let _gone = content.abort(scope, reference).await;
            drop(unfinished.finish());
            return Err(error);
        }
    };
    let writer = unfinished.writer();
    let digest = writer.digest().await.map_err(|e| wire(&e))?;
    let size_bytes = writer.status().offset_bytes;
    let commit = unfinished
        .finish()
        .commit(size_bytes, Some(&digest), labels(&made));
    let existed = match commit.await {
        Ok(_) => false,
        Err(StoreError::AlreadyExists { .. }) => true,
        Err(error) => return Err(wire(&error)),
    };
    Ok(Ingested {
        digest,
        size_bytes,
        made,
        existed,
    })
}

/// A writer that hands chunks to whoever receives them; to be used on a blocking thread.
#[derive(Debug)]
pub(crate) struct Chunks {
    buffer: Vec<u8>,
    sender: mpsc::Sender<Bytes>,
}

impl Chunks {
    /// Hands what is written to whoever has the other end of `sender`.
    pub(crate) fn new(sender: mpsc::Sender<Bytes>) -> Self {
        Self {
            buffer: Vec::with_capacity(CHUNK_BYTES),
            sender,
        }
    }
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = CHUNK_BYTES - self.buffer.len();
        let taken = room.min(bytes.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == CHUNK_BYTES {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK_BYTES));
        self.sender
            .blocking_send(chunk.into())
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}
