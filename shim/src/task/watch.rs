//! What happens to a container by itself: exits, OOM kills, and the events that tell of them.

use std::sync::Arc;

use lighter_proto::containerd::events;
use lighter_proto::time::to_timestamp;
use tracing::{debug, info, warn};

use super::{Inner, Task};
use crate::bundle::Spec;
use crate::cgroup::{Cgroup, Followed};
use crate::error::Error;
use crate::process::{Effect, Exit, Input};
use crate::runtime::Running;

impl Task {
    /// Finds the container's cgroup while init is surely alive, and watches it for OOM kills.
    pub(super) fn watch_cgroup(self: &Arc<Self>, pid: u32, known: Option<Followed>) {
        let followed = match known.map_or_else(|| Cgroup::of(pid).map(Followed::from), Ok) {
            Ok(followed) => followed,
            Err(error) => {
                warn!(container_id = %self.id, %error, "no cgroup: no metrics, no OOM events");
                return;
            }
        };
        match followed.oom {
            Ok(watch) => {
                self.locked().oom = Some(watch.clone());
                let task = self.clone();
                self.core.tracker.spawn(async move {
                    while watch.changed().await {
                        task.report_oom();
                    }
                });
            }
            Err(error) => warn!(container_id = %self.id, %error, "no OOM events"),
        }
        self.locked().cgroup = Some(followed.cgroup);
    }

    pub(super) fn report_oom(&self) {
        let inner = self.locked();
        self.report_oom_locked(&inner);
    }

    /// Announces OOM kills that were not announced yet.
    pub(super) fn report_oom_locked(&self, inner: &Inner) {
        let Some(watch) = &inner.oom else { return };
        for _ in 0..watch.take() {
            let event = events::TaskOom {
                container_id: self.id.clone(),
            };
            self.core.publisher.publish("/tasks/oom", &event);
        }
    }

    /// Waits for a process's exit in the background.
    pub(super) fn watch_exit(self: &Arc<Self>, exec: Option<String>, running: Running) {
        let task = self.clone();
        self.core.tracker.spawn(async move {
            let exit = running.exit.exit().await;
            task.exited(exec, exit);
        });
    }

    pub(super) fn exited(self: &Arc<Self>, exec: Option<String>, exit: Exit) {
        {
            let inner = self.locked();
            let io = match exec.as_deref() {
                None => Some(self.io.clone()),
                Some(id) => inner.execs.get(id).and_then(|data| data.io.clone()),
            };
            if let Some(io) = io {
                io.finish();
            }
        }
        // The process may have been deleted by force meanwhile.
        let _ = self.apply(Input::Exited(exec, exit));
    }

    pub(super) fn carry_out(self: &Arc<Self>, inner: &mut Inner, effect: Effect) {
        let publisher = &self.core.publisher;
        let container_id = self.id.clone();
        match effect {
            Effect::ExecAdded(exec_id) => publisher.publish(
                "/tasks/exec-added",
                &events::TaskExecAdded {
                    container_id,
                    exec_id,
                },
            ),
            Effect::Started(None, pid) => {
                publisher.publish("/tasks/start", &events::TaskStart { container_id, pid });
            }
            Effect::Started(Some(exec_id), pid) => publisher.publish(
                "/tasks/exec-started",
                &events::TaskExecStarted {
                    container_id,
                    exec_id,
                    pid,
                },
            ),
            Effect::Exited(who, pid, exit) => {
                if who.is_none() {
                    self.report_oom_locked(inner);
                    if let Some(watch) = inner.oom.take() {
                        watch.stop();
                    }
                }
                info!(container_id = %self.id, pid, status = exit.status, "process exited");
                let id = who.unwrap_or_else(|| self.id.clone());
                publisher.publish(
                    "/tasks/exit",
                    &events::TaskExit {
                        container_id,
                        id,
                        pid,
                        exit_status: exit.status,
                        exited_at: Some(to_timestamp(exit.at)),
                    },
                );
            }
            Effect::InitGone { thaw } => {
                let task = self.clone();
                self.core
                    .tracker
                    .spawn(async move { task.clear_out(thaw).await });
            }
            Effect::Paused => {
                publisher.publish("/tasks/paused", &events::TaskPaused { container_id });
            }
            Effect::Resumed => {
                publisher.publish("/tasks/resumed", &events::TaskResumed { container_id });
            }
        }
    }

    /// Init is gone: what else runs in the container goes too.
    pub(super) async fn clear_out(&self, thaw: bool) {
        if thaw && let Err(error) = self.runtime.resume().await {
            debug!(container_id = %self.id, %error, "not thawed");
        }
        let known = self.locked().private_pids;
        // Without a readable spec the safe assumption is that processes are left.
        let private = known
            .unwrap_or_else(|| Spec::read(&self.bundle).is_ok_and(|spec| spec.has_private_pids()));
        if !private
            && let Err(error) = self.runtime.kill(9, true).await
            && !matches!(error, Error::NotFound(_))
        {
            warn!(container_id = %self.id, %error, "cannot kill what init left behind");
        }
    }
}
