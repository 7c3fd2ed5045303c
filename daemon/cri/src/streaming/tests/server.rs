//! What the server itself does: refusals, limits, ends, TLS.

use super::*;

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
