//! The plugin: what every call works with, made once at start.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use lighter_engine::gc::Collector;
use lighter_engine::runtime::Manager;
use lighter_engine::transfer::Transfer;
use lighter_store::metadata::Db;
use lighter_store::{Namespace, Scope};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;

use crate::cdi;
use crate::cni::{self, Cni};
use crate::config;
use crate::error::{Error, Result};
use crate::image::Images;
use crate::json::Json;
use crate::nri;
use crate::runtime::{
    Backend, Backlog, History, Hooks, ImageFilesystem, KnownFeatures, Outputs, Timers,
};
use crate::selinux::{self, Selinux};
use crate::spec;
use crate::spec::classes::Classes;
use crate::spec::resources::Machine;
use crate::store::Store;
use crate::streaming;

/// Directory of the plugin below the daemon's root and state.
pub const DIRECTORY: &str = "io.containerd.grpc.v1.cri";

fn count(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// Makes a directory that only we may look into; one that is there is made so.
async fn private_dir(dir: &Path) -> Result<()> {
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    tokio::fs::create_dir_all(dir)
        .await
        .map_err(crate::error::io("create", dir))?;
    tokio::fs::set_permissions(dir, mode)
        .await
        .map_err(crate::error::io("close to others", dir))
}

/// Networks as the configuration wants them.
fn cni_config(runtime: &config::Runtime, root: &Path) -> cni::Config {
    let settings = &runtime.cni;
    cni::Config {
        conf_dir: PathBuf::from(&settings.conf_dir),
        bin_dirs: settings.bin_dirs.iter().map(PathBuf::from).collect(),
        max_conf_num: count(settings.max_conf_num),
        setup_serially: settings.setup_serially,
        conf_template: Some(&settings.conf_template)
            .filter(|t| !t.is_empty())
            .map(PathBuf::from),
        ..cni::Config::with_root(root)
    }
}

/// What the plugin is made of.
#[derive(Debug)]
pub struct Parts {
    /// Configuration.
    pub config: config::Cri,
    /// Configuration of NRI plugins.
    pub nri: nri::Config,
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
    /// Networks of handlers without a directory of their own.
    pub(crate) cni: Cni,
    /// Networks by handler, where one has a directory of its own.
    pub(crate) own_cni: BTreeMap<String, Cni>,
    /// Held by whoever mounts an image as a volume.
    pub(crate) volumes: tokio::sync::Mutex<()>,
    /// Specs that handlers start from in place of the default.
    bases: HashMap<String, Value>,
    /// Accounts of images.
    pub(crate) tables: spec::user::Known,
    pub(crate) json: Json,
    pub(crate) stats: History,
    pub(crate) timers: Timers,
    /// Output that the daemon reads, because its shim does not write logs.
    pub(crate) outputs: Outputs,
    pub(crate) hooks: Hooks,
    /// `None` when CDI is off.
    pub(crate) cdi: Option<Arc<cdi::Registry>>,
    nri: nri::Config,
    pub(crate) streaming: OnceLock<Arc<streaming::Server>>,
    pub(crate) tracker: TaskTracker,
    pub(crate) stop: CancellationToken,
    pub(crate) machine: Machine,
    pub(crate) events: Backlog,
    /// What handlers offer, once somebody asked.
    pub(crate) features: KnownFeatures,
    /// Labels and the categories that are taken.
    pub(crate) selinux: Selinux,
    /// Classes of block I/O, and of caches and memory bandwidth.
    pub(crate) classes: Classes,
    /// The last measure of the images, when it was taken and of which images.
    pub(crate) image_filesystems: tokio::sync::Mutex<Option<(u64, Instant, Vec<ImageFilesystem>)>>,
    /// Held by whoever makes the pause image.
    pub(crate) pause_made: tokio::sync::Mutex<()>,
    pub(crate) version: String,
}

/// Takes away the short-lived mounts that a killed daemon left in `dir`.
fn drop_mounts(dir: &Path) {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    for entry in entries {
        if entry
            .file_name()
            .to_string_lossy()
            .starts_with("lighter-mount-")
        {
            let path = entry.path();
            // Not mounted any more is as good.
            let _ = nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH);
            let _ = std::fs::remove_dir(&path);
        }
    }
}

/// Measurements, as often and as long as the configuration says.
fn history(config: &config::Cri) -> Result<History> {
    let runtime = &config.runtime;
    Ok(History::new(
        config::duration("stats_collect_period", &runtime.stats_collect_period)?,
        config::duration("stats_retention_period", &runtime.stats_retention_period)?,
        Duration::from_secs(config.images.stats_collect_period),
    ))
}

