//! CRI: commands in running containers, unary and streamed.

use std::time::{Duration, Instant};

use lighter_integration::cri::stream::{
    Channel, Ended, Session, Spdy, Streams, Transport, WebSocket, upgrade,
};
use lighter_integration::cri::{Node, newer};
use lighter_integration::{Result, eventually};
use lighter_proto::runtime::v1 as api;
use tonic::Code;

pub(crate) const OUT: Streams = Streams {
    stdin: false,
    stdout: true,
    stderr: true,
    tty: false,
};
pub(crate) const IN_OUT: Streams = Streams { stdin: true, ..OUT };
pub(crate) const TERMINAL: Streams = Streams {
    stdin: true,
    stdout: true,
    stderr: false,
    tty: true,
};

/// URL of an exec.
pub(crate) async fn url(
    node: &Node,
    id: &str,
    cmd: &[&str],
    streams: Streams,
) -> Result<String, tonic::Status> {
    let request = api::ExecRequest {
        container_id: id.to_owned(),
        cmd: cmd.iter().map(|&word| word.to_owned()).collect(),
        tty: streams.tty,
        stdin: streams.stdin,
        stdout: streams.stdout,
        stderr: streams.stderr,
    };
    Ok(node.cri.runtime().exec(request).await?.into_inner().url)
}

/// Opens an exec.
pub(crate) async fn exec(
    node: &Node,
    id: &str,
    cmd: &[&str],
    streams: Streams,
    transport: Transport,
) -> Result<Session> {
    let url = url(node, id, cmd, streams).await?;
    Session::open(&url, transport, streams).await
}

async fn all(node: &Node, id: &str, script: &str, transport: Transport) -> Result<Ended> {
    let session = exec(node, id, &["sh", "-c", script], OUT, transport).await?;
    session.finish().await
}

#[tokio::test]
async fn a_command_runs_to_its_end() -> Result {
    let node = Node::start().await?;
    let (pod, id) = node.run_idle("sync").await?;
    let done = node
        .cri
        .exec(&id, &["sh", "-c", "echo out; echo err >&2; exit 3"])
        .await?;
    assert_eq!(done.stdout, b"out\n");
    assert_eq!(done.stderr, b"err\n");
    assert_eq!(done.exit_code, 3);
    let done = node.cri.exec(&id, &["true"]).await?;
    assert_eq!(
        (done.exit_code, done.stdout.len(), done.stderr.len()),
        (0, 0, 0)
    );
    // A prefix of the id does.
    let done = node.cri.exec(&id[..16], &["echo", "a  b"]).await?;
    assert_eq!(done.stdout, b"a  b\n");
    let big = node
        .cri
        .exec(&id, &["sh", "-c", "head -c 3000000 /dev/zero"])
        .await?;
    assert_eq!(big.stdout.len(), 3_000_000);

    let missing = node.cri.exec(&id, &["/no/such"]).await.unwrap_err();
    assert!(missing.message().contains("/no/such"), "{missing}");
    node.cri.exec(&id, &[]).await.unwrap_err();
    let unknown = node
        .cri
        .exec("0123456789abcdef", &["true"])
        .await
        .unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    let created = node.cri.create(&pod, &node.idle("created")).await?;
    let early = node.cri.exec(&created, &["true"]).await.unwrap_err();
    assert!(
        early.message().contains("CONTAINER_CREATED state"),
        "{early}"
    );
    node.cri.stop(&id, 0).await?;
    let late = node.cri.exec(&id, &["true"]).await.unwrap_err();
    assert!(late.message().contains("CONTAINER_EXITED state"), "{late}");
    node.finish().await
}

#[tokio::test]
async fn a_command_that_takes_too_long_is_killed() -> Result {
    let node = Node::start().await?;
    let (_, id) = node.run_idle("slow").await?;
    let begun = Instant::now();
    let late = node
        .cri
        .exec_within(&id, &["sleep", "4321"], 1)
        .await
        .unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
    assert!(begun.elapsed() < Duration::from_secs(10));
    eventually("its process is gone", async || {
        let found = node
            .cri
            .shell(&id, "ps | grep -v grep | grep -c 'sleep 4321' || true");
        Ok((found.await?.trim() == "0").then_some(()))
    })
    .await?;
    let quick = node.cri.exec_within(&id, &["echo", "quick"], 10).await?;
    assert_eq!(quick.stdout, b"quick\n");
    node.finish().await
}

