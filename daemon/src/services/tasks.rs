//! `containerd.services.tasks.v1.Tasks`

use std::borrow::Cow;

use lighter_engine::runtime::{CreateTask, ExecTask, Exit, Handle, Manager, Process, Stdio};
use lighter_proto::containerd::services::tasks::v1::tasks_server::Tasks;
use lighter_proto::containerd::services::tasks::v1::{
    CheckpointTaskRequest, CheckpointTaskResponse, CloseIoRequest, CreateTaskRequest,
    CreateTaskResponse, DeleteProcessRequest, DeleteResponse, DeleteTaskRequest,
    ExecProcessRequest, GetRequest, GetResponse, KillRequest, ListPidsRequest, ListPidsResponse,
    ListTasksRequest, ListTasksResponse, MetricsRequest, MetricsResponse, PauseTaskRequest,
    ResizePtyRequest, ResumeTaskRequest, StartRequest, StartResponse, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use lighter_proto::containerd::types::Metric;
use lighter_proto::containerd::v1::types as wire;
use lighter_proto::errdefs::{ErrorKind, WireError, into_status};
use lighter_proto::time::{now, to_timestamp};
use lighter_store::filter::{Fields, Filter};
use lighter_store::metadata::{Container, Containers};
use lighter_store::{Identifier, Scope};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::scope::scope_of;
use super::wire::stopping;

/// Tasks of containers on record.
#[derive(Debug, Clone)]
pub(crate) struct TasksService {
    tasks: Manager,
    containers: Containers,
    stop: CancellationToken,
}

impl TasksService {
    /// Over all tasks and the records of their containers; who waits is sent away at `stop`.
    pub(crate) fn new(tasks: Manager, containers: Containers, stop: CancellationToken) -> Self {
        Self {
            tasks,
            containers,
            stop,
        }
    }

    /// The task of a container that must be on record.
    async fn task(&self, scope: &Scope, id: &str) -> Result<Handle, Status> {
        match self.tasks.get(&scope.namespace, id).await {
            Ok(task) => Ok(task),
            // Which of both is missing decides what the client is told.
            Err(error) => {
                self.container(scope, id)?;
                Err(into_status(error))
            }
        }
    }

    fn container(&self, scope: &Scope, id: &str) -> Result<Container, Status> {
        self.containers.get(scope, id).map_err(into_status)
    }
}

/// Fields of a task that its metrics can be filtered by.
struct ByTask<'a>(&'a Handle);

impl Fields for ByTask<'_> {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path {
            [field] if field == "id" => Some(Cow::Borrowed(self.0.id())),
            [field] if field == "namespace" => Some(Cow::Borrowed(self.0.namespace().as_str())),
            _ => None,
        }
    }
}

fn invalid(reason: impl Into<String>) -> Status {
    into_status(WireError::new(ErrorKind::InvalidArgument, reason))
}

/// The process as clients get it: the first one goes by the container's id alone.
fn encode(task: &Handle, exec_id: &str, process: Process) -> wire::Process {
    let (container_id, id) = if exec_id.is_empty() {
        (String::new(), task.id().to_owned())
    } else {
        (task.id().to_owned(), exec_id.to_owned())
    };
    wire::Process {
        container_id,
        id,
        pid: process.pid,
        status: process.status.wire() as i32,
        stdin: process.stdio.stdin,
        stdout: process.stdio.stdout,
        stderr: process.stdio.stderr,
        terminal: process.stdio.terminal,
        exit_status: process.exit.map_or(0, |exit| exit.status),
        exited_at: process.exit.map(|exit| to_timestamp(exit.at)),
    }
}

fn deleted(id: &str, exit: Exit, pid: u32) -> Response<DeleteResponse> {
    Response::new(DeleteResponse {
        id: id.to_owned(),
        pid,
        exit_status: exit.status,
        exited_at: Some(to_timestamp(exit.at)),
    })
}

#[tonic::async_trait]
impl Tasks for TasksService {
    async fn create(
        &self,
        request: Request<CreateTaskRequest>,
    ) -> Result<Response<CreateTaskResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let container = self.container(&scope, &request.container_id)?;
        let base = CreateTask::of(&container);
        let task = CreateTask {
            runtime: Some(request.runtime_path)
                .filter(|path| !path.is_empty())
                .unwrap_or(base.runtime),
            options: request.options.or(base.options),
            rootfs: request.rootfs.into_iter().map(Into::into).collect(),
            stdio: Stdio {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
            checkpoint: request.checkpoint,
            task_api: Some((request.task_api_address, request.task_api_version))
                .filter(|(address, _)| !address.is_empty()),
            ..base
        };
        let task = self.tasks.create(&scope, task).await.map_err(into_status)?;
        Ok(Response::new(CreateTaskResponse {
            container_id: request.container_id,
            pid: task.init().pid,
        }))
    }

