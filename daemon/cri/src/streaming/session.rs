//! One session: what a client asked for, over the protocol it speaks, until one of them ends.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::channel::Activity;
use super::http::{Prefixed, Request};
use super::remote::{Command, Streams};
use super::upgrade::{
    FORWARD_PROTOCOLS, PORT_FORWARD, SPDY_PROTOCOLS, TUNNEL, WEBSOCKET_PROTOCOLS, find,
    spdy_upgrade, websocket_upgrade,
};
use super::websocket::Codec;
use super::{Server, forward, spdy, websocket};

/// Time for the client to hang up after everything was sent.
pub(super) const LINGER: Duration = Duration::from_secs(5);
/// Ports of one WebSocket port-forward: two channels each, and channels are bytes.
const MAX_PORTS: usize = 64;
impl Server {
    /// Exec and attach.
    pub(super) async fn remote<S>(
        &self,
        request: &Request,
        mut stream: Prefixed<S>,
        command: &Command,
        permit: OwnedSemaphorePermit,
        activity: &Arc<Activity>,
    ) -> std::io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let backend = self.backend.as_ref();
        let survives = command.exec.is_some();
        if request.upgrades_to("websocket") {
            let names = WEBSOCKET_PROTOCOLS.map(|(name, ..)| name);
            let Some(name) = websocket_upgrade(request, &mut stream, &names).await? else {
                return Ok(());
            };
            let (_, form, codec) = *find(&WEBSOCKET_PROTOCOLS, |(known, ..)| *known == name);
            let (driver, mut connection) = websocket::serve(stream, codec, 5, activity.clone());
            let work = async {
                let streams = Streams::over_websocket(&mut connection, command).await;
                if let Some(streams) = streams {
                    streams.run(backend, command, form).await;
                }
            };
            self.session(driver, work, activity, survives, permit).await;
            return Ok(());
        }
        let names = SPDY_PROTOCOLS.map(|(name, ..)| name);
        let Some(name) = spdy_upgrade(request, &mut stream, &names).await? else {
            return Ok(());
        };
        let (_, form, sizes) = *find(&SPDY_PROTOCOLS, |(known, ..)| *known == name);
        let (driver, mut connection) = spdy::serve(stream, activity.clone());
        let work = async {
            match Streams::over_spdy(&mut connection, command, sizes).await {
                Ok(streams) => streams.run(backend, command, form).await,
                Err(reason) => tracing::debug!(reason, "streaming session"),
            }
            connection.finish().await;
        };
        self.session(driver, work, activity, survives, permit).await;
        Ok(())
    }

    /// Port-forward.
    pub(super) async fn forward<S>(
        &self,
        request: &Request,
        mut stream: Prefixed<S>,
        sandbox_id: &str,
        ports: &[u16],
        activity: &Arc<Activity>,
    ) -> std::io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let backend = self.backend.as_ref();
        if !request.upgrades_to("websocket") {
            let upgraded = spdy_upgrade(request, &mut stream, &[PORT_FORWARD]).await?;
            if upgraded.is_some() {
                let (driver, connection) = spdy::serve(stream, activity.clone());
                let work = forward::over_spdy(connection, backend, sandbox_id);
                self.session_ends_with_client(driver, work, activity).await;
            }
            return Ok(());
        }
        let mut names = vec![TUNNEL];
        names.extend(FORWARD_PROTOCOLS.map(|(name, _)| name));
        let Some(name) = websocket_upgrade(request, &mut stream, &names).await? else {
            return Ok(());
        };
        if name == TUNNEL {
            let (ours, theirs) = tokio::io::duplex(64 << 10);
            let (carrier, channel) = websocket::serve(stream, Codec::Raw, 1, activity.clone());
            let (driver, connection) = spdy::serve(theirs, activity.clone());
            let tunnel = carry(channel, ours);
            let driver = async {
                tokio::select! {
                    () = carrier => {}
                    ((), ()) = async { tokio::join!(driver, tunnel) } => {}
                }
            };
            let work = forward::over_spdy(connection, backend, sandbox_id);
            self.session_ends_with_client(driver, work, activity).await;
            return Ok(());
        }
        let (_, codec) = *find(&FORWARD_PROTOCOLS, |(known, _)| *known == name);
        let ports = &ports[..ports.len().min(MAX_PORTS)];
        let channels = u8::try_from(ports.len() * 2).expect("at most 64 ports");
        let (driver, connection) = websocket::serve(stream, codec, channels, activity.clone());
        let work = forward::over_websocket(connection, backend, sandbox_id, ports);
        self.session_ends_with_client(driver, work, activity).await;
        Ok(())
    }

    /// Runs a session. When the client goes, `work` goes too, unless it `survives`.
    async fn session(
        &self,
        driver: impl Future<Output = ()> + Send,
        work: impl Future<Output = ()> + Send,
        activity: &Activity,
        survives: bool,
        permit: OwnedSemaphorePermit,
    ) {
        let mut work = Box::pin(work);
        {
            let driver = Box::pin(driver);
            tokio::pin!(driver);
            tokio::select! {
                () = &mut driver => {}
                () = activity.over(self.idle_timeout) => {}
                () = &mut work => {
                    let _ = timeout(LINGER, driver).await;
                    return;
                }
            }
            // The driver is dropped here: the streams end, and writes to them fail.
        }
        drop(permit);
        if survives {
            work.await;
        }
    }

    async fn session_ends_with_client(
        &self,
        driver: impl Future<Output = ()> + Send,
        work: impl Future<Output = ()> + Send,
        activity: &Activity,
    ) {
        let driver = Box::pin(driver);
        tokio::pin!(driver);
        tokio::select! {
            () = &mut driver => {}
            () = activity.over(self.idle_timeout) => {}
            () = Box::pin(work) => {
                let _ = timeout(LINGER, driver).await;
            }
        }
    }
}

/// Copies between the tunnel's messages and the connection within it.
async fn carry(mut channel: websocket::Connection, inner: tokio::io::DuplexStream) {
    let (Some(Some(mut from)), Some(Some(mut to))) = (channel.readers.pop(), channel.writers.pop())
    else {
        return;
    };
    let (mut inner_read, mut inner_write) = tokio::io::split(inner);
    let inbound = async {
        let _ = tokio::io::copy(&mut from, &mut inner_write).await;
        // The inner connection must see the end.
        let _ = tokio::io::AsyncWriteExt::shutdown(&mut inner_write).await;
    };
    let outbound = async {
        let _ = tokio::io::copy(&mut inner_read, &mut to).await;
        drop(to);
    };
    tokio::join!(inbound, outbound);
}