/// Probes are such commands: they end before whoever started them has had a look.
#[tokio::test]
async fn the_shortest_commands_have_the_oom_score_of_their_container() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("short").await?;
    let mut config = node.idle("main");
    let linux = config.linux.get_or_insert_default();
    linux.resources.get_or_insert_default().oom_score_adj = 900;
    let id = node.cri.run(&pod, &config).await?;
    let some = |_| async {
        for _ in 0..25 {
            let done = node.cri.exec(&id, &["cat", "/proc/self/oom_score_adj"]);
            assert_eq!(done.await?.stdout, b"900\n");
        }
        Result::<()>::Ok(())
    };
    futures::future::try_join_all((0..8).map(some)).await?;
    node.finish().await
}

#[tokio::test]
async fn streams_carry_output_and_exit_codes_over_every_protocol() -> Result {
    let node = Node::start().await?;
    let (_, id) = node.run_idle("streams").await?;
    let every = [Transport::SPDY, Transport::WEBSOCKET, Transport::BASE64];
    for transport in every {
        let ended = all(&node, &id, "echo out; echo err >&2; exit 9", transport).await?;
        assert_eq!(ended.stdout, b"out\n", "{transport:?}");
        assert_eq!(ended.stderr, b"err\n", "{transport:?}");
        assert_eq!(ended.code()?, 9, "{transport:?}");
        assert!(
            ended
                .error
                .contains("command terminated with non-zero exit code"),
            "{ended:?}"
        );
        let ended = all(&node, &id, "true", transport).await?;
        assert_eq!(ended.code()?, 0, "{transport:?}");
        let ended = all(&node, &id, "head -c 2000000 /dev/zero", transport).await?;
        assert_eq!(ended.stdout.len(), 2_000_000, "{transport:?}");
        let session = exec(&node, &id, &["/no/such"], OUT, transport).await?;
        let ended = session.finish().await?;
        assert!(
            ended.code().is_err() && ended.error.contains("/no/such"),
            "{ended:?}"
        );
    }
    // The older protocols end in plain text.
    for protocol in ["v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"] {
        let ended = all(&node, &id, "echo old; exit 9", Transport::Spdy(protocol)).await?;
        assert_eq!(ended.text(), "old\n", "{protocol}");
        // The first one breaks its error stream off, and with it what was said there.
        let said = ended.error.contains("exit code 9");
        assert!(
            said || protocol == "channel.k8s.io",
            "{protocol}: {ended:?}"
        );
        let ended = all(&node, &id, "true", Transport::Spdy(protocol)).await?;
        assert_eq!(ended.error, "", "{protocol}");
    }
    node.finish().await
}

#[tokio::test]
async fn input_reaches_the_process_and_its_end_too() -> Result {
    let node = Node::start().await?;
    let (_, id) = node.run_idle("input").await?;
    let session = exec(&node, &id, &["cat"], IN_OUT, Transport::SPDY).await?;
    session.write(b"one\n").await?;
    session.write(b"two\n").await?;
    session.sink.close(Channel::Stdin).await?;
    let ended = session.finish().await?;
    assert_eq!((ended.text().as_str(), ended.code()?), ("one\ntwo\n", 0));
    // Half-closed, the other half still carries what comes later.
    let script = "cat > /dev/null; sleep 0.3; echo after";
    let session = exec(&node, &id, &["sh", "-c", script], IN_OUT, Transport::SPDY).await?;
    session.write(b"x").await?;
    session.sink.close(Channel::Stdin).await?;
    assert_eq!(session.finish().await?.text(), "after\n");

    for transport in [Transport::WEBSOCKET, Transport::BASE64] {
        let session = exec(&node, &id, &["head", "-n", "2"], IN_OUT, transport).await?;
        session.write(b"one\n").await?;
        session.write(b"two\n").await?;
        let ended = session.finish().await?;
        assert_eq!((ended.text().as_str(), ended.code()?), ("one\ntwo\n", 0));
    }
    if !newer("v5.channel.k8s.io") {
        let transport = Transport::WebSocket("v5.channel.k8s.io");
        let session = exec(&node, &id, &["cat"], IN_OUT, transport).await?;
        session.write(b"one\n").await?;
        session.sink.close_v5(Channel::Stdin).await?;
        let ended = session.finish().await?;
        assert_eq!((ended.text().as_str(), ended.code()?), ("one\n", 0));
    }
    node.finish().await
}

