//! The command line and bootstrap forms, groups, and what comes after a shim's death.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use lighter_proto::containerd::runtime::bootstrap::v1::{BootstrapParams, BootstrapResult};
use lighter_proto::containerd::task::v3 as api;
use lighter_proto::containerd::types::RuntimeInfo;
use prost::Message as _;

use crate::harness::{
    Daemon, NAMESPACE, alive, assert_nothing_left, binary, can_run, eventually, run,
};
use crate::lifecycle::for_each_runtime;

for_each_runtime!(a_dead_shim_is_cleaned_up_after);

fn params(daemon: &Daemon, id: &str) -> BootstrapParams {
    BootstrapParams {
        instance_id: id.to_owned(),
        namespace: NAMESPACE.to_owned(),
        containerd_grpc_address: daemon.address().display().to_string(),
        containerd_ttrpc_address: daemon.dir.path().join("d.sock.ttrpc").display().to_string(),
        socket_dir: Some(daemon.dir.path().join("s").display().to_string()),
        ..BootstrapParams::default()
    }
}

#[tokio::test]
async fn new_daemons_bootstrap_by_message() {
    if !can_run() {
        return;
    }
    let daemon = Daemon::new("").await;
    daemon.make_bundle("modern", &["/bin/busybox", "true"], |_| {});
    let mut child = daemon
        .start_command("modern", "start")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let bytes = params(&daemon, "modern").encode_to_vec();
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let result = BootstrapResult::decode(output.stdout.as_slice()).unwrap();
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    let socket = result.address.strip_prefix("unix://").unwrap();
    assert!(socket.starts_with(&daemon.dir.path().join("s").display().to_string()));
    let shim = daemon.connect("modern", &result.address).await;
    shim.run().await;
    assert_eq!(shim.wait("").await, 0);
    shim.finish().await;
}

#[tokio::test]
async fn a_group_shares_one_shim() {
    if !can_run() {
        return;
    }
    let daemon = Daemon::new("").await;
    for id in ["pod", "member"] {
        daemon.make_bundle(id, &["/bin/busybox", "sleep", "1000"], |spec| {
            spec["annotations"] = serde_json::json!({"io.kubernetes.cri.sandbox-id": "pod"});
        });
    }
    let address = daemon.start("pod");
    assert_eq!(daemon.start("member"), address);
    assert_eq!(
        std::fs::read_to_string(daemon.bundle("member").join("address")).unwrap(),
        address
    );
    let pod = daemon.connect("pod", &address).await;
    let member = daemon.connect("member", &address).await;
    assert_eq!(pod.pid, member.pid);
    pod.run().await;
    member.run().await;
    pod.kill("", 9).await.unwrap();
    pod.wait("").await;
    pod.delete("").await.unwrap();
    // The other one is still there, so the shim is.
    pod.shutdown().await;
    assert!(alive(member.pid));
    member.finish().await;
}

