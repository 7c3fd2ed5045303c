//! Whole sessions over loopback, with clients written here and a backend without containers.

mod over_spdy;
mod over_websocket;
mod server;

use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::spdy::client::Client;
use super::upgrade::PORT_FORWARD;
use super::websocket::Codec;
use super::*;

/// Commands by name instead of processes.
#[derive(Default)]
struct TestBackend {
    /// Execs and attaches that are running.
    running: AtomicUsize,
    /// Execs that came to their own end.
    finished: AtomicUsize,
    /// Lets `hang` go on.
    release: tokio::sync::Notify,
}

struct Running<'a>(&'a AtomicUsize);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl TestBackend {
    fn enter(&self) -> Running<'_> {
        self.running.fetch_add(1, Ordering::SeqCst);
        Running(&self.running)
    }
}

#[async_trait::async_trait]
impl Backend for TestBackend {
    async fn exec(
        &self,
        _: &str,
        command: &[String],
        io: ExecIo,
    ) -> Result<ExitStatus, BackendError> {
        let _running = self.enter();
        let ExecIo {
            mut stdin,
            mut stdout,
            mut stderr,
            mut resize,
            ..
        } = io;
        let argument = command.get(1).cloned().unwrap_or_default();
        let mut code = 0;
        match command[0].as_str() {
            "cat" => {
                let (from, to) = (stdin.as_mut().unwrap(), stdout.as_mut().unwrap());
                let _ = tokio::io::copy(from, to).await;
            }
            "exit" => code = argument.parse().unwrap(),
            "both" => {
                stdout.as_mut().unwrap().write_all(b"out").await.unwrap();
                stderr.as_mut().unwrap().write_all(b"err").await.unwrap();
            }
            "flood" => {
                let count: u64 = argument.parse().unwrap();
                let mut zeros = tokio::io::repeat(b'z').take(count);
                let _ = tokio::io::copy(&mut zeros, stdout.as_mut().unwrap()).await;
            }
            "sizes" => {
                let size = *resize.wait_for(Option::is_some).await.unwrap();
                let size = size.unwrap();
                let text = format!("{}x{}", size.width, size.height);
                stdout
                    .as_mut()
                    .unwrap()
                    .write_all(text.as_bytes())
                    .await
                    .unwrap();
            }
            "hang" => self.release.notified().await,
            other => return Err(BackendError(format!("no such command {other}"))),
        }
        self.finished.fetch_add(1, Ordering::SeqCst);
        Ok(ExitStatus { code })
    }

    async fn attach(&self, _: &str, io: ExecIo) -> Result<(), BackendError> {
        let _running = self.enter();
        let (mut stdin, mut stdout) = (io.stdin.unwrap(), io.stdout.unwrap());
        let _ = tokio::io::copy(&mut stdin, &mut stdout).await;
        // The container goes on after its input ended.
        std::future::pending().await
    }

    async fn port_forward(
        &self,
        _: &str,
        port: u16,
        mut stream: BoxDuplex,
    ) -> Result<(), BackendError> {
        let _running = self.enter();
        if port == 1 {
            return Err(BackendError("connection refused".to_owned()));
        }
        let (mut from, mut to) = tokio::io::split(&mut stream);
        let _ = tokio::io::copy(&mut from, &mut to).await;
        Ok(())
    }
}

struct Fixture {
    server: Arc<Server>,
    backend: Arc<TestBackend>,
    cancel: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
}

impl Fixture {
    async fn new() -> Self {
        Self::with(Config::default()).await
    }

    async fn with(config: Config) -> Self {
        let backend = Arc::new(TestBackend::default());
        let server = Server::bind(&config, backend.clone()).await.unwrap();
        let cancel = CancellationToken::new();
        #[expect(clippy::disallowed_methods, reason = "joined in stop")]
        let serving = tokio::spawn(server.clone().serve(cancel.clone()));
        Self {
            server,
            backend,
            cancel,
            serving,
        }
    }

