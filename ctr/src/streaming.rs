//! Named streams beside a call: progress, credentials, and bytes with a window.
//!
//! The client opens a stream under an id, the daemon acknowledges, and a request then names the id.
//! Bytes travel as `Data`; their receiver grants what it can take by `WindowUpdate`.

use std::io::{Read, Write};
use std::time::Duration;

use anyhow::Context as _;
use lighter_proto::any;
use lighter_proto::containerd::services::streaming::v1::StreamInit;
use lighter_proto::containerd::types::transfer::{Data, WindowUpdate};
use prost_types::Any;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::client::Client;

/// Bytes that a receiver grants at a time.
const WINDOW: i32 = 64 << 10;
/// Largest piece sent at once, bytes.
const CHUNK: usize = 32 << 10;
/// Messages queued towards the daemon.
const QUEUE: usize = 4;

/// Zeros that end a tar archive, bytes.
const ARCHIVE_END: usize = 1024;
/// Silence after a transfer that may mean its end.
const SILENCE: Duration = Duration::from_millis(100);
/// How long the rest of an archive is waited for after its transfer.
const PATIENCE: Duration = Duration::from_secs(10);

/// An open stream.
#[derive(Debug)]
pub(crate) struct Stream {
    id: String,
    outgoing: mpsc::Sender<Any>,
    incoming: Streaming<Any>,
}

impl Stream {
    /// Opens a stream and waits until the daemon knows it.
    pub(crate) async fn open(client: &Client, prefix: &str) -> Result<Self, Status> {
        let id = format!("{prefix}-{:016x}", rand::random::<u64>());
        let (outgoing, receiver) = mpsc::channel(QUEUE);
        let init = any::pack(&StreamInit { id: id.clone() });
        outgoing.try_send(init).expect("a new channel has room");
        let answer = client
            .streaming()
            .stream(ReceiverStream::new(receiver))
            .await?;
        let mut incoming = answer.into_inner();
        incoming
            .message()
            .await?
            .ok_or_else(|| Status::unavailable("the daemon closed a stream before using it"))?;
        Ok(Self {
            id,
            outgoing,
            incoming,
        })
    }

    /// The id for the request.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// The next message; `None` at the end. A broken stream ends as well: the call that uses it says
    /// what went wrong.
    pub(crate) async fn next(&mut self) -> Option<Any> {
        self.incoming.message().await.ok().flatten()
    }

    /// Sends a message; whether anyone still listens.
    pub(crate) async fn send(&self, message: Any) -> bool {
        self.outgoing.send(message).await.is_ok()
    }

    /// Sends all bytes of `source`, as fast as the window allows. Ends when the daemon has taken them.
    pub(crate) async fn upload<R: Read + Send + 'static>(self, source: R) -> anyhow::Result<()> {
        let Self {
            outgoing,
            mut incoming,
            ..
        } = self;
        let mut source = Some(source);
        let mut window = 0_usize;
        loop {
            while window == 0 {
                let Ok(Some(message)) = incoming.message().await else {
                    return Ok(());
                };
                if let Ok(grant) = any::unpack::<WindowUpdate>(&message) {
                    window += usize::try_from(grant.update).unwrap_or(0);
                }
            }
            let mut reader = source.take().expect("given back after every read");
            let most = window.min(CHUNK);
            let read = tokio::task::spawn_blocking(move || {
                let data = fill(&mut reader, most)?;
                Ok::<_, std::io::Error>((reader, data))
            });
            let (reader, data) = read.await?.context("cannot read the input")?;
            source = Some(reader);
            if data.is_empty() {
                break;
            }
            window -= data.len();
            if outgoing.send(any::pack(&Data { data })).await.is_err() {
                return Ok(());
            }
        }
        // Closing our side says that this was all. Leaving as well would take back what is on its
        // way: stay until the daemon closes the other side.
        drop(outgoing);
        while let Ok(Some(_)) = incoming.message().await {}
        Ok(())
    }

    /// Writes all bytes that come to `sink`.
    pub(crate) async fn download<W: Write + Send + 'static>(self, sink: W) -> anyhow::Result<()> {
        // Never sent: only the end of the stream counts.
        let (_never, finished) = watch::channel(false);
        self.download_archive(sink, finished).await
    }

    /// Writes a tar archive to `sink`. Upstream's daemon leaves the stream open at the end of the
    /// transfer; so once `finished` says that the transfer is done, an archive that has its end (two
    /// blocks of zeros) and stays silent is taken for whole.
    pub(crate) async fn download_archive<W: Write + Send + 'static>(
        mut self,
        sink: W,
        mut finished: watch::Receiver<bool>,
    ) -> anyhow::Result<()> {
        let mut sink = Some(sink);
        let mut window = 0_i32;
        let mut zeros = 0;
        let mut silent = Duration::ZERO;
        loop {
            if window < WINDOW {
                self.send(any::pack(&WindowUpdate { update: WINDOW })).await;
                window += WINDOW;
            }
            let silence = async {
                // An error means that nobody will ever say so.
                if finished.wait_for(|done| *done).await.is_err() {
                    std::future::pending::<()>().await;
                }
                tokio::time::sleep(SILENCE).await;
            };
            let message = tokio::select! {
                message = self.incoming.message() => message.ok().flatten(),
                () = silence => {
                    silent += SILENCE;
                    if zeros >= ARCHIVE_END {
                        break;
                    }
                    anyhow::ensure!(silent < PATIENCE, "the daemon did not send the whole archive");
                    continue;
                }
            };
            silent = Duration::ZERO;
            let Some(message) = message else { break };
            let Ok(data) = any::unpack::<Data>(&message) else {
                continue;
            };
            window -= i32::try_from(data.data.len()).unwrap_or(window);
            zeros = trailing_zeros(zeros, &data.data);
            let mut writer = sink.take().expect("given back after every write");
            let written =
                tokio::task::spawn_blocking(move || writer.write_all(&data.data).map(|()| writer));
            sink = Some(written.await?.context("cannot write the output")?);
        }
        if let Some(mut writer) = sink {
            tokio::task::spawn_blocking(move || writer.flush()).await??;
        }
        Ok(())
    }
}

/// Reads up to `most` bytes; fewer only at the end.
fn fill<R: Read>(reader: &mut R, most: usize) -> std::io::Result<Vec<u8>> {
    let mut data = Vec::with_capacity(most);
    let limit = u64::try_from(most).unwrap_or(u64::MAX);
    reader.take(limit).read_to_end(&mut data)?;
    Ok(data)
}

/// Zeros at the end of everything so far, `before` of them before `data`.
fn trailing_zeros(before: usize, data: &[u8]) -> usize {
    let last = data.iter().rev().take_while(|byte| **byte == 0).count();
    if last == data.len() {
        before.saturating_add(last)
    } else {
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_an_archive_may_come_in_pieces() {
        let zeros = trailing_zeros(0, &[1, 0, 0]);
        assert_eq!(zeros, 2);
        assert_eq!(trailing_zeros(zeros, &[0; 1022]), ARCHIVE_END);
        assert_eq!(trailing_zeros(zeros, &[0, 1]), 0);
    }

    #[test]
    fn a_piece_is_short_only_at_the_end() {
        let mut source = std::io::Cursor::new(vec![7; 10]);
        assert_eq!(fill(&mut source, 8).unwrap().len(), 8);
        assert_eq!(fill(&mut source, 8).unwrap().len(), 2);
        assert!(fill(&mut source, 8).unwrap().is_empty());
    }
}
