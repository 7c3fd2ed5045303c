//! Commands in running containers: to their end with bounded output, or over the streaming server.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Weak;
use std::time::Duration;

use async_trait::async_trait;
use lighter_engine::runtime::{ExecTask, Handle, Stdio};
use lighter_floor::cri_log::Stream;
use lighter_proto::any;
use lighter_proto::errdefs::ErrorKind;
use lighter_proto::runtime::v1::{ContainerState, ExecSyncResponse};
use nix::sys::stat::Mode;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::unix::pipe;

use super::new_id;
use crate::config;
use crate::deadline::time_left;
use crate::error::{Error, Result, io};
use crate::netns;
use crate::plugin::Plugin;
use crate::store::Container;
use crate::streaming::{BackendError, BoxDuplex, ExecIo, ExitStatus, TerminalSize};

/// Bytes kept of each output: both together stay below the largest message.
const OUTPUT_LIMIT: usize = 7 << 20;
/// How long output may come after the process ended, where the configuration sets no bound.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// Longest that a shim may take to see to a log.
const SHIM_LIMIT: Duration = Duration::from_secs(10);
/// How long a forwarded connection's one direction may go on when the other has ended.
const FORWARD_LIMIT: Duration = Duration::from_secs(1);
/// Type of an exec's spec.
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// The signal that nothing withstands.
const SIGKILL: u32 = 9;

/// The fifos of one exec; gone with this.
struct Fifos {
    dir: PathBuf,
}

impl Fifos {
    fn new(below: &Path) -> Result<Self> {
        let dir = below.join("fifo").join(new_id());
        std::fs::create_dir_all(&dir).map_err(io("create", &dir))?;
        Ok(Self { dir })
    }

    fn make(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        let made = nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR);
        made.map_err(|e| io("make fifo", &path)(e.into()))?;
        Ok(path)
    }

    /// Opened for both, so that neither side waits for the other; `close` ends the reading.
    fn reader(path: &Path) -> Result<pipe::Receiver> {
        pipe::OpenOptions::new()
            .open_receiver(path)
            .map_err(io("open", path))
    }
}

