//! A client of the streaming server: exec, attach and port-forward over SPDY/3.1 and WebSocket.

mod forward;
mod http;
mod inbound;
mod session;
mod spdy;
mod websocket;

pub use forward::{Connection, Forward};
pub use http::{Answer, upgrade};
pub use session::{Channel, Ended, Event, Session, Sink, Source, Streams};
pub use spdy::Spdy;
pub use websocket::{Message, WebSocket};

/// How streams are carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// SPDY/3.1 with this stream protocol.
    Spdy(&'static str),
    /// WebSocket with this subprotocol.
    WebSocket(&'static str),
}

impl Transport {
    /// What `kubectl` and the kubelet speak.
    pub const SPDY: Self = Self::Spdy("v4.channel.k8s.io");
    /// What browsers and the API server speak.
    pub const WEBSOCKET: Self = Self::WebSocket("v4.channel.k8s.io");
    /// The same in text messages.
    pub const BASE64: Self = Self::WebSocket("v4.base64.channel.k8s.io");
}