/// What specs depend on beside requests: what runtimes offer, labels, and classes.
///
/// # Errors
/// For values that keys of the configuration cannot have.
fn beside_requests(config: &config::Cri) -> Result<(KnownFeatures, Selinux, Classes)> {
    for warning in config.runtime.check()? {
        tracing::warn!("{warning}");
    }
    let features = KnownFeatures::of(config.runtime.containerd.runtimes.keys());
    let selinux = Selinux::new(&config.runtime, &selinux::Places::below(Path::new("/")))?;
    Ok((features, selinux, Classes::load(&config.tasks)))
}

impl Plugin {
    /// Makes the plugin and starts its background work; `recover` comes before serving.
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
            private_dir(dir).await?;
        }
        drop_mounts(&state);
        let images = Images::new(
            parts.db.clone(),
            scope.clone(),
            parts.transfer.clone(),
            parts.config.images.clone(),
        );
        let common = cni_config(&parts.config.runtime, &root);
        let cni = Cni::new(common.clone()).await;
        let (mut own_cni, mut bases) = (BTreeMap::new(), HashMap::new());
        for (name, handler) in &parts.config.runtime.containerd.runtimes {
            if !handler.base_runtime_spec.is_empty() {
                bases.insert(name.clone(), base_spec(&handler.base_runtime_spec).await?);
            }
            if !handler.cni_conf_dir.is_empty() {
                let own = cni::Config {
                    conf_dir: PathBuf::from(&handler.cni_conf_dir),
                    max_conf_num: count(handler.cni_max_conf_num),
                    conf_template: None,
                    ..common.clone()
                };
                own_cni.insert(name.clone(), Cni::new(own).await);
            }
        }
        let stats = history(&parts.config)?;
        let (features, selinux, classes) = beside_requests(&parts.config)?;
        let dirs = parts.config.runtime.cdi_spec_dirs.iter().map(PathBuf::from);
        let cdi = parts
            .config
            .runtime
            .enable_cdi
            .then(|| Arc::new(cdi::Registry::new(dirs)));
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
            own_cni,
            volumes: tokio::sync::Mutex::default(),
            bases,
            tables: spec::user::Known::default(),
            json: Json::new()?,
            stats,
            timers: Timers::default(),
            outputs: Outputs::default(),
            hooks: Hooks::default(),
            cdi,
            nri: parts.nri,
            streaming: OnceLock::new(),
            tracker: parts.tracker,
            stop: parts.stop,
            events: Backlog::default(),
            features,
            selinux,
            classes,
            image_filesystems: tokio::sync::Mutex::default(),
            pause_made: tokio::sync::Mutex::default(),
            version: parts.version,
        });
        plugin.serve_streams().await?;
        plugin.background();
        Ok(plugin)
    }

    /// Lets NRI plugins in: once all there is is known, so that they are told of it.
    ///
    /// # Errors
    /// When their socket cannot be made.
    pub(crate) async fn admit_plugins(self: &Arc<Self>) -> Result<()> {
        self.start_nri(self.nri.clone()).await
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
            idle_timeout: config::duration("stream_idle_timeout", &server.stream_idle_timeout)?
                .unwrap_or(streaming::Config::default().idle_timeout),
            tls: stream_keys(server)?,
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
            .spawn(async move { stop.run_until_cancelled(this.watch_networks()).await });
        let (this, stop) = (Arc::clone(self), self.stop.clone());
        self.tracker
            .spawn(async move { stop.run_until_cancelled(this.follow_oom()).await });
        let (this, stop) = (Arc::clone(self), self.stop.clone());
        self.tracker
            .spawn(async move { stop.run_until_cancelled(this.sample()).await });
    }

    async fn watch_networks(&self) {
        let own = self.own_cni.values().map(Cni::watch);
        tokio::join!(self.cni.watch(), futures::future::join_all(own));
    }

    /// The networks of a handler's pods.
    pub(crate) fn cni_of(&self, handler: &str) -> &Cni {
        self.own_cni
            .get(self.handler_name(handler))
            .unwrap_or(&self.cni)
    }

    /// The runtime handler of a name; empty for the default.
    ///
    /// # Errors
    /// For a handler that is not configured.
    pub(crate) fn handler(&self, name: &str) -> Result<&config::Handler> {
        let name = self.handler_name(name);
        let runtimes = &self.config.runtime.containerd.runtimes;
        runtimes
            .get(name)
            .ok_or_else(|| Error::unknown(format!("no runtime for {name:?} is configured")))
    }

    /// The name of a runtime handler; empty for the default.
    pub(crate) fn handler_name<'a>(&'a self, name: &'a str) -> &'a str {
        if name.is_empty() {
            &self.config.runtime.containerd.default_runtime_name
        } else {
            name
        }
    }

    /// What specs of a runtime handler start from.
    pub(crate) fn base_spec(&self, name: &str) -> Value {
        let configured = self.bases.get(self.handler_name(name));
        configured.cloned().unwrap_or_else(spec::base)
    }

    /// Whether specs of a runtime handler start from a file.
    pub(crate) fn has_base_spec(&self, name: &str) -> bool {
        self.bases.contains_key(self.handler_name(name))
    }

    /// The snapshotter of a runtime handler.
    pub(crate) fn snapshotter_of(&self, handler: &str) -> String {
        let own = self.handler(handler).ok().map(|h| &h.snapshotter);
        let platform = self.config.images.runtime_platforms.get(handler);
        own.into_iter()
            .chain(platform.map(|p| &p.snapshotter))
            .find(|s| !s.is_empty())
            .unwrap_or(&self.config.images.snapshotter)
            .clone()
    }

    /// Collects garbage now.
    pub(crate) async fn collect(&self) {
        if let Err(error) = self.collector.run_now().await {
            tracing::warn!(%error, "collection failed");
        }
        self.images.changed();
    }

    /// Snapshotters that handlers use: the default one, then the others by name.
    pub(crate) fn snapshotters(&self) -> Vec<String> {
        let default = &self.config.images.snapshotter;
        let handlers = self.config.runtime.containerd.runtimes.keys();
        let platforms = self.config.images.runtime_platforms.values();
        let platforms = platforms.map(|platform| platform.snapshotter.clone());
        let others = handlers
            .map(|name| self.snapshotter_of(name))
            .chain(platforms);
        let others: BTreeSet<_> = others
            .filter(|name| !name.is_empty() && name != default)
            .collect();
        std::iter::once(default.clone()).chain(others).collect()
    }

    /// The streaming server.
    pub(crate) fn streaming(&self) -> Result<&Arc<streaming::Server>> {
        self.streaming
            .get()
            .ok_or_else(|| Error::unknown("server is not initialized yet"))
    }
}

