//! CRI: attach to a container's own process, and connections into pods.

use std::time::Duration;

use lighter_integration::cri::stream::{Channel, Forward, Session, Spdy, Streams, Transport};
use lighter_integration::cri::{Node, Pod, Settings};
use lighter_integration::{Result, eventually};
use lighter_proto::runtime::v1 as api;
use tonic::Code;

use crate::cri_exec::{IN_OUT, OUT, TERMINAL};

pub(crate) async fn attach(
    node: &Node,
    id: &str,
    streams: Streams,
    transport: Transport,
) -> Result<Session> {
    let request = api::AttachRequest {
        container_id: id.to_owned(),
        stdin: streams.stdin,
        tty: streams.tty,
        stdout: streams.stdout,
        stderr: streams.stderr,
    };
    let url = node.cri.runtime().attach(request).await?.into_inner().url;
    Session::open(&url, transport, streams).await
}

pub(crate) async fn forward_url(
    node: &Node,
    pod: &str,
    port: i32,
) -> Result<String, tonic::Status> {
    let request = api::PortForwardRequest {
        pod_sandbox_id: pod.to_owned(),
        port: vec![port],
    };
    Ok(node
        .cri
        .runtime()
        .port_forward(request)
        .await?
        .into_inner()
        .url)
}

#[tokio::test]
async fn attached_clients_talk_to_the_process() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("talk").await?;
    let mut config = node.container(
        "main",
        &["sh", "-c", "while read l; do echo got $l; done; exit 8"],
    );
    config.stdin = true;
    let id = node.cri.run(&pod, &config).await?;
    for transport in [Transport::SPDY, Transport::WEBSOCKET] {
        let mut session = attach(&node, &id, IN_OUT, transport).await?;
        // The attach is there once it carries.
        session.write(b"first\n").await?;
        session.until("got first").await?;
        session.write(b"second\n").await?;
        session.until("got second").await?;
        drop(session);
    }
    // Losing them ended nothing, for stdin stays open without stdin_once.
    let status = node.cri.status(&id).await?;
    assert_eq!(status.state(), api::ContainerState::ContainerRunning);
    let lines = eventually("the log has all", async || {
        let lines = node.log(&pod, "main")?;
        Ok((lines.len() >= 4).then_some(lines))
    })
    .await?;
    assert_eq!(lines[3].text, "got second");
    node.finish().await
}

#[tokio::test]
async fn stdin_once_ends_with_its_client() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("once").await?;
    let mut config = node.container("main", &["sh", "-c", "cat; echo over; exit 8"]);
    config.stdin = true;
    config.stdin_once = true;
    let id = node.cri.run(&pod, &config).await?;
    let mut session = attach(&node, &id, IN_OUT, Transport::SPDY).await?;
    session.write(b"words\n").await?;
    session.until("words\n").await?;
    session.sink.close(Channel::Stdin).await?;
    session.until("over").await?;
    assert_eq!(node.cri.exited(&id).await?.exit_code, 8);
    node.finish().await
}

#[tokio::test]
async fn an_attached_terminal_is_resized() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("tty").await?;
    let mut config = node.container("main", &["sh"]);
    config.stdin = true;
    config.tty = true;
    let id = node.cri.run(&pod, &config).await?;
    let mut session = attach(&node, &id, TERMINAL, Transport::SPDY).await?;
    session.resize(99, 33).await?;
    let size = eventually("the size is set", async || {
        session.write(b"stty size; echo do''ne\n").await?;
        let seen = session.until("done").await?;
        Ok(seen.contains("33 99").then_some(seen))
    })
    .await?;
    assert!(size.contains("33 99"));
    session.write(b"exit 5\n").await?;
    assert_eq!(node.cri.exited(&id).await?.exit_code, 5);
    session.finish().await?;
    node.finish().await
}

