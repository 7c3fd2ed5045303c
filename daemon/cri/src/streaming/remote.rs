//! Exec and attach over either protocol: gathers the streams, runs the command, reports its end.

use std::future::Future;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::backend::{Backend, BackendError, BoxRead, BoxWrite, ExecIo, ExitStatus, TerminalSize};
use super::channel::{ChannelReader, ChannelWriter};
use super::{spdy, websocket};

/// How long the client has to begin all the streams it asked for.
const CREATION: Duration = Duration::from_secs(30);
/// Bytes of one resize message.
const MAX_RESIZE: usize = 4096;

/// What the CRI client asked for.
#[derive(Debug, Clone)]
pub(super) struct Command {
    pub(super) container_id: String,
    /// The command of an exec; `None` for attach.
    pub(super) exec: Option<Vec<String>>,
    pub(super) stdin: bool,
    pub(super) stdout: bool,
    pub(super) stderr: bool,
    pub(super) tty: bool,
}

/// How the end of the command is told on the error stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StatusForm {
    /// Text, and nothing on success (before v4).
    Text,
    /// A Kubernetes `Status` object (since v4).
    Json,
}

/// The client's streams, whichever protocol carries them.
pub(super) struct Streams {
    error: ChannelWriter,
    stdin: Option<ChannelReader>,
    stdout: Option<ChannelWriter>,
    stderr: Option<ChannelWriter>,
    resize: Option<ChannelReader>,
}

impl Streams {
    /// Waits for the streams that a SPDY client begins.
    pub(super) async fn over_spdy(
        connection: &mut spdy::Connection,
        command: &Command,
        with_resize: bool,
    ) -> Result<Self, &'static str> {
        let deadline = Instant::now() + CREATION;
        let mut error = None;
        let (mut stdin, mut stdout, mut stderr, mut resize) = (None, None, None, None);
        let mut missing = 1 + [
            command.stdin,
            command.stdout,
            command.stderr,
            command.tty && with_resize,
        ]
        .into_iter()
        .filter(|wanted| *wanted)
        .count();
        while missing > 0 {
            let next = timeout_at(deadline, connection.streams.recv()).await;
            let stream = match next {
                Err(_) => return Err("timed out waiting for client to create streams"),
                Ok(None) => return Err("client hung up before it created its streams"),
                Ok(Some(stream)) => stream,
            };
            let kind = stream.header("streamtype").unwrap_or_default().to_owned();
            let taken = match kind.as_str() {
                "error" if error.is_none() => {
                    error = Some(stream.writer);
                    true
                }
                "stdin" if stdin.is_none() => {
                    stdin = Some(stream.reader);
                    true
                }
                "stdout" if stdout.is_none() => {
                    stdout = Some(stream.writer);
                    true
                }
                "stderr" if stderr.is_none() => {
                    stderr = Some(stream.writer);
                    true
                }
                "resize" if resize.is_none() => {
                    resize = Some(stream.reader);
                    true
                }
                _ => {
                    spdy::refuse(connection, &stream).await;
                    false
                }
            };
            missing -= usize::from(taken);
        }
        Ok(Self {
            error: error.ok_or("client created no error stream")?,
            stdin: stdin.filter(|_| command.stdin),
            stdout: stdout.filter(|_| command.stdout),
            stderr: stderr.filter(|_| command.stderr),
            resize,
        })
    }

    /// Takes the channels of a WebSocket connection, and tells the client that they are there.
    pub(super) async fn over_websocket(
        connection: &mut websocket::Connection,
        command: &Command,
    ) -> Option<Self> {
        let mut streams = Self {
            error: connection.writers.get_mut(3)?.take()?,
            stdin: connection
                .readers
                .get_mut(0)?
                .take()
                .filter(|_| command.stdin),
            stdout: connection
                .writers
                .get_mut(1)?
                .take()
                .filter(|_| command.stdout),
            stderr: connection
                .writers
                .get_mut(2)?
                .take()
                .filter(|_| command.stderr),
            resize: connection
                .readers
                .get_mut(4)?
                .take()
                .filter(|_| command.tty),
        };
        // Channels that nobody will use must not keep the connection open.
        connection.writers.clear();
        connection.readers.clear();
        let first = match (&mut streams.stdout, &mut streams.stderr) {
            (Some(stdout), _) => stdout,
            (None, Some(stderr)) => stderr,
            (None, None) => &mut streams.error,
        };
        // Fails only when the client is gone already.
        let _ = first.write(&[]).await;
        Some(streams)
    }

    /// Runs the command on these streams and reports its end on the error stream.
    pub(super) async fn run(self, backend: &dyn Backend, command: &Command, form: StatusForm) {
        let Self {
            mut error,
            stdin,
            stdout,
            stderr,
            resize,
        } = self;
        let closers: Vec<_> = [&stdout, &stderr]
            .into_iter()
            .flatten()
            .filter_map(ChannelWriter::closer)
            .collect();
        let (sizes, sizes_seen) = watch::channel(None);
        let io = ExecIo {
            stdin: stdin.map(|reader| Box::pin(reader) as BoxRead),
            stdout: stdout.map(|writer| Box::pin(writer) as BoxWrite),
            stderr: stderr.map(|writer| Box::pin(writer) as BoxWrite),
            resize: sizes_seen,
            tty: command.tty,
        };
        let id = &command.container_id;
        let work = async {
            match &command.exec {
                Some(argv) => backend.exec(id, argv, io).await.map(Some),
                None => backend.attach(id, io).await.map(|()| None),
            }
        };
        let outcome = alongside(work, follow_resize(resize, sizes)).await;
        for closer in closers {
            closer.close().await;
        }
        let status = describe(command, outcome, form);
        // Fails only when the client is gone; then nobody wants to know.
        let _ = error.write_all(status.as_bytes()).await;
        let _ = error.shutdown().await;
    }
}

