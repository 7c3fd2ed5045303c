//! Whole sessions over loopback, with clients written here and a backend without containers.

use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::spdy::client::Client;
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

#[tokio::test]
async fn a_spdy_exec_echoes_until_half_close_and_succeeds() {
    let fixture = Fixture::new().await;
    let url = fixture.exec(&["cat"], true, false, false);
    let mut client = spdy(&url, "v5.channel.k8s.io, v4.channel.k8s.io").await;
    let error = open(&mut client, "error").await;
    let stdin = open(&mut client, "stdin").await;
    let stdout = open(&mut client, "stdout").await;
    client.ping(1).await;
    client.send(stdin, b"hello ", false).await;
    client.send(stdin, b"world", true).await;
    client.finish().await;
    assert_eq!(client.text(stdout), "hello world");
    assert!(client.ended(stdout) && client.ended(error));
    assert!(client.text(error).contains("\"Success\""));
    assert_eq!(client.pongs, [1]);
    drop(client);
    fixture.stop().await;
}

#[tokio::test]
async fn exit_codes_and_failures_reach_the_error_stream() {
    let fixture = Fixture::new().await;
    for (command, protocol, want) in [
        (vec!["exit", "3"], "v4.channel.k8s.io", "NonZeroExitCode"),
        (
            vec!["exit", "3"],
            "v2.channel.k8s.io",
            "error executing command [exit 3], exit code 3",
        ),
        (vec!["nope"], "v4.channel.k8s.io", "no such command nope"),
    ] {
        let url = fixture.exec(&command, false, true, false);
        let mut client = spdy(&url, protocol).await;
        let error = open(&mut client, "error").await;
        for kind in ["stdout", "stderr"] {
            open(&mut client, kind).await;
        }
        client.finish().await;
        assert!(client.text(error).contains(want), "{}", client.text(error));
    }
    fixture.stop().await;
}

