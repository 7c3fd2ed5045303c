//! A shim as others write theirs: with the `containerd-shim` crate. Its task is a `sleep` on the host.
//!
//! Daemons start it as they start any shim of the second version; what the crate does of that (the
//! handshake at `start`, the socket, publishing of events) is what the test is about.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim::event::Event as _;
use containerd_shim::monitor::{Subject, Subscription, Topic, monitor_subscribe};
use containerd_shim::protos::events::task::TaskExit;
use containerd_shim::protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim::publisher::RemotePublisher;
use containerd_shim::{
    Config, Context, DeleteResponse, Error, ExitSignal, Flags, Shim, StartOpts, Task, TtrpcContext,
    TtrpcResult, api, run, spawn,
};
use tokio::sync::watch;

/// How the task ended: its status and when.
type Exit = Option<(u32, SystemTime)>;

#[derive(Clone)]
struct Sleeper {
    id: String,
    namespace: String,
    end: Arc<ExitSignal>,
    task: Arc<watch::Sender<State>>,
}

#[derive(Debug, Default, Clone)]
struct State {
    bundle: String,
    pid: u32,
    started: bool,
    exit: Exit,
}

fn stamp(at: SystemTime) -> Timestamp {
    Timestamp::from(at)
}

#[async_trait]
impl Shim for Sleeper {
    type T = Served;

    async fn new(_: &str, flags: &Flags, config: &mut Config) -> Self {
        config.no_setup_logger = true;
        Self {
            id: flags.id.clone(),
            namespace: flags.namespace.clone(),
            end: Arc::default(),
            task: Arc::new(watch::Sender::new(State::default())),
        }
    }

    async fn start_shim(&mut self, opts: StartOpts) -> Result<String, Error> {
        let group = opts.id.clone();
        spawn(opts, &group, Vec::new()).await
    }

    async fn delete_shim(&mut self) -> Result<DeleteResponse, Error> {
        let mut answer = DeleteResponse::new();
        answer.set_exit_status(137);
        answer.set_exited_at(stamp(SystemTime::now()));
        Ok(answer)
    }

    async fn wait(&mut self) {
        self.end.wait().await;
    }

    async fn create_task_service(&self, publisher: RemotePublisher) -> Served {
        Served {
            shim: self.clone(),
            publisher: Arc::new(publisher),
        }
    }
}

/// Waits for the end of the task, and says so.
async fn told(pid: u32, mut exits: Subscription, shim: Sleeper, publisher: Arc<RemotePublisher>) {
    while let Some(exit) = exits.rx.recv().await {
        if !matches!(exit.subject, Subject::Pid(of) if u32::try_from(of) == Ok(pid)) {
            continue;
        }
        let code = u32::try_from(exit.exit_code).unwrap_or(255);
        let at = SystemTime::now();
        shim.task.send_modify(|task| task.exit = Some((code, at)));
        let mut event = TaskExit::new();
        event.set_container_id(shim.id.clone());
        event.set_id(shim.id.clone());
        event.set_pid(pid);
        event.set_exit_status(code);
        event.set_exited_at(stamp(at));
        let topic = event.topic();
        // A daemon that is away learns of it by asking.
        let _ = publisher
            .publish(Context::default(), &topic, &shim.namespace, Box::new(event))
            .await;
        return;
    }
}

/// The task service of a shim that runs.
struct Served {
    shim: Sleeper,
    publisher: Arc<RemotePublisher>,
}

impl Served {
    fn state(&self) -> State {
        self.shim.task.borrow().clone()
    }
}

#[async_trait]
impl Task for Served {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> TtrpcResult<api::CreateTaskResponse> {
        let others = |e: std::io::Error| {
            containerd_shim::protos::ttrpc::Error::Others(format!("start sleep: {e}"))
        };
        // Before there is anything to end: the crate reaps.
        let exits = monitor_subscribe(Topic::Pid).await.map_err(|e| {
            containerd_shim::protos::ttrpc::Error::Others(format!("watch exits: {e}"))
        })?;
        let child = Command::new("sleep")
            .arg("1000")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(others)?;
        let pid = child.id();
        self.shim.task.send_modify(|task| {
            task.bundle = request.bundle.clone();
            task.pid = pid;
        });
        #[allow(clippy::disallowed_methods, reason = "it ends with the process")]
        tokio::spawn(told(
            pid,
            exits,
            self.shim.clone(),
            Arc::clone(&self.publisher),
        ));
        let mut answer = api::CreateTaskResponse::new();
        answer.set_pid(pid);
        Ok(answer)
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        _: api::StartRequest,
    ) -> TtrpcResult<api::StartResponse> {
        self.shim.task.send_modify(|task| task.started = true);
        let mut answer = api::StartResponse::new();
        answer.set_pid(self.state().pid);
        Ok(answer)
    }

    async fn state(
        &self,
        _: &TtrpcContext,
        _: api::StateRequest,
    ) -> TtrpcResult<api::StateResponse> {
        let state = self.state();
        let mut answer = api::StateResponse::new();
        answer.set_id(self.shim.id.clone());
        answer.set_bundle(state.bundle);
        answer.set_pid(state.pid);
        answer.set_status(match (state.started, state.exit) {
            (_, Some(_)) => api::Status::STOPPED,
            (true, None) => api::Status::RUNNING,
            (false, None) => api::Status::CREATED,
        });
        if let Some((code, at)) = state.exit {
            answer.set_exit_status(code);
            answer.set_exited_at(stamp(at));
        }
        Ok(answer)
    }

    async fn wait(&self, _: &TtrpcContext, _: api::WaitRequest) -> TtrpcResult<api::WaitResponse> {
        let mut task = self.shim.task.subscribe();
        let ended = task.wait_for(|task| task.exit.is_some()).await;
        let (code, at) = ended
            .ok()
            .and_then(|task| task.exit)
            .unwrap_or((255, SystemTime::now()));
        let mut answer = api::WaitResponse::new();
        answer.set_exit_status(code);
        answer.set_exited_at(stamp(at));
        Ok(answer)
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> TtrpcResult<api::Empty> {
        let pid = i32::try_from(self.state().pid).unwrap_or_default();
        let signal = i32::try_from(request.signal).unwrap_or_default();
        let signal = nix::sys::signal::Signal::try_from(signal);
        if let (true, Ok(signal)) = (pid > 1, signal) {
            // One that is gone has been killed.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
        }
        Ok(api::Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, _: api::DeleteRequest) -> TtrpcResult<DeleteResponse> {
        let state = self.state();
        let mut answer = DeleteResponse::new();
        answer.set_pid(state.pid);
        if let Some((code, at)) = state.exit {
            answer.set_exit_status(code);
            answer.set_exited_at(stamp(at));
        }
        Ok(answer)
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        _: api::ConnectRequest,
    ) -> TtrpcResult<api::ConnectResponse> {
        let mut answer = api::ConnectResponse::new();
        answer.set_shim_pid(std::process::id());
        answer.set_task_pid(self.state().pid);
        Ok(answer)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> TtrpcResult<api::Empty> {
        self.shim.end.signal();
        Ok(api::Empty::new())
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    run::<Sleeper>("io.containerd.crate.v1", None).await;
}
