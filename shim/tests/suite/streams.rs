//! Standard streams of every kind.

use std::io::Write as _;
use std::time::{Duration, Instant};

use lighter_proto::containerd::task::v3 as api;
use lighter_proto::lighter::shim::v1 as log_api;

use crate::harness::{Daemon, drain, eventually, fifo};
use crate::lifecycle::for_each_runtime;

for_each_runtime!(
    all_output_arrives,
    input_ends_when_it_is_closed,
    a_file_gets_both_streams,
    a_terminal_echoes,
    a_logging_program_gets_the_output,
    a_log_is_written_in_cri_format_and_reopened,
    a_flood_that_nobody_reads_harms_nobody,
);

async fn all_output_arrives(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let script = "busybox dd if=/dev/zero bs=1000 count=3000 2>/dev/null; echo err >&2";
    let shim = daemon
        .shim("output", &["/bin/busybox", "sh", "-c", script])
        .await;
    let (out, err) = (daemon.dir.path().join("out"), daemon.dir.path().join("err"));
    let stdout = drain(fifo(&out));
    let stderr = drain(fifo(&err));
    let request = api::CreateTaskRequest {
        stdout: out.display().to_string(),
        stderr: err.display().to_string(),
        ..shim.request()
    };
    shim.create(&request).await.unwrap();
    shim.start("").await.unwrap();
    assert_eq!(shim.wait("").await, 0);
    shim.delete("").await.unwrap();
    assert_eq!(stdout.join().unwrap().len(), 3_000_000);
    assert_eq!(stderr.join().unwrap(), b"err\n");
    shim.finish().await;
}

async fn input_ends_when_it_is_closed(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = daemon.shim("input", &["/bin/busybox", "cat"]).await;
    let (input, out) = (daemon.dir.path().join("in"), daemon.dir.path().join("out"));
    let _keep = fifo(&input);
    let stdout = drain(fifo(&out));
    let request = api::CreateTaskRequest {
        stdin: input.display().to_string(),
        stdout: out.display().to_string(),
        ..shim.request()
    };
    shim.create(&request).await.unwrap();
    shim.start("").await.unwrap();
    // A client that comes and goes does not end the input.
    for word in ["one ", "two\n"] {
        let mut writer = std::fs::File::options().write(true).open(&input).unwrap();
        writer.write_all(word.as_bytes()).unwrap();
    }
    let close = api::CloseIoRequest {
        id: "input".into(),
        stdin: true,
        ..Default::default()
    };
    let _: () = shim.call("CloseIO", &close).await.unwrap();
    assert_eq!(shim.wait("").await, 0);
    shim.delete("").await.unwrap();
    assert_eq!(stdout.join().unwrap(), b"one two\n");
    shim.finish().await;
}

async fn a_file_gets_both_streams(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = daemon
        .shim("file", &["/bin/busybox", "sh", "-c", "echo a; echo b >&2"])
        .await;
    let path = daemon.dir.path().join("logs/new/file");
    let uri = format!("file://{}", path.display());
    let request = api::CreateTaskRequest {
        stdout: uri.clone(),
        stderr: uri,
        ..shim.request()
    };
    shim.create(&request).await.unwrap();
    shim.start("").await.unwrap();
    shim.wait("").await;
    shim.delete("").await.unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["a", "b"]);
    shim.finish().await;
}

async fn a_terminal_echoes(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let script = "busybox stty size; read line; echo got $line; exit 5";
    daemon.make_bundle("tty", &["/bin/busybox", "sh", "-c", script], |spec| {
        spec["process"]["terminal"] = true.into();
        spec["process"]["consoleSize"] = serde_json::json!({"width": 90, "height": 30});
    });
    let shim = daemon.connect("tty", &daemon.start("tty")).await;
    let (input, out) = (daemon.dir.path().join("in"), daemon.dir.path().join("out"));
    let _keep = fifo(&input);
    let stdout = drain(fifo(&out));
    let request = api::CreateTaskRequest {
        terminal: true,
        stdin: input.display().to_string(),
        stdout: out.display().to_string(),
        ..shim.request()
    };
    shim.create(&request).await.unwrap();
    let resize = api::ResizePtyRequest {
        id: "tty".into(),
        width: 100,
        height: 40,
        ..Default::default()
    };
    let _: () = shim.call("ResizePty", &resize).await.unwrap();
    shim.start("").await.unwrap();
    let mut writer = std::fs::File::options().write(true).open(&input).unwrap();
    writer.write_all(b"word\n").unwrap();
    assert_eq!(shim.wait("").await, 5);
    shim.delete("").await.unwrap();
    let text = String::from_utf8(stdout.join().unwrap()).unwrap();
    assert!(text.contains("40 100"), "{text:?}");
    assert!(
        text.contains("word\r\n") && text.contains("got word\r\n"),
        "{text:?}"
    );
    shim.finish().await;
}

