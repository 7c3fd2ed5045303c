//! A container's life as clients lead it: record, snapshot, task, execs.

use std::collections::HashMap;
use std::path::Path;

use lighter_proto::any;
use lighter_proto::containerd::runc::v1::Options as RuncOptions;
use lighter_proto::containerd::services as svc;
use prost_types::Any;
use serde_json::Value;
use tonic::Status;

use super::{Client, Container, Exit};
use crate::{Result, Spec};

impl Client {
    /// Prepares a root on `parent` and records a container with `spec`.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn create(&self, id: &str, parent: &str, spec: &Spec) -> Result<Container> {
        self.create_on(id, parent, spec, "overlayfs", "io.containerd.runc.v2", None)
            .await
    }

    /// [`Client::create`] with snapshotter, runtime and runtime options of the caller's.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn create_on(
        &self,
        id: &str,
        parent: &str,
        spec: &Spec,
        snapshotter: &str,
        runtime: &str,
        options: Option<Any>,
    ) -> Result<Container> {
        self.snapshots()
            .prepare(svc::snapshots::v1::PrepareSnapshotRequest {
                snapshotter: snapshotter.to_owned(),
                key: id.to_owned(),
                parent: parent.to_owned(),
                labels: HashMap::new(),
            })
            .await?;
        let of_run = crate::runtime().map(|binary_name| {
            any::pack(&RuncOptions {
                binary_name,
                ..Default::default()
            })
        });
        let container = svc::containers::v1::Container {
            id: id.to_owned(),
            runtime: Some(svc::containers::v1::container::Runtime {
                name: runtime.to_owned(),
                options: options.or(of_run),
            }),
            spec: Some(any::pack_json(any::SPEC, &spec.0)?),
            snapshotter: snapshotter.to_owned(),
            snapshot_key: id.to_owned(),
            ..Default::default()
        };
        self.containers()
            .create(svc::containers::v1::CreateContainerRequest {
                container: Some(container),
            })
            .await?;
        Ok(Container {
            id: id.to_owned(),
            snapshotter: snapshotter.to_owned(),
        })
    }

    /// Creates the task with stdout and stderr to `log` (a `file://` log) where given. Returns its
    /// pid.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn create_task(
        &self,
        container: &Container,
        log: Option<&Path>,
    ) -> std::result::Result<u32, Status> {
        let mounts = self
            .snapshots()
            .mounts(svc::snapshots::v1::MountsRequest {
                snapshotter: container.snapshotter.clone(),
                key: container.id.clone(),
            })
            .await?
            .into_inner()
            .mounts;
        let stdout = log
            .map(|path| format!("file://{}", path.display()))
            .unwrap_or_default();
        let request = svc::tasks::v1::CreateTaskRequest {
            container_id: container.id.clone(),
            rootfs: mounts,
            stdout: stdout.clone(),
            stderr: stdout,
            ..Default::default()
        };
        Ok(self.tasks().create(request).await?.into_inner().pid)
    }

    /// Starts a process; an empty `exec_id` is the task itself.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn start(&self, id: &str, exec_id: &str) -> std::result::Result<u32, Status> {
        let request = svc::tasks::v1::StartRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        };
        Ok(self.tasks().start(request).await?.into_inner().pid)
    }

    /// Registers and starts an exec. Returns its pid.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        log: Option<&Path>,
    ) -> Result<u32> {
        let stdout = log
            .map(|path| format!("file://{}", path.display()))
            .unwrap_or_default();
        self.tasks()
            .exec(svc::tasks::v1::ExecProcessRequest {
                container_id: id.to_owned(),
                exec_id: exec_id.to_owned(),
                stdout: stdout.clone(),
                stderr: stdout,
                spec: Some(any::pack_json(any::PROCESS, process)?),
                ..Default::default()
            })
            .await?;
        Ok(self.start(id, exec_id).await?)
    }

    /// Waits for a process to end.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn wait(&self, id: &str, exec_id: &str) -> std::result::Result<Exit, Status> {
        let request = svc::tasks::v1::WaitRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        };
        Ok(Exit {
            status: self.tasks().wait(request).await?.into_inner().exit_status,
        })
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn kill(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
    ) -> std::result::Result<(), Status> {
        let request = svc::tasks::v1::KillRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            all: false,
        };
        self.tasks().kill(request).await.map(drop)
    }

    /// Deletes the task. Returns how it ended.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn delete_task(&self, id: &str) -> std::result::Result<Exit, Status> {
        let request = svc::tasks::v1::DeleteTaskRequest {
            container_id: id.to_owned(),
        };
        Ok(Exit {
            status: self.tasks().delete(request).await?.into_inner().exit_status,
        })
    }

    /// Deletes the container's record and snapshot.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn delete(&self, container: &Container) -> std::result::Result<(), Status> {
        self.containers()
            .delete(svc::containers::v1::DeleteContainerRequest {
                id: container.id.clone(),
            })
            .await?;
        self.snapshots()
            .remove(svc::snapshots::v1::RemoveSnapshotRequest {
                snapshotter: container.snapshotter.clone(),
                key: container.id.clone(),
            })
            .await
            .map(drop)
    }

    /// Runs `args` to the end and removes everything. Returns exit and output.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn run(
        &self,
        id: &str,
        parent: &str,
        spec: &Spec,
        dir: &Path,
    ) -> Result<(Exit, String)> {
        let log = dir.join(format!("{id}.log"));
        let container = self.create(id, parent, spec).await?;
        let ran = self.run_task(&container, &log).await;
        let _ = self.delete_task(id).await;
        self.delete(&container).await?;
        let output = std::fs::read_to_string(&log).unwrap_or_default();
        Ok((ran?, output))
    }

    async fn run_task(&self, container: &Container, log: &Path) -> Result<Exit> {
        self.create_task(container, Some(log)).await?;
        self.start(&container.id, "").await?;
        Ok(self.wait(&container.id, "").await?)
    }

    /// Kills what runs and removes task, container and snapshot; what is gone already is fine.
    ///
    /// # Errors
    /// When something could not be removed.
    pub async fn destroy(&self, container: &Container) -> Result<()> {
        let _ = self.kill(&container.id, "", 9).await;
        let _ = self.wait(&container.id, "").await;
        match self.delete_task(&container.id).await {
            Err(status) if status.code() != tonic::Code::NotFound => return Err(status.into()),
            _ => {}
        }
        self.delete(container).await?;
        Ok(())
    }

    /// State of a task.
    ///
    /// # Errors
    /// The daemon's status.
    pub async fn task(
        &self,
        id: &str,
        exec_id: &str,
    ) -> std::result::Result<lighter_proto::containerd::v1::types::Process, Status> {
        let request = svc::tasks::v1::GetRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        };
        self.tasks()
            .get(request)
            .await?
            .into_inner()
            .process
            .ok_or_else(|| Status::internal("Get answered no process"))
    }
}
