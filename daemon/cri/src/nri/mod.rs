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
mod connect;
mod error;
mod events;
mod launch;
mod merge;
mod metrics;
mod mux;
mod owners;
mod plugin;
mod validate;

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use lighter_proto::nri::pkg::api::v1alpha1::{
    Container, ContainerAdjustment, ContainerEviction, ContainerUpdate, LinuxResources, PodSandbox,
};
use tokio::sync::{OwnedRwLockReadGuard, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::apply::{apply_adjustment, apply_resources};
pub use self::error::Error;
pub use self::metrics::{CallStats, Metrics};
pub use self::validate::DefaultValidator;

use self::connect::listen;
use self::plugin::Plugin;

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

    /// Plugins that are called now.
    #[must_use]
    pub fn active(&self) -> usize {
        self.plugins().len()
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
}

#[cfg(test)]
mod tests;