async fn a_logging_program_gets_the_output(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = daemon
        .shim(
            "logger",
            &["/bin/busybox", "sh", "-c", "echo out; echo err >&2"],
        )
        .await;
    let logger = daemon.dir.path().join("logger.sh");
    let log = daemon.dir.path().join("log");
    let script = "#!/bin/sh\nexec 5>&-\ncat <&4 >>$2.err &\n(echo \"$CONTAINER_ID $CONTAINER_NAMESPACE $1\"; cat <&3) >$2\nwait\n";
    lighter_testing::executable(&logger, script).unwrap();
    let uri = format!("binary://{}?key={}", logger.display(), log.display());
    let request = api::CreateTaskRequest {
        stdout: uri.clone(),
        stderr: uri.clone(),
        ..shim.request()
    };
    shim.create(&request).await.unwrap();
    shim.start("").await.unwrap();
    shim.wait("").await;
    eventually("the program's log", || {
        std::fs::read_to_string(&log)
            .ok()
            .filter(|text| text == "logger shimtest key\nout\n")
    })
    .await;
    shim.finish().await;
    // The second version insists on hearing from it.
    let shim = daemon.shim("logger2", &["/bin/busybox", "true"]).await;
    let uri = uri.replace("binary://", "binary-v2://");
    let request = api::CreateTaskRequest {
        stdout: uri,
        ..shim.request()
    };
    let error = shim.create(&request).await.unwrap_err();
    assert!(
        error.message.contains("did not call ready"),
        "{}",
        error.message
    );
    shim.finish().await;
}

async fn a_log_is_written_in_cri_format_and_reopened(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let script = "echo first; read x; echo second; echo oops >&2; busybox printf tail";
    let shim = daemon
        .shim("crilog", &["/bin/busybox", "sh", "-c", script])
        .await;
    let path = daemon.dir.path().join("pod/0.log");
    let input = daemon.dir.path().join("in");
    let tee = daemon.dir.path().join("tee");
    let _keep = fifo(&input);
    let attached = drain(fifo(&tee));
    let uri = format!("cri-log://{}?max=16", path.display());
    let request = api::CreateTaskRequest {
        stdin: input.display().to_string(),
        stdout: uri.clone(),
        stderr: uri,
        ..shim.request()
    };
    shim.create(&request).await.unwrap();
    shim.start("").await.unwrap();
    let read = || std::fs::read_to_string(&path).unwrap_or_default();
    eventually("the first record", || {
        read().ends_with(" stdout F first\n").then_some(())
    })
    .await;
    let attach = log_api::AttachRequest {
        id: "crilog".into(),
        stdout: tee.display().to_string(),
        ..Default::default()
    };
    let _: () = shim
        .call_service("lighter.shim.v1.Log", "Attach", &attach)
        .await
        .unwrap();
    let rotated = path.with_extension("1");
    std::fs::rename(&path, &rotated).unwrap();
    let reopen = log_api::ReopenRequest {
        id: "crilog".into(),
        ..Default::default()
    };
    let _: () = shim
        .call_service("lighter.shim.v1.Log", "Reopen", &reopen)
        .await
        .unwrap();
    std::fs::File::options()
        .write(true)
        .open(&input)
        .unwrap()
        .write_all(b"\n")
        .unwrap();
    shim.wait("").await;
    shim.delete("").await.unwrap();
    assert_eq!(
        std::fs::read_to_string(&rotated).unwrap().lines().count(),
        1
    );
    let mut records: Vec<String> = read()
        .lines()
        .map(|line| line.split_once(' ').unwrap().1.to_owned())
        .collect();
    records.sort();
    assert_eq!(
        records,
        ["stderr F oops", "stdout F second", "stdout P tail"]
    );
    assert_eq!(attached.join().unwrap(), b"second\ntail");
    shim.finish().await;
}

async fn a_flood_that_nobody_reads_harms_nobody(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = daemon.shim("flood", &["/bin/busybox", "yes"]).await;
    let out = daemon.dir.path().join("out");
    // Opened, and never read.
    let _reader = fifo(&out);
    let request = api::CreateTaskRequest {
        stdout: out.display().to_string(),
        ..shim.request()
    };
    shim.create(&request).await.unwrap();
    shim.start("").await.unwrap();
    let log = daemon.dir.path().join("log");
    let exec = api::ExecProcessRequest {
        id: "flood".into(),
        exec_id: "e".into(),
        stdout: format!("cri-log://{}", log.display()),
        spec: Some(
            lighter_proto::any::pack_json(
                lighter_proto::any::PROCESS,
                &crate::harness::process(&["/bin/busybox", "timeout", "1", "/bin/busybox", "yes"]),
            )
            .unwrap(),
        ),
        ..Default::default()
    };
    let _: () = shim.call("Exec", &exec).await.unwrap();
    shim.start("e").await.unwrap();
    let mut slowest = Duration::ZERO;
    for _ in 0..20 {
        let before = Instant::now();
        shim.state("").await.unwrap();
        slowest = slowest.max(before.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    shim.wait("e").await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", shim.pid)).unwrap();
    let resident = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .unwrap();
    let resident_kib: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(resident_kib < 8 * 1024, "{resident_kib} KiB");
    let before = Instant::now();
    shim.kill("", 9).await.unwrap();
    assert_eq!(shim.wait("").await, 137);
    assert!(before.elapsed() < Duration::from_secs(5));
    drop(_reader);
    let drained = drain(std::fs::File::open(&out).unwrap());
    shim.finish().await;
    drained.join().unwrap();
    std::fs::remove_file(log).unwrap();
}
