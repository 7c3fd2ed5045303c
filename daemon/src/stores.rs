//! The durable part: database, blobs, snapshotters, records.
//!
//! | below the root | what |
//! |---|---|
//! | `io.containerd.metadata.v1.sled/` | the database |
//! | `io.containerd.metadata.v1.sled.export` | what it is rebuilt from when it is damaged |
//! | `io.containerd.content.v1.content/` | blobs and ingests, in containerd's layout |
//! | `io.containerd.snapshotter.v1.<id>/` | snapshots of each driver |

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use lighter_proto::errdefs::{Classify as _, ErrorKind, WireError, render};
use lighter_snapshotter::{
    Blockfile, BlockfileConfig, Erofs, ErofsConfig, Native, Overlayfs, OverlayfsConfig, Proxy,
    Snapshotter, mount,
};
use lighter_store::content::{self, Local, Store};
use lighter_store::events::Exchange;
use lighter_store::metadata::{Db, SharingPolicy};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::plugin::Plugin;
use crate::plugin::builtins::{kind, proxied, skipped};

/// Directory of the database below the root.
const DATABASE: &str = "io.containerd.metadata.v1.sled";
/// Snapshotters of this process.
pub(crate) const BUILT_IN: [&str; 4] = ["overlayfs", "native", "erofs", "blockfile"];
/// How long a database that another process has is waited for.
const LOCK_LIMIT: Duration = Duration::from_secs(5);
/// Pause between two tries at it.
const LOCK_PAUSE: Duration = Duration::from_millis(50);
/// How often a database that changed is exported.
const EXPORT_EVERY: Duration = Duration::from_secs(300);

/// Opened stores, and each as a plugin, failed ones included.
pub(crate) struct Stores {
    /// The database under everything.
    pub(crate) kv: lighter_kv::Db,
    /// Records.
    pub(crate) db: Db,
    /// Content store and snapshotters for introspection.
    pub(crate) plugins: Vec<Plugin>,
    /// Whether the database was damaged and rebuilt: changes since its export are lost.
    pub(crate) rebuilt: bool,
}

/// Opens the database, or waits for it a little. A daemon that was killed while it forked leaves a
/// child that has its lock until it executes its program, which takes long on a busy machine.
fn open_database(path: &Path) -> Result<(lighter_kv::Db, lighter_kv::Opened), lighter_kv::Error> {
    let until = Instant::now() + LOCK_LIMIT;
    loop {
        match lighter_kv::Db::open_or_rebuild(path, &lighter_kv::Options::default()) {
            Err(lighter_kv::Error::Locked { .. }) if Instant::now() < until => {
                std::thread::sleep(LOCK_PAUSE);
            }
            opened => return opened,
        }
    }
}

/// Opens everything durable. Blocks.
///
/// # Errors
/// When the database or the content cannot be opened; a snapshotter that cannot is left out.
pub(crate) fn open(config: &Config) -> anyhow::Result<Stores> {
    let path = config.root.join(DATABASE);
    let (kv, opened) =
        open_database(&path).with_context(|| format!("open the database in {}", path.display()))?;
    let (content, mut plugins) = content(config)?;
    let mut snapshotters = BTreeMap::new();
    for (id, opened) in drivers(config, &kv)? {
        let plugin = match config.proxies.get(&id) {
            Some(proxy) => proxied(kind::SNAPSHOTTER, &id, proxy),
            None => Plugin::new(kind::SNAPSHOTTER, &id).on_platform(),
        };
        match opened {
            Ok(snapshotter) => {
                let mut plugin = plugin.capabilities(snapshotter.capabilities());
                if let Some(root) = snapshotter.root() {
                    plugin = plugin.export("root", root.display().to_string());
                }
                plugins.push(plugin);
                snapshotters.insert(id, snapshotter);
            }
            Err(error) => {
                // What the machine or the file does not offer is no fault.
                if error.kind == ErrorKind::FailedPrecondition {
                    info!(snapshotter = %id, %error, "snapshotter left out");
                } else {
                    warn!(snapshotter = %id, %error, "snapshotter left out");
                }
                plugins.push(plugin.failed(error));
            }
        }
    }
    let policy = match config.plugins.metadata.content_sharing_policy.as_str() {
        "" | "shared" => SharingPolicy::Shared,
        "isolated" => SharingPolicy::Isolated,
        other => anyhow::bail!(
            "plugins.'io.containerd.metadata.v1.bolt'.content_sharing_policy: {other:?} is neither shared nor isolated"
        ),
    };
    let db = Db::open(kv.clone(), content, snapshotters, Exchange::new(), policy)
        .context("open the records")?;
    Ok(Stores {
        kv,
        db,
        plugins,
        rebuilt: opened != lighter_kv::Opened::Whole,
    })
}

