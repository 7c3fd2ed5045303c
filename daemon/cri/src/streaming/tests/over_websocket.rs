//! Sessions over WebSocket.

use super::*;

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
