//! The Task service, versions 2 and 3, and our Log service: decode, call one method, encode.
//!
//! The messages of both Task versions are the same on the wire, so one set of handlers serves both
//! names. A connection may break at any moment; what must run to its end runs in a task of the
//! shim's own, and the handler only waits for it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lighter_proto::containerd::runc::v1::CheckpointOptions;
use lighter_proto::containerd::task::v3 as api;
use lighter_proto::errdefs::into_ttrpc;
use lighter_proto::lighter::shim::v1 as log_api;
use lighter_proto::time::to_timestamp;
use lighter_proto::ttrpc::{Methods, unary};
use prost::Message;
use tokio_util::sync::CancellationToken;
use ttrpc::asynchronous::{MethodHandler, Service};

use crate::bootstrap;
use crate::error::{Error, Result};
use crate::io::cri_log::Stream;
use crate::task::{self, Core, Task};

type Handler = Box<dyn MethodHandler + Send + Sync>;

/// A container id in use.
#[derive(Debug)]
enum Slot {
    /// Being created.
    Reserved,
    /// There.
    Live(Arc<Task>),
}

/// The containers of this shim.
#[derive(Debug)]
pub(crate) struct Shim {
    core: Arc<Core>,
    tasks: Mutex<HashMap<String, Slot>>,
    /// Ends the process.
    end: CancellationToken,
}

/// An empty exec id means init.
fn exec(id: String) -> Option<String> {
    (!id.is_empty()).then_some(id)
}

