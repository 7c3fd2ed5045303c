//! Tests of pinned network namespaces; they need root and say so when they are skipped.

use super::*;

fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

async fn loopback_flags(path: &Path) -> String {
    run_in(path, "read", || {
        // sysfs shows the namespace it was mounted in; /proc/net follows the reading thread.
        std::fs::read_to_string("/proc/thread-self/net/if_inet6")
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn a_namespace_is_pinned_with_loopback_up_and_removed() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = create(dir.path(), None).await.unwrap();
    assert!(!is_closed(&path));
    assert!(
        loopback_flags(&path).await.contains("lo"),
        "::1 is there only on a raised loopback"
    );
    assert_eq!(leftovers(dir.path()).unwrap(), vec![path.clone()]);
    remove(&path).await.unwrap();
    assert!(is_closed(&path));
    remove(&path).await.unwrap();
    assert!(leftovers(dir.path()).unwrap().is_empty());
}

#[tokio::test]
async fn a_busy_namespace_is_detached() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = create(dir.path(), None).await.unwrap();
    let user = std::fs::File::open(&path).unwrap();
    remove(&path).await.unwrap();
    assert!(is_closed(&path));
    drop(user);
}

#[tokio::test]
async fn a_taken_name_is_refused_and_kept() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = create(dir.path(), None).await.unwrap();
    assert!(create_named(&path, None).await.is_err());
    assert!(!is_closed(&path));
    remove(&path).await.unwrap();
}

#[tokio::test]
async fn a_namespace_is_owned_by_the_user_namespace_given() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut child = std::process::Command::new("unshare")
        .args(["-U", "-r", "sleep", "60"])
        .spawn()
        .unwrap();
    let user_path = format!("/proc/{}/ns/user", child.id());
    let own = std::fs::read_link("/proc/self/ns/user").unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while std::fs::read_link(&user_path).unwrap() == own {
        assert!(std::time::Instant::now() < deadline, "unshare never ran");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let userns: OwnedFd = std::fs::File::open(&user_path).unwrap().into();
    let made = create(dir.path(), Some(userns)).await;
    child.kill().unwrap();
    child.wait().unwrap();
    let path = made.unwrap();
    assert!(!is_closed(&path));
    assert!(loopback_flags(&path).await.contains("lo"));
    remove(&path).await.unwrap();
}

#[tokio::test]
async fn localhost_of_a_namespace_is_reached() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = create(dir.path(), None).await.unwrap();
    let listener = run_in(&path, "listen", || {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    })
    .await
    .unwrap();
    let port = listener.local_addr().unwrap().port();
    assert!(connect_localhost(&path, port).await.is_ok());
    drop(listener);
    assert!(connect_localhost(&path, port).await.is_err());
    remove(&path).await.unwrap();
}