#[tokio::test]
async fn stdout_and_stderr_are_kept_apart_and_sizes_arrive() {
    let fixture = Fixture::new().await;
    let url = fixture.exec(&["both"], false, true, false);
    let mut client = spdy(&url, "v4.channel.k8s.io").await;
    open(&mut client, "error").await;
    let (out, err) = (
        open(&mut client, "stdout").await,
        open(&mut client, "stderr").await,
    );
    client.finish().await;
    assert_eq!(
        (client.text(out), client.text(err)),
        ("out".to_owned(), "err".to_owned())
    );

    let url = fixture.exec(&["sizes"], false, false, true);
    let mut client = spdy(&url, "v4.channel.k8s.io").await;
    open(&mut client, "error").await;
    let out = open(&mut client, "stdout").await;
    let resize = open(&mut client, "resize").await;
    client
        .send(resize, br#"{"Width":120,"Height":40}"#, false)
        .await;
    client.finish().await;
    assert_eq!(client.text(out), "120x40");
    fixture.stop().await;
}

#[tokio::test]
async fn an_attach_ends_with_its_client_and_an_exec_does_not() {
    let fixture = Fixture::new().await;
    let request = AttachRequest {
        container_id: "c".to_owned(),
        stdin: true,
        stdout: true,
        ..AttachRequest::default()
    };
    let url = fixture.server.attach_url(&request).unwrap();
    let mut client = spdy(&url, "v4.channel.k8s.io").await;
    open(&mut client, "error").await;
    let stdin = open(&mut client, "stdin").await;
    let stdout = open(&mut client, "stdout").await;
    client.send(stdin, b"x", false).await;
    while client.text(stdout).is_empty() {
        assert!(client.step().await);
    }
    drop(client);
    fixture.idle().await;

    let url = fixture.exec(&["hang"], false, false, false);
    let mut client = spdy(&url, "v4.channel.k8s.io").await;
    for kind in ["error", "stdout"] {
        open(&mut client, kind).await;
    }
    while fixture.backend.running.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    drop(client);
    // The session's place is given back although the exec goes on.
    while fixture.server.sessions.available_permits() < MAX_SESSIONS {
        tokio::task::yield_now().await;
    }
    assert_eq!(fixture.backend.running.load(Ordering::SeqCst), 1);
    fixture.backend.release.notify_one();
    fixture.idle().await;
    assert_eq!(fixture.backend.finished.load(Ordering::SeqCst), 1);
    fixture.stop().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_command() {
    let fixture = Fixture::new().await;
    let size = 64 << 20;
    let url = fixture.exec(&["flood", &size.to_string()], false, false, false);
    let mut client = spdy(&url, "v4.channel.k8s.io").await;
    open(&mut client, "error").await;
    let out = open(&mut client, "stdout").await;
    // Kernel buffers fill, then the command waits: it must not come to its end.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(fixture.backend.finished.load(Ordering::SeqCst), 0);
    client.finish().await;
    assert_eq!(client.received[&out].0.len(), size);
    fixture.stop().await;
}

#[tokio::test]
async fn windows_hold_once_the_client_announces_them() {
    let fixture = Fixture::new().await;
    let url = fixture.exec(&["flood", "5000"], false, false, false);
    let mut client = spdy(&url, "v4.channel.k8s.io").await;
    client.window(1000).await;
    open(&mut client, "error").await;
    let out = open(&mut client, "stdout").await;
    while client
        .received
        .get(&out)
        .is_none_or(|(data, _)| data.len() < 1000)
    {
        assert!(client.step().await);
    }
    assert!(
        timeout(Duration::from_millis(100), client.step())
            .await
            .is_err(),
        "sent too much"
    );
    client.grant(out, 4000).await;
    client.finish().await;
    assert_eq!(client.received[&out].0.len(), 5000);
    fixture.stop().await;
}

async fn pair(client: &mut Client<TcpStream>, port: &str, request: &str) -> (u32, u32) {
    let headers = |kind| [("streamtype", kind), ("port", port), ("requestid", request)];
    let error = client.open(&headers("error")).await;
    let data = client.open(&headers("data")).await;
    (error, data)
}

#[tokio::test]
async fn forwarded_connections_share_one_client() {
    let fixture = Fixture::new().await;
    let mut client = spdy(&fixture.forward(&[]), PORT_FORWARD).await;
    let (_, first) = pair(&mut client, "7", "0").await;
    let (_, second) = pair(&mut client, "7", "1").await;
    let (refused, _) = pair(&mut client, "1", "2").await;
    // Without request ids, as old clients do it.
    client.open(&[("streamtype", "error"), ("port", "7")]).await;
    let old = client.open(&[("streamtype", "data"), ("port", "7")]).await;
    for (id, text) in [(second, "two"), (first, "one"), (old, "old")] {
        client.send(id, text.as_bytes(), true).await;
    }
    while ![first, second, old, refused]
        .iter()
        .all(|id| client.ended(*id))
    {
        assert!(client.step().await);
    }
    assert_eq!(client.text(first), "one");
    assert_eq!(client.text(second), "two");
    assert_eq!(client.text(old), "old");
    assert_eq!(
        client.text(refused),
        "error forwarding port 1 to pod p: connection refused"
    );
    let bad = client.open(&[("streamtype", "data"), ("port", "0")]).await;
    while client.resets.is_empty() {
        assert!(client.step().await);
    }
    assert_eq!(client.resets, [bad]);
    // One that the client gives up ends in the backend too.
    let (_, data) = pair(&mut client, "7", "3").await;
    client.send(data, b"x", false).await;
    while client.text(data).is_empty() {
        assert!(client.step().await);
    }
    client.reset(data).await;
    fixture.idle().await;
    drop(client);
    fixture.stop().await;
}

#[tokio::test]
async fn many_bytes_go_through_a_forward_both_ways() {
    let fixture = Fixture::new().await;
    let mut client = spdy(&fixture.forward(&[]), PORT_FORWARD).await;
    let (_, data) = pair(&mut client, "7", "0").await;
    let block = vec![7_u8; 64 << 10];
    let total = 100 * block.len();
    for _ in 0..100 {
        client.send(data, &block, false).await;
        while client.received.get(&data).map_or(0, |(data, _)| data.len()) + (1 << 20) < total / 2 {
            if !matches!(
                timeout(Duration::from_millis(1), client.step()).await,
                Ok(true)
            ) {
                break;
            }
        }
    }
    client.send(data, &[], true).await;
    while !client.ended(data) {
        assert!(client.step().await);
    }
    assert_eq!(client.received[&data].0.len(), total);
    fixture.stop().await;
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

#[tokio::test]
async fn websocket_v5_half_closes_stdin() {
    let fixture = Fixture::new().await;
    let url = fixture.exec(&["cat"], true, false, false);
    let mut client = Web::connect(&url, "v5.channel.k8s.io").await;
    assert_eq!(client.next().await, Some((2, vec![1])), "the greeting");
    client.send(9, b"ping").await;
    assert_eq!(client.next().await, Some((10, b"ping".to_vec())));
    client.send(2, b"\0hello").await;
    client.send(2, &[255, 0]).await;
    let channels = client.finish(false).await;
    assert_eq!(channels[1], b"hello");
    assert!(String::from_utf8_lossy(&channels[3]).contains("Success"));
    drop(client);
    fixture.stop().await;
}

#[tokio::test]
async fn websocket_speaks_base64_and_the_oldest_protocol() {
    let fixture = Fixture::new().await;
    let url = fixture.exec(&["both"], false, true, false);
    let mut client = Web::connect(&url, "nonsense, v4.base64.channel.k8s.io").await;
    let channels = client.finish(true).await;
    assert_eq!(
        (&channels[1][..], &channels[2][..]),
        (&b"out"[..], &b"err"[..])
    );
    let url = fixture.exec(&["exit", "4"], false, true, false);
    let channels = Web::connect(&url, "").await.finish(false).await;
    assert!(channels[3].ends_with(b"exit code 4"));
    fixture.stop().await;
}

#[tokio::test]
async fn websocket_forwards_ports_by_channel() {
    let fixture = Fixture::new().await;
    let url = fixture.forward(&[7, 1]);
    let mut client = Web::connect(&url, "v4.channel.k8s.io").await;
    client.send(2, b"\0data").await;
    let mut channels = vec![Vec::new(); 4];
    while channels[0].len() < 6 || channels[3].len() < 10 {
        let (_, payload) = client.next().await.unwrap();
        channels[usize::from(payload[0])].extend_from_slice(&payload[1..]);
    }
    assert_eq!(channels[0], b"\x07\0data");
    assert_eq!(channels[1], b"\x07\0");
    assert_eq!(channels[2], b"\x01\0");
    assert!(channels[3].ends_with(b"connection refused"));
    drop(client);
    fixture.idle().await;
    fixture.stop().await;
}

#[tokio::test]
async fn malformed_frames_end_the_session_only() {
    let fixture = Fixture::new().await;
    for bytes in [
        &[0x82, 0x01, 0x00][..],
        &[0xf2, 0x81, 0, 0, 0, 0, 0],
        &[0x82, 0x81, 0, 0, 0, 0, 99],
        &[0x80, 0x81, 0, 0, 0, 0, 1],
    ] {
        let url = fixture.exec(&["cat"], true, false, false);
        let mut client = Web::connect(&url, "v4.channel.k8s.io").await;
        client.next().await.unwrap();
        client.stream.write_all(bytes).await.unwrap();
        assert_eq!(
            client.next().await,
            Some((8, 1002_u16.to_be_bytes().to_vec()))
        );
        fixture.idle().await;
    }
    for bytes in [
        &[0x80, 9, 0, 1, 0, 0, 0, 0][..],
        &[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff],
    ] {
        let url = fixture.exec(&["cat"], true, false, false);
        let mut client = spdy(&url, "v4.channel.k8s.io").await;
        client.raw(bytes).await;
        client.finish().await;
    }
    fixture.stop().await;
}

#[tokio::test]
async fn requests_that_cannot_be_served_are_answered() {
    let fixture = Fixture::new().await;
    let upgrade = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n";
    let head = async |url: &str, headers: &str| connect(url, headers).await.1;
    let fresh = || fixture.exec(&["cat"], true, false, false);
    let base = fixture.server.base_url().to_owned();
    assert!(
        head(&format!("{base}/exec/AAAAAAAA"), upgrade)
            .await
            .starts_with("HTTP/1.1 404")
    );
    assert!(
        head(&format!("{base}/"), upgrade)
            .await
            .starts_with("HTTP/1.1 404")
    );
    let other_kind = fresh().replace("/exec/", "/attach/");
    assert!(head(&other_kind, upgrade).await.starts_with("HTTP/1.1 404"));
    assert!(head(&fresh(), "").await.starts_with("HTTP/1.1 400"));
    assert!(head(&fresh(), upgrade).await.starts_with("HTTP/1.1 400"));
    let unknown = format!("{upgrade}X-Stream-Protocol-Version: v9.channel.k8s.io\r\n");
    let refused = head(&fresh(), &unknown).await;
    assert!(refused.starts_with("HTTP/1.1 403"), "{refused}");
    assert!(refused.contains("X-Accepted-Stream-Protocol-Versions: v4.channel.k8s.io"));
    let web = "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\
               Sec-WebSocket-Protocol: nonsense\r\n";
    assert!(head(&fresh(), web).await.starts_with("HTTP/1.1 403"));
    let used = fresh();
    spdy(&used, "v4.channel.k8s.io").await;
    assert!(
        head(&used, upgrade).await.starts_with("HTTP/1.1 404"),
        "a token is used once"
    );
    let long = format!("X-Long: {}\r\n", "x".repeat(40_000));
    assert_eq!(head(&fresh(), &long).await, "", "hung up");
    fixture.stop().await;
}

#[tokio::test]
async fn options_are_checked_before_a_url_is_given() {
    let fixture = Fixture::new().await;
    let exec = |edit: fn(&mut ExecRequest)| {
        let mut request = ExecRequest {
            container_id: "c".to_owned(),
            stdout: true,
            ..ExecRequest::default()
        };
        edit(&mut request);
        fixture
            .server
            .exec_url(&request)
            .map_err(|e| (e.kind(), e.to_string()))
    };
    assert!(exec(|_| {}).is_ok());
    let invalid = |text: &str| Err((ErrorKind::InvalidArgument, text.to_owned()));
    assert_eq!(
        exec(|r| r.container_id.clear()),
        invalid("missing required container_id")
    );
    assert_eq!(
        exec(|r| r.stdout = false),
        invalid("one of stdin, stdout, or stderr must be set")
    );
    assert_eq!(
        exec(|r| (r.tty, r.stderr) = (true, true)),
        invalid("tty and stderr cannot both be true")
    );
    let request = PortForwardRequest {
        pod_sandbox_id: "p".to_owned(),
        port: vec![70000],
    };
    assert!(fixture.server.port_forward_url(&request).is_err());
    let too_many = (0..=token::MAX_TOKENS).find_map(|_| exec(|_| {}).err());
    assert_eq!(too_many.unwrap().0, ErrorKind::ResourceExhausted);
    fixture.stop().await;
}

#[tokio::test]
async fn idle_sessions_end() {
    let fixture = Fixture::with(Config {
        idle_timeout: Duration::from_millis(100),
        ..Config::default()
    })
    .await;
    let mut client = spdy(&fixture.forward(&[]), PORT_FORWARD).await;
    let (_, data) = pair(&mut client, "7", "0").await;
    client.send(data, b"x", false).await;
    client.finish().await;
    fixture.idle().await;
    fixture.stop().await;
}

#[tokio::test]
async fn a_client_gone_behind_unread_input_is_noticed() {
    let fixture = Fixture::new().await;
    let url = fixture.exec(&["hang"], true, false, false);
    let mut client = spdy(&url, "v4.channel.k8s.io").await;
    open(&mut client, "error").await;
    let stdin = open(&mut client, "stdin").await;
    open(&mut client, "stdout").await;
    for _ in 0..3 {
        assert!(client.step().await, "a stream's reply");
    }
    // More than a channel holds, less than the socket takes: the end comes after it.
    client.send(stdin, &vec![0; 300 << 10], false).await;
    drop(client);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while fixture.server.sessions.available_permits() < MAX_SESSIONS {
        assert!(tokio::time::Instant::now() < deadline, "the session stays");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    fixture.backend.release.notify_one();
    fixture.idle().await;
    fixture.stop().await;
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(256))]

    /// What a client may send after the upgrade ends a session at worst.
    #[test]
    fn no_bytes_break_a_connection(
        bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let feed = async |mut client: tokio::io::DuplexStream| {
                let _ = client.write_all(&bytes).await;
                let _ = client.shutdown().await;
                let _ = timeout(Duration::from_secs(5), client.read_to_end(&mut Vec::new())).await;
            };
            let activity = Activity::new(None);
            let (client, server) = tokio::io::duplex(4096);
            let (driver, connection) = spdy::serve(server, activity.clone());
            drop(connection);
            tokio::join!(driver, feed(client));
            for codec in [Codec::Binary, Codec::BinaryWithClose, Codec::Base64, Codec::Raw] {
                let (client, server) = tokio::io::duplex(4096);
                let (driver, connection) = websocket::serve(server, codec, 5, activity.clone());
                drop(connection);
                tokio::join!(driver, feed(client));
            }
        });
    }
}