impl Shim {
    /// A shim without containers; `end` is cancelled when the process shall end.
    pub(crate) fn new(core: Arc<Core>, end: CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            core,
            tasks: Mutex::default(),
            end,
        })
    }

    fn tasks(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is no container, not even one being made.
    pub(crate) fn is_empty(&self) -> bool {
        self.tasks().is_empty()
    }

    fn task(&self, id: &str) -> Result<Arc<Task>> {
        match self.tasks().get(id) {
            Some(Slot::Live(task)) => Ok(task.clone()),
            Some(Slot::Reserved) | None => Err(Error::no_container()),
        }
    }

    /// Everything served on the socket.
    pub(crate) fn services(self: &Arc<Self>) -> HashMap<String, Service> {
        let mut services = HashMap::new();
        for name in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
            services.insert(
                name.to_owned(),
                lighter_proto::ttrpc::service(self.task_methods()),
            );
        }
        services.insert(
            "lighter.shim.v1.Log".to_owned(),
            lighter_proto::ttrpc::service(self.log_methods()),
        );
        services
    }

    fn task_methods(self: &Arc<Self>) -> Methods {
        let methods: [(&str, Handler); 17] = [
            ("State", self.brief(Self::state)),
            ("Create", self.owned(Self::create)),
            ("Start", self.owned(Self::start)),
            ("Delete", self.owned(Self::delete)),
            ("Pids", self.brief(Self::pids)),
            ("Pause", self.owned(Self::pause)),
            ("Resume", self.owned(Self::resume)),
            ("Checkpoint", self.owned(Self::checkpoint)),
            ("Kill", self.owned(Self::kill)),
            ("Exec", self.brief(Self::exec)),
            ("ResizePty", self.brief(Self::resize)),
            ("CloseIO", self.brief(Self::close_io)),
            ("Update", self.owned(Self::update)),
            ("Wait", self.brief(Self::wait)),
            ("Stats", self.brief(Self::stats)),
            ("Connect", self.brief(Self::connect)),
            ("Shutdown", self.brief(Self::shutdown)),
        ];
        methods
            .into_iter()
            .map(|(name, handler)| (name.to_owned(), handler))
            .collect()
    }

    fn log_methods(self: &Arc<Self>) -> Methods {
        let methods: [(&str, Handler); 2] = [
            ("Reopen", self.brief(Self::reopen_log)),
            ("Attach", self.brief(Self::attach)),
        ];
        methods
            .into_iter()
            .map(|(name, handler)| (name.to_owned(), handler))
            .collect()
    }

    /// A handler that may be dropped midway when the client goes.
    fn brief<Req, Res, Fut>(self: &Arc<Self>, handler: fn(Arc<Self>, Req) -> Fut) -> Handler
    where
        Req: Message + Default + 'static,
        Res: Message + 'static,
        Fut: Future<Output = Result<Res>> + Send + 'static,
    {
        let shim = self.clone();
        unary(move |_context, request: Req| {
            let work = handler(shim.clone(), request);
            async move { work.await.map_err(into_ttrpc) }
        })
    }

    /// A handler whose work runs to its end whatever becomes of the client.
    fn owned<Req, Res, Fut>(self: &Arc<Self>, handler: fn(Arc<Self>, Req) -> Fut) -> Handler
    where
        Req: Message + Default + 'static,
        Res: Message + 'static,
        Fut: Future<Output = Result<Res>> + Send + 'static,
    {
        let shim = self.clone();
        unary(move |_context, request: Req| {
            let work = shim.core.tracker.spawn(handler(shim.clone(), request));
            async move {
                let done = work.await;
                done.unwrap_or_else(|e| Err(Error::Runtime(format!("shim: {e}"))))
                    .map_err(into_ttrpc)
            }
        })
    }

    async fn create(
        self: Arc<Self>,
        request: api::CreateTaskRequest,
    ) -> Result<api::CreateTaskResponse> {
        task::check_id(&request.id)?;
        let options = request
            .options
            .as_ref()
            .map(bootstrap::options)
            .transpose()?;
        {
            let mut tasks = self.tasks();
            if tasks.contains_key(&request.id) {
                return Err(Error::AlreadyExists(format!("task {}", request.id)));
            }
            tasks.insert(request.id.clone(), Slot::Reserved);
        }
        let id = request.id.clone();
        match Task::create(self.core.clone(), request, options.unwrap_or_default()).await {
            Ok((task, pid)) => {
                self.tasks().insert(id, Slot::Live(task));
                Ok(api::CreateTaskResponse { pid })
            }
            Err(error) => {
                self.tasks().remove(&id);
                Err(error)
            }
        }
    }

    async fn start(self: Arc<Self>, request: api::StartRequest) -> Result<api::StartResponse> {
        let pid = self.task(&request.id)?.start(exec(request.exec_id)).await?;
        Ok(api::StartResponse { pid })
    }

    async fn delete(self: Arc<Self>, request: api::DeleteRequest) -> Result<api::DeleteResponse> {
        let task = self.task(&request.id)?;
        let exec = exec(request.exec_id);
        let is_init = exec.is_none();
        let response = task.delete(exec).await?;
        if is_init {
            self.tasks().remove(&request.id);
            crate::sys::trim_heap();
        }
        Ok(response)
    }

    async fn exec(self: Arc<Self>, request: api::ExecProcessRequest) -> Result<()> {
        self.task(&request.id)?.add_exec(request)
    }

    async fn state(self: Arc<Self>, request: api::StateRequest) -> Result<api::StateResponse> {
        self.task(&request.id)?.state(exec(request.exec_id))
    }

    async fn pids(self: Arc<Self>, request: api::PidsRequest) -> Result<api::PidsResponse> {
        Ok(api::PidsResponse {
            processes: self.task(&request.id)?.pids().await?,
        })
    }

    async fn pause(self: Arc<Self>, request: api::PauseRequest) -> Result<()> {
        self.task(&request.id)?.pause().await
    }

    async fn resume(self: Arc<Self>, request: api::ResumeRequest) -> Result<()> {
        self.task(&request.id)?.resume().await
    }

    async fn checkpoint(self: Arc<Self>, request: api::CheckpointTaskRequest) -> Result<()> {
        let options: CheckpointOptions = request
            .options
            .filter(|any| !any.type_url.is_empty())
            .map(|any| lighter_proto::any::unpack(&any))
            .transpose()
            .map_err(|e| Error::InvalidArgument(format!("checkpoint options: {e}")))?
            .unwrap_or_default();
        self.task(&request.id)?
            .checkpoint(PathBuf::from(request.path), options)
            .await
    }

    async fn kill(self: Arc<Self>, request: api::KillRequest) -> Result<()> {
        self.task(&request.id)?
            .kill(exec(request.exec_id), request.signal, request.all)
            .await
    }

    async fn resize(self: Arc<Self>, request: api::ResizePtyRequest) -> Result<()> {
        let exec = exec(request.exec_id);
        self.task(&request.id)?
            .resize(exec.as_deref(), request.width, request.height)
    }

    async fn close_io(self: Arc<Self>, request: api::CloseIoRequest) -> Result<()> {
        let task = self.task(&request.id)?;
        if request.stdin {
            task.close_stdin(exec(request.exec_id).as_deref())?;
        }
        Ok(())
    }

    async fn update(self: Arc<Self>, request: api::UpdateTaskRequest) -> Result<()> {
        self.task(&request.id)?.update(request.resources).await
    }

    async fn wait(self: Arc<Self>, request: api::WaitRequest) -> Result<api::WaitResponse> {
        let exit = self.task(&request.id)?.wait(exec(request.exec_id)).await?;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: Some(to_timestamp(exit.at)),
        })
    }

    async fn stats(self: Arc<Self>, request: api::StatsRequest) -> Result<api::StatsResponse> {
        Ok(api::StatsResponse {
            stats: Some(self.task(&request.id)?.stats()?),
        })
    }

    async fn connect(
        self: Arc<Self>,
        request: api::ConnectRequest,
    ) -> Result<api::ConnectResponse> {
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.task(&request.id).map_or(0, |task| task.pid()),
            version: String::new(),
        })
    }

    async fn shutdown(self: Arc<Self>, _request: api::ShutdownRequest) -> Result<()> {
        // Others of the group may still be here; the last one's shutdown ends the process.
        if self.is_empty() {
            self.end.cancel();
        }
        Ok(())
    }

    async fn reopen_log(self: Arc<Self>, request: log_api::ReopenRequest) -> Result<()> {
        let io = self
            .task(&request.id)?
            .io(exec(request.exec_id).as_deref())?;
        let log = io.log().ok_or_else(|| no_log(&request.id))?;
        log.reopen()
    }

    async fn attach(self: Arc<Self>, request: log_api::AttachRequest) -> Result<()> {
        let io = self
            .task(&request.id)?
            .io(exec(request.exec_id).as_deref())?;
        let log = io.log().ok_or_else(|| no_log(&request.id))?;
        for (stream, path) in [
            (Stream::Stdout, request.stdout),
            (Stream::Stderr, request.stderr),
        ] {
            if path.is_empty() {
                continue;
            }
            let path = PathBuf::from(path);
            if !path.is_absolute() {
                return Err(Error::InvalidArgument(format!(
                    "{}: not absolute",
                    path.display()
                )));
            }
            if !log.attach(stream, path) {
                return Err(Error::Precondition(
                    "too many readers are attached".to_owned(),
                ));
            }
        }
        Ok(())
    }
}

fn no_log(id: &str) -> Error {
    Error::Precondition(format!("container {id} has no log that is written here"))
}
