//! `ctr pprof`: what a daemon's debug socket tells. Needs no API.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use crate::advice;
use crate::table;

/// Largest answer that is taken, bytes: a heap profile of a large daemon has some tens of MiB.
const MAX_ANSWER: u64 = 256 << 20;
/// How much longer than the time profiled an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Flags of `ctr pprof`.
#[derive(Debug, Args)]
pub(crate) struct Pprof {
    /// The daemon's debug socket
    #[arg(
        long,
        short = 'd',
        global = true,
        value_name = "SOCKET",
        default_value = "/run/containerd/debug.sock"
    )]
    debug_socket: PathBuf,
    #[command(subcommand)]
    profile: Profile,
}

/// What to ask for.
#[derive(Debug, Subcommand)]
#[allow(clippy::enum_variant_names, reason = "the reference's names")]
enum Profile {
    /// What a lighterd is doing: requests in flight, tasks, threads, and what each waits for
    Report,
    /// A Go daemon's profile of blocking
    Block,
    /// A Go daemon's stacks
    Goroutines,
    /// A Go daemon's heap
    Heap,
    /// A Go daemon's use of the processor
    Profile {
        /// Seconds to watch
        #[arg(long, short, default_value_t = 30)]
        seconds: u32,
    },
    /// What made a Go daemon's threads
    Threadcreate,
    /// A Go daemon's execution trace
    Trace {
        /// Seconds to watch
        #[arg(long, short, default_value_t = 5)]
        seconds: u32,
    },
}

impl Profile {
    /// Path and query, and how long the answer takes at least.
    fn request(&self) -> (String, Duration) {
        let go = |what: &str| format!("/debug/pprof/{what}");
        let over = |what: &str, seconds: u32| {
            let path = format!("{}?seconds={seconds}", go(what));
            (path, Duration::from_secs(seconds.into()))
        };
        let path = match self {
            Self::Report => "/debug".to_owned(),
            Self::Block => go("block?debug=1"),
            Self::Goroutines => go("goroutine?debug=2"),
            Self::Heap => go("heap"),
            Self::Threadcreate => go("threadcreate?debug=1"),
            Self::Profile { seconds } => return over("profile", *seconds),
            Self::Trace { seconds } => return over("trace", *seconds),
        };
        (path, Duration::ZERO)
    }
}

impl Pprof {
    /// Prints the answer as it is: text, or what `go tool pprof` reads.
    pub(crate) async fn run(&self) -> anyhow::Result<()> {
        let socket = &self.debug_socket;
        let (path, least) = self.profile.request();
        let answer = tokio::time::timeout(least + PATIENCE, get(socket, &path)).await;
        let Ok(answer) = answer else {
            return advice::fail(
                format!("{} does not answer", socket.display()),
                "the daemon may be stuck: its threads are in /proc/PID/task/*/stack",
            );
        };
        let (status, body) = answer?;
        match status {
            200 => table::raw(&body),
            404 => advice::fail(
                format!("{} has no {path}: no such page", socket.display()),
                match self.profile {
                    Profile::Report => "only lighterd has a report; a Go daemon has `goroutines`",
                    _ => {
                        "lighterd is not written in Go and has no such profiles: `ctr pprof report` \
                         prints what it runs and waits for, its memory and times are in its metrics, \
                         and `perf record -g -p PID` profiles it"
                    }
                },
            ),
            other => anyhow::bail!(
                "{}: {path}: status {other}: {}",
                socket.display(),
                String::from_utf8_lossy(&body).trim()
            ),
        }
    }
}

/// One exchange; status and body.
async fn get(socket: &Path, path: &str) -> anyhow::Result<(u16, Vec<u8>)> {
    let stream = UnixStream::connect(socket).await;
    let mut stream = match stream {
        Ok(stream) => stream,
        Err(error) => {
            return advice::fail(
                format!("cannot reach {}: {error}", socket.display()),
                "name the socket with -d: `[debug] address` in the daemon's configuration, or \
                 debug.sock in its state directory",
            );
        }
    };
    // Version 1.0 has no chunks and ends with the connection.
    let request = format!("GET {path} HTTP/1.0\r\nHost: debug\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer).await?;
    parse(&answer).with_context(|| format!("{} speaks no HTTP", socket.display()))
}

/// Status and body of an answer that is whole.
fn parse(answer: &[u8]) -> Option<(u16, Vec<u8>)> {
    let head = answer.windows(4).position(|w| w == b"\r\n\r\n")?;
    let line = std::str::from_utf8(&answer[..head]).ok()?.lines().next()?;
    let mut words = line.split(' ');
    if !words.next()?.starts_with("HTTP/1.") {
        return None;
    }
    let status = words.next()?.parse().ok()?;
    Some((status, answer[head + 4..].to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_taken_apart() {
        let answer = b"HTTP/1.0 200 OK\r\nA: b\r\n\r\nbody\r\n\r\nmore";
        assert_eq!(parse(answer), Some((200, b"body\r\n\r\nmore".to_vec())));
        for bad in [
            &b""[..],
            b"HTTP/1.1 200 OK\r\n",
            b"SSH-2\r\n\r\n",
            b"HTTP/1.1 x\r\n\r\n",
        ] {
            assert_eq!(parse(bad), None);
        }
    }

    #[test]
    fn every_profile_has_its_page() {
        assert_eq!(Profile::Report.request().0, "/debug");
        assert_eq!(
            Profile::Goroutines.request().0,
            "/debug/pprof/goroutine?debug=2"
        );
        let (path, least) = Profile::Trace { seconds: 7 }.request();
        assert_eq!(path, "/debug/pprof/trace?seconds=7");
        assert_eq!(least, Duration::from_secs(7));
    }
}