#[tokio::test]
async fn attach_needs_a_running_container() -> Result {
    let node = Node::start().await?;
    let (pod, id) = node.run_idle("gone").await?;
    let unknown = attach(&node, "0123456789abcdef", OUT, Transport::SPDY)
        .await
        .unwrap_err();
    let status = unknown
        .downcast_ref::<tonic::Status>()
        .map(tonic::Status::code);
    assert_eq!(status, Some(Code::NotFound), "{unknown}");
    let created = node.cri.create(&pod, &node.idle("created")).await?;
    attach(&node, &created, OUT, Transport::SPDY)
        .await
        .unwrap_err();
    node.cri.stop(&id, 0).await?;
    attach(&node, &id, OUT, Transport::SPDY).await.unwrap_err();
    let none = attach(&node, &id, Streams::default(), Transport::SPDY)
        .await
        .unwrap_err();
    assert!(none.downcast_ref::<tonic::Status>().is_some(), "{none}");
    node.finish().await
}

/// Runs a server in a pod that answers each line with itself.
async fn echo(node: &Node, name: &str) -> Result<Pod> {
    serve(node, name, &["/bin/cat"]).await
}

/// Runs a server in a pod that gives each connection to a process of its own.
async fn serve(node: &Node, name: &str, command: &[&str]) -> Result<Pod> {
    let pod = node.run_pod(name).await?;
    let listen = ["nc", "-ll", "-p", "8080", "-e"];
    let server = node.container("server", &[&listen[..], command].concat());
    let id = node.cri.run(&pod, &server).await?;
    eventually("the server listens", async || {
        let table = node.cri.shell(
            &id,
            "cat /proc/net/tcp /proc/net/tcp6 | grep -c ':1F90 .* 0A ' || true",
        );
        Ok((table.await?.trim() != "0").then_some(()))
    })
    .await?;
    Ok(pod)
}

#[tokio::test]
async fn a_forwarded_port_carries_both_ways() -> Result {
    let node = Node::with_network().await?;
    let pod = echo(&node, "forward").await?;
    let mut forward = Forward::open(&forward_url(&node, &pod.id, 8080).await?).await?;
    for n in 0..3 {
        let mut connection = forward.connect(8080).await?;
        let text = format!("hello {n}\n");
        connection.write(text.as_bytes()).await?;
        assert_eq!(connection.read().await, Some(text.into_bytes()));
        connection.close().await?;
        assert_eq!(connection.read().await, None);
        assert_eq!(connection.error().await, "");
    }
    // Several at once on one session.
    let mut many = Vec::new();
    for n in 0..10_u8 {
        let connection = forward.connect(8080).await?;
        connection.write(&[b'a' + n; 100]).await?;
        many.push(connection);
    }
    for (n, connection) in many.iter_mut().enumerate() {
        let mut seen = Vec::new();
        while seen.len() < 100 {
            let bytes = connection.read().await;
            seen.extend(bytes.ok_or_else(|| anyhow::anyhow!("connection {n} ended"))?);
        }
        assert_eq!(seen, [b'a' + u8::try_from(n)?; 100]);
    }
    drop(many);
    let mut nobody = forward.connect(9).await?;
    let said = nobody.error().await;
    assert!(
        said.contains("connection refused") || said.contains("Connection refused"),
        "{said}"
    );
    node.finish().await
}

#[tokio::test]
async fn a_server_that_stays_does_not_keep_a_forwarded_connection() -> Result {
    let node = Node::with_network().await?;
    let pod = serve(&node, "stays", &["/bin/sleep", "1000"]).await?;
    let mut forward = Forward::open(&forward_url(&node, &pod.id, 8080).await?).await?;
    let mut connection = forward.connect(8080).await?;
    connection.write(b"anybody?\n").await?;
    connection.close().await?;
    let rest = tokio::time::timeout(Duration::from_secs(10), connection.read_all()).await?;
    assert!(rest.is_empty(), "{rest:?}");
    node.finish().await
}

