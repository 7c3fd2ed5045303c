//! Taking back pods whose making did not end: the daemon was killed in it, or undoing it failed.
//!
//! Such a pod is listed as not ready, so that whoever asked for it sees what became of it and may stop
//! and remove it. Nobody has to: it goes by itself after a while, tried again and again until every
//! step works. Its name stays reserved until then, but whoever runs a pod of that name waits for no
//! pause: that call takes it back at once.
//!
//! The same holds for what the journal of networks knows of pods that are gone.

use std::sync::Arc;
use std::time::Duration;

use lighter_proto::errdefs::{ErrorKind, render};

use crate::error::{Error, Result};
use crate::plugin::{Plugin, UNDO_LIMIT};
use crate::store::Pod;
use crate::turn::Taken;

/// First and longest pause before such a pod is taken back. The first is long enough for whoever
/// looks what became of it.
const PAUSE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));
/// What holds the turn of such a pod.
const CALL: &str = "undoing RunPodSandbox";

/// What does not work, where it is known at which step.
fn at_step(turn: &Taken<'_>, error: impl std::fmt::Display) -> String {
    match turn.step() {
        Some(step) => format!("step {step:?}: {error}"),
        None => error.to_string(),
    }
}

impl Plugin {
    /// Takes back a pod that is being made, within the call that makes it.
    ///
    /// # Errors
    /// The step that failed or took too long, and why.
    pub(super) async fn undo_pod(
        self: &Arc<Self>,
        pod: &Pod,
        turn: &Taken<'_>,
    ) -> Result<(), String> {
        let undo = async {
            turn.at("undo: kill the sandbox");
            self.kill_task(&pod.id).await?;
            if let Some(netns) = &pod.netns {
                turn.at("undo: CNI DEL");
                self.detach_network(pod, netns).await?;
            }
            turn.at("undo: remove");
            self.erase_pod(pod).await
        };
        match tokio::time::timeout(UNDO_LIMIT, undo).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(at_step(turn, render(&error))),
            Err(_) => Err(at_step(turn, "takes too long")),
        }
    }

    /// Lists a pod whose making did not end, and sees to it that it goes.
    pub(super) fn abandon(self: &Arc<Self>, pod: &Arc<Pod>) {
        pod.update(|s| {
            s.abandoned = true;
            s.visible = true;
        });
        let (this, pod, stop) = (Arc::clone(self), Arc::clone(pod), self.stop.clone());
        self.tracker.spawn(async move {
            stop.run_until_cancelled(this.take_back_in_time(&pod)).await;
        });
    }

    async fn take_back_in_time(self: &Arc<Self>, pod: &Arc<Pod>) {
        let (mut pause, longest) = PAUSE;
        loop {
            tokio::time::sleep(pause).await;
            let Err(error) = self.take_back(pod).await else {
                return;
            };
            pause = (pause * 2).min(longest);
            let error = render(&error);
            tracing::warn!(sandbox_id = %pod.id, %error, again_in = ?pause, "half-made pod not taken back");
        }
    }

    /// Takes back a pod whose making did not end; one that is gone is fine.
    ///
    /// # Errors
    /// The step that failed or took too long, and why.
    async fn take_back(self: &Arc<Self>, pod: &Arc<Pod>) -> Result<()> {
        let turn = pod.busy.take(CALL, &pod.name).await?;
        let blocked = |why: String| {
            let message = format!("half-made pod {} is not taken back: {why}", pod.id);
            Error::new(ErrorKind::Unavailable, message)
        };
        match tokio::time::timeout(UNDO_LIMIT, self.remove_pod_locked(pod, &turn)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(blocked(at_step(&turn, render(&error)))),
            Err(_) => Err(blocked(at_step(&turn, "takes too long"))),
        }
    }

    /// Makes `name` free if it is a half-made pod that holds it.
    ///
    /// # Errors
    /// The step that keeps that pod from going.
    pub(super) async fn free_name(self: &Arc<Self>, name: &str) -> Result<()> {
        let Some(holder) = self.store.holder(name) else {
            return Ok(());
        };
        match self.store.pods.find(&holder)? {
            Some(pod) if pod.state().abandoned => {
                let taken = self.take_back(&pod).await;
                taken.map_err(|e| e.context(format!("failed to reserve sandbox name {name:?}")))
            }
            _ => Ok(()),
        }
    }

    /// Detaches the networks of a pod that is gone, in its own time.
    pub(super) fn detach_lost(self: &Arc<Self>, handler: String, id: String) {
        let (this, stop) = (Arc::clone(self), self.stop.clone());
        let again = async move {
            let (mut pause, longest) = PAUSE;
            while let Err(error) = this.cni_of(&handler).detach_leftover(&id).await {
                let error = render(&error);
                tracing::warn!(sandbox_id = %id, %error, again_in = ?pause, "network of a lost pod not detached");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(longest);
            }
        };
        self.tracker.spawn(async move {
            stop.run_until_cancelled(again).await;
        });
    }
}
