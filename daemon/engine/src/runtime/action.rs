//! Running an action of a shim's binary to its end: what it printed, and how it ended.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

/// Most bytes read of what a shim prints.
const MAX_OUTPUT_BYTES: u64 = 1 << 20;
/// How long output is read after the process ended: a server it left behind may hold the pipe.
const OUTPUT_GRACE: Duration = Duration::from_millis(500);

/// What a shim printed and how it ended.
pub(super) struct Output {
    pub(super) status: ExitStatus,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
}

/// As Go says it, which is what clients have seen so far.
pub(super) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal: {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// Runs a command to its end, with `input` on stdin.
pub(super) async fn run(mut command: Command, input: &[u8], limit: Duration) -> io::Result<Output> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    // The fork waits until the binary is loaded: not on a thread that serves requests.
    let mut child = tokio::task::spawn_blocking(move || command.spawn())
        .await
        .map_err(io::Error::other)??;
    let mut stdin = child.stdin.take().expect("stdin is piped");
    // A shim that does not read closes the pipe, which is its business.
    let _written = stdin.write_all(input).await;
    drop(stdin);
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let (mut out, mut err) = (
        child.stdout.take().expect("stdout is piped"),
        child.stderr.take().expect("stderr is piped"),
    );
    let work = async {
        let mut read = std::pin::pin!(async {
            let _both = tokio::join!(
                read_some(&mut out, &mut stdout),
                read_some(&mut err, &mut stderr)
            );
        });
        let mut drained = false;
        let status = loop {
            // Reading may be dropped: the buffers outlive it.
            tokio::select! {
                () = &mut read, if !drained => drained = true,
                status = child.wait() => break status?,
            }
        };
        if !drained {
            let _late = tokio::time::timeout(OUTPUT_GRACE, &mut read).await;
        }
        Ok::<_, io::Error>(status)
    };
    let status = tokio::time::timeout(limit, work).await.map_err(|_| {
        io::Error::new(
            io::ErrorKind::TimedOut,
            format!("did not end within {limit:?}"),
        )
    })??;
    Ok(Output {
        status,
        stdout,
        stderr,
    })
}

/// Reads to the end, or to the bound; bytes read before a cancellation stay in `buffer`.
async fn read_some<R: AsyncRead + Unpin>(pipe: &mut R, buffer: &mut Vec<u8>) -> io::Result<()> {
    let mut pipe = pipe.take(MAX_OUTPUT_BYTES);
    while pipe.read_buf(buffer).await? > 0 {}
    Ok(())
}