/// Keeps the export that a damaged database is rebuilt from, until `stop` and once more then. A
/// database that failed ends the daemon: containers go on, and the next start opens it anew.
pub(crate) async fn keep_exported(kv: lighter_kv::Db, root: PathBuf, stop: CancellationToken) {
    let target = lighter_kv::export_path(&root.join(DATABASE));
    let mut exported = None;
    loop {
        let stopping = tokio::select! {
            () = stop.cancelled() => true,
            reason = kv.stopped() => {
                error!(reason, "the database failed; the daemon ends");
                stop.cancel();
                return;
            }
            () = tokio::time::sleep(EXPORT_EVERY) => false,
        };
        let revision = kv.revision();
        if exported != Some(revision) {
            let (kv, target) = (kv.clone(), target.clone());
            match tokio::task::spawn_blocking(move || kv.export(&target)).await {
                Ok(Ok(_pairs)) => exported = Some(revision),
                Ok(Err(error)) => warn!(error = %render(&error), "export of the database"),
                Err(error) => warn!(%error, "export of the database"),
            }
        }
        if stopping {
            return;
        }
    }
}

/// The one content store: ours, or one in another process in its place.
fn content(config: &Config) -> anyhow::Result<(Arc<dyn Store>, Vec<Plugin>)> {
    let own = Plugin::new(kind::CONTENT, "content");
    let uri = own.uri();
    let mut remote = config.proxies.iter().filter(|(_, p)| p.kind == "content");
    match (config.disabled(&uri), remote.next(), remote.next()) {
        (false, None, _) => {
            let path = config.root.join(&uri);
            let store = Local::open(&path)
                .with_context(|| format!("open the content in {}", path.display()))?;
            let plugin = own.export("root", path.display().to_string());
            Ok((Arc::new(store), vec![plugin]))
        }
        (true, Some((name, proxy)), None) => {
            let store = content::Proxy::connect(&proxy.address)
                .with_context(|| format!("proxy_plugins.{name}"))?;
            let plugins = vec![
                own.failed(skipped(&uri)),
                proxied(kind::CONTENT, name, proxy),
            ];
            Ok((Arc::new(store), plugins))
        }
        (true, None, _) => {
            anyhow::bail!("{uri} is turned off and no proxy plugin of type content takes its place")
        }
        (false, Some((name, _)), _) => anyhow::bail!(
            "there can be one content store: add {uri} to disabled_plugins to use \
             proxy_plugins.{name}"
        ),
        (true, Some((first, _)), Some((second, _))) => anyhow::bail!(
            "there can be one content store: remove proxy_plugins.{first} or proxy_plugins.{second}"
        ),
    }
}

type Opened = Result<Arc<dyn Snapshotter>, WireError>;

