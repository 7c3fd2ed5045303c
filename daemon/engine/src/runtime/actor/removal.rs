//! Taking a task away: at its shim first, then everything of ours.

use std::sync::Arc;
use std::time::Duration;

use lighter_proto::containerd::task::v3 as wire;
use lighter_proto::errdefs::{ErrorKind, render};
use tokio::sync::watch;
use tracing::warn;

use super::outcome::Done;
use super::{Actor, Reply};
use crate::runtime::bundle::Bundle;
use crate::runtime::connection::Connection;
use crate::runtime::error::Error;
use crate::runtime::reap;
use crate::runtime::shared::{Shared, Slot};
use crate::runtime::state::{Exit, Input};

/// How long a shim that serves nobody any more is left alone: its client has more to remove, and waits for
/// that.
const LINGER: Duration = Duration::from_millis(3);

impl Actor {
    pub(super) fn delete(&mut self, reply: Reply<(Exit, u32)>) {
        if self.lost {
            // The shim is being looked after; the task is gone when that is done.
            self.removal_waiters().push(reply);
            return;
        }
        if let Some(waiters) = &mut self.removal {
            waiters.push(reply);
            return;
        }
        self.removal = Some(vec![reply]);
        let (shared, bundle) = (Arc::clone(&self.shared), Arc::clone(&self.bundle));
        let (connection, ours) = (self.connection(), self.ours);
        self.calls.spawn(async move {
            let (result, gone) = remove(&shared, &bundle, &connection, ours).await;
            Done::Removed { result, gone }
        });
    }

    fn removal_waiters(&mut self) -> &mut Vec<Reply<(Exit, u32)>> {
        self.removal.get_or_insert_default()
    }

    pub(super) fn removed(&mut self, result: Result<(Exit, u32), Error>, gone: bool) -> bool {
        let waiters = self.removal.take().unwrap_or_default();
        let exit = result.as_ref().map(|(exit, _)| *exit);
        if gone {
            self.apply(Input::Gone {
                exit: exit.unwrap_or_else(|_| Exit::unknown()),
            });
        }
        let mut first = Some(result);
        for reply in waiters {
            // One removal, one answer; who came second finds nothing.
            let answer = first.take().unwrap_or_else(|| {
                Err(Error::NotFound {
                    id: self.bundle.id.clone(),
                })
            });
            let _left = reply.send(answer);
        }
        gone
    }
}

/// Deletes at the shim, then everything of ours. The flag says whether the task is no more.
async fn remove(
    shared: &Arc<Shared>,
    bundle: &Arc<Bundle>,
    connection: &Connection,
    ours: bool,
) -> (Result<(Exit, u32), Error>, bool) {
    let _step = shared.step(bundle, "Task.Delete");
    let request = wire::DeleteRequest {
        id: bundle.id.clone(),
        exec_id: String::new(),
    };
    let answer: Result<wire::DeleteResponse, _> = connection.task("Delete", request, None).await;
    let gone = match &answer {
        Ok(_) => true,
        Err(error) => error.kind == ErrorKind::NotFound || connection.is_closed(),
    };
    if !gone {
        return (
            Err(answer.err().map_or(Error::Stopping, Error::from)),
            false,
        );
    }
    // Our shim has unmounted the root filesystem when it answers, and the id stays taken: nobody
    // needs to wait for the rest.
    let later = answer.is_ok() && ours && !shared.has_mounts(bundle);
    // Off the books before the shim goes: its end must not be taken for a death.
    let clearing = clear_away(shared, bundle, connection, later);
    if later {
        shared.tracker.spawn(clearing);
    } else {
        clearing.await;
    }
    let answer = answer
        .map(|a| (Exit::from_wire(a.exit_status, a.exited_at), a.pid))
        .map_err(Error::from);
    (answer, true)
}

/// Takes a deleted task off the books at once; the future sends its shim away, removes the bundle
/// and frees the id; `later` when nobody waits for it.
fn clear_away(
    shared: &Arc<Shared>,
    bundle: &Arc<Bundle>,
    connection: &Connection,
    later: bool,
) -> impl Future<Output = ()> + Send + 'static {
    let (freed, waiting) = watch::channel(());
    shared.put(bundle, Slot::Removing(waiting));
    let step = shared.step(bundle, "Task.Shutdown");
    let (shared, bundle) = (Arc::clone(shared), Arc::clone(bundle));
    let connection = connection.clone();
    async move {
        let address = connection.bootstrap().address;
        // The next of a group may come to its shim at any moment: that goes at once or not at all.
        if later && !shared.groups.has(&address) {
            tokio::select! {
                () = tokio::time::sleep(LINGER) => {}
                () = shared.hurry.notified() => {}
                () = shared.stop.cancelled() => {}
            }
        }
        if !shared.shares_shim(&address) {
            shared.groups.forget(&address);
        }
        reap::dismiss(&shared, &bundle, &connection).await;
        step.at("delete bundle");
        if let Err(error) = shared.delete_bundle(&bundle).await {
            warn!(container_id = %bundle.id, error = %render(&error), "cannot delete the bundle");
        }
        shared.forget(&bundle);
        drop(freed);
    }
}