/// Runs `work` to its end, and `other` as long as it takes.
async fn alongside<T>(work: impl Future<Output = T>, other: impl Future<Output = ()>) -> T {
    tokio::pin!(work, other);
    tokio::select! {
        result = &mut work => return result,
        () = &mut other => {}
    }
    work.await
}

/// Passes the newest size on until the client ends the stream.
async fn follow_resize(stream: Option<ChannelReader>, sizes: watch::Sender<Option<TerminalSize>>) {
    let Some(mut stream) = stream else {
        return;
    };
    let mut pending = Vec::new();
    let mut buffer = [0; 512];
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        pending.extend_from_slice(&buffer[..count]);
        // The objects are flat, so each ends at its first closing brace.
        while let Some(end) = pending.iter().position(|byte| *byte == b'}') {
            let object: Vec<u8> = pending.drain(..=end).collect();
            if let Some(size) = size_of(&object) {
                sizes.send_replace(Some(size));
            }
        }
        if pending.len() > MAX_RESIZE {
            pending.clear();
        }
    }
}

fn size_of(object: &[u8]) -> Option<TerminalSize> {
    let value: Value = serde_json::from_slice(object).ok()?;
    let field = |name: &str| {
        let fields = value.as_object()?;
        let found = fields
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name));
        u16::try_from(found?.1.as_u64()?).ok()
    };
    Some(TerminalSize {
        width: field("width")?,
        height: field("height")?,
    })
}

/// The text for the error stream.
fn describe(
    command: &Command,
    outcome: Result<Option<ExitStatus>, BackendError>,
    form: StatusForm,
) -> String {
    let argv = command.exec.as_deref().unwrap_or_default().join(" ");
    let (message, status) = match outcome {
        Ok(None | Some(ExitStatus { code: 0 })) => {
            let status = json!({"metadata": {}, "status": "Success"});
            (String::new(), status)
        }
        Ok(Some(ExitStatus { code })) => {
            let message = format!(
                "command terminated with non-zero exit code: error executing command [{argv}], \
                 exit code {code}"
            );
            let cause = json!({"reason": "ExitCode", "message": code.to_string()});
            let status = json!({
                "metadata": {}, "status": "Failure", "message": message,
                "reason": "NonZeroExitCode", "details": {"causes": [cause]},
            });
            (message, status)
        }
        Err(error) => {
            let what = match command.exec {
                Some(_) => "error executing command in container",
                None => "error attaching to container",
            };
            let message = format!("{what}: {error}");
            let status = json!({
                "metadata": {}, "status": "Failure",
                "message": format!("Internal error occurred: {message}"),
                "reason": "InternalError", "details": {"causes": [{"message": message}]},
                "code": 500,
            });
            (message, status)
        }
    };
    match form {
        StatusForm::Text => message,
        StatusForm::Json => status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_size_wins_and_nonsense_is_skipped() {
        let (sender, reader) = ChannelReader::new();
        let (sizes, seen) = watch::channel(None);
        for piece in [
            r#"{"Width":80,"Hei"#,
            r#"ght":24}{"Width":1"#,
            r#"00,"Height":30}{"Width":-1,"Height":3}{}}"#,
        ] {
            sender.send(piece.as_bytes().to_vec().into()).await.unwrap();
        }
        sender.send(vec![b'x'; 8000].into()).await.unwrap();
        drop(sender);
        follow_resize(Some(reader), sizes).await;
        let want = TerminalSize {
            width: 100,
            height: 30,
        };
        assert_eq!(*seen.borrow(), Some(want));
    }

    #[test]
    fn exit_codes_are_told_as_kubernetes_reads_them() {
        let command = Command {
            container_id: "c".to_owned(),
            exec: Some(vec!["sh".to_owned(), "-c".to_owned(), "exit 3".to_owned()]),
            stdin: false,
            stdout: true,
            stderr: true,
            tty: false,
        };
        let failed = || Ok(Some(ExitStatus { code: 3 }));
        let text = describe(&command, failed(), StatusForm::Json);
        let status: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0]["message"], "3");
        let text = describe(&command, failed(), StatusForm::Text);
        assert_eq!(
            text,
            "command terminated with non-zero exit code: error executing command \
             [sh -c exit 3], exit code 3"
        );
        let done = Ok(Some(ExitStatus { code: 0 }));
        assert_eq!(describe(&command, done, StatusForm::Text), "");
    }
}
