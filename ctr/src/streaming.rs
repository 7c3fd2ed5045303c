//! Named streams beside a call: progress, credentials, and bytes with a window.
//!
//! The client opens a stream under an id, the daemon acknowledges, and a request then names the id.
//! Bytes travel as `Data`; their receiver grants what it can take by `WindowUpdate`.

use std::io::{Read, Write};

use anyhow::Context as _;
use lighter_proto::any;
use lighter_proto::containerd::services::streaming::v1::StreamInit;
use lighter_proto::containerd::types::transfer::{Data, WindowUpdate};
use prost_types::Any;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::client::Client;

/// Bytes that a receiver grants at a time.
const WINDOW: i32 = 64 << 10;
/// Largest piece sent at once, bytes.
const CHUNK: usize = 32 << 10;
/// Messages queued towards the daemon.
const QUEUE: usize = 4;

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

    /// Sends all bytes of `source`, as fast as the window allows, then closes.
    pub(crate) async fn upload<R: Read + Send + 'static>(
        mut self,
        source: R,
    ) -> anyhow::Result<()> {
        let mut source = Some(source);
        let mut window = 0_usize;
        loop {
            while window == 0 {
                let Some(message) = self.next().await else {
                    return Ok(());
                };
                if let Ok(grant) = any::unpack::<WindowUpdate>(&message) {
                    window += usize::try_from(grant.update).unwrap_or(0);
                }
            }
            let mut reader = source.take().expect("given back after every read");
            let most = window.min(CHUNK);
            let read = tokio::task::spawn_blocking(move || {
                let mut data = vec![0; most];
                let mut filled = 0;
                while filled < most {
                    match reader.read(&mut data[filled..]) {
                        Ok(0) => break,
                        Ok(count) => filled += count,
                        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(error),
                    }
                }
                data.truncate(filled);
                Ok((reader, data))
            });
            let (reader, data) = read.await?.context("cannot read the input")?;
            source = Some(reader);
            if data.is_empty() {
                return Ok(());
            }
            window -= data.len();
            if !self.send(any::pack(&Data { data })).await {
                return Ok(());
            }
        }
    }

    /// Writes all bytes that come to `sink`.
    pub(crate) async fn download<W: Write + Send + 'static>(
        mut self,
        sink: W,
    ) -> anyhow::Result<()> {
        let mut sink = Some(sink);
        let mut window = 0_i32;
        loop {
            if window < WINDOW {
                self.send(any::pack(&WindowUpdate { update: WINDOW })).await;
                window += WINDOW;
            }
            let Some(message) = self.next().await else {
                break;
            };
            let Ok(data) = any::unpack::<Data>(&message) else {
                continue;
            };
            window -= i32::try_from(data.data.len()).unwrap_or(window);
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