#[tokio::test]
async fn websocket_forwards_a_port() -> Result {
    use lighter_integration::cri::stream::WebSocket;
    let node = Node::with_network().await?;
    let pod = echo(&node, "forward").await?;
    let url = forward_url(&node, &pod.id, 8080).await?;
    let (socket, mut reader) = WebSocket::connect(&url, "v4.channel.k8s.io").await?;
    socket.binary(b"\0ping\n").await?;
    let mut data = Vec::new();
    while !data.ends_with(b"ping\n") {
        use lighter_integration::cri::stream::Message;
        match reader.next().await? {
            Some(Message::Binary(message)) if message.first() == Some(&0) => {
                data.extend_from_slice(&message[1..]);
            }
            Some(Message::Binary(_)) => {}
            other => anyhow::bail!("{other:?} after {data:?}"),
        }
    }
    // Each channel begins with its port.
    assert_eq!(data, [&8080_u16.to_le_bytes()[..], b"ping\n"].concat());
    node.finish().await
}

#[tokio::test]
async fn forwarding_needs_a_ready_pod() -> Result {
    let node = Node::with_network().await?;
    let unknown = forward_url(&node, "0123456789abcdef", 80)
        .await
        .unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    let pod = echo(&node, "ends").await?;
    let fresh = forward_url(&node, &pod.id, 8080).await?;
    let without = Spdy::ask(&fresh, &[]).await?;
    assert_ne!(without.status, 101, "{without:?}");
    let fresh = forward_url(&node, &pod.id, 8080).await?;
    let mut forward = Forward::open(&fresh).await?;
    let mut connection = forward.connect(8080).await?;
    connection.write(b"x").await?;
    connection.read().await;
    node.cri.stop_pod(&pod.id).await?;
    // The other end is gone.
    let rest = tokio::time::timeout(Duration::from_secs(10), connection.read_all()).await?;
    assert!(rest.is_empty(), "{rest:?}");
    let stopped = forward_url(&node, &pod.id, 8080).await.unwrap_err();
    assert!(stopped.message().contains("is not running"), "{stopped}");
    node.finish().await
}

/// Carries plain connections to a TLS server which must show `certificate`; where to connect to.
async fn tunnel(
    to: std::net::SocketAddr,
    certificate: rustls::pki_types::CertificateDer<'static>,
) -> Result<(std::net::SocketAddr, tokio::task::JoinSet<()>)> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate)?;
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        while let Ok((mut plain, _)) = listener.accept().await {
            let carried = async {
                let tcp = tokio::net::TcpStream::connect(to).await?;
                let mut tls = connector.connect(to.ip().into(), tcp).await?;
                tokio::io::copy_bidirectional(&mut plain, &mut tls).await
            };
            // A refusal shows as a closed connection.
            let _ = carried.await;
        }
    });
    Ok((address, tasks))
}

fn pem(label: &str, bytes: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(bytes);
    format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n")
}

#[tokio::test]
async fn streams_use_tls_with_the_keys_that_are_configured() -> Result {
    let dir = tempfile::tempdir()?;
    let names = vec!["127.0.0.1".to_owned()];
    let made = rcgen::generate_simple_self_signed(names)?;
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&cert, pem("CERTIFICATE", made.cert.der()))?;
    std::fs::write(&key, pem("PRIVATE KEY", &made.signing_key.serialize_der()))?;
    let settings = Settings {
        cri: format!(
            "enable_tls_streaming = true\nx509_key_pair_streaming = {{ tls_cert_file = {cert:?}, \
             tls_key_file = {key:?} }}"
        ),
        ..Settings::default()
    };
    let node = Node::start_with(&settings).await?;
    let (_, id) = node.run_idle("secret").await?;
    let url = crate::cri_exec::url(&node, &id, &["echo", "hello"], OUT).await?;
    let rest = url.strip_prefix("https://").expect("the URL says TLS");
    let (host, path) = rest.split_once('/').expect("the URL has a path");
    // Without TLS nothing is said.
    let plain = format!("http://{host}/{path}");
    assert!(Session::open(&plain, Transport::SPDY, OUT).await.is_err());
    let (address, _tasks) = tunnel(host.parse()?, made.cert.der().clone()).await?;
    let carried = format!("http://{address}/{path}");
    let ended = Session::open(&carried, Transport::SPDY, OUT).await?;
    let ended = ended.finish().await?;
    assert_eq!(ended.stdout, b"hello\n");
    assert_eq!(ended.code()?, 0);
    node.finish().await
}
