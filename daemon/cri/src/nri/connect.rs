//! How plugins come and go: the socket, the programs that are started, the handshake.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use lighter_proto::errdefs::ttrpc_status;
use lighter_proto::nri::pkg::api::v1alpha1::{
    Empty, RegisterPluginRequest, UpdateContainersRequest, UpdateContainersResponse,
};
use tokio::io::DuplexStream;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use ttrpc::asynchronous::transport::{Listener, Socket};
use ttrpc::asynchronous::{Client, Server};

use super::launch::Installed;
use super::plugin::{Plugin, Refused, Terms};
use super::{Nri, launch, mux, plugin};

/// The service that plugins call.
pub(super) const RUNTIME_SERVICE: &str = "nri.pkg.api.v1alpha1.Runtime";
/// Plugins at once, those in their handshake included.
const MAX_PLUGINS: usize = 128;

impl Nri {
    pub(super) async fn accept(self: Arc<Self>, listener: UnixListener) {
        loop {
            let accepted = tokio::select! {
                () = self.cancel.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((socket, _)) if self.tasks.len() <= MAX_PLUGINS => {
                    let nri = self.clone();
                    self.tasks
                        .spawn(async move { nri.serve(socket, None, None).await });
                }
                Ok(_) => tracing::warn!("too many NRI plugins, connection closed"),
                Err(error) => {
                    tracing::warn!(%error, "NRI socket");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    pub(super) async fn launch(self: Arc<Self>, plugin: Installed, ready: mpsc::Sender<()>) {
        match launch::start(&plugin) {
            Ok((mut child, socket)) => {
                let pid = child.id();
                tracing::info!(plugin = plugin.name, pid, "NRI plugin started");
                self.serve(socket, Some(plugin), Some(ready)).await;
                // It has had its goodbye; a plugin that stays on is ended.
                let _ = child.kill().await;
            }
            Err(error) => {
                tracing::warn!(path = %plugin.path.display(), %error, "NRI plugin not started");
            }
        }
    }

    /// Serves one plugin's socket until it closes. `ready` is dropped when the plugin is called
    /// for its events, or never will be.
    async fn serve(
        &self,
        socket: UnixStream,
        installed: Option<Installed>,
        ready: Option<mpsc::Sender<()>>,
    ) {
        let closed = self.cancel.child_token();
        let (driver, connections) = mux::open(socket);
        let (register, mut registered) = mpsc::channel(1);
        let client = Client::new(Socket::new(connections.plugin));
        let mut server = self.runtime_service(connections.runtime, register);
        if let Err(error) = server.start().await {
            tracing::warn!(%error, "NRI plugin connection");
            return;
        }
        let handshake = async {
            let plugin = self
                .handshake(client, &mut registered, installed, &closed)
                .await;
            drop(ready);
            match plugin {
                Ok(_) => std::future::pending().await,
                Err(error) => tracing::warn!(%error, "NRI plugin refused"),
            }
        };
        tokio::select! {
            () = closed.cancelled() => {}
            () = handshake => {}
            ended = driver => if let Err(error) = ended {
                tracing::warn!(%error, "NRI plugin connection");
            },
        }
        closed.cancel();
        self.drop_closed();
        if let Err(error) = server.shutdown().await {
            tracing::debug!(%error, "NRI plugin connection");
        }
    }

    fn drop_closed(&self) {
        let mut plugins = self.plugins.write().unwrap_or_else(PoisonError::into_inner);
        plugins.retain(|plugin| !plugin.closed.is_cancelled());
    }

    /// The service that a plugin calls.
    fn runtime_service(
        &self,
        connection: DuplexStream,
        register: mpsc::Sender<(String, String)>,
    ) -> Server {
        let register_plugin = move |_, request: RegisterPluginRequest| {
            let register = register.clone();
            async move {
                plugin::check_names(&request.plugin_idx, &request.plugin_name).map_err(
                    |error| {
                        tracing::warn!(%error, "NRI plugin refused");
                        ttrpc_status(tonic::Code::InvalidArgument, error.to_string())
                    },
                )?;
                // Full or closed: it has registered already.
                let _ = register.try_send((request.plugin_idx, request.plugin_name));
                Ok(Empty {})
            }
        };
        let runtime = self.runtime.clone();
        let update = move |_, request: UpdateContainersRequest| {
            let runtime = runtime.clone();
            async move {
                let failed = runtime.update(request.update).await;
                runtime.evict(request.evict).await;
                Ok(UpdateContainersResponse { failed })
            }
        };
        let mut methods = lighter_proto::ttrpc::Methods::new();
        methods.insert(
            "RegisterPlugin".to_owned(),
            lighter_proto::ttrpc::unary(register_plugin),
        );
        methods.insert(
            "UpdateContainers".to_owned(),
            lighter_proto::ttrpc::unary(update),
        );
        let service = lighter_proto::ttrpc::service(methods);
        // The server's own end expects its accepting task to be there still.
        let accepted = futures::stream::once(async move { Ok(connection) });
        let accepted = accepted.chain(futures::stream::pending());
        Server::new()
            .add_listener(Listener::new(accepted))
            .register_service([(RUNTIME_SERVICE.to_owned(), service)].into())
    }

    async fn handshake(
        &self,
        client: Client,
        registered: &mut mpsc::Receiver<(String, String)>,
        installed: Option<Installed>,
        closed: &CancellationToken,
    ) -> Result<(), Refused> {
        let limit = self.config.registration_timeout;
        let names = tokio::time::timeout(limit, registered.recv()).await;
        let names = names.ok().flatten().ok_or(Refused::Silent(limit))?;
        // A plugin that was started here has the names of its file, whatever it says.
        let (names, config) = match &installed {
            None => (names, String::new()),
            Some(file) => {
                let dir = &self.config.plugin_config_path;
                let config = launch::config(dir, file).unwrap_or_else(|error| {
                    tracing::warn!(plugin = file.name, %error, "NRI plugin configuration");
                    String::new()
                });
                ((file.index.clone(), file.name.clone()), config)
            }
        };
        let terms = Terms {
            runtime_version: self.config.runtime_version.clone(),
            registration_timeout: limit,
            request_timeout: self.config.request_timeout,
        };
        let plugin = Plugin::configure(client, names, config, &terms, closed.clone()).await?;
        let updates = {
            let _exclusive = self.sync.write().await;
            let (pods, containers) = self.runtime.snapshot().await;
            let updates = plugin.synchronize(pods, containers).await?;
            let name = plugin.name.clone();
            let mut plugins = self.plugins.write().unwrap_or_else(PoisonError::into_inner);
            plugins.push(Arc::new(plugin));
            plugins.sort_by(|a, b| a.index.cmp(&b.index));
            tracing::info!(plugin = name, "NRI plugin connected");
            updates
        };
        if !updates.is_empty() {
            let failed = self.runtime.update(updates).await;
            if !failed.is_empty() {
                tracing::warn!(count = failed.len(), "NRI updates failed");
            }
        }
        Ok(())
    }
}

/// Opens the socket for root only. One left by a daemon that is gone is replaced.
pub(super) fn listen(path: &Path) -> std::io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))?;
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}
