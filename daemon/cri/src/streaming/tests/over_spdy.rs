//! Sessions over SPDY.

use super::*;

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
