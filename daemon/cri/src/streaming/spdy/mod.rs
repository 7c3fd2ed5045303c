//! SPDY/3.1, the server's side, as Kubernetes' clients speak it: many streams over one connection.
//!
//! Spec: SPDY protocol draft 3.1, sections 2.2 (framing) to 2.6 (control frames). There is no push;
//! every stream is begun by the client.

mod frame;
mod headers;

#[cfg(test)]
pub(super) mod client;

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter};
use tokio::sync::mpsc;

use self::frame::{Control, Head};
use self::headers::{Deflater, Inflater};
use super::channel::{
    Activity, ChannelReader, ChannelState, ChannelWriter, MAX_CHUNK, OUTBOUND_CHUNKS, Outgoing,
    Window,
};

/// Streams whose client side is open, on one connection.
const MAX_STREAMS: usize = 1024;
/// Bytes of one control frame.
const MAX_CONTROL: usize = 64 << 10;
/// New streams waiting for the application.
const ACCEPT_QUEUE: usize = 32;
/// Replies waiting to be sent.
const CONTROL_QUEUE: usize = 64;
/// Bytes that may be sent before a window update, unless settings say otherwise.
const INITIAL_WINDOW: i64 = 64 << 10;
/// Bytes received before the peer is allowed as many again.
const UPDATE_AFTER: usize = 32 << 10;

/// A stream begun by the client.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) id: u32,
    headers: Vec<(String, String)>,
    pub(super) reader: ChannelReader,
    pub(super) writer: ChannelWriter,
}

impl Stream {
    /// A header's value, by lower-case name.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let found = self
            .headers
            .iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }
}

/// The application's side of a connection.
#[derive(Debug)]
pub(super) struct Connection {
    /// New streams; closed when the client is gone.
    pub(super) streams: mpsc::Receiver<Stream>,
    /// To the writer.
    queue: mpsc::Sender<Outgoing>,
}

impl Connection {
    /// Says goodbye after everything that was written, and lets the connection end.
    pub(super) async fn finish(self) {
        let _ = self.queue.send(Outgoing::Raw(frame::goaway())).await;
    }
}

/// Refuses a stream, which the client sees as reset.
pub(super) async fn refuse(connection: &Connection, stream: &Stream) {
    let reset = frame::reset(stream.id, frame::REFUSED_STREAM);
    let _ = connection.queue.send(Outgoing::Raw(reset)).await;
}

/// Serves a connection. The future drives it, and ends when the client is gone.
pub(super) fn serve<S: AsyncRead + AsyncWrite + Send + 'static>(
    stream: S,
    activity: Arc<Activity>,
) -> (impl Future<Output = ()> + Send, Connection) {
    let (queue, outgoing) = mpsc::channel(OUTBOUND_CHUNKS);
    let (control, replies) = mpsc::channel(CONTROL_QUEUE);
    let (accept, streams) = mpsc::channel(ACCEPT_QUEUE);
    let connection = Connection {
        streams,
        queue: queue.clone(),
    };
    let driver = async move {
        let (reader, writer) = tokio::io::split(stream);
        let read = Reader {
            reader,
            inflater: Inflater::new(),
            deflater: Deflater::default(),
            control,
            queue: queue.downgrade(),
            accept: Some(accept),
            live: HashMap::new(),
            last_id: 0,
            window: Arc::new(Window::new(INITIAL_WINDOW, false)),
            initial: AtomicI64::new(INITIAL_WINDOW),
            flow_controlled: false,
            received: 0,
            activity: activity.clone(),
        };
        drop(queue);
        let read = read.run();
        let write = write_all(writer, outgoing, replies, activity);
        tokio::pin!(read, write);
        let ended = tokio::select! {
            ended = &mut read => ended,
            // Everything is sent: the client's last frames are read until it hangs up.
            ended = &mut write => match ended {
                Ok(()) => read.await,
                Err(e) => Err(e),
            },
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "streaming connection");
        }
    };
    (driver, connection)
}

