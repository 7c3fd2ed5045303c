//! Terminals through a console socket.

use std::io::{IoSliceMut, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::json;

use crate::bundle::{Bundle, bundle};

/// Runs `words` with a console socket and returns the terminal's master.
fn with_console(bundle: &Bundle, words: &[&str]) -> std::fs::File {
    let path = bundle.path().join("console");
    std::fs::remove_file(&path).ok();
    let listener = UnixListener::bind(&path).unwrap();
    let said = bundle.say(words);
    assert_eq!(said.code, 0, "{}", said.err);
    let (stream, _) = listener.accept().unwrap();
    let mut name = [0; 256];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    rustix::net::recvmsg(
        &stream,
        &mut [IoSliceMut::new(&mut name)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )
    .unwrap();
    let master: Option<OwnedFd> = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    std::fs::File::from(master.expect("a terminal was sent"))
}

fn read_until(master: &mut std::fs::File, wanted: &str) -> String {
    let mut seen = String::new();
    let mut chunk = [0; 512];
    while !seen.contains(wanted) {
        let mut polled = [rustix::event::PollFd::new(
            &*master,
            rustix::event::PollFlags::IN,
        )];
        let patience = rustix::event::Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        assert!(
            rustix::event::poll(&mut polled, Some(&patience)).unwrap() > 0,
            "no {wanted:?} in {seen:?}"
        );
        match master.read(&mut chunk) {
            Ok(0) | Err(_) => break,
            Ok(length) => seen.push_str(&String::from_utf8_lossy(&chunk[..length])),
        }
    }
    assert!(seen.contains(wanted), "no {wanted:?} in {seen:?}");
    seen
}

#[test]
fn init_gets_a_terminal_of_its_size() {
    let Some(bundle) = bundle(&[
        "sh",
        "-c",
        "tty; stty size; ls -l /dev/console; read line; echo got $line; sleep 60",
    ]) else {
        return;
    };
    let bundle = bundle
        .set("/process/terminal", json!(true))
        .set("/process/consoleSize", json!({"height": 33, "width": 99}));
    let path = bundle.path().to_str().unwrap().to_owned();
    let said = bundle.say(&["create", "--bundle", &path, &bundle.id]);
    assert!(
        said.err.contains("without setting console socket"),
        "{}",
        said.err
    );
    let console = bundle.path().join("console").to_str().unwrap().to_owned();
    let mut master = with_console(
        &bundle,
        &[
            "create",
            "--bundle",
            &path,
            "--console-socket",
            &console,
            &bundle.id,
        ],
    );
    assert_eq!(bundle.say(&["start", &bundle.id]).code, 0);
    let seen = read_until(&mut master, "/dev/console");
    assert!(
        seen.contains("/dev/pts/0") && seen.contains("33 99"),
        "{seen}"
    );
    master.write_all(b"hello\n").unwrap();
    read_until(&mut master, "got hello");
}

#[test]
fn exec_gets_a_terminal() {
    let Some(bundle) = bundle(&["sleep", "60"]) else {
        return;
    };
    bundle.up();
    let console = bundle.path().join("console").to_str().unwrap().to_owned();
    let words = [
        "exec",
        "-d",
        "-t",
        "--console-socket",
        &console,
        &bundle.id,
        "sh",
        "-c",
        "tty; echo done",
    ];
    let mut master = with_console(&bundle, &words);
    let seen = read_until(&mut master, "done");
    assert!(seen.contains("/dev/pts/0"), "{seen}");
}
