//! CRI: container logs.

use std::fs;

use lighter_integration::cri::{Node, lines, newer};
use lighter_integration::{Result, eventually};
use lighter_proto::runtime::v1 as api;

/// Bytes at which a line is split.
const LINE: usize = 16384;

fn reopen(id: &str) -> api::ReopenContainerLogRequest {
    api::ReopenContainerLogRequest {
        container_id: id.to_owned(),
    }
}

#[tokio::test]
async fn lines_have_time_stream_and_tag() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("log").await?;
    let script = "echo one; echo two >&2; echo; printf 'cr\\r\\n'; printf tail";
    let id = node
        .cri
        .run(&pod, &node.container("main", &["sh", "-c", script]))
        .await?;
    node.cri.exited(&id).await?;
    let all = node.log(&pod, "main")?;
    let of = |stream: &str| -> Vec<_> {
        let lines = all.iter().filter(|l| l.stream == stream);
        lines.map(|l| (l.full, l.text.as_str())).collect()
    };
    let out = of("stdout");
    assert_eq!(out[..2], [(true, "one"), (true, "")]);
    assert_eq!(out.len(), 4, "{out:?}");
    assert_eq!(out[3].1, "tail");
    assert_eq!(of("stderr"), [(true, "two")]);
    if !newer("a tail without its newline marked as partial") {
        assert_eq!(out[2..], [(true, "cr"), (false, "tail")]);
    }
    let path = node.logs("log").join("main.log");
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(fs::metadata(&path)?.permissions().mode() & 0o777, 0o640);
    let mut times: Vec<_> = all.iter().map(|l| l.time.len()).collect();
    times.dedup();
    assert!(times.iter().all(|len| *len >= 20), "{all:?}");
    node.finish().await
}

#[tokio::test]
async fn long_lines_are_split_at_exactly_the_limit() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("long").await?;
    let script = format!(
        "head -c {LINE} /dev/zero | tr '\\0' a; echo; head -c {} /dev/zero | tr '\\0' b; echo; \
         head -c {} /dev/zero | tr '\\0' c; echo",
        LINE + 1,
        3 * LINE + 5,
    );
    let script = script.replace("tr '", "busybox tr '");
    let id = node
        .cri
        .run(&pod, &node.container("main", &["sh", "-c", &script]))
        .await?;
    node.cri.exited(&id).await?;
    let parts: Vec<_> = node
        .log(&pod, "main")?
        .iter()
        .map(|l| (l.text.chars().next().unwrap_or('-'), l.full, l.text.len()))
        .collect();
    let expected = [
        ('a', true, LINE),
        ('b', false, LINE),
        ('b', true, 1),
        ('c', false, LINE),
        ('c', false, LINE),
        ('c', false, LINE),
        ('c', true, 5),
    ];
    assert_eq!(parts, expected);
    node.finish().await
}

#[tokio::test]
async fn a_terminals_log_has_one_stream() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("tty").await?;
    let mut config = node.container("main", &["sh", "-c", "echo out; echo err >&2; tty"]);
    config.tty = true;
    config.stdin = true;
    let id = node.cri.run(&pod, &config).await?;
    node.cri.exited(&id).await?;
    let all = node.log(&pod, "main")?;
    let all: Vec<_> = all
        .iter()
        .map(|l| (l.stream.as_str(), l.text.trim_end()))
        .collect();
    assert_eq!(
        all,
        [
            ("stdout", "out"),
            ("stdout", "err"),
            ("stdout", "/dev/pts/0")
        ]
    );
    node.finish().await
}