/// Reads a handler's base spec.
async fn base_spec(file: &str) -> Result<Value> {
    let path = Path::new(file);
    let text = tokio::fs::read(path)
        .await
        .map_err(crate::error::io("failed to load base OCI spec", path))?;
    let base: Value = serde_json::from_slice(&text)
        .map_err(|e| Error::invalid(format!("failed to load base OCI spec {file}: {e}")))?;
    if base.is_object() {
        Ok(base)
    } else {
        Err(Error::invalid(format!(
            "base OCI spec {file} is no JSON object"
        )))
    }
}

/// The key pair for TLS of the streaming server; `None` without TLS.
///
/// # Errors
/// When one of the two files is named without the other, or files without TLS.
fn stream_keys(server: &config::Server) -> Result<Option<streaming::KeyPair>> {
    let pair = &server.x509_key_pair_streaming;
    let named = !pair.tls_cert_file.is_empty() || !pair.tls_key_file.is_empty();
    let complete = !pair.tls_cert_file.is_empty() && !pair.tls_key_file.is_empty();
    match (server.enable_tls_streaming, named) {
        (false, false) => Ok(None),
        (false, true) => Err(Error::invalid(
            "x509_key_pair_streaming is set, but enable_tls_streaming is not",
        )),
        (true, false) => Ok(Some(streaming::KeyPair::SelfSigned)),
        (true, true) if complete => Ok(Some(streaming::KeyPair::Files {
            certificate: PathBuf::from(&pair.tls_cert_file),
            key: PathBuf::from(&pair.tls_key_file),
        })),
        (true, true) => Err(Error::invalid(
            "x509_key_pair_streaming needs both tls_cert_file and tls_key_file",
        )),
    }
}

/// How long undoing a failed call may take.
pub(crate) const UNDO_LIMIT: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tls_files_come_in_pairs() {
        let mut server = config::Server::default();
        assert_eq!(stream_keys(&server).unwrap(), None);
        server.x509_key_pair_streaming.tls_cert_file = "/c".into();
        assert!(stream_keys(&server).is_err(), "without TLS");
        server.enable_tls_streaming = true;
        assert!(stream_keys(&server).is_err(), "without a key");
        server.x509_key_pair_streaming.tls_key_file = "/k".into();
        assert!(matches!(
            stream_keys(&server).unwrap(),
            Some(streaming::KeyPair::Files { .. })
        ));
        server.x509_key_pair_streaming = config::KeyPair::default();
        assert_eq!(
            stream_keys(&server).unwrap(),
            Some(streaming::KeyPair::SelfSigned)
        );
    }

    #[tokio::test]
    async fn a_base_spec_must_be_an_object() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().display().to_string();
        for bad in ["", "[]", "{"] {
            std::fs::write(file.path(), bad).unwrap();
            assert!(base_spec(&path).await.is_err(), "{bad:?}");
        }
        std::fs::write(file.path(), r#"{"process":{}}"#).unwrap();
        assert!(base_spec(&path).await.unwrap().is_object());
        assert!(base_spec("/nonexistent").await.is_err());
    }
}
