//! Making a container: root file system, streams, runtime, and the event that announces it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use lighter_proto::containerd::events;
use lighter_proto::containerd::runc::v1::Options;
use lighter_proto::containerd::task::v3 as api;
use lighter_proto::containerd::types::Mount;
use tokio::sync::Notify;
use tracing::{info, warn};

use super::{Core, Inner, Task, io_context};
use crate::error::{Error, Result};
use crate::io::{ProcessIo, Stdio};
use crate::process::Container;
use crate::runtime::{self, Create, Target};
use crate::{bundle, mount};

impl Task {
    /// Creates a container as a request asks. A failure leaves nothing behind and tells nobody.
    ///
    /// # Errors
    /// `InvalidArgument` for what the request has wrong; else what the system or the runtime said.
    pub(crate) async fn create(
        core: Arc<Core>,
        request: api::CreateTaskRequest,
        options: Options,
    ) -> Result<(Arc<Self>, u32)> {
        let bundle = PathBuf::from(&request.bundle);
        if !bundle.is_absolute() {
            return Err(Error::InvalidArgument(format!(
                "bundle {:?}: not absolute",
                request.bundle
            )));
        }
        bundle::record(&bundle, &options)?;
        let rootfs = bundle.join("rootfs");
        let made = Self::create_recorded(&core, &request, options, bundle.clone(), &rootfs).await;
        if made.is_err() {
            if !request.rootfs.is_empty() {
                mount::unmount(&rootfs);
            }
            bundle::forget(&bundle);
        }
        made
    }

    pub(super) async fn create_recorded(
        core: &Arc<Core>,
        request: &api::CreateTaskRequest,
        options: Options,
        bundle: PathBuf,
        rootfs: &Path,
    ) -> Result<(Arc<Self>, u32)> {
        mount::mount_all(&core.reaper, &request.rootfs, rootfs).await?;
        let target = Target::new(
            &request.id,
            bundle.clone(),
            &core.namespace,
            options.clone(),
        );
        let runtime = runtime::open(target, core)?;
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let context = io_context(core, &request.id, &options);
        let (io, child) = ProcessIo::open(&stdio, &context).await?;
        let io = Arc::new(io);
        let mut task = Self {
            core: core.clone(),
            id: request.id.clone(),
            bundle,
            options: options.clone(),
            runtime,
            io: io.clone(),
            checkpoint: None,
            ops: tokio::sync::Mutex::new(()),
            inner: Mutex::new(Inner {
                machine: Container::created(&request.id, 0),
                execs: HashMap::new(),
                cgroup: None,
                oom: None,
                private_pids: None,
                restore: None,
            }),
            changed: Notify::new(),
        };
        if !request.checkpoint.is_empty() {
            let parent = Some(&request.parent_checkpoint).filter(|p| !p.is_empty());
            task.checkpoint = Some((
                PathBuf::from(&request.checkpoint),
                parent.map(PathBuf::from),
            ));
            task.locked().restore = Some(child);
            let task = Arc::new(task);
            task.announce_create(&request.rootfs, &request.checkpoint, 0);
            return Ok((task, 0));
        }
        core.publisher.expect();
        let created = match task.runtime.create(Create { stdio: child }).await {
            Ok(mut running) => match task.adopt(&io, &mut running).await {
                Ok(()) => Ok(running),
                Err(error) => {
                    // The container exists, but without its streams it is of no use.
                    if let Err(error) = task.runtime.delete(true).await {
                        warn!(container_id = %task.id, %error, "cannot delete after a failed create");
                    }
                    Err(error)
                }
            },
            Err(error) => Err(error),
        };
        let mut running = match created {
            Ok(running) => running,
            Err(error) => {
                io.close().await;
                return Err(error);
            }
        };
        let pid = running.pid;
        task.locked().machine = Container::created(&request.id, pid);
        let task = Arc::new(task);
        let known = running.known.take();
        task.locked().private_pids = known.as_ref().map(|known| known.private_pids);
        task.watch_cgroup(pid, known.and_then(|known| known.cgroup));
        task.announce_create(&request.rootfs, "", pid);
        task.watch_exit(None, running);
        info!(container_id = %task.id, pid, "container created");
        Ok((task, pid))
    }

    pub(super) fn announce_create(&self, rootfs: &[Mount], checkpoint: &str, pid: u32) {
        let stdio = self.io.stdio();
        self.core.publisher.publish(
            "/tasks/create",
            &events::TaskCreate {
                container_id: self.id.clone(),
                bundle: self.bundle.display().to_string(),
                rootfs: rootfs.to_vec(),
                io: Some(events::TaskIo {
                    stdin: stdio.stdin.clone(),
                    stdout: stdio.stdout.clone(),
                    stderr: stdio.stderr.clone(),
                    terminal: stdio.terminal,
                }),
                checkpoint: checkpoint.to_owned(),
                pid,
            },
        );
    }
}