#[tokio::test]
async fn a_terminal_has_the_size_it_is_given() -> Result {
    let node = Node::start().await?;
    let (_, id) = node.run_idle("terminal").await?;
    for transport in [Transport::SPDY, Transport::WEBSOCKET] {
        let script = "tty; read go; stty size; read go; stty size; exit 4";
        let mut session = exec(&node, &id, &["sh", "-c", script], TERMINAL, transport).await?;
        session.until("/dev/pts/").await?;
        let mut sizes = Vec::new();
        for (width, height) in [(123, 45), (80, 24)] {
            session.resize(width, height).await?;
            // Sizes and input go by different streams.
            tokio::time::sleep(Duration::from_millis(300)).await;
            session.write(b"\n").await?;
            sizes.push(session.until(&format!("{height} {width}")).await?);
        }
        let ended = session.finish().await?;
        assert_eq!(ended.code()?, 4, "{sizes:?}");
        assert!(ended.stderr.is_empty());
    }
    node.finish().await
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused() -> Result {
    let node = Node::start().await?;
    let (_, id) = node.run_idle("refused").await?;
    let none = Streams::default();
    let refused = url(&node, &id, &["true"], none).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    let both = Streams { tty: true, ..OUT };
    let refused = url(&node, &id, &["true"], both).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    let refused = url(&node, "0123456789abcdef", &["true"], OUT)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused}");

    // A URL is good for one use, by the protocol's upgrade only.
    let good = url(&node, &id, &["true"], OUT).await?;
    let (base, _) = good.rsplit_once('/').unwrap_or_default();
    let answer = upgrade("PUT", &good, &[]).await?;
    assert!([404, 405].contains(&answer.status), "{answer:?}");
    let session = Session::open(&good, Transport::SPDY, OUT).await?;
    assert_eq!(session.finish().await?.code()?, 0);
    let again = Spdy::ask(&good, &["v4.channel.k8s.io"]).await?;
    assert_eq!(again.status, 404, "{again:?}");
    let unknown = Spdy::ask(&format!("{base}/nosuch_1"), &["v4.channel.k8s.io"]).await?;
    assert_eq!(unknown.status, 404, "{unknown:?}");
    let other = base.replace("/exec", "/attach");
    let token = url(&node, &id, &["true"], OUT).await?;
    let token = token.rsplit('/').next().unwrap_or_default();
    let wrong = Spdy::ask(&format!("{other}/{token}"), &["v4.channel.k8s.io"]).await?;
    assert_ne!(wrong.status, 101, "{wrong:?}");
    let fresh = url(&node, &id, &["true"], OUT).await?;
    let foreign = Spdy::ask(&fresh, &["v9.channel.k8s.io"]).await?;
    assert_eq!(foreign.status, 403, "{foreign:?}");
    let fresh = url(&node, &id, &["true"], OUT).await?;
    let foreign = WebSocket::ask(&fresh, "v9.channel.k8s.io").await?;
    assert_ne!(foreign.status, 101, "{foreign:?}");
    node.finish().await
}

#[tokio::test]
async fn a_lost_client_does_not_stop_the_container() -> Result {
    let node = Node::start().await?;
    let (_, id) = node.run_idle("lost").await?;
    for transport in [Transport::SPDY, Transport::WEBSOCKET] {
        let script = "echo begun; while :; do echo more; sleep 0.05; done";
        let mut session = exec(&node, &id, &["sh", "-c", script], IN_OUT, transport).await?;
        session.until("begun").await?;
        drop(session);
    }
    assert_eq!(node.cri.shell(&id, "echo alive").await?, "alive\n");
    let status = node.cri.status(&id).await?;
    assert_eq!(status.state(), api::ContainerState::ContainerRunning);
    node.finish().await
}