    fn exec(&self, command: &[&str], stdin: bool, stderr: bool, tty: bool) -> String {
        let request = ExecRequest {
            container_id: "c".to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            tty,
            stdin,
            stdout: true,
            stderr,
        };
        self.server.exec_url(&request).unwrap()
    }

    fn forward(&self, ports: &[i32]) -> String {
        let request = PortForwardRequest {
            pod_sandbox_id: "p".to_owned(),
            port: ports.to_vec(),
        };
        self.server.port_forward_url(&request).unwrap()
    }

    async fn idle(&self) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while self.backend.running.load(Ordering::SeqCst) > 0 {
            assert!(tokio::time::Instant::now() < deadline, "still running");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Ends the server; every session must end with it.
    async fn stop(self) {
        self.cancel.cancel();
        timeout(Duration::from_secs(10), self.serving)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(self.backend.running.load(Ordering::SeqCst), 0);
        assert!(self.server.tasks.is_empty());
    }
}

/// Connects, sends a request, and returns the response's head.
async fn connect(url: &str, headers: &str) -> (TcpStream, String) {
    let rest = url.split_once("://").unwrap().1;
    let (host, path) = rest.split_once('/').unwrap();
    let mut stream = TcpStream::connect(host).await.unwrap();
    let request = format!("POST /{path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(char::from(byte)),
            Err(_) => break,
        }
    }
    (stream, head)
}

async fn spdy(url: &str, protocols: &str) -> Client<TcpStream> {
    let headers = format!(
        "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {protocols}\r\n"
    );
    let (stream, head) = connect(url, &headers).await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    Client::new(stream)
}

async fn open(client: &mut Client<TcpStream>, kind: &str) -> u32 {
    client.open(&[("streamtype", kind)]).await
}

async fn pair(client: &mut Client<TcpStream>, port: &str, request: &str) -> (u32, u32) {
    let headers = |kind| [("streamtype", kind), ("port", port), ("requestid", request)];
    let error = client.open(&headers("error")).await;
    let data = client.open(&headers("data")).await;
    (error, data)
}

/// A WebSocket client for tests.
struct Web {
    stream: TcpStream,
}

impl Web {
    async fn connect(url: &str, protocol: &str) -> Self {
        let mut headers =
            "Connection: upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                .to_owned();
        if !protocol.is_empty() {
            headers = format!("{headers}Sec-WebSocket-Protocol: {protocol}\r\n");
        }
        let (stream, head) = connect(url, &headers).await;
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
        Self { stream }
    }

    async fn send(&mut self, opcode: u8, payload: &[u8]) {
        let mask = [1, 2, 3, 4];
        let mut frame = vec![0x80 | opcode, 0x80 | 126];
        frame.extend_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
        frame.extend_from_slice(&mask);
        frame.extend(
            payload
                .iter()
                .enumerate()
                .map(|(i, byte)| byte ^ mask[i % 4]),
        );
        self.stream.write_all(&frame).await.unwrap();
    }

    /// The next message: its opcode and payload. `None` at the end of the connection.
    async fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        let flags = self.stream.read_u8().await.ok()?;
        let length = match self.stream.read_u8().await.unwrap() {
            126 => usize::from(self.stream.read_u16().await.unwrap()),
            127 => usize::try_from(self.stream.read_u64().await.unwrap()).unwrap(),
            small => usize::from(small),
        };
        let mut payload = vec![0; length];
        self.stream.read_exact(&mut payload).await.unwrap();
        Some((flags & 0x0f, payload))
    }

    /// Everything received on each channel until the server closes.
    async fn finish(&mut self, base64: bool) -> Vec<Vec<u8>> {
        let mut channels = vec![Vec::new(); 8];
        while let Some((opcode, payload)) = self.next().await {
            if opcode == 8 {
                assert_eq!(payload, 1000_u16.to_be_bytes());
                self.send(8, &payload).await;
                continue;
            }
            if base64 {
                let data = STANDARD.decode(&payload[1..]).unwrap();
                channels[usize::from(payload[0] - b'0')].extend(data);
            } else {
                channels[usize::from(payload[0])].extend(&payload[1..]);
            }
        }
        channels
    }
}
