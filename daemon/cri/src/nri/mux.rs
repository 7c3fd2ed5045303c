//! Several logical connections over one socket, framed as NRI's plugins expect it.
//!
//! | bytes | what |
//! |---|---|
//! | 4 | connection id, big-endian: 1 the plugin's service, 2 the runtime's |
//! | 4 | payload length, big-endian |
//! | n | payload |
//!
//! A payload is a piece of a byte stream, except that Go's plugins read each one into whatever
//! buffer they have at that moment, which is 4096 bytes at the start of a ttrpc message. Messages
//! are therefore sent as one payload of up to that many bytes and one with the rest.

use std::future::Future;
use std::io;

use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex,
    split,
};
use tokio::sync::Mutex;
use tokio::time::{Duration, timeout};

/// Connection on which the daemon calls the plugin.
const PLUGIN_ID: u32 = 1;
/// Connection on which the plugin calls the daemon.
const RUNTIME_ID: u32 = 2;
/// Bytes of one payload: a whole ttrpc message.
const MAX_PAYLOAD: usize = (4 << 20) + TTRPC_HEAD;
/// Bytes before a ttrpc message's data: length, stream, type and flags.
const TTRPC_HEAD: usize = 10;
/// Bytes that a plugin can take at the start of a message.
const FIRST_PAYLOAD: usize = 4096;
/// Bytes buffered in each direction of a logical connection.
const BUFFER: usize = 64 << 10;
/// How long one side may leave its buffer full before everything is closed.
const STALLED: Duration = Duration::from_secs(10);

/// Both logical connections of a socket.
#[derive(Debug)]
pub(super) struct Connections {
    /// The plugin's service.
    pub(super) plugin: DuplexStream,
    /// The runtime's service.
    pub(super) runtime: DuplexStream,
}

/// Splits a socket. The future drives it, and ends when either side closes.
pub(super) fn open<S>(socket: S) -> (impl Future<Output = io::Result<()>> + Send, Connections)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (plugin, plugin_inner) = duplex(BUFFER);
    let (runtime, runtime_inner) = duplex(BUFFER);
    let driver = async move {
        let (reader, writer) = split(socket);
        let (plugin_out, plugin_in) = split(plugin_inner);
        let (runtime_out, runtime_in) = split(runtime_inner);
        let writer = Mutex::new(writer);
        tokio::select! {
            ended = receive(reader, plugin_in, runtime_in) => ended,
            ended = send(PLUGIN_ID, plugin_out, &writer) => ended,
            ended = send(RUNTIME_ID, runtime_out, &writer) => ended,
        }
    };
    (driver, Connections { plugin, runtime })
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

async fn receive<S: AsyncRead>(
    mut reader: ReadHalf<S>,
    mut plugin: WriteHalf<DuplexStream>,
    mut runtime: WriteHalf<DuplexStream>,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let id = match reader.read_u32().await {
            Ok(id) => id,
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e),
        };
        let length = usize::try_from(reader.read_u32().await?).unwrap_or(usize::MAX);
        if length > MAX_PAYLOAD {
            return Err(invalid("payload is too large"));
        }
        let target = match id {
            PLUGIN_ID => &mut plugin,
            RUNTIME_ID => &mut runtime,
            _ => return Err(invalid("unknown connection id")),
        };
        let mut left = length;
        while left > 0 {
            let piece = &mut buffer[..left.min(16 << 10)];
            reader.read_exact(piece).await?;
            left -= piece.len();
            timeout(STALLED, target.write_all(piece))
                .await
                .map_err(|_| invalid("a logical connection is not being read"))??;
        }
    }
}

async fn send<S: AsyncWrite>(
    id: u32,
    mut reader: ReadHalf<DuplexStream>,
    writer: &Mutex<WriteHalf<S>>,
) -> io::Result<()> {
    loop {
        let mut message = vec![0; TTRPC_HEAD];
        match reader.read_exact(&mut message).await {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e),
        }
        let [a, b, c, d, ..] = message[..] else {
            return Err(invalid("message is cut short"));
        };
        let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        if length > MAX_PAYLOAD - TTRPC_HEAD {
            return Err(invalid("message is too large"));
        }
        message.resize(TTRPC_HEAD + length, 0);
        reader.read_exact(&mut message[TTRPC_HEAD..]).await?;
        let (first, rest) = message.split_at(message.len().min(FIRST_PAYLOAD));
        let mut writer = writer.lock().await;
        for payload in [first, rest] {
            if !payload.is_empty() {
                let length = u32::try_from(payload.len()).expect("payloads are bounded");
                writer.write_all(&id.to_be_bytes()).await?;
                writer.write_all(&length.to_be_bytes()).await?;
                writer.write_all(payload).await?;
            }
        }
        writer.flush().await?;
    }
}
