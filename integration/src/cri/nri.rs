//! A plugin of the Node Resource Interface that agrees to everything and notes what it is told.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::task::JoinSet;

use crate::Result;

/// Logical connection on which the daemon calls.
const PLUGIN: u32 = 1;
/// Logical connection on which the plugin calls.
const RUNTIME: u32 = 2;
/// Bytes before a message of ttrpc: length, number, kind, flags.
const HEAD: usize = 10;
/// Kinds of messages.
const REQUEST: u8 = 1;
/// See [`REQUEST`].
const RESPONSE: u8 = 2;

/// The part of a request of ttrpc that matters here.
#[derive(Clone, PartialEq, prost::Message)]
struct Request {
    #[prost(string, tag = "1")]
    service: String,
    #[prost(string, tag = "2")]
    method: String,
    #[prost(bytes = "vec", tag = "3")]
    payload: Vec<u8>,
}

/// A connected plugin; gone when dropped.
#[derive(Debug)]
pub struct NriPlugin {
    calls: Arc<Mutex<Vec<String>>>,
    // Ends with the plugin.
    _reader: JoinSet<()>,
}

async fn send(stream: &mut UnixStream, id: u32, number: u32, kind: u8, body: &[u8]) -> Result {
    let mut message = u32::try_from(body.len())?.to_be_bytes().to_vec();
    message.extend(number.to_be_bytes());
    message.extend([kind, 0]);
    message.extend(body);
    stream.write_u32(id).await?;
    stream.write_u32(u32::try_from(message.len())?).await?;
    Ok(stream.write_all(&message).await?)
}

/// Answers every call with an empty message, until the daemon is gone.
async fn serve(mut stream: UnixStream, calls: &Mutex<Vec<String>>) -> Result {
    let mut pending = Vec::new();
    loop {
        let id = stream.read_u32().await?;
        let length = usize::try_from(stream.read_u32().await?)?;
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload).await?;
        if id != PLUGIN {
            continue;
        }
        pending.extend(payload);
        while let Some([a, b, c, d, e, f, g, h]) = pending.first_chunk::<8>().copied() {
            let length = usize::try_from(u32::from_be_bytes([a, b, c, d]))?;
            if pending.len() < HEAD + length {
                break;
            }
            let message: Vec<u8> = pending.drain(..HEAD + length).collect();
            let request = Request::decode(&message[HEAD..])?;
            calls
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(request.method);
            let number = u32::from_be_bytes([e, f, g, h]);
            send(&mut stream, PLUGIN, number, RESPONSE, &[]).await?;
        }
    }
}

impl NriPlugin {
    /// Registers with the daemon that listens at `socket`.
    ///
    /// # Errors
    /// When nobody listens.
    pub async fn connect(socket: &Path, index: &str, name: &str) -> Result<Self> {
        use lighter_proto::nri::pkg::api::v1alpha1::RegisterPluginRequest;
        let mut stream = UnixStream::connect(socket).await?;
        let register = RegisterPluginRequest {
            plugin_name: name.to_owned(),
            plugin_idx: index.to_owned(),
            ..RegisterPluginRequest::default()
        };
        let request = Request {
            service: "nri.pkg.api.v1alpha1.Runtime".to_owned(),
            method: "RegisterPlugin".to_owned(),
            payload: register.encode_to_vec(),
        };
        let body = request.encode_to_vec();
        send(&mut stream, RUNTIME, 1, REQUEST, &body).await?;
        let calls: Arc<Mutex<Vec<String>>> = Arc::default();
        let noted = Arc::clone(&calls);
        let mut reader = JoinSet::new();
        reader.spawn(async move {
            // The daemon's end is the plugin's.
            let _ = serve(stream, &noted).await;
        });
        Ok(Self {
            calls,
            _reader: reader,
        })
    }

    /// Methods called so far, in order.
    #[must_use]
    pub fn calls(&self) -> Vec<String> {
        let calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        calls.clone()
    }

    /// How often a method was called.
    #[must_use]
    pub fn count(&self, method: &str) -> usize {
        self.calls().iter().filter(|name| *name == method).count()
    }
}