    async fn start(
        &self,
        request: Request<StartRequest>,
    ) -> Result<Response<StartResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let task = self.task(&scope, &request.container_id).await?;
        let pid = task.start(&request.exec_id).await.map_err(into_status)?;
        Ok(Response::new(StartResponse { pid }))
    }

    async fn delete(
        &self,
        request: Request<DeleteTaskRequest>,
    ) -> Result<Response<DeleteResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let task = self.task(&scope, &request.container_id).await?;
        let (exit, pid) = task.delete().await.map_err(into_status)?;
        Ok(deleted("", exit, pid))
    }

    async fn delete_process(
        &self,
        request: Request<DeleteProcessRequest>,
    ) -> Result<Response<DeleteResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        if request.exec_id.is_empty() {
            return Err(invalid("exec id cannot be empty"));
        }
        let task = self.task(&scope, &request.container_id).await?;
        let (exit, pid) = task
            .delete_exec(&request.exec_id)
            .await
            .map_err(into_status)?;
        Ok(deleted(&request.exec_id, exit, pid))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let task = self.task(&scope, &request.container_id).await?;
        let process = task.process(&request.exec_id).await.map_err(into_status)?;
        Ok(Response::new(GetResponse {
            process: Some(encode(&task, &request.exec_id, process)),
        }))
    }

    async fn list(
        &self,
        request: Request<ListTasksRequest>,
    ) -> Result<Response<ListTasksResponse>, Status> {
        let scope = scope_of(&request)?;
        let tasks = self.tasks.list(&scope.namespace).await;
        Ok(Response::new(ListTasksResponse {
            tasks: tasks
                .iter()
                .map(|task| encode(task, "", task.init()))
                .collect(),
        }))
    }

    async fn kill(&self, request: Request<KillRequest>) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let task = self.task(&scope, &request.container_id).await?;
        task.kill(&request.exec_id, request.signal, request.all)
            .await
            .map_err(into_status)?;
        Ok(Response::new(()))
    }

    async fn exec(&self, request: Request<ExecProcessRequest>) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        if request.exec_id.is_empty() {
            return Err(invalid("exec id cannot be empty"));
        }
        Identifier::new(&request.exec_id).map_err(into_status)?;
        let task = self.task(&scope, &request.container_id).await?;
        let exec = ExecTask {
            exec_id: request.exec_id,
            spec: request.spec,
            stdio: Stdio {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
        };
        task.exec(exec).await.map_err(into_status)?;
        Ok(Response::new(()))
    }

    async fn resize_pty(&self, request: Request<ResizePtyRequest>) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let task = self.task(&scope, &request.container_id).await?;
        task.resize_pty(&request.exec_id, request.width, request.height)
            .await
            .map_err(into_status)?;
        Ok(Response::new(()))
    }

    async fn close_io(&self, request: Request<CloseIoRequest>) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let task = self.task(&scope, &request.container_id).await?;
        if request.stdin {
            task.close_io(&request.exec_id).await.map_err(into_status)?;
        }
        Ok(Response::new(()))
    }

    async fn pause(&self, request: Request<PauseTaskRequest>) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let task = self.task(&scope, &request.get_ref().container_id).await?;
        task.pause().await.map_err(into_status)?;
        Ok(Response::new(()))
    }

    async fn resume(&self, request: Request<ResumeTaskRequest>) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let task = self.task(&scope, &request.get_ref().container_id).await?;
        task.resume().await.map_err(into_status)?;
        Ok(Response::new(()))
    }

    async fn list_pids(
        &self,
        request: Request<ListPidsRequest>,
    ) -> Result<Response<ListPidsResponse>, Status> {
        let scope = scope_of(&request)?;
        let task = self.task(&scope, &request.get_ref().container_id).await?;
        let processes = task.pids().await.map_err(into_status)?;
        Ok(Response::new(ListPidsResponse { processes }))
    }

    async fn checkpoint(
        &self,
        request: Request<CheckpointTaskRequest>,
    ) -> Result<Response<CheckpointTaskResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let container = self.container(&scope, &request.container_id)?;
        let descriptors = self
            .tasks
            .checkpoint(&scope, &container, request.options)
            .await
            .map_err(into_status)?;
        Ok(Response::new(CheckpointTaskResponse { descriptors }))
    }

    async fn update(&self, request: Request<UpdateTaskRequest>) -> Result<Response<()>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let task = self.task(&scope, &request.container_id).await?;
        task.update(request.resources, request.annotations)
            .await
            .map_err(into_status)?;
        Ok(Response::new(()))
    }

    async fn metrics(
        &self,
        request: Request<MetricsRequest>,
    ) -> Result<Response<MetricsResponse>, Status> {
        let scope = scope_of(&request)?;
        let filter = Filter::parse(&request.get_ref().filters).map_err(into_status)?;
        let tasks = self.tasks.list(&scope.namespace).await;
        let limit = self.tasks.timeouts().shim_stats;
        let asked = tasks
            .iter()
            .filter(|task| filter.matches(&ByTask(task)))
            .map(|task| async move {
                // A task that cannot say is left out; the others are not held up by it.
                let data = task.stats(limit).await.ok()?;
                Some(Metric {
                    timestamp: Some(now()),
                    id: task.id().to_owned(),
                    data: Some(data),
                })
            });
        let metrics = futures::future::join_all(asked).await;
        Ok(Response::new(MetricsResponse {
            metrics: metrics.into_iter().flatten().collect(),
        }))
    }

    async fn wait(&self, request: Request<WaitRequest>) -> Result<Response<WaitResponse>, Status> {
        let scope = scope_of(&request)?;
        let request = request.into_inner();
        let task = self.task(&scope, &request.container_id).await?;
        let wait = self.stop.run_until_cancelled(task.wait(&request.exec_id));
        let exit = wait.await.ok_or_else(stopping)?.map_err(into_status)?;
        Ok(Response::new(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(to_timestamp(exit.at)),
        }))
    }
}
