//! One process of a task, by the daemon's names for it.

use std::time::Duration;

use lighter_proto::containerd::services::tasks::v1::{
    CloseIoRequest, DeleteProcessRequest, DeleteTaskRequest, KillRequest, ResizePtyRequest,
    StartRequest, WaitRequest,
};
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::client::Client;

/// How long a wait goes on asking after the daemon went away: it restarts without its containers.
const RECONNECT: Duration = Duration::from_secs(30);
/// Pause between two such attempts.
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);

/// The init process of a container, or one of its execs.
#[derive(Debug, Clone)]
pub(crate) struct Process {
    client: Client,
    container_id: String,
    /// Empty for init.
    exec_id: String,
}

impl Process {
    /// The first process of a container.
    pub(crate) fn init(client: &Client, container_id: &str) -> Self {
        Self::exec(client, container_id, "")
    }

    /// An exec in a container.
    pub(crate) fn exec(client: &Client, container_id: &str, exec_id: &str) -> Self {
        let (container_id, exec_id) = (container_id.to_owned(), exec_id.to_owned());
        Self {
            client: client.clone(),
            container_id,
            exec_id,
        }
    }

    /// Runs it; its pid.
    pub(crate) async fn start(&self) -> Result<u32, Status> {
        let request = StartRequest {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
        };
        Ok(self.client.tasks().start(request).await?.into_inner().pid)
    }

    /// Its exit status, once it has one. Survives a restart of the daemon.
    pub(crate) async fn wait(&self) -> Result<u32, Status> {
        let mut lost: Option<Instant> = None;
        loop {
            let request = WaitRequest {
                container_id: self.container_id.clone(),
                exec_id: self.exec_id.clone(),
            };
            match self.client.tasks().wait(request).await {
                Ok(answer) => return Ok(answer.into_inner().exit_status),
                Err(status) if daemon_gone(&status) => {
                    if lost.get_or_insert_with(Instant::now).elapsed() > RECONNECT {
                        return Err(status);
                    }
                    tokio::time::sleep(RECONNECT_PAUSE).await;
                }
                Err(status) => return Err(status),
            }
        }
    }

    /// Sends a signal, to every process of the container when `all`.
    pub(crate) async fn kill(&self, signal: u32, all: bool) -> Result<(), Status> {
        let request = KillRequest {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            signal,
            all,
        };
        self.client.tasks().kill(request).await.map(drop)
    }

    /// Tells its terminal our size.
    pub(crate) async fn resize(&self, (width, height): (u32, u32)) -> Result<(), Status> {
        let request = ResizePtyRequest {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            width,
            height,
        };
        self.client.tasks().resize_pty(request).await.map(drop)
    }

    /// Ends its input.
    pub(crate) async fn close_stdin(&self) -> Result<(), Status> {
        let request = CloseIoRequest {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            stdin: true,
        };
        self.client.tasks().close_io(request).await.map(drop)
    }

    /// Removes it once it has ended; its exit status.
    pub(crate) async fn delete(&self) -> Result<u32, Status> {
        let mut tasks = self.client.tasks();
        let container_id = self.container_id.clone();
        let answer = if self.exec_id.is_empty() {
            tasks.delete(DeleteTaskRequest { container_id }).await?
        } else {
            let exec_id = self.exec_id.clone();
            tasks
                .delete_process(DeleteProcessRequest {
                    container_id,
                    exec_id,
                })
                .await?
        };
        Ok(answer.into_inner().exit_status)
    }
}

/// Whether the connection failed, not the call.
fn daemon_gone(status: &Status) -> bool {
    let text = status.message();
    match status.code() {
        Code::Unavailable | Code::Cancelled => true,
        Code::Unknown | Code::Internal => [
            "transport error",
            "h2 protocol error",
            "connection",
            "broken pipe",
        ]
        .iter()
        .any(|word| text.contains(word)),
        _ => false,
    }
}

/// An exit status as our own: statuses are 32 bits on the wire, a process has 8.
pub(crate) fn exit_code(status: u32) -> u8 {
    u8::try_from(status).unwrap_or(u8::MAX)
}