impl Drop for Fifos {
    fn drop(&mut self) {
        // Removed with the state directory at the latest.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Copies until the end, keeping what fits.
async fn keep(mut from: impl AsyncRead + Unpin, kept: &tokio::sync::Mutex<Vec<u8>>) {
    let mut block = vec![0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut block).await {
        let mut kept = kept.lock().await;
        let room = OUTPUT_LIMIT.saturating_sub(kept.len()).min(count);
        kept.extend_from_slice(&block[..room]);
    }
}

/// Copies until the end; a reader that is gone does not stop it.
async fn drain(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    let mut block = vec![0; 16 << 10];
    let mut open = true;
    while let Ok(count @ 1..) = from.read(&mut block).await {
        open = open && to.write_all(&block[..count]).await.is_ok();
    }
    // The peer may be gone already.
    let _ = to.shutdown().await;
}

impl Plugin {
    /// The task of a container that runs.
    pub(super) async fn running(&self, container: &Container) -> Result<Handle> {
        let state = container.status().state;
        if state != ContainerState::ContainerRunning {
            return Err(Error::unknown(format!(
                "container is in {} state",
                state.as_str_name()
            )));
        }
        self.task(&container.id).await?.ok_or_else(|| {
            Error::not_found(format!(
                "failed to load task of container {:?}",
                container.id
            ))
        })
    }

    /// The process of an exec: the container's own with another command.
    fn process(&self, id: &str, command: &[String], tty: bool) -> Result<prost_types::Any> {
        let record = self.db.containers().get(&self.scope, id)?;
        let spec: Value = serde_json::from_slice(&record.spec.value)?;
        let mut process = spec["process"].clone();
        process["args"] = json!(command);
        process["terminal"] = json!(tty);
        if tty
            && let Some(env) = process["env"].as_array_mut()
            && !env
                .iter()
                .any(|v| v.as_str().is_some_and(|v| v.starts_with("TERM=")))
        {
            env.push(json!("TERM=xterm"));
        }
        Ok(any::pack_json(PROCESS, &process)?)
    }

    fn drain_limit(&self) -> Duration {
        let text = &self.config.runtime.drain_exec_sync_io_timeout;
        let limit = config::duration("drain_exec_sync_io_timeout", text);
        // For ever is no choice: a grandchild that holds the output would hold the call.
        match limit {
            Ok(Some(limit)) if !limit.is_zero() => limit,
            _ => DRAIN_LIMIT,
        }
    }

    /// Runs a command to its end, at most `limit` (zero is for ever).
    pub(super) async fn exec_sync(
        &self,
        container: &Container,
        command: &[String],
        limit: Duration,
    ) -> Result<ExecSyncResponse> {
        let handle = self.running(container).await?;
        // Nobody waits for longer than that, and nobody would end the process.
        let limit = match time_left() {
            Some(left) if limit.is_zero() => left,
            _ => limit,
        };
        let fifos = Fifos::new(&self.state)?;
        let (out, err) = (fifos.make("stdout")?, fifos.make("stderr")?);
        let (out_end, err_end) = (Fifos::reader(&out)?, Fifos::reader(&err)?);
        let exec_id = new_id();
        let exec = ExecTask {
            exec_id: exec_id.clone(),
            spec: Some(self.process(&container.id, command, false)?),
            stdio: Stdio {
                stdout: out.display().to_string(),
                stderr: err.display().to_string(),
                ..Stdio::default()
            },
        };
        let failed = |e: lighter_engine::runtime::Error| {
            Error::unknown(format!("failed to exec in container: {}", Error::from(e)))
        };
        handle.exec(exec).await.map_err(failed)?;
        if let Err(error) = handle.start(&exec_id).await {
            forget(&handle, &exec_id).await;
            return Err(failed(error));
        }
        let (kept_out, kept_err) = Default::default();
        let output = async { tokio::join!(keep(out_end, &kept_out), keep(err_end, &kept_err)) };
        let ended = async {
            if limit.is_zero() {
                return Some(handle.wait(&exec_id).await);
            }
            tokio::time::timeout(limit, handle.wait(&exec_id))
                .await
                .ok()
        };
        tokio::pin!(output, ended);
        let mut drained = false;
        let exit = loop {
            tokio::select! {
                exit = &mut ended => break exit,
                _ = &mut output, if !drained => drained = true,
            }
        };
        let Some(exit) = exit else {
            let _ = handle.kill(&exec_id, SIGKILL, false).await;
            let _ = tokio::time::timeout(DRAIN_LIMIT, handle.wait(&exec_id)).await;
            self.forget_later(&handle, &exec_id);
            let message = format!(
                "failed to exec in container: timeout {limit:?} exceeded: context deadline exceeded"
            );
            return Err(Error::new(ErrorKind::DeadlineExceeded, message));
        };
        if !drained
            && tokio::time::timeout(self.drain_limit(), &mut output)
                .await
                .is_err()
        {
            let message = format!(
                "failed to drain exec process {exec_id:?} io: io is still held by other processes"
            );
            self.forget_later(&handle, &exec_id);
            return Err(Error::unknown(message));
        }
        forget(&handle, &exec_id).await;
        let exit = exit.map_err(Error::from)?;
        let (stdout, stderr) = (
            std::mem::take(&mut *kept_out.lock().await),
            std::mem::take(&mut *kept_err.lock().await),
        );
        Ok(ExecSyncResponse {
            stdout,
            stderr,
            exit_code: i32::try_from(exit.status).unwrap_or(i32::MAX),
        })
    }

    /// Removes an exec whose output others still hold: its shim waits for them, its caller does not.
    fn forget_later(&self, handle: &Handle, exec_id: &str) {
        let (handle, exec_id) = (handle.clone(), exec_id.to_owned());
        self.tracker
            .spawn(async move { forget(&handle, &exec_id).await });
    }

    async fn exec_stream(&self, id: &str, command: &[String], io: ExecIo) -> Result<u32> {
        let container = self.store.containers.get(id)?;
        let handle = self.running(&container).await?;
        let fifos = Fifos::new(&self.state)?;
        let mut stdio = Stdio {
            terminal: io.tty,
            ..Stdio::default()
        };
        let mut outputs = tokio::task::JoinSet::new();
        for (name, to) in [("stdout", io.stdout), ("stderr", io.stderr)] {
            let Some(to) = to else { continue };
            let path = fifos.make(name)?;
            outputs.spawn(drain(Fifos::reader(&path)?, to));
            let text = path.display().to_string();
            if name == "stdout" {
                stdio.stdout = text;
            } else {
                stdio.stderr = text;
            }
        }
        let input = match io.stdin {
            Some(from) => {
                let path = fifos.make("stdin")?;
                stdio.stdin = path.display().to_string();
                let open = pipe::OpenOptions::new().read_write(true).open_sender(&path);
                Some((from, open.map_err(crate::error::io("open", &path))?))
            }
            None => None,
        };
        let exec_id = new_id();
        let spec = Some(self.process(&container.id, command, io.tty)?);
        handle
            .exec(ExecTask {
                exec_id: exec_id.clone(),
                spec,
                stdio,
            })
            .await?;
        if let Err(error) = handle.start(&exec_id).await {
            forget(&handle, &exec_id).await;
            return Err(error.into());
        }
        let feed = async {
            if let Some((mut from, mut to)) = input {
                // An end of either side is the end of the input.
                let _ = tokio::io::copy(&mut from, &mut to).await;
                drop(to);
                let _ = handle.close_io(&exec_id).await;
            }
            std::future::pending::<()>().await;
        };
        let exit = tokio::select! {
            exit = handle.wait(&exec_id) => exit,
            () = follow_size(&handle, &exec_id, io.resize) => unreachable!("sizes never end"),
            () = feed => unreachable!("input never ends"),
        };
        let all = async { while outputs.join_next().await.is_some() {} };
        // A grandchild may hold the output for ever.
        let _ = tokio::time::timeout(DRAIN_LIMIT, all).await;
        forget(&handle, &exec_id).await;
        Ok(exit?.status)
    }
}

/// Gives a process's terminal every size that its client's has; never ends.
async fn follow_size(
    handle: &Handle,
    exec_id: &str,
    mut sizes: tokio::sync::watch::Receiver<Option<TerminalSize>>,
) {
    loop {
        let size = *sizes.borrow_and_update();
        if let Some(size) = size {
            // A process that ended has no terminal.
            let _ = handle
                .resize_pty(exec_id, size.width.into(), size.height.into())
                .await;
        }
        if sizes.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Removes an exec that is over.
async fn forget(handle: &Handle, exec_id: &str) {
    if let Err(error) = handle.delete_exec(exec_id).await {
        tracing::debug!(id = handle.id(), exec_id, %error, "exec not deleted");
    }
}

/// The plugin as the streaming server sees it.
#[derive(Debug)]
pub struct Backend(pub Weak<Plugin>);

fn refused(error: impl std::fmt::Display) -> BackendError {
    BackendError(error.to_string())
}

#[async_trait]
impl crate::streaming::Backend for Backend {
    async fn exec(
        &self,
        container_id: &str,
        command: &[String],
        io: ExecIo,
    ) -> std::result::Result<ExitStatus, BackendError> {
        let plugin = self
            .0
            .upgrade()
            .ok_or_else(|| refused("the daemon stops"))?;
        let code = plugin
            .exec_stream(container_id, command, io)
            .await
            .map_err(refused)?;
        Ok(ExitStatus { code })
    }

    async fn attach(
        &self,
        container_id: &str,
        io: ExecIo,
    ) -> std::result::Result<(), BackendError> {
        let plugin = self
            .0
            .upgrade()
            .ok_or_else(|| refused("the daemon stops"))?;
        plugin.attach(container_id, io).await.map_err(refused)
    }

    async fn port_forward(
        &self,
        sandbox_id: &str,
        port: u16,
        stream: BoxDuplex,
    ) -> std::result::Result<(), BackendError> {
        let plugin = self
            .0
            .upgrade()
            .ok_or_else(|| refused("the daemon stops"))?;
        let pod = plugin.store.pods.get(sandbox_id).map_err(refused)?;
        if !pod.is_ready() {
            return Err(refused(format!(
                "sandbox container {:?} is not running",
                pod.id
            )));
        }
        let peer = match &pod.netns {
            Some(netns) => netns::connect_localhost(netns, port)
                .await
                .map_err(refused)?,
            None => connect_here(port).await.map_err(refused)?,
        };
        carry(stream, peer).await.map_err(refused)
    }
}

/// Connects to a port of this machine's localhost, as pods' own are: over IPv4, then over IPv6.
///
/// # Errors
/// The IPv4 failure, when neither family answers.
async fn connect_here(port: u16) -> std::io::Result<TcpStream> {
    let first = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Ok(stream) => return Ok(stream),
        Err(error) => error,
    };
    let second = TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await;
    second.map_err(|_| first)
}

/// Carries bytes both ways. When one side has ended the other is told, and has a little time to end
/// as well: a server that takes no notice must not keep the connection for ever.
async fn carry(client: BoxDuplex, peer: TcpStream) -> std::io::Result<()> {
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_peer, mut to_peer) = peer.into_split();
    let there = async {
        let copied = tokio::io::copy(&mut from_client, &mut to_peer).await;
        // One that is gone needs not be told.
        let _ = to_peer.shutdown().await;
        copied
    };
    let back = async {
        let copied = tokio::io::copy(&mut from_peer, &mut to_client).await;
        let _ = to_client.shutdown().await;
        copied
    };
    tokio::pin!(there, back);
    let (first, second) = tokio::select! {
        first = &mut there => (first, tokio::time::timeout(FORWARD_LIMIT, back).await),
        first = &mut back => (first, tokio::time::timeout(FORWARD_LIMIT, there).await),
    };
    first?;
    match second {
        Ok(copied) => copied.map(|_| ()),
        // Cut off: no failure, for the first side was done.
        Err(_) => Ok(()),
    }
}

impl Plugin {
    /// Streams of a container's own process, from now to its end. Leaving them detaches.
    async fn attach(&self, id: &str, io: ExecIo) -> Result<()> {
        use lighter_proto::lighter::shim::v1::AttachRequest;
        let container = self.store.containers.get(id)?;
        let handle = self.running(&container).await?;
        let fifos = Fifos::new(&self.state)?;
        let mut request = AttachRequest {
            id: container.id.clone(),
            ..AttachRequest::default()
        };
        let mut outputs = tokio::task::JoinSet::new();
        let read_here = self.outputs.get(&container.id).is_some();
        let (out, err) = (io.stdout, io.stderr);
        let (out, err) = if read_here {
            let both = [(Stream::Stdout, out), (Stream::Stderr, err)];
            let asked = both.into_iter().filter_map(|(of, to)| Some((of, to?)));
            self.listen_to(&container.id, asked.collect(), &mut outputs)?;
            (None, None)
        } else {
            (out, err)
        };
        let streams = [
            (&mut request.stdout, "stdout", out),
            (&mut request.stderr, "stderr", err),
        ];
        for (field, name, to) in streams {
            let Some(to) = to else { continue };
            let path = fifos.make(name)?;
            outputs.spawn(drain(Fifos::reader(&path)?, to));
            *field = path.display().to_string();
        }
        if !read_here && !outputs.is_empty() {
            let connection = handle.connection();
            connection
                .log::<_, ()>("Attach", request, Some(SHIM_LIMIT))
                .await?;
        }
        let input = match io.stdin.filter(|_| container.config.stdin) {
            Some(from) => {
                let path = self.stdin_fifo(&container.id);
                // Opened both ways: it opens at once, and a process that does not read holds us up
                // instead of failing us.
                let open = pipe::OpenOptions::new().read_write(true).open_sender(&path);
                Some((from, open.map_err(crate::error::io("open", &path))?))
            }
            None => None,
        };
        let feed = async {
            if let Some((mut from, mut to)) = input {
                // An end of either side is the end of the input.
                let _ = tokio::io::copy(&mut from, &mut to).await;
                drop(to);
                if container.config.stdin_once
                    && let Err(error) = handle.close_io("").await
                {
                    tracing::debug!(container_id = %container.id, %error, "input not closed");
                }
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = container.ended() => {}
            () = follow_size(&handle, "", io.resize) => {}
            () = feed => {}
        }
        let all = async { while outputs.join_next().await.is_some() {} };
        // A grandchild may hold the output for ever.
        let _ = tokio::time::timeout(DRAIN_LIMIT, all).await;
        Ok(())
    }

    /// Tells the shim that the log file was moved away.
    pub(super) async fn reopen_log(&self, container: &Container) -> Result<()> {
        use lighter_proto::lighter::shim::v1::ReopenRequest;
        if container.status().state != ContainerState::ContainerRunning {
            return Err(Error::unknown("container is not running"));
        }
        let handle = self.running(container).await?;
        if let Some(output) = self.outputs.get(&container.id) {
            return output.reopen().await;
        }
        let request = ReopenRequest {
            id: container.id.clone(),
            ..ReopenRequest::default()
        };
        Ok(handle
            .connection()
            .log::<_, ()>("Reopen", request, Some(SHIM_LIMIT))
            .await?)
    }
}
