//! CRI: streams under load, and what the daemon keeps of them.

use std::fs;
use std::time::Duration;

use lighter_integration::cri::Node;
use lighter_integration::cri::stream::{Channel, Event, Forward, Transport};
use lighter_integration::{Result, eventually};
use lighter_proto::runtime::v1 as api;

use crate::cri_exec::{IN_OUT, OUT, exec};

/// Bytes sent through a forwarded port.
const FORWARDED: usize = 100 << 20;
/// What the daemon may keep after streams: an allocator's slack.
const SLACK_KB: u64 = 12 << 10;
/// Commands at once.
const EXECS: usize = 50;

/// Private memory of the daemon, in kB.
fn private(node: &Node) -> Result<u64> {
    let table = fs::read_to_string(format!("/proc/{}/smaps_rollup", node.daemon.pid()?))?;
    let rows = table.lines().filter(|l| l.starts_with("Private_"));
    Ok(rows
        .filter_map(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum())
}

fn descriptors(node: &Node) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", node.daemon.pid()?))?.count())
}

async fn many_execs(node: &Node, id: &str) -> Result {
    let mut work = tokio::task::JoinSet::new();
    for n in 0..EXECS {
        let script = format!(
            "head -c 50000 /dev/zero; read word; echo $word; exit {}",
            n % 7
        );
        let transport = [Transport::SPDY, Transport::WEBSOCKET, Transport::BASE64][n % 3];
        let session = exec(node, id, &["sh", "-c", &script], IN_OUT, transport).await?;
        work.spawn(async move {
            session.write(format!("word{n}\n").as_bytes()).await?;
            anyhow::Ok((n, session.finish().await?))
        });
    }
    while let Some(done) = work.join_next().await {
        let (n, ended) = done??;
        let tail = ended.stdout.get(50_000..).map(String::from_utf8_lossy);
        assert_eq!(tail.as_deref(), Some(format!("word{n}\n").as_str()));
        assert_eq!(ended.code()?, i32::try_from(n % 7)?);
    }
    Ok(())
}

#[tokio::test]
async fn fifty_commands_at_once_keep_nothing() -> Result {
    let node = Node::start().await?;
    let (_, id) = node.run_idle("crowd").await?;
    many_execs(&node, &id).await?;
    let (memory, files) = (private(&node)?, descriptors(&node)?);
    for _ in 0..3 {
        many_execs(&node, &id).await?;
    }
    eventually("memory and files are as before", async || {
        let flat = private(&node)? < memory + SLACK_KB && descriptors(&node)? <= files + 8;
        Ok(flat.then_some(()))
    })
    .await
    .map_err(|e| e.context(format!("{memory} then {:?}", private(&node))))?;
    node.finish().await
}

#[tokio::test]
async fn many_bytes_go_through_a_forwarded_port() -> Result {
    let node = Node::with_network().await?;
    let pod = node.run_pod("pipe").await?;
    let server = node.container("server", &["nc", "-ll", "-p", "8080", "-e", "/bin/cat"]);
    let id = node.cri.run(&pod, &server).await?;
    eventually("the server listens", async || {
        let script = "cat /proc/net/tcp /proc/net/tcp6 | grep -c ':1F90 .* 0A ' || true";
        Ok((node.cri.shell(&id, script).await?.trim() != "0").then_some(()))
    })
    .await?;
    let request = api::PortForwardRequest {
        pod_sandbox_id: pod.id.clone(),
        port: vec![8080],
    };
    let url = node
        .cri
        .runtime()
        .port_forward(request)
        .await?
        .into_inner()
        .url;
    let mut forward = Forward::open(&url).await?;
    let before = private(&node)?;
    let mut connection = forward.connect(8080).await?;
    let (spdy, stream) = connection.writer();
    let pattern = |n: usize| u8::try_from(n % 251).unwrap_or(0);
    let mut writer = tokio::task::JoinSet::new();
    writer.spawn(async move {
        let mut sent = 0;
        while sent < FORWARDED {
            let end = (sent + (64 << 10)).min(FORWARDED);
            let piece: Vec<u8> = (sent..end).map(pattern).collect();
            spdy.send(stream, &piece).await?;
            sent = end;
        }
        anyhow::Ok(())
    });
    let mut received = 0;
    while received < FORWARDED {
        let piece = tokio::time::timeout(Duration::from_secs(20), connection.read()).await?;
        let piece = piece.ok_or_else(|| anyhow::anyhow!("ended after {received} bytes"))?;
        let expected: Vec<u8> = (received..received + piece.len()).map(pattern).collect();
        assert!(piece == expected, "within {} of {received}", piece.len());
        received += piece.len();
    }
    while let Some(done) = writer.join_next().await {
        done??;
    }
    connection.close().await?;
    drop(connection);
    drop(forward);
    eventually("memory is as before", async || {
        Ok((private(&node)? < before + SLACK_KB).then_some(()))
    })
    .await
    .map_err(|e| e.context(format!("{before} kB, then {:?}", private(&node))))?;
    node.finish().await
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_its_own_stream_only() -> Result {
    let node = Node::start().await?;
    let (_, id) = node.run_idle("slow").await?;
    let mut slow = exec(&node, &id, &["yes", "ahoy"], OUT, Transport::SPDY).await?;
    slow.until("ahoy").await?;
    let before = private(&node)?;
    // Nobody reads `slow` now, and the command would print for ever.
    for _ in 0..20 {
        assert_eq!(node.cri.shell(&id, "echo well").await?, "well\n");
    }
    let grown = private(&node)?.saturating_sub(before);
    assert!(grown < 64 << 10, "{grown} kB more");
    drop(slow);
    node.finish().await
}

#[tokio::test]
async fn attached_clients_come_and_go() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("port").await?;
    let mut config = node.container(
        "main",
        &[
            "sh",
            "-c",
            "n=0; while :; do n=$((n+1)); echo tick $n; sleep 0.02; done",
        ],
    );
    config.stdin = true;
    let id = node.cri.run(&pod, &config).await?;
    for n in 0..12 {
        let transport = [Transport::SPDY, Transport::WEBSOCKET][n % 2];
        let mut session = crate::cri_attach::attach(&node, &id, IN_OUT, transport).await?;
        session.until("tick").await?;
    }
    // Two at once both see what comes.
    let open = async || crate::cri_attach::attach(&node, &id, OUT, Transport::SPDY).await;
    let (mut one, mut two) = (open().await?, open().await?);
    one.until("tick").await?;
    two.until("tick").await?;
    let files = descriptors(&node)?;
    drop((one, two));
    eventually("connections are let go", async || {
        Ok((descriptors(&node)? <= files).then_some(()))
    })
    .await?;
    let mut last = crate::cri_attach::attach(&node, &id, OUT, Transport::SPDY).await?;
    last.until("tick").await?;
    node.cri.stop(&id, 0).await?;
    // The end of the process is the end of the session.
    let ended = async {
        while let Some(event) = last.source.next().await? {
            if event == Event::Closed(Channel::Stdout) {
                break;
            }
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(20), ended).await??;
    // The log missed nothing meanwhile.
    let lines = node.log(&pod, "main")?;
    for (n, line) in lines.iter().enumerate() {
        assert_eq!(line.text, format!("tick {}", n + 1));
    }
    node.finish().await
}
