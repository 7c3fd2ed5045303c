//! The smallest shim that speaks gRPC, for tests of daemons: its task is a `sleep` on the host, its
//! sandbox is a word.
//!
//! `start` leaves a server behind and prints where it listens, `delete` prints an empty answer,
//! `serve SOCKET` is the server.

#![allow(
    clippy::print_stdout,
    reason = "what a shim answers goes to its output"
)]

mod sandbox;

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use lighter_proto::containerd::task::v3 as api;
use lighter_proto::containerd::task::v3::task_server::{Task, TaskServer};
use lighter_proto::containerd::v1::types::Status as State;
use lighter_proto::time::to_timestamp;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let done = match args
        .by_ref()
        .find(|arg| matches!(arg.as_str(), "start" | "delete" | "serve"))
    {
        Some(action) if action == "start" => start(),
        Some(action) if action == "serve" => serve(Path::new(&args.next().unwrap_or_default())),
        Some(_) => Ok(()),
        None => Err(anyhow::anyhow!("want start, delete or serve")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("grpc-shim: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs in the bundle.
fn start() -> anyhow::Result<()> {
    let socket = std::env::current_dir()?.join("g.sock");
    Command::new(std::env::current_exe()?)
        .arg("serve")
        .arg(&socket)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    for _ in 0..500 {
        if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
            // Upstream dials gRPC shims by plain path.
            let address = socket.display();
            println!(r#"{{"version":3,"address":"{address}","protocol":"grpc"}}"#);
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    anyhow::bail!("nobody listens on {}", socket.display())
}

fn serve(socket: &Path) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = UnixListener::bind(socket)?;
        let (stop, mut stopped) = watch::channel(false);
        let shim = Shim {
            stop,
            ..Shim::new(socket)
        };
        tonic::transport::Server::builder()
            .add_service(TaskServer::new(shim))
            .add_service(sandbox::service())
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
                let _ = stopped.wait_for(|stop| *stop).await;
                // The answer that says so goes out first.
                tokio::time::sleep(Duration::from_millis(50)).await;
            })
            .await
            .context("serve")
    })
}

/// How the task ended: its status and when.
type Exit = Option<(u32, SystemTime)>;

struct Shim {
    id: String,
    bundle: String,
    pid: Mutex<u32>,
    started: Mutex<bool>,
    exit: watch::Sender<Exit>,
    stop: watch::Sender<bool>,
}

impl Shim {
    fn new(socket: &Path) -> Self {
        let bundle = socket.parent().unwrap_or(socket);
        let id = bundle.file_name().unwrap_or_default();
        Self {
            id: id.to_string_lossy().into_owned(),
            bundle: bundle.display().to_string(),
            pid: Mutex::default(),
            started: Mutex::default(),
            exit: watch::Sender::new(None),
            stop: watch::Sender::new(false),
        }
    }

    fn pid(&self) -> u32 {
        *self.pid.lock().expect("not poisoned")
    }

    fn ended(&self) -> (u32, Option<prost_types::Timestamp>) {
        let exit = *self.exit.borrow();
        exit.map_or((0, None), |(status, at)| (status, Some(to_timestamp(at))))
    }
}

/// The answer to what this shim cannot do.
fn none<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not in this shim"))
}

#[tonic::async_trait]
impl Task for Shim {
    async fn state(
        &self,
        _: Request<api::StateRequest>,
    ) -> Result<Response<api::StateResponse>, Status> {
        let pid = self.pid();
        if pid == 0 {
            return Err(Status::not_found("no task"));
        }
        let started = *self.started.lock().expect("not poisoned");
        let (exit_status, exited_at) = self.ended();
        let state = match (exited_at.is_some(), started) {
            (true, _) => State::Stopped,
            (false, true) => State::Running,
            (false, false) => State::Created,
        };
        Ok(Response::new(api::StateResponse {
            id: self.id.clone(),
            bundle: self.bundle.clone(),
            pid,
            status: state.into(),
            exit_status,
            exited_at,
            ..Default::default()
        }))
    }

