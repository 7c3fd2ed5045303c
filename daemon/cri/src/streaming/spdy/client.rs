//! A small SPDY client for tests: what a Kubernetes client does, under the test's control.

use std::collections::HashMap;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::frame::{self, Head};
use super::headers::Deflater;

pub(in super::super) struct Client<S> {
    stream: S,
    deflater: Deflater,
    next_id: u32,
    /// What arrived on each stream, and whether it ended.
    pub(in super::super) received: HashMap<u32, (Vec<u8>, bool)>,
    /// Streams that were reset.
    pub(in super::super) resets: Vec<u32>,
    /// Pings answered.
    pub(in super::super) pongs: Vec<u32>,
    pub(in super::super) gone: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub(in super::super) fn new(stream: S) -> Self {
        Self {
            stream,
            deflater: Deflater::default(),
            next_id: 1,
            received: HashMap::new(),
            resets: Vec::new(),
            pongs: Vec::new(),
            gone: false,
        }
    }

    pub(in super::super) async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let id = self.next_id;
        self.next_id += 2;
        let block = self.deflater.write(headers).unwrap();
        self.raw(&frame::syn_stream(id, &block)).await;
        id
    }

    pub(in super::super) async fn raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    pub(in super::super) async fn send(&mut self, id: u32, data: &[u8], last: bool) {
        self.raw(&frame::data_head(id, last, data.len())).await;
        self.raw(data).await;
    }

    pub(in super::super) async fn ping(&mut self, id: u32) {
        self.raw(&frame::ping(id)).await;
    }

    pub(in super::super) async fn reset(&mut self, id: u32) {
        self.raw(&frame::reset(id, 5)).await;
    }

    /// Announces flow control with this many bytes for each stream.
    pub(in super::super) async fn window(&mut self, size: u32) {
        self.raw(&frame::initial_window(size)).await;
    }

    pub(in super::super) async fn grant(&mut self, id: u32, delta: usize) {
        self.raw(&frame::window_update(id, delta)).await;
    }

    /// Reads one frame; false at the end of the connection.
    pub(in super::super) async fn step(&mut self) -> bool {
        let mut bytes = [0; 8];
        if self.stream.read_exact(&mut bytes).await.is_err() {
            self.gone = true;
            return false;
        }
        match frame::head(bytes).unwrap() {
            Head::Data { id, last, length } => {
                let mut data = vec![0; length];
                self.stream.read_exact(&mut data).await.unwrap();
                let entry = self.received.entry(id).or_default();
                entry.0.extend_from_slice(&data);
                entry.1 |= last;
            }
            Head::Control { kind, length, .. } => {
                let mut body = vec![0; length];
                self.stream.read_exact(&mut body).await.unwrap();
                let word = |at: usize| {
                    body.get(at..at + 4)
                        .map(|b| u32::from_be_bytes(b.try_into().unwrap()))
                };
                match kind {
                    3 => self.resets.push(word(0).unwrap()),
                    6 => self.pongs.push(word(0).unwrap()),
                    _ => {}
                }
            }
        }
        true
    }

    pub(in super::super) fn ended(&self, id: u32) -> bool {
        self.received.get(&id).is_some_and(|(_, last)| *last)
    }

    pub(in super::super) fn text(&self, id: u32) -> String {
        let data = self.received.get(&id).map(|(data, _)| data.clone());
        String::from_utf8(data.unwrap_or_default()).unwrap()
    }

    /// Reads until the connection ends.
    pub(in super::super) async fn finish(&mut self) {
        while self.step().await {}
    }
}
