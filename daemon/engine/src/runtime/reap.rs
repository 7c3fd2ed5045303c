//! What is left to do when a shim is gone, or should go.
//!
//! A connection that ended is no proof of a death: the socket is tried again, and only when
//! nobody listens there the shim's `delete` action is run, which kills what the container still
//! has and says how it ended.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lighter_proto::containerd::task::v3 as wire;
use lighter_proto::errdefs::{ErrorKind, WireError, render};
use tracing::{info, warn};

use super::bootstrap::Bootstrap;
use super::bundle::Bundle;
use super::connection::Connection;
use super::shared::Shared;
use super::state::Exit;

/// Pause before a shim that answered nothing is asked again.
const AGAIN: Duration = Duration::from_millis(50);
/// Longest such pause.
const AGAIN_AT_MOST: Duration = Duration::from_secs(2);

/// What became of a shim whose connection ended.
#[derive(Debug)]
pub(super) enum Found {
    /// It is alive, over this connection.
    Alive(Connection),
    /// It is dead, its container gone, and so is the bundle.
    Dead { exit: Exit, pid: u32 },
}

/// Connects and asks for a sign of life.
///
/// # Errors
/// `Unavailable` when nobody listens: the shim is dead. Others leave that open.
pub(super) async fn greet(
    bundle: &Bundle,
    bootstrap: &Bootstrap,
    limit: Duration,
) -> Result<Connection, WireError> {
    let connection = Connection::open(bootstrap, bundle.namespace.as_str()).await?;
    let request = wire::ConnectRequest {
        id: bundle.id.clone(),
    };
    let answer: Result<wire::ConnectResponse, _> =
        connection.task("Connect", request, Some(limit)).await;
    match answer {
        Ok(_) => Ok(connection),
        // It took the connection, so it lives, or lived until now: the next try will tell.
        Err(error) if error.kind == ErrorKind::Unavailable => {
            Err(WireError::new(ErrorKind::Aborted, error.message))
        }
        Err(error) => Err(error),
    }
}

/// Finds out what became of the shim, however long that takes, and cleans up after a dead one.
pub(super) async fn look(shared: &Arc<Shared>, bundle: &Bundle, bootstrap: &Bootstrap) -> Found {
    let step = shared.step(bundle, "look after the shim");
    let mut pause = AGAIN;
    loop {
        match greet(bundle, bootstrap, shared.timeouts.shim_load).await {
            Ok(connection) => return Found::Alive(connection),
            Err(error) if error.kind == ErrorKind::Unavailable => break,
            Err(error) => {
                warn!(container_id = %bundle.id, %error, "the shim does not answer; trying again");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(AGAIN_AT_MOST);
    }
    step.at("clean up after a dead shim");
    let (exit, pid) = bury(shared, bundle).await;
    Found::Dead { exit, pid }
}

/// Runs the `delete` action and removes the bundle; how the container ended, and its pid.
pub(super) async fn bury(shared: &Arc<Shared>, bundle: &Bundle) -> (Exit, u32) {
    info!(container_id = %bundle.id, namespace = %bundle.namespace, "the shim is dead, cleaning up");
    let recorded = bundle.init_pid().unwrap_or_default();
    let answer = match bundle.shim_path() {
        Some(shim) => delete_action(shared, &shim, bundle).await,
        None => None,
    };
    if let Err(error) = shared.delete_bundle(bundle).await {
        warn!(container_id = %bundle.id, error = %render(&error), "cannot delete the bundle");
    }
    match answer {
        Some(answer) => {
            let pid = if answer.pid == 0 {
                recorded
            } else {
                answer.pid
            };
            (Exit::from_wire(answer.exit_status, answer.exited_at), pid)
        }
        None => (Exit::unknown(), recorded),
    }
}

/// The `delete` action; a failure is logged, since there is nobody else to tell.
pub(super) async fn delete_action(
    shared: &Arc<Shared>,
    shim: &Path,
    bundle: &Bundle,
) -> Option<wire::DeleteResponse> {
    shared
        .launcher
        .delete(shim, bundle, shared.timeouts.shim_cleanup)
        .await
        .inspect_err(|error| {
            warn!(container_id = %bundle.id, error = %render(error), "the shim's delete failed");
        })
        .ok()
}

/// Sends a shim away whose task is gone. One that serves others stays, and so does one that a
/// sandbox lives in: that is its controller's to end.
pub(super) async fn dismiss(shared: &Arc<Shared>, bundle: &Bundle, connection: &Connection) {
    if bundle.is_guest() {
        connection.close();
        return;
    }
    let request = wire::ShutdownRequest {
        id: bundle.id.clone(),
        now: false,
    };
    let limit = shared.timeouts.shim_shutdown;
    let answer: Result<(), _> = connection.task("Shutdown", request, Some(limit)).await;
    if let Err(error) = answer
        && error.kind != ErrorKind::Unavailable
    {
        warn!(container_id = %bundle.id, %error, "the shim does not shut down");
    }
    // A shim on its way out still takes connections: a task of the same name that is made next
    // must not find it.
    if !shared.shares_shim(&connection.bootstrap().address) {
        let _late = tokio::time::timeout(limit, connection.closed()).await;
    }
    connection.close();
}