/// A nursery, and the socket that orders servers from it.
fn nursery() -> (OwnedFd, std::process::Child) {
    let (ours, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let mut command = Command::new(binary());
    command
        .args(["-ready", "2", "warm", &" ".repeat(300)])
        .stdin(theirs);
    (ours, command.spawn().unwrap())
}

/// Orders a server; the status and the bytes of the answer, and the line.
fn order(daemon: &Daemon, nursery: &OwnedFd, id: &str) -> (u8, Vec<u8>, UnixStream) {
    let message = params(daemon, id).encode_to_vec();
    let mut frame = u32::try_from(message.len()).unwrap().to_be_bytes().to_vec();
    frame.extend(message);
    frame.extend(daemon.bundle(id).display().to_string().as_bytes());
    let (mut line, theirs) = UnixStream::pair().unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    let descriptors = [std::os::fd::AsFd::as_fd(&theirs)];
    control.push(rustix::net::SendAncillaryMessage::ScmRights(&descriptors));
    let parts = [std::io::IoSlice::new(&frame)];
    let flags = rustix::net::SendFlags::NOSIGNAL;
    rustix::net::sendmsg(nursery, &parts, &mut control, flags).unwrap();
    drop(theirs);
    let mut length = [0; 4];
    line.read_exact(&mut length).unwrap();
    let mut answer = vec![0; u32::from_be_bytes(length) as usize];
    line.read_exact(&mut answer).unwrap();
    (answer[0], answer.split_off(1), line)
}

fn command_line(pid: u32) -> String {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    String::from_utf8_lossy(&line).replace('\0', " ")
}

#[tokio::test]
async fn warm_shims_take_on_containers_and_outlive_the_nursery() {
    if !can_run() {
        return;
    }
    let daemon = Daemon::new("").await;
    let (pool, mut child) = nursery();
    let mut shims = Vec::new();
    // More than are kept ready.
    for n in 0..5 {
        let id = format!("warm{n}");
        daemon.make_bundle(&id, &["/bin/busybox", "sleep", "1000"], |_| {});
        let (status, answer, line) = order(&daemon, &pool, &id);
        assert_eq!(status, 0, "{}", String::from_utf8_lossy(&answer));
        let result = BootstrapResult::decode(answer.as_slice()).unwrap();
        let shim = daemon.connect(&id, &result.address).await;
        drop(line);
        let title = command_line(shim.pid);
        assert!(title.contains(&format!("-id {id} start")), "{title}");
        shim.run().await;
        shims.push(shim);
    }
    // A second order for a group that is served leads to its server.
    let (status, answer, _line) = order(&daemon, &pool, "warm0");
    assert_eq!(status, 2, "{}", String::from_utf8_lossy(&answer));
    // The pool dies with its daemon, servers do not.
    drop(pool);
    assert!(child.wait().unwrap().success());
    for shim in shims {
        assert!(alive(shim.pid));
        shim.kill("", 9).await.unwrap();
        assert_eq!(shim.wait("").await, 137);
        shim.finish().await;
    }
}

#[tokio::test]
async fn a_warm_shim_says_why_it_cannot_serve() {
    if !can_run() {
        return;
    }
    let daemon = Daemon::new("").await;
    let (pool, mut child) = nursery();
    let (status, answer, _line) = order(&daemon, &pool, "nowhere");
    assert_eq!(status, 1);
    let text = String::from_utf8(answer).unwrap();
    assert!(text.contains("nowhere"), "{text}");
    drop(pool);
    assert!(child.wait().unwrap().success());
}

async fn a_dead_shim_is_cleaned_up_after(runtime: &str) {
    let daemon = Daemon::new(runtime).await;
    let shim = daemon
        .shim("dead", &["/bin/busybox", "sleep", "1000"])
        .await;
    let pid = shim.run().await;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(shim.pid).unwrap()),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    eventually("the shim's death", || (!alive(shim.pid)).then_some(())).await;
    for _ in 0..2 {
        let output = run(&mut daemon.start_command("dead", "delete"));
        assert!(output.status.success(), "{output:?}");
        let response = api::DeleteResponse::decode(output.stdout.as_slice()).unwrap();
        assert_eq!((response.pid, response.exit_status), (pid, 137));
    }
    eventually("the container's death", || (!alive(pid)).then_some(())).await;
    assert!(!shim.socket.exists());
    assert_nothing_left(&shim.cgroup, &shim.bundle);
}

#[test]
fn info_and_version_answer_without_a_daemon() {
    let version = run(Command::new(binary()).arg("-v"));
    assert!(
        String::from_utf8(version.stdout)
            .unwrap()
            .contains(env!("CARGO_PKG_VERSION"))
    );
    let info = run(Command::new(binary()).arg("-info").stdin(Stdio::null()));
    assert!(info.status.success(), "{info:?}");
    let info = RuntimeInfo::decode(info.stdout.as_slice()).unwrap();
    assert_eq!(info.version.unwrap().version, env!("CARGO_PKG_VERSION"));
}

#[test]
fn a_bad_command_line_says_what_is_wrong() {
    let output = run(Command::new(binary())
        .args(["-nonsense", "start"])
        .stdin(Stdio::null()));
    assert!(!output.status.success());
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("-nonsense")
    );
    let output = run(Command::new(binary())
        .args(["-namespace", "n", "-id", "../x", "start"])
        .stdin(Stdio::null()));
    assert!(!output.status.success());
    assert!(String::from_utf8(output.stderr).unwrap().contains("../x"));
}
