//! The plugin: what every call works with, made once at start.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lighter_engine::gc::Collector;
use lighter_engine::runtime::Manager;
use lighter_engine::transfer::Transfer;
use lighter_proto::errdefs::into_status;
use lighter_proto::runtime::v1::ContainerEventResponse;
use lighter_snapshotter::Usage;
use lighter_store::filter::Filter;
use lighter_store::metadata::Db;
use lighter_store::{Namespace, Scope};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Response, Status};

use crate::cni::{self, Cni};
use crate::config;
use crate::error::{Error, Result};
use crate::image::Images;
use crate::json::Json;
use crate::runtime::{Backend, History};
use crate::spec::resources::Machine;
use crate::store::Store;
use crate::streaming;

/// Directory of the plugin below the daemon's root and state.
pub const DIRECTORY: &str = "io.containerd.grpc.v1.cri";
/// Events kept for a subscriber that reads slowly.
const EVENT_BACKLOG: usize = 1024;

/// What the plugin is made of.
#[derive(Debug)]
pub struct Parts {
    /// Configuration.
    pub config: config::Cri,
    /// The daemon's root directory.
    pub root: PathBuf,
    /// The daemon's state directory.
    pub state: PathBuf,
    /// Records.
    pub db: Db,
    /// Tasks.
    pub tasks: Manager,
    /// Transfers.
    pub transfer: Transfer,
    /// Garbage collection.
    pub collector: Collector,
    /// Owner of what calls leave behind.
    pub tracker: TaskTracker,
    /// Ends with the daemon.
    pub stop: CancellationToken,
    /// The daemon's version.
    pub version: String,
}

/// The way to the plugin: shut until what earlier runs left is known again.
#[derive(Debug, Default)]
pub struct Gate(OnceLock<Arc<Plugin>>);

impl Gate {
    /// Serves from now on.
    pub fn open(&self, plugin: Arc<Plugin>) {
        // The first one stays: there is one plugin in a process.
        let _ = self.0.set(plugin);
    }

    /// The plugin.
    ///
    /// # Errors
    /// `Unavailable` until it is open.
    #[allow(clippy::result_large_err, reason = "tonic's own error")]
    pub(crate) fn plugin(&self) -> Result<&Arc<Plugin>, Status> {
        self.0
            .get()
            .ok_or_else(|| Status::unavailable("server is not initialized yet"))
    }
}

/// Does work to its end, even when the caller hangs up.
pub(crate) async fn owned<T: Send + 'static>(
    plugin: &Plugin,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<Response<T>, Status> {
    let done = plugin.tracker.spawn(work).await;
    let done = done.map_err(|e| Status::internal(e.to_string()))?;
    done.map(Response::new).map_err(into_status)
}

/// The plugin.
#[derive(Debug)]
pub struct Plugin {
    pub(crate) config: config::Cri,
    pub(crate) root: PathBuf,
    pub(crate) state: PathBuf,
    pub(crate) db: Db,
    pub(crate) scope: Scope,
    pub(crate) tasks: Manager,
    pub(crate) transfer: Transfer,
    collector: Collector,
    pub(crate) images: Arc<Images>,
    pub(crate) store: Arc<Store>,
    pub(crate) cni: Cni,
    pub(crate) json: Json,
    pub(crate) stats: History,
    pub(crate) streaming: OnceLock<Arc<streaming::Server>>,
    pub(crate) tracker: TaskTracker,
    pub(crate) stop: CancellationToken,
    pub(crate) machine: Machine,
    pub(crate) events: broadcast::Sender<ContainerEventResponse>,
    pub(crate) version: String,
}

impl Plugin {
    /// Makes the plugin and starts its background work; [`Plugin::recover`] comes before serving.
    ///
    /// # Errors
    /// When directories cannot be made, the records cannot be read or the streaming server cannot
    /// listen.
    pub async fn build(parts: Parts) -> Result<Arc<Self>> {
        let namespace = Namespace::new(crate::NAMESPACE)?;
        let scope = Scope::new(namespace);
        let root = parts.root.join(DIRECTORY);
        let state = parts.state.join(DIRECTORY);
        for dir in [&root, &state] {
            tokio::fs::create_dir_all(dir)
                .await
                .map_err(crate::error::io("create", dir))?;
        }
        let images = Images::new(
            parts.db.clone(),
            scope.clone(),
            parts.transfer.clone(),
            parts.config.images.clone(),
        );
        let settings = &parts.config.runtime.cni;
        let cni = Cni::new(cni::Config {
            conf_dir: PathBuf::from(&settings.conf_dir),
            bin_dirs: settings.bin_dirs.iter().map(PathBuf::from).collect(),
            max_conf_num: usize::try_from(settings.max_conf_num).unwrap_or(usize::MAX),
            setup_serially: settings.setup_serially,
            conf_template: Some(&settings.conf_template)
                .filter(|t| !t.is_empty())
                .map(PathBuf::from),
            ..cni::Config::with_root(&root)
        })
        .await;
        let stats = History::new(
            config::duration(
                "stats_collect_period",
                &parts.config.runtime.stats_collect_period,
            )?,
            config::duration(
                "stats_retention_period",
                &parts.config.runtime.stats_retention_period,
            )?,
            Duration::from_secs(parts.config.images.stats_collect_period),
        );
        let plugin = Arc::new(Self {
            machine: Machine::detect(parts.config.runtime.disable_hugetlb_controller),
            config: parts.config,
            root,
            state,
            db: parts.db,
            scope,
            tasks: parts.tasks,
            transfer: parts.transfer,
            collector: parts.collector,
            images: Arc::new(images),
            store: Arc::default(),
            cni,
            json: Json::new()?,
            stats,
            streaming: OnceLock::new(),
            tracker: parts.tracker,
            stop: parts.stop,
            events: broadcast::Sender::new(EVENT_BACKLOG),
            version: parts.version,
        });
        plugin.serve_streams().await?;
        plugin.background();
        Ok(plugin)
    }

