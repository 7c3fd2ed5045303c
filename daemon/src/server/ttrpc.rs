//! The socket that shims publish their events on.

use std::io;

use futures::StreamExt as _;
use lighter_engine::runtime::Manager;
use lighter_proto::containerd::services::events::ttrpc::v1::ForwardRequest;
use lighter_proto::errdefs::{ErrorKind, WireError, into_ttrpc};
use lighter_proto::line::Line;
use lighter_proto::ttrpc::{Methods, service, unary};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tracing::warn;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

/// Name of the service shims call.
const EVENTS: &str = "containerd.services.events.ttrpc.v1.Events";

/// Serves `Forward` on `listener` to processes of our own user.
///
/// # Errors
/// When the server does not start.
pub(crate) async fn serve(listener: UnixListener, tasks: Manager) -> Result<Server, ttrpc::Error> {
    let forward = unary(move |_context, request: ForwardRequest| {
        let tasks = tasks.clone();
        async move {
            let envelope = request.envelope.ok_or_else(|| {
                into_ttrpc(WireError::new(
                    ErrorKind::InvalidArgument,
                    "envelope is missing",
                ))
            })?;
            // An event changes what we say about its task before anybody hears of it.
            tasks.forward(envelope).await.map_err(into_ttrpc)
        }
    });
    let methods = Methods::from([("Forward".to_owned(), forward)]);
    let mut server = Server::new()
        .add_listener(Listener::new(own_user(listener)))
        .register_service([(EVENTS.to_owned(), service(methods))].into());
    server.start().await?;
    Ok(server)
}

/// Connections of our own user and group; others are closed, a failed accept is only logged.
fn own_user(
    listener: UnixListener,
) -> impl futures::Stream<Item = io::Result<Line>> + Send + 'static {
    let (uid, gid) = (
        nix::unistd::geteuid().as_raw(),
        nix::unistd::getegid().as_raw(),
    );
    UnixListenerStream::new(listener).filter_map(move |accepted| async move {
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                warn!(%error, "accepting a connection on the ttrpc socket failed");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                return None;
            }
        };
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == uid && peer.gid() == gid => Some(Line::try_from(stream)),
            Ok(peer) => {
                warn!(
                    uid = peer.uid(),
                    gid = peer.gid(),
                    "refused a ttrpc client of another user"
                );
                None
            }
            Err(error) => {
                warn!(%error, "refused a ttrpc client without credentials");
                None
            }
        }
    })
}