    async fn create(
        &self,
        _: Request<api::CreateTaskRequest>,
    ) -> Result<Response<api::CreateTaskResponse>, Status> {
        let child = tokio::process::Command::new("sleep")
            .arg("1000")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut child = child.map_err(|error| Status::internal(error.to_string()))?;
        let pid = child.id().unwrap_or_default();
        *self.pid.lock().expect("not poisoned") = pid;
        let exit = self.exit.clone();
        #[expect(clippy::disallowed_methods, reason = "ends with the process")]
        tokio::spawn(async move {
            use std::os::unix::process::ExitStatusExt as _;
            let status = child.wait().await.ok();
            let signal = status.and_then(|s| s.signal()).map(|signal| 128 + signal);
            let code = signal
                .or_else(|| status.and_then(|s| s.code()))
                .unwrap_or(255);
            let code = u32::try_from(code).unwrap_or(255);
            exit.send_replace(Some((code, SystemTime::now())));
        });
        Ok(Response::new(api::CreateTaskResponse { pid }))
    }

    async fn start(
        &self,
        _: Request<api::StartRequest>,
    ) -> Result<Response<api::StartResponse>, Status> {
        *self.started.lock().expect("not poisoned") = true;
        Ok(Response::new(api::StartResponse { pid: self.pid() }))
    }

    async fn delete(
        &self,
        _: Request<api::DeleteRequest>,
    ) -> Result<Response<api::DeleteResponse>, Status> {
        let (exit_status, exited_at) = self.ended();
        let pid = std::mem::take(&mut *self.pid.lock().expect("not poisoned"));
        Ok(Response::new(api::DeleteResponse {
            pid,
            exit_status,
            exited_at,
        }))
    }

    async fn pids(
        &self,
        _: Request<api::PidsRequest>,
    ) -> Result<Response<api::PidsResponse>, Status> {
        let process = lighter_proto::containerd::v1::types::ProcessInfo {
            pid: self.pid(),
            info: None,
        };
        Ok(Response::new(api::PidsResponse {
            processes: vec![process],
        }))
    }

    async fn kill(&self, request: Request<api::KillRequest>) -> Result<Response<()>, Status> {
        let signal = i32::try_from(request.get_ref().signal).unwrap_or_default();
        let signal = nix::sys::signal::Signal::try_from(signal);
        let signal = signal.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid()).unwrap_or_default());
        if pid.as_raw() == 0 || self.exit.borrow().is_some() {
            return Err(Status::not_found("process already finished"));
        }
        nix::sys::signal::kill(pid, signal).map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(()))
    }

    async fn wait(
        &self,
        _: Request<api::WaitRequest>,
    ) -> Result<Response<api::WaitResponse>, Status> {
        let mut exit = self.exit.subscribe();
        let _ = exit.wait_for(Option::is_some).await;
        let (exit_status, exited_at) = self.ended();
        Ok(Response::new(api::WaitResponse {
            exit_status,
            exited_at,
        }))
    }

    async fn connect(
        &self,
        _: Request<api::ConnectRequest>,
    ) -> Result<Response<api::ConnectResponse>, Status> {
        Ok(Response::new(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.pid(),
            version: "v3".to_owned(),
        }))
    }

    async fn shutdown(&self, _: Request<api::ShutdownRequest>) -> Result<Response<()>, Status> {
        self.stop.send_replace(true);
        Ok(Response::new(()))
    }

    async fn pause(&self, _: Request<api::PauseRequest>) -> Result<Response<()>, Status> {
        none()
    }
    async fn resume(&self, _: Request<api::ResumeRequest>) -> Result<Response<()>, Status> {
        none()
    }
    async fn checkpoint(
        &self,
        _: Request<api::CheckpointTaskRequest>,
    ) -> Result<Response<()>, Status> {
        none()
    }
    async fn exec(&self, _: Request<api::ExecProcessRequest>) -> Result<Response<()>, Status> {
        none()
    }
    async fn resize_pty(&self, _: Request<api::ResizePtyRequest>) -> Result<Response<()>, Status> {
        none()
    }
    async fn close_io(&self, _: Request<api::CloseIoRequest>) -> Result<Response<()>, Status> {
        none()
    }
    async fn update(&self, _: Request<api::UpdateTaskRequest>) -> Result<Response<()>, Status> {
        none()
    }
    async fn stats(
        &self,
        _: Request<api::StatsRequest>,
    ) -> Result<Response<api::StatsResponse>, Status> {
        none()
    }
}
