//! Output of containers whose shim is not ours: it knows fifos, not CRI's logs, so the daemon reads the
//! fifos and writes the log.
//!
//! Such a shim keeps both ends of its fifos open. While no daemon reads, what is written waits in
//! them; the next daemon goes on where the one before it stopped. The fifos are in the container's
//! state directory: there they tell a restarted daemon whose output it has to read.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use lighter_floor::cri_log::{Cutter, Stream, line_limit};
use lighter_floor::timestamp::Rfc3339;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::containers::make_fifo;
use crate::error::{Error, Result, io};
use crate::plugin::Plugin;
use crate::store::Container;

/// Bytes read at once.
const BLOCK: usize = 32 << 10;
/// Blocks that an attached client may be behind before it holds the container back.
const BEHIND: usize = 4;
/// Attached clients of one container.
const MAX_ATTACHED: usize = 64;
/// How long output may come once the container ended.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Whether the shim of a runtime writes CRI's logs itself.
pub(super) fn writes_logs(runtime: &str) -> bool {
    let program = Path::new(runtime).file_name().and_then(|n| n.to_str());
    matches!(
        program,
        Some("io.containerd.lighter.v2" | "containerd-shim-lighter-v2")
    )
}

/// The log file, and whether the last write failed.
#[derive(Debug)]
struct Log {
    file: tokio::fs::File,
    failing: bool,
}

/// The output of one container.
#[derive(Debug)]
pub(crate) struct Output {
    path: Option<PathBuf>,
    log: tokio::sync::Mutex<Option<Log>>,
    attached: Mutex<Vec<(Stream, mpsc::Sender<Bytes>)>>,
    /// Streams that are being read.
    open: watch::Sender<usize>,
    stop: CancellationToken,
}

async fn open_log(path: &Path) -> Result<Log> {
    let file = tokio::fs::File::options()
        .append(true)
        .create(true)
        .mode(0o640)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .await
        .map_err(io("open log", path))?;
    Ok(Log {
        file,
        failing: false,
    })
}

impl Output {
    async fn new(path: Option<PathBuf>, stop: CancellationToken) -> Result<Self> {
        let log = match &path {
            Some(path) => Some(open_log(path).await?),
            None => None,
        };
        Ok(Self {
            path,
            log: tokio::sync::Mutex::new(log),
            attached: Mutex::default(),
            open: watch::Sender::new(0),
            stop,
        })
    }

    fn attached(&self) -> MutexGuard<'_, Vec<(Stream, mpsc::Sender<Bytes>)>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the stream says from now on; `None` when there are too many listeners. Ends with the
    /// stream.
    pub(super) fn listen(&self, stream: Stream) -> Option<mpsc::Receiver<Bytes>> {
        let (sender, receiver) = mpsc::channel(BEHIND);
        let mut attached = self.attached();
        attached.retain(|(_, sender)| !sender.is_closed());
        if attached.len() >= MAX_ATTACHED {
            return None;
        }
        attached.push((stream, sender));
        Some(receiver)
    }

    /// Goes on in a new file of the same name.
    pub(super) async fn reopen(&self) -> Result<()> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        // The lock is held while the file is replaced, so that no record goes to neither.
        let mut log = self.log.lock().await;
        *log = Some(open_log(path).await?);
        Ok(())
    }

    async fn write(&self, records: &[u8]) {
        let mut log = self.log.lock().await;
        let Some(log) = log.as_mut().filter(|_| !records.is_empty()) else {
            return;
        };
        let done = async {
            log.file.write_all(records).await?;
            log.file.flush().await
        };
        match done.await {
            Ok(()) => log.failing = false,
            Err(error) => {
                if !log.failing {
                    let path = self.path.as_deref().unwrap_or(Path::new(""));
                    tracing::warn!(%error, path = %path.display(), "log records are lost");
                }
                log.failing = true;
            }
        }
    }

    async fn tell(&self, stream: Stream, block: &[u8]) {
        let listeners: Vec<_> = {
            let attached = self.attached();
            let of = attached.iter().filter(|(of, _)| *of == stream);
            of.map(|(_, sender)| sender.clone()).collect()
        };
        for listener in listeners {
            // One that is gone is forgotten when the next one comes.
            let _ = listener.send(Bytes::copy_from_slice(block)).await;
        }
    }

    /// Reads a stream to its end.
    async fn read(&self, mut from: pipe::Receiver, stream: Stream, limit: usize) {
        let mut cutter = Cutter::new(stream, limit);
        let mut block = vec![0; BLOCK];
        loop {
            let read = self.stop.run_until_cancelled(from.read(&mut block)).await;
            let stamp = Rfc3339::of(SystemTime::now());
            let mut records = Vec::new();
            if let Some(Ok(count @ 1..)) = read {
                cutter.push(&block[..count], &stamp, &mut records);
                self.write(&records).await;
                self.tell(stream, &block[..count]).await;
            } else {
                cutter.finish(&stamp, &mut records);
                self.write(&records).await;
                break;
            }
        }
        self.attached().retain(|(of, _)| *of != stream);
        self.open.send_modify(|open| *open -= 1);
    }

    /// Waits until all streams have ended, for a while.
    async fn drained(&self) {
        let mut open = self.open.subscribe();
        let all = open.wait_for(|open| *open == 0);
        if tokio::time::timeout(DRAIN_LIMIT, all).await.is_err() {
            tracing::warn!(path = ?self.path, "output is still held by other processes");
        }
    }
}