/// A stream of the client, as the connection's reader knows it.
struct Live {
    /// To the stream's reader; dropped at its end.
    inbound: Option<mpsc::Sender<Bytes>>,
    state: Arc<ChannelState>,
    /// Bytes received and not yet allowed again.
    received: usize,
}

/// The reading half of a connection.
struct Reader<R> {
    reader: R,
    inflater: Inflater,
    deflater: Deflater,
    /// Replies for the writer, sent before any data.
    control: mpsc::Sender<Outgoing>,
    /// Data for the writer, handed to new streams. Weak, so that the connection ends with its
    /// last stream.
    queue: mpsc::WeakSender<Outgoing>,
    /// New streams for the application; dropped when the client begins no more.
    accept: Option<mpsc::Sender<Stream>>,
    live: HashMap<u32, Live>,
    last_id: u32,
    /// What the client accepts over all streams.
    window: Arc<Window>,
    /// What the client accepts on a new stream.
    initial: AtomicI64,
    /// The client has shown that it does flow control.
    flow_controlled: bool,
    /// Bytes received over all streams and not yet allowed again.
    received: usize,
    activity: Arc<Activity>,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    async fn run(mut self) -> io::Result<()> {
        loop {
            let mut head = [0; 8];
            match self.reader.read_exact(&mut head).await {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(e) => return Err(e),
            }
            match frame::head(head)? {
                Head::Data { id, last, length } => self.data(id, last, length).await?,
                Head::Control {
                    kind,
                    flags,
                    length,
                } => {
                    if length > MAX_CONTROL {
                        return Err(frame::invalid("control frame is too large"));
                    }
                    let mut body = vec![0; length];
                    self.reader.read_exact(&mut body).await?;
                    self.control(frame::control(kind, flags, &body)?).await?;
                }
            }
        }
    }

    async fn data(&mut self, id: u32, last: bool, length: usize) -> io::Result<()> {
        let mut left = length;
        while left > 0 {
            let mut chunk = vec![0; left.min(MAX_CHUNK)];
            self.reader.read_exact(&mut chunk).await?;
            left -= chunk.len();
            self.activity.touch();
            let count = chunk.len();
            let inbound = self.live.get(&id).and_then(|live| live.inbound.clone());
            // Nobody reading any more is no error: the rest is dropped.
            if let Some(inbound) = inbound {
                let _ = inbound.send(chunk.into()).await;
            }
            self.allow_more(id, count).await;
        }
        if last {
            self.end_inbound(id);
        }
        Ok(())
    }

    /// Counts received bytes and hands out new credit in time.
    async fn allow_more(&mut self, id: u32, count: usize) {
        let mut updates = Vec::new();
        self.received += count;
        if self.received >= UPDATE_AFTER {
            updates.push(frame::window_update(0, self.received));
            self.received = 0;
        }
        if let Some(live) = self.live.get_mut(&id) {
            live.received += count;
            if live.received >= UPDATE_AFTER {
                updates.push(frame::window_update(id, live.received));
                live.received = 0;
            }
        }
        for update in updates {
            let _ = self.control.send(Outgoing::Raw(update)).await;
        }
    }

    fn end_inbound(&mut self, id: u32) {
        if let Some(live) = self.live.get_mut(&id) {
            live.inbound = None;
            if live.state.is_finished() {
                self.live.remove(&id);
            }
        }
    }