    /// Finds what earlier runs left. Tasks must be on the books.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub async fn recover(self: &Arc<Self>) -> Result<()> {
        self.images.load().await
    }

    async fn serve_streams(self: &Arc<Self>) -> Result<()> {
        let server = &self.config.server;
        let invalid = |what: &str| Error::invalid(format!("plugins.'{DIRECTORY}'.{what}"));
        let config = streaming::Config {
            address: server.stream_server_address.clone(),
            port: server
                .stream_server_port
                .parse()
                .map_err(|_| invalid("stream_server_port: not a port"))?,
            ..streaming::Config::default()
        };
        let backend = Arc::new(Backend(Arc::downgrade(self)));
        let server = streaming::Server::bind(&config, backend)
            .await
            .map_err(|e| Error::unknown(format!("streaming server: {e}")))?;
        self.tracker
            .spawn(Arc::clone(&server).serve(self.stop.clone()));
        // Set once: `build` alone calls this.
        let _ = self.streaming.set(server);
        Ok(())
    }

    fn background(self: &Arc<Self>) {
        let (images, stop) = (Arc::clone(&self.images), self.stop.clone());
        self.tracker
            .spawn(async move { stop.run_until_cancelled(images.follow()).await });
        let (this, stop) = (Arc::clone(self), self.stop.clone());
        self.tracker
            .spawn(async move { stop.run_until_cancelled(this.cni.watch()).await });
        let (this, stop) = (Arc::clone(self), self.stop.clone());
        self.tracker
            .spawn(async move { stop.run_until_cancelled(this.follow_oom()).await });
        let (this, stop) = (Arc::clone(self), self.stop.clone());
        self.tracker
            .spawn(async move { stop.run_until_cancelled(this.sample()).await });
    }

    /// The runtime handler of a name; empty for the default.
    ///
    /// # Errors
    /// For a handler that is not configured.
    pub(crate) fn handler(&self, name: &str) -> Result<&config::Handler> {
        let runtimes = &self.config.runtime.containerd;
        let name = if name.is_empty() {
            &runtimes.default_runtime_name
        } else {
            name
        };
        runtimes
            .runtimes
            .get(name)
            .ok_or_else(|| Error::unknown(format!("no runtime for {name:?} is configured")))
    }

    /// The snapshotter of a runtime handler.
    pub(crate) fn snapshotter_of(&self, handler: &str) -> String {
        self.handler(handler)
            .ok()
            .map(|h| h.snapshotter.clone())
            .filter(|s| !s.is_empty())
            .unwrap_or_else(|| self.config.images.snapshotter.clone())
    }

    /// Collects garbage now.
    pub(crate) async fn collect(&self) {
        if let Err(error) = self.collector.run_now().await {
            tracing::warn!(%error, "collection failed");
        }
    }

    /// Root of the image snapshotter, and what its snapshots take.
    ///
    /// # Errors
    /// When the snapshotter fails.
    pub(crate) async fn image_filesystem(&self) -> Result<(String, Usage)> {
        let name = &self.config.images.snapshotter;
        let snapshots = self.db.snapshots(name)?;
        let root = snapshots.driver().root().map(|r| r.display().to_string());
        let mut total = Usage::default();
        for info in snapshots.list(&self.scope, &Filter::default()).await? {
            // One that went away since it was listed takes nothing.
            if let Ok(usage) = snapshots.usage(&self.scope, &info.name).await {
                total.size_bytes += usage.size_bytes;
                total.inodes += usage.inodes;
            }
        }
        Ok((root.unwrap_or_default(), total))
    }

    /// The streaming server.
    pub(crate) fn streaming(&self) -> Result<&Arc<streaming::Server>> {
        self.streaming
            .get()
            .ok_or_else(|| Error::unknown("server is not initialized yet"))
    }
}

/// How long undoing a failed call may take.
pub(crate) const UNDO_LIMIT: Duration = Duration::from_secs(60);