/// Outputs by container.
#[derive(Debug, Default)]
pub(crate) struct Outputs(Mutex<HashMap<String, Arc<Output>>>);

impl Outputs {
    fn map(&self) -> MutexGuard<'_, HashMap<String, Arc<Output>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The output that the daemon reads for this container, if it does.
    pub(super) fn get(&self, id: &str) -> Option<Arc<Output>> {
        self.map().get(id).cloned()
    }
}

impl Plugin {
    fn output_fifos(&self, id: &str) -> [(Stream, PathBuf); 2] {
        let dir = self.container_state(id);
        [
            (Stream::Stdout, dir.join("stdout")),
            (Stream::Stderr, dir.join("stderr")),
        ]
    }

    /// Makes the fifos of a container whose shim knows no better, and reads them. Their paths.
    pub(super) async fn make_output(&self, container: &Container) -> Result<(String, String)> {
        let [out, err] = self.output_fifos(&container.id);
        make_fifo(&out.1).await?;
        let mut paths = (out.1.display().to_string(), String::new());
        if !container.config.tty {
            make_fifo(&err.1).await?;
            paths.1 = err.1.display().to_string();
        }
        self.read_output(container).await?;
        Ok(paths)
    }

    /// Reads the fifos that a container has.
    pub(super) async fn read_output(&self, container: &Container) -> Result<()> {
        let fifos = self.output_fifos(&container.id);
        let fifos: Vec<_> = fifos
            .into_iter()
            .filter(|(_, path)| path.exists())
            .collect();
        if fifos.is_empty() || self.outputs.get(&container.id).is_some() {
            return Ok(());
        }
        let stop = self.stop.child_token();
        let output = Arc::new(Output::new(container.log_path.clone(), stop).await?);
        let limit = line_limit(self.config.runtime.max_container_log_line_size);
        for (stream, path) in fifos {
            let from = pipe::OpenOptions::new()
                .open_receiver(&path)
                .map_err(io("open", &path))?;
            output.open.send_modify(|open| *open += 1);
            let this = Arc::clone(&output);
            self.tracker
                .spawn(async move { this.read(from, stream, limit).await });
        }
        self.outputs.map().insert(container.id.clone(), output);
        Ok(())
    }

    /// A container ended: what it said before is in its log when this returns.
    pub(super) async fn drain_output(&self, id: &str) {
        if let Some(output) = self.outputs.get(id) {
            output.drained().await;
            self.end_output(id);
        }
    }

    /// Stops reading.
    pub(super) fn end_output(&self, id: &str) {
        if let Some(output) = self.outputs.map().remove(id) {
            output.stop.cancel();
        }
    }

    /// Copies what a container says from now on to attached clients.
    ///
    /// # Errors
    /// When the daemon does not read its output, or for too many clients.
    pub(super) fn listen_to(
        &self,
        id: &str,
        streams: Vec<(Stream, crate::streaming::BoxWrite)>,
        tasks: &mut tokio::task::JoinSet<()>,
    ) -> Result<()> {
        let gone = || Error::not_found(format!("output of container {id:?} is not read"));
        let output = self.outputs.get(id).ok_or_else(gone)?;
        for (stream, mut to) in streams {
            let Some(mut from) = output.listen(stream) else {
                return Err(Error::unknown(format!(
                    "container {id:?} has {MAX_ATTACHED} attached clients already"
                )));
            };
            tasks.spawn(async move {
                while let Some(block) = from.recv().await {
                    if to.write_all(&block).await.is_err() {
                        break;
                    }
                }
                // The peer may be gone already.
                let _ = to.shutdown().await;
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_shim_writes_logs_and_no_other() {
        for ours in [
            "io.containerd.lighter.v2",
            "/usr/bin/containerd-shim-lighter-v2",
        ] {
            assert!(writes_logs(ours), "{ours}");
        }
        for other in [
            "io.containerd.kata.v2",
            "/usr/bin/containerd-shim-runc-v2",
            "",
        ] {
            assert!(!writes_logs(other), "{other}");
        }
    }

    #[tokio::test]
    async fn output_is_logged_told_and_ends() {
        let dir = tempfile::tempdir().unwrap();
        let (log, fifo) = (dir.path().join("log"), dir.path().join("fifo"));
        make_fifo(&fifo).await.unwrap();
        let output = Output::new(Some(log.clone()), CancellationToken::new());
        let output = Arc::new(output.await.unwrap());
        let mut heard = output.listen(Stream::Stdout).unwrap();
        let from = pipe::OpenOptions::new().open_receiver(&fifo).unwrap();
        let mut to = pipe::OpenOptions::new().open_sender(&fifo).unwrap();
        output.open.send_modify(|open| *open += 1);
        let read = output.read(from, Stream::Stdout, 16);
        let write = async {
            to.write_all(b"one\n").await.unwrap();
            assert_eq!(heard.recv().await.unwrap(), "one\n");
            std::fs::rename(&log, dir.path().join("old")).unwrap();
            output.reopen().await.unwrap();
            to.write_all(b"two").await.unwrap();
            drop(to);
        };
        tokio::join!(read, write);
        output.drained().await;
        assert_eq!(heard.recv().await.unwrap(), "two");
        assert_eq!(heard.recv().await, None);
        let old = std::fs::read_to_string(dir.path().join("old")).unwrap();
        let new = std::fs::read_to_string(&log).unwrap();
        assert!(old.ends_with(" stdout F one\n"), "{old}");
        assert!(new.ends_with(" stdout P two\n"), "{new}");
    }
}