    async fn control(&mut self, control: Control<'_>) -> io::Result<()> {
        match control {
            Control::SynStream { id, last, block } => {
                let headers = self.inflater.read(block)?;
                self.begin(id, last, headers).await
            }
            Control::Headers { block } => self.inflater.read(block).map(drop),
            Control::Reset { id } => {
                if let Some(live) = self.live.remove(&id) {
                    live.state.reset();
                }
                Ok(())
            }
            Control::InitialWindow { size } => {
                let old = self.initial.swap(size, Ordering::Relaxed);
                self.flow_controlled = true;
                for live in self.live.values() {
                    live.state
                        .window()
                        .inspect(|window| window.grant(size - old));
                }
                self.window.grant(0);
                Ok(())
            }
            Control::WindowUpdate { id: 0, delta } => {
                self.window.grant(delta);
                Ok(())
            }
            Control::WindowUpdate { id, delta } => {
                self.flow_controlled = true;
                if let Some(live) = self.live.get(&id) {
                    live.state.window().inspect(|window| window.grant(delta));
                }
                Ok(())
            }
            Control::Ping { id } => {
                // Even ids answer pings of ours, which there are none of.
                if id % 2 == 1 {
                    let _ = self.control.send(Outgoing::Raw(frame::ping(id))).await;
                }
                Ok(())
            }
            Control::GoAway => {
                self.accept = None;
                Ok(())
            }
            Control::Other => Ok(()),
        }
    }

    async fn begin(
        &mut self,
        id: u32,
        last: bool,
        headers: Vec<(String, String)>,
    ) -> io::Result<()> {
        if id.is_multiple_of(2) || id <= self.last_id {
            return Err(frame::invalid("stream id is not a new odd number"));
        }
        self.last_id = id;
        if self.live.len() >= MAX_STREAMS {
            let abandoned = |live: &Live| {
                live.state.is_finished()
                    && live.inbound.as_ref().is_none_or(mpsc::Sender::is_closed)
            };
            self.live.retain(|_, live| !abandoned(live));
        }
        let queue = self
            .queue
            .upgrade()
            .filter(|_| self.live.len() < MAX_STREAMS);
        let (Some(queue), Some(accept)) = (queue, &self.accept) else {
            let reset = frame::reset(id, frame::REFUSED_STREAM);
            let _ = self.control.send(Outgoing::Raw(reset)).await;
            return Ok(());
        };
        let (inbound, reader) = ChannelReader::new();
        let credit = self.initial.load(Ordering::Relaxed);
        let window = Arc::new(Window::new(credit, self.flow_controlled));
        let state = ChannelState::new(vec![window, self.window.clone()]);
        self.live.insert(
            id,
            Live {
                inbound: (!last).then_some(inbound),
                state: state.clone(),
                received: 0,
            },
        );
        let reply = frame::syn_reply(id, &self.deflater.write(&[])?);
        let _ = self.control.send(Outgoing::Raw(reply)).await;
        let stream = Stream {
            id,
            headers,
            reader,
            writer: ChannelWriter::new(queue, id, state),
        };
        // An application that accepts no more has ended; its connection is about to.
        let _ = accept.send(stream).await;
        Ok(())
    }
}

/// Sends replies first, then data, until every sender is gone; then ends the writing side.
async fn write_all<W: AsyncWrite + Unpin>(
    writer: W,
    mut outgoing: mpsc::Receiver<Outgoing>,
    mut replies: mpsc::Receiver<Outgoing>,
    activity: Arc<Activity>,
) -> io::Result<()> {
    let mut writer = BufWriter::with_capacity(MAX_CHUNK + 8, writer);
    loop {
        if outgoing.is_empty() && replies.is_empty() {
            writer.flush().await?;
        }
        // Both branches are cancel-safe: a message is taken only by the branch that runs.
        let next = tokio::select! {
            biased;
            Some(reply) = replies.recv() => Some(reply),
            data = outgoing.recv() => data,
        };
        match next {
            Some(Outgoing::Raw(frame)) => writer.write_all(&frame).await?,
            Some(Outgoing::Data {
                channel,
                data,
                last,
            }) => {
                activity.touch();
                writer
                    .write_all(&frame::data_head(channel, last, data.len()))
                    .await?;
                writer.write_all(&data).await?;
            }
            None => break,
        }
    }
    writer.flush().await?;
    writer.shutdown().await
}
