//! Node Resource Interface: plugins that watch and change pods and containers.
//!
//! Plugins are programs that the daemon starts, or that connect to a socket. Each is told what
//! exists and is then called for its events in ascending order of index; what several of them want
//! for a new container is joined, and a conflict is an error naming both.
//!
//! The runtime calls the hooks and is called back through [`Runtime`]. While an operation is
//! between its hook and its visibility, it holds [`Nri::block_sync`], so that a new plugin neither
//! misses an object nor sees it twice.

mod apply;
mod error;
mod launch;
mod merge;
mod metrics;
mod mux;
mod owners;
mod plugin;
mod validate;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use futures::future::join_all;
use lighter_proto::errdefs::ttrpc_status;
use lighter_proto::nri::pkg::api::v1alpha1::{
    Container, ContainerAdjustment, ContainerEviction, ContainerUpdate, CreateContainerRequest,
    CreateContainerResponse, Empty, Event, LinuxResources, PluginInstance, PodSandbox,
    PostCreateContainerRequest, PostStartContainerRequest, PostUpdateContainerRequest,
    PostUpdatePodSandboxRequest, RegisterPluginRequest, RemoveContainerRequest,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StopContainerRequest,
    StopContainerResponse, StopPodSandboxRequest, UpdateContainerRequest, UpdateContainerResponse,
    UpdateContainersRequest, UpdateContainersResponse, UpdatePodSandboxRequest,
    UpdatePodSandboxResponse, ValidateContainerAdjustmentRequest,
    ValidateContainerAdjustmentResponse,
};
use tokio::io::DuplexStream;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedRwLockReadGuard, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use ttrpc::asynchronous::transport::{Listener, Socket};
use ttrpc::asynchronous::{Client, Server};

pub use self::apply::{apply_adjustment, apply_resources};
pub use self::error::Error;
pub use self::metrics::{CallStats, Metrics};
pub use self::validate::DefaultValidator;

use self::launch::Installed;
use self::merge::Merge;
use self::plugin::{Plugin, Refused, Terms};

const RUNTIME_SERVICE: &str = "nri.pkg.api.v1alpha1.Runtime";
/// Plugins at once, those in their handshake included.
const MAX_PLUGINS: usize = 128;

/// Settings, table `io.containerd.nri.v1.nri`.
#[derive(Debug, Clone)]
pub struct Config {
    /// No plugins at all.
    pub disable: bool,
    /// Socket to which plugins connect.
    pub socket_path: PathBuf,
    /// Directory of plugins to start.
    pub plugin_path: PathBuf,
    /// Directory of their configurations.
    pub plugin_config_path: PathBuf,
    /// Time to register after connecting.
    pub registration_timeout: Duration,
    /// Time to answer a request.
    pub request_timeout: Duration,
    /// Do not listen on the socket.
    pub disable_connections: bool,
    /// The built-in validator.
    pub default_validator: DefaultValidator,
    /// The daemon's version, which plugins are told.
    pub runtime_version: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            disable: false,
            socket_path: PathBuf::from("/var/run/nri/nri.sock"),
            plugin_path: PathBuf::from("/opt/nri/plugins"),
            plugin_config_path: PathBuf::from("/etc/nri/conf.d"),
            registration_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(2),
            disable_connections: false,
            default_validator: DefaultValidator::default(),
            runtime_version: String::new(),
        }
    }
}

/// The runtime, as NRI sees it. None of the methods may call [`Nri::block_sync`].
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// Every pod, and every container that has neither exited nor an unknown state.
    async fn snapshot(&self) -> (Vec<PodSandbox>, Vec<Container>);

    /// Changes containers. Returns the changes that failed and may not be ignored.
    async fn update(&self, updates: Vec<ContainerUpdate>) -> Vec<ContainerUpdate>;

    /// Stops containers at once; failures are the runtime's to log.
    async fn evict(&self, evictions: Vec<ContainerEviction>);
}

/// What the plugins want for a new container.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Created {
    /// Changes to it, for [`apply_adjustment`].
    pub adjust: ContainerAdjustment,
    /// Changes to other containers, for the caller to make.
    pub updates: Vec<ContainerUpdate>,
    /// Containers to stop with timeout 0, for the caller to do.
    pub evictions: Vec<ContainerEviction>,
}

/// What the plugins make of a container's update.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Updated {
    /// Resources to set instead of those asked for; `None` when no plugin changed them.
    pub resources: Option<LinuxResources>,
    /// Changes to other containers, for the caller to make.
    pub updates: Vec<ContainerUpdate>,
    /// Containers to stop with timeout 0, for the caller to do.
    pub evictions: Vec<ContainerEviction>,
}