/// Every snapshotter that is configured, whether it could be opened or not.
fn drivers(config: &Config, kv: &lighter_kv::Db) -> anyhow::Result<Vec<(String, Opened)>> {
    let mut drivers = Vec::new();
    for id in BUILT_IN {
        let uri = format!("{}.{id}", kind::SNAPSHOTTER);
        if config.proxies.get(id).is_some_and(|p| p.kind == "snapshot") {
            anyhow::ensure!(
                config.disabled(&uri),
                "proxy_plugins.{id}: there is a snapshotter of that name: choose another, or add \
                 {uri} to disabled_plugins"
            );
            continue;
        }
        let opened = if config.disabled(&uri) {
            Err(skipped(&uri))
        } else {
            builtin(config, kv, id)
        };
        drivers.push((id.to_owned(), opened));
    }
    for (name, proxy) in config.proxies.iter().filter(|(_, p)| p.kind == "snapshot") {
        let opened = Proxy::connect(&proxy.address, name)
            .map(|driver| {
                let root = proxy.exports.get("root").map(PathBuf::from);
                Arc::new(driver.described(proxy.capabilities.clone(), root)) as Arc<dyn Snapshotter>
            })
            .map_err(failed);
        drivers.push((name.clone(), opened));
    }
    Ok(drivers)
}

/// The snapshotter `id` of this process, with records in `kv`.
///
/// # Errors
/// For an id that is none of [`BUILT_IN`], and when it cannot be opened.
pub(crate) fn builtin(config: &Config, kv: &lighter_kv::Db, id: &str) -> Opened {
    if !BUILT_IN.contains(&id) {
        return Err(WireError::new(
            ErrorKind::InvalidArgument,
            format!("snapshotter {id:?} is none of {}", BUILT_IN.join(", ")),
        ));
    }
    let root = |configured: &str| {
        if configured.is_empty() {
            config.root.join(format!("{}.{id}", kind::SNAPSHOTTER))
        } else {
            Path::new(configured).to_owned()
        }
    };
    let prefix = format!("snapshotter/{id}/");
    let (kv, prefix, plugins) = (kv.clone(), prefix.as_bytes(), &config.plugins);
    let opened: Result<Arc<dyn Snapshotter>, _> = match id {
        "native" => {
            let root = root(&plugins.native.root_path);
            Native::open(kv, prefix, &root).map(|driver| Arc::new(driver) as _)
        }
        "erofs" => {
            let erofs = &plugins.erofs;
            let config = ErofsConfig {
                root: root(&erofs.root_path),
                ovl_mount_options: erofs.ovl_mount_options.clone(),
                enable_fsverity: erofs.enable_fsverity,
                set_immutable: erofs.set_immutable,
                default_size_bytes: default_size(&erofs.default_size)?,
            };
            Erofs::open(kv, prefix, config).map(|driver| Arc::new(driver) as _)
        }
        "blockfile" => {
            let blockfile = &plugins.blockfile;
            let config = BlockfileConfig {
                root: root(&blockfile.root_path),
                scratch_file: PathBuf::from(&blockfile.scratch_file),
                fs_type: blockfile.fs_type.clone(),
                mount_options: blockfile.mount_options.clone(),
                recreate_scratch: blockfile.recreate_scratch,
            };
            Blockfile::open(kv, prefix, config).map(|driver| Arc::new(driver) as _)
        }
        _ => {
            let overlay = &plugins.overlayfs;
            let config = OverlayfsConfig {
                root: root(&overlay.root_path),
                upperdir_label: overlay.upperdir_label,
                sync_remove: overlay.sync_remove,
                slow_chown: overlay.slow_chown,
                mount_options: overlay.mount_options.clone(),
            };
            Overlayfs::open(kv, prefix, config).map(|driver| Arc::new(driver) as _)
        }
    };
    opened.map_err(failed)
}

fn default_size(text: &str) -> Result<u64, WireError> {
    match text {
        "" => Ok(0),
        text => mount::size_bytes(text).ok_or_else(|| {
            WireError::new(
                ErrorKind::InvalidArgument,
                format!("failed to parse default_size {text:?}: want a size such as 64MiB"),
            )
        }),
    }
}

#[allow(clippy::needless_pass_by_value, reason = "used as `map_err(failed)`")]
fn failed(error: lighter_snapshotter::Error) -> WireError {
    let kind = match error.kind() {
        ErrorKind::FailedPrecondition => ErrorKind::FailedPrecondition,
        _ => ErrorKind::Unknown,
    };
    WireError::new(kind, format!("{}: skip plugin", render(&error)))
}