#[tokio::test]
async fn a_reopened_log_loses_no_line() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("rotate").await?;
    let script =
        "n=0; while :; do n=$((n+1)); echo line $n; [ $((n % 100)) = 0 ] && sleep 0.01; done";
    let id = node
        .cri
        .run(&pod, &node.container("main", &["sh", "-c", script]))
        .await?;
    let path = node.logs("rotate").join("main.log");
    for n in 0..5 {
        eventually("the log grows", async || {
            Ok(fs::metadata(&path)
                .is_ok_and(|m| m.len() > 10_000)
                .then_some(()))
        })
        .await?;
        fs::rename(&path, node.logs("rotate").join(format!("old.{n}")))?;
        node.cri.runtime().reopen_container_log(reopen(&id)).await?;
        assert!(path.exists());
    }
    node.cri.stop(&id, 0).await?;
    let mut all = Vec::new();
    for n in 0..5 {
        all.extend(lines(&node.logs("rotate").join(format!("old.{n}")))?);
    }
    all.extend(lines(&path)?);
    // Killed, the writer may have been within a line.
    all.retain(|l| l.full);
    for (n, line) in all.iter().enumerate() {
        assert_eq!(line.text, format!("line {}", n + 1));
    }
    let stopped = node
        .cri
        .runtime()
        .reopen_container_log(reopen(&id))
        .await
        .unwrap_err();
    assert!(stopped.message().contains("not running"), "{stopped}");
    let unknown = reopen("0123456789abcdef");
    let unknown = node
        .cri
        .runtime()
        .reopen_container_log(unknown)
        .await
        .unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound, "{unknown}");
    node.finish().await
}

#[tokio::test]
async fn without_a_log_path_output_is_dropped_and_the_process_goes_on() -> Result {
    let node = Node::start().await?;
    let mut sandbox = node.pod("quiet");
    sandbox.log_directory = String::new();
    let pod = node.cri.run_pod(&sandbox).await?;
    let script = "head -c 1000000 /dev/zero; exit 5";
    let id = node
        .cri
        .run(&pod, &node.container("main", &["sh", "-c", script]))
        .await?;
    assert_eq!(node.cri.exited(&id).await?.exit_code, 5);
    assert_eq!(node.cri.status(&id).await?.log_path, "");
    node.finish().await
}

#[tokio::test]
async fn a_log_that_cannot_be_written_fails_the_start_and_names_it() -> Result {
    let node = Node::start().await?;
    let pod = node.run_pod("blocked").await?;
    fs::create_dir_all(node.logs("blocked"))?;
    fs::write(node.logs("blocked").join("file"), "")?;
    let mut config = node.idle("main");
    config.log_path = "file/beneath/a/file.log".into();
    let started = match node.cri.create(&pod, &config).await {
        Ok(id) => node.cri.start(&id).await,
        Err(refused) => Err(refused),
    };
    let refused = started.unwrap_err();
    assert!(refused.message().contains("logs/blocked/file"), "{refused}");
    // Nothing runs, and the name can be had again.
    let running = node.cri.containers(Some(api::ContainerFilter {
        state: Some(api::ContainerStateValue {
            state: api::ContainerState::ContainerRunning.into(),
        }),
        ..Default::default()
    }));
    assert!(running.await?.is_empty());
    for left in node.cri.containers(None).await? {
        node.cri.remove(&left.id).await?;
    }
    node.cri.run(&pod, &node.idle("main")).await?;
    node.finish().await
}

#[tokio::test]
async fn a_full_disk_does_not_block_the_process() -> Result {
    let node = Node::start().await?;
    let mut sandbox = node.pod("full");
    let dir = node.daemon.dir().join("small");
    fs::create_dir(&dir)?;
    let flags = nix::mount::MsFlags::empty();
    let size = Some("size=64k");
    nix::mount::mount(Some("tmpfs"), &dir, Some("tmpfs"), flags, size)?;
    sandbox.log_directory = dir.display().to_string();
    let pod = node.cri.run_pod(&sandbox).await?;
    let script =
        "n=0; while [ $n -lt 20000 ]; do n=$((n+1)); echo a line of some length $n; done; exit 6";
    let id = node
        .cri
        .run(&pod, &node.container("main", &["sh", "-c", script]))
        .await?;
    assert_eq!(node.cri.exited(&id).await?.exit_code, 6);
    node.cri.end_pod(&pod.id).await?;
    nix::mount::umount(&dir)?;
    node.finish().await
}