/// Keeps plugins from being synchronized while it lives.
#[derive(Debug)]
pub struct SyncBlock {
    _guard: OwnedRwLockReadGuard<()>,
}

/// The plugins of this daemon.
pub struct Nri {
    config: Config,
    runtime: Arc<dyn Runtime>,
    /// Those that are called, in order.
    plugins: RwLock<Vec<Arc<Plugin>>>,
    /// Held shared by operations, exclusively by synchronizations.
    sync: Arc<tokio::sync::RwLock<()>>,
    metrics: Metrics,
    tasks: TaskTracker,
    cancel: CancellationToken,
}

impl std::fmt::Debug for Nri {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nri")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// An event with a pod, or with a pod and a container, that has no answer.
macro_rules! notification {
    ($(#[$doc:meta])* $name:ident, $event:ident, $request:ident, pod) => {
        $(#[$doc])*
        pub async fn $name(&self, pod: &PodSandbox) -> Result<(), Error> {
            for plugin in self.plugins() {
                let request = $request { pod: Some(pod.clone()) };
                let old = || (Some(pod.clone()), None);
                let method = method_of(Event::$event);
                plugin.notify(Event::$event, method, &request, old, &self.metrics).await?;
            }
            Ok(())
        }
    };
    ($(#[$doc:meta])* $name:ident, $event:ident, $request:ident, container) => {
        $(#[$doc])*
        pub async fn $name(&self, pod: &PodSandbox, container: &Container) -> Result<(), Error> {
            for plugin in self.plugins() {
                let (pod, container) = (Some(pod.clone()), Some(container.clone()));
                let request = $request { pod: pod.clone(), container: container.clone() };
                let method = method_of(Event::$event);
                let old = || (pod, container);
                plugin.notify(Event::$event, method, &request, old, &self.metrics).await?;
            }
            Ok(())
        }
    };
}

impl Nri {
    /// Opens the socket, starts the installed plugins and waits until each is synchronized or has
    /// failed, which is only logged. Call this once the runtime knows its pods.
    ///
    /// # Errors
    /// A socket that cannot be listened on.
    pub async fn start(config: Config, runtime: Arc<dyn Runtime>) -> Result<Arc<Self>, Error> {
        let nri = Arc::new(Self {
            runtime,
            plugins: RwLock::default(),
            sync: Arc::default(),
            metrics: Metrics::default(),
            tasks: TaskTracker::new(),
            cancel: CancellationToken::new(),
            config,
        });
        if nri.config.disable {
            return Ok(nri);
        }
        if !nri.config.disable_connections {
            let listener = listen(&nri.config.socket_path).map_err(|source| Error::Listen {
                path: nri.config.socket_path.display().to_string(),
                source,
            })?;
            nri.tasks.spawn(nri.clone().accept(listener));
        }
        let installed = launch::installed(&nri.config.plugin_path).unwrap_or_else(|error| {
            tracing::warn!(%error, "NRI plugin directory");
            Vec::new()
        });
        let (ready, mut done) = mpsc::channel::<()>(1);
        for plugin in installed {
            nri.tasks.spawn(nri.clone().launch(plugin, ready.clone()));
        }
        drop(ready);
        // Closed once every plugin dropped its sender; nothing is ever sent.
        let _ = done.recv().await;
        Ok(nri)
    }

    /// Says goodbye to every plugin, ends those started here, and waits for all tasks.
    pub async fn shutdown(&self) {
        join_all(self.plugins().iter().map(|plugin| plugin.shutdown())).await;
        self.cancel.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Keeps new plugins from being synchronized until the value is dropped.
    pub async fn block_sync(&self) -> SyncBlock {
        SyncBlock {
            _guard: self.sync.clone().read_owned().await,
        }
    }

    /// The plugins that are called now, in order.
    #[must_use]
    pub fn plugin_names(&self) -> Vec<String> {
        self.plugins()
            .iter()
            .map(|plugin| plugin.name.clone())
            .collect()
    }

    /// Whether there is nobody to call.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let plugins = self.plugins.read().unwrap_or_else(PoisonError::into_inner);
        plugins.is_empty() && !self.config.default_validator.enable
    }

    /// Calls, errors and durations by plugin.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn plugins(&self) -> Vec<Arc<Plugin>> {
        let plugins = self.plugins.read().unwrap_or_else(PoisonError::into_inner);
        plugins.clone()
    }

    async fn accept(self: Arc<Self>, listener: UnixListener) {
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

    async fn launch(self: Arc<Self>, plugin: Installed, ready: mpsc::Sender<()>) {
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

    notification! {
        /// A pod is about to become visible.
        ///
        /// # Errors
        /// A plugin's refusal, which fails the request.
        run_pod_sandbox, RunPodSandbox, RunPodSandboxRequest, pod
    }
    notification! {
        /// A pod has been stopped. Failures are for logging only.
        ///
        /// # Errors
        /// The first plugin's.
        stop_pod_sandbox, StopPodSandbox, StopPodSandboxRequest, pod
    }
    notification! {
        /// A pod is being removed. Failures are for logging only.
        ///
        /// # Errors
        /// The first plugin's.
        remove_pod_sandbox, RemovePodSandbox, RemovePodSandboxRequest, pod
    }
    notification! {
        /// A pod's resources have been changed. Failures are for logging only.
        ///
        /// # Errors
        /// The first plugin's.
        post_update_pod_sandbox, PostUpdatePodSandbox, PostUpdatePodSandboxRequest, pod
    }
    notification! {
        /// A container has been created. Failures are for logging only.
        ///
        /// # Errors
        /// The first plugin's.
        post_create_container, PostCreateContainer, PostCreateContainerRequest, container
    }
    notification! {
        /// A container is about to be started.
        ///
        /// # Errors
        /// A plugin's refusal, which fails the request.
        start_container, StartContainer, StartContainerRequest, container
    }
    notification! {
        /// A container has been started. Failures are for logging only.
        ///
        /// # Errors
        /// The first plugin's.
        post_start_container, PostStartContainer, PostStartContainerRequest, container
    }
    notification! {
        /// A container has been updated. Failures are for logging only.
        ///
        /// # Errors
        /// The first plugin's.
        post_update_container, PostUpdateContainer, PostUpdateContainerRequest, container
    }
    notification! {
        /// A container is being removed. Failures are for logging only.
        ///
        /// # Errors
        /// The first plugin's.
        remove_container, RemoveContainer, RemoveContainerRequest, container
    }

    /// A pod's resources are about to be changed.
    ///
    /// # Errors
    /// A plugin's refusal, which fails the request.
    pub async fn update_pod_sandbox(
        &self,
        pod: &PodSandbox,
        overhead: Option<&LinuxResources>,
        resources: Option<&LinuxResources>,
    ) -> Result<(), Error> {
        let request = UpdatePodSandboxRequest {
            pod: Some(pod.clone()),
            overhead_linux_resources: overhead.cloned(),
            linux_resources: resources.cloned(),
        };
        let event = Event::UpdatePodSandbox;
        for plugin in self.plugins() {
            let _: Option<UpdatePodSandboxResponse> = plugin
                .call(event, method_of(event), &request, &self.metrics)
                .await?;
        }
        Ok(())
    }

    /// A container is about to be created. Returns what the plugins want, accepted by every
    /// validator.
    ///
    /// # Errors
    /// A plugin's refusal, two plugins in conflict, or a validator's rejection.
    pub async fn create_container(
        &self,
        pod: &PodSandbox,
        container: &Container,
    ) -> Result<Created, Error> {
        let plugins = self.plugins();
        if plugins.is_empty() && !self.config.default_validator.enable {
            return Ok(Created::default());
        }
        let event = Event::CreateContainer;
        let mut merge = Merge::create(container.clone());
        for plugin in &plugins {
            let request = CreateContainerRequest {
                pod: Some(pod.clone()),
                container: Some(merge.container.clone()),
            };
            let answer = plugin
                .call(event, method_of(event), &request, &self.metrics)
                .await?;
            let Some(CreateContainerResponse {
                adjust,
                update,
                evict,
            }) = answer
            else {
                continue;
            };
            if let Some(adjust) = adjust {
                merge.adjust(&plugin.name, adjust)?;
            }
            merge.update(&plugin.name, update)?;
            merge.evictions.extend(evict);
        }
        self.validate(&plugins, pod, container, &merge).await?;
        Ok(Created {
            adjust: merge.adjust,
            updates: merge.updates,
            evictions: merge.evictions,
        })
    }

    async fn validate(
        &self,
        plugins: &[Arc<Plugin>],
        pod: &PodSandbox,
        container: &Container,
        merge: &Merge,
    ) -> Result<(), Error> {
        let instances: Vec<PluginInstance> = plugins.iter().map(|p| p.instance()).collect();
        let own = &self.config.default_validator;
        own.check(pod, container, &merge.owners, &instances)?;
        let event = Event::ValidateContainerAdjustment;
        if !plugins.iter().any(|plugin| plugin.wants(event)) {
            return Ok(());
        }
        let request = ValidateContainerAdjustmentRequest {
            pod: Some(pod.clone()),
            container: Some(container.clone()),
            adjust: Some(merge.adjust.clone()),
            update: merge.updates.clone(),
            owners: Some(merge.owners.message()),
            plugins: instances,
        };
        let ask = async |plugin: &Arc<Plugin>| {
            let answer = plugin
                .call(event, method_of(event), &request, &self.metrics)
                .await?;
            match answer {
                Some(ValidateContainerAdjustmentResponse {
                    reject: true,
                    reason,
                }) => Err(Error::Rejected {
                    plugin: plugin.name.clone(),
                    reason,
                }),
                _ => Ok(()),
            }
        };
        join_all(plugins.iter().map(ask))
            .await
            .into_iter()
            .collect()
    }

    /// A container's resources are about to be changed.
    ///
    /// # Errors
    /// A plugin's refusal, or two plugins in conflict.
    pub async fn update_container(
        &self,
        pod: &PodSandbox,
        container: &Container,
        resources: &LinuxResources,
    ) -> Result<Updated, Error> {
        let event = Event::UpdateContainer;
        let mut merge = Merge::change();
        let mut wanted = resources.clone();
        for plugin in self.plugins() {
            let request = UpdateContainerRequest {
                pod: Some(pod.clone()),
                container: Some(container.clone()),
                linux_resources: Some(wanted.clone()),
            };
            let answer = plugin
                .call(event, method_of(event), &request, &self.metrics)
                .await?;
            let Some(UpdateContainerResponse { update, evict }) = answer else {
                continue;
            };
            merge.update(&plugin.name, update)?;
            merge.evictions.extend(evict);
            let own = merge
                .updates
                .iter()
                .find(|u| u.container_id == container.id);
            if let Some(own) = own.and_then(|u| u.linux.as_ref()?.resources.as_ref()) {
                merge::overlay(&mut wanted, own);
            }
        }
        let (own, updates) = merge
            .updates
            .into_iter()
            .partition::<Vec<_>, _>(|update| update.container_id == container.id);
        Ok(Updated {
            resources: (!own.is_empty()).then_some(wanted),
            updates,
            evictions: merge.evictions,
        })
    }

    /// A container has been stopped. Returns changes to other containers. Failures are for logging
    /// only.
    ///
    /// # Errors
    /// The first plugin's, or two plugins in conflict.
    pub async fn stop_container(
        &self,
        pod: &PodSandbox,
        container: &Container,
    ) -> Result<Vec<ContainerUpdate>, Error> {
        let event = Event::StopContainer;
        let mut merge = Merge::change();
        for plugin in self.plugins() {
            let request = StopContainerRequest {
                pod: Some(pod.clone()),
                container: Some(container.clone()),
            };
            let answer: Option<StopContainerResponse> = plugin
                .call(event, method_of(event), &request, &self.metrics)
                .await?;
            if let Some(answer) = answer {
                merge.update(&plugin.name, answer.update)?;
            }
        }
        Ok(merge.updates)
    }
}

/// The RPC of an event.
fn method_of(event: Event) -> &'static str {
    match event {
        Event::RunPodSandbox => "RunPodSandbox",
        Event::StopPodSandbox => "StopPodSandbox",
        Event::RemovePodSandbox => "RemovePodSandbox",
        Event::CreateContainer => "CreateContainer",
        Event::PostCreateContainer => "PostCreateContainer",
        Event::StartContainer => "StartContainer",
        Event::PostStartContainer => "PostStartContainer",
        Event::UpdateContainer => "UpdateContainer",
        Event::PostUpdateContainer => "PostUpdateContainer",
        Event::StopContainer => "StopContainer",
        Event::RemoveContainer => "RemoveContainer",
        Event::UpdatePodSandbox => "UpdatePodSandbox",
        Event::PostUpdatePodSandbox => "PostUpdatePodSandbox",
        Event::ValidateContainerAdjustment => "ValidateContainerAdjustment",
        Event::Unknown | Event::Last => "",
    }
}

/// Opens the socket for root only. One left by a daemon that is gone is replaced.
fn listen(path: &Path) -> std::io::Result<UnixListener> {
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

#[cfg(test)]
mod tests;
