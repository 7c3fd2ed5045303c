//! Shims that are scripts: how they are found, started and heard.

use super::*;

fn launcher() -> Launcher {
    Launcher::new(
        "1".to_owned(),
        "/run/a".into(),
        "/run/a.ttrpc".into(),
        "/nonexistent/lighterd".into(),
        LogLevel::Info,
        Vec::new(),
    )
}

#[test]
fn a_missing_runtime_is_named_with_its_binary() {
    let error = launcher().resolve("io.containerd.none.v9").unwrap_err();
    assert_eq!(
        error.to_string(),
        "runtime \"io.containerd.none.v9\" binary not installed \"containerd-shim-none-v9\": file does not exist"
    );
    assert!(launcher().resolve("./relative").is_err());
    assert!(launcher().resolve("/nonexistent/shim").is_err());
}

/// A shim that is a script: `body` sees the action as `$action` and stdin as it is.
fn script(dir: &Path, body: &str) -> PathBuf {
    let path = dir.join("containerd-shim-fake-v1");
    let text = format!("#!/bin/sh\nfor a in \"$@\"; do action=$a; done\n{body}\n");
    lighter_testing::executable(&path, text).unwrap();
    path
}

fn bundle(dir: &Path) -> Bundle {
    let bundle = Bundle::at(
        dir,
        &dir.join("root"),
        "t",
        &lighter_store::Namespace::new("n").unwrap(),
        "c",
    );
    std::fs::create_dir_all(&bundle.path).unwrap();
    bundle
}

#[tokio::test]
async fn the_older_form_is_tried_once_and_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    // Fails on BootstrapParams, whose first field is the id "c".
    let shim = script(
        dir.path(),
        &format!(
            "n=$(wc -c); echo $n >> {}; [ $n -eq 0 ] || exit 1; echo unix:///x",
            log.display()
        ),
    );
    let (launcher, bundle) = (launcher(), bundle(dir.path()));
    for _ in 0..2 {
        let bootstrap = launcher.start(&shim, &bundle, None).await.unwrap();
        assert_eq!(bootstrap.address, "unix:///x");
    }
    let calls = std::fs::read_to_string(log).unwrap();
    assert_eq!(calls.lines().count(), 3, "{calls}");
}

#[tokio::test]
async fn a_failed_start_says_what_the_shim_printed() {
    let dir = tempfile::tempdir().unwrap();
    let shim = script(dir.path(), "echo no luck >&2; exit 3");
    let error = launcher()
        .start(&shim, &bundle(dir.path()), None)
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "failed to start shim: start failed: no luck: exit status 3"
    );
}

#[tokio::test]
async fn a_server_that_keeps_the_pipe_does_not_hold_the_start_up() {
    let dir = tempfile::tempdir().unwrap();
    let shim = script(dir.path(), "echo unix:///x; sleep 30 & exit 0");
    let (launcher, bundle) = (launcher(), bundle(dir.path()));
    let start = launcher.start(&shim, &bundle, None);
    let started = tokio::time::timeout(Duration::from_secs(10), start);
    assert_eq!(started.await.unwrap().unwrap().address, "unix:///x");
}