#[tokio::test]
async fn fifty_execs_run_at_once() {
    let fixture = Fixture::new().await;
    let one = async |n: usize| {
        let url = fixture.exec(&["cat"], true, false, false);
        let mut client = spdy(&url, "v4.channel.k8s.io").await;
        open(&mut client, "error").await;
        let stdin = open(&mut client, "stdin").await;
        let stdout = open(&mut client, "stdout").await;
        let text = n.to_string().repeat(1000);
        client.send(stdin, text.as_bytes(), true).await;
        client.finish().await;
        assert_eq!(client.text(stdout), text);
    };
    futures::future::join_all((0..50).map(one)).await;
    fixture.stop().await;
}

#[tokio::test]
async fn tls_is_served_with_a_certificate_made_at_start() {
    let fixture = Fixture::with(Config {
        tls: Some(KeyPair::SelfSigned),
        ..Config::default()
    })
    .await;
    assert!(fixture.server.base_url().starts_with("https://127.0.0.1:"));
    let missing = KeyPair::Files {
        certificate: "/nonexistent/cert.pem".into(),
        key: "/nonexistent/key.pem".into(),
    };
    let config = Config {
        tls: Some(missing),
        ..Config::default()
    };
    let failed = Server::bind(&config, fixture.backend.clone())
        .await
        .unwrap_err();
    assert!(failed.to_string().contains("/nonexistent/cert.pem"));
    fixture.stop().await;
}
