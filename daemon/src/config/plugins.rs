//! The tables below `[plugins]`: those of ours typed, the others warned about.

use lighter_cri::config as cri;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::Error;

/// Tables of plugins that containerd has and this daemon does without: accepted in silence, since
/// files written for containerd carry them.
const IGNORED: [&str; 14] = [
    "io.containerd.content.v1.content",
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.tracing",
    "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.runtime.v1.linux",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.differ.v1.erofs",
    "io.containerd.differ.v1.walking",
    "io.containerd.sandbox.controller.v1.podsandbox",
    "io.containerd.mount-manager.v1.bolt",
    "io.containerd.grpc.v1.streaming",
];

/// Every plugin table of ours.
#[derive(Debug, Clone, Default)]
#[allow(
    dead_code,
    reason = "checked here, read where the engine of each is wired"
)]
pub(crate) struct Plugins {
    pub(crate) scheduler: Scheduler,
    pub(crate) metadata: Metadata,
    pub(crate) overlayfs: Overlayfs,
    pub(crate) native: SnapshotterRoot,
    pub(crate) erofs: Erofs,
    pub(crate) blockfile: Blockfile,
    pub(crate) shim_manager: ShimManager,
    pub(crate) diff: DiffService,
    pub(crate) transfer: Transfer,
    pub(crate) restart: Restart,
    pub(crate) cgroups: Cgroups,
    pub(crate) verifier: Verifier,
    pub(crate) nri: Nri,
    pub(crate) cri: cri::Cri,
}

/// `io.containerd.gc.v1.scheduler`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Scheduler {
    /// Most of the time that collection may take, as a fraction.
    pub(crate) pause_threshold: f64,
    /// Deletions that start a collection at once; 0 is never.
    pub(crate) deletion_threshold: u32,
    /// Mutations that start one.
    pub(crate) mutation_threshold: u32,
    /// Go duration between trigger and collection.
    pub(crate) schedule_delay: String,
    /// Go duration between start and the first collection.
    pub(crate) startup_delay: String,
}

impl Default for Scheduler {
    fn default() -> Self {
        Self {
            pause_threshold: 0.02,
            deletion_threshold: 0,
            mutation_threshold: 100,
            schedule_delay: "0s".to_owned(),
            startup_delay: "100ms".to_owned(),
        }
    }
}

/// `io.containerd.metadata.v1.bolt`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Metadata {
    /// `shared` or `isolated`.
    pub(crate) content_sharing_policy: String,
    /// Of no effect: an acknowledged change is always durable.
    pub(crate) no_sync: bool,
}

/// `io.containerd.snapshotter.v1.overlayfs`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(clippy::struct_excessive_bools, reason = "the file's keys")]
pub(crate) struct Overlayfs {
    pub(crate) root_path: String,
    pub(crate) upperdir_label: bool,
    pub(crate) sync_remove: bool,
    pub(crate) slow_chown: bool,
    pub(crate) mount_options: Vec<String>,
}

/// A snapshotter whose root can be moved.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct SnapshotterRoot {
    pub(crate) root_path: String,
}

/// `io.containerd.snapshotter.v1.erofs`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Erofs {
    pub(crate) root_path: String,
    pub(crate) ovl_mount_options: Vec<String>,
    pub(crate) enable_fsverity: bool,
    pub(crate) set_immutable: bool,
    pub(crate) default_size: String,
    pub(crate) max_unmerged_layers: u32,
}

/// `io.containerd.snapshotter.v1.blockfile`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Blockfile {
    pub(crate) root_path: String,
    pub(crate) scratch_file: String,
    pub(crate) fs_type: String,
    pub(crate) mount_options: Vec<String>,
    pub(crate) recreate_scratch: bool,
}

/// `io.containerd.shim.v1.manager`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ShimManager {
    /// `KEY=value` pairs added to the environment of every shim.
    pub(crate) env: Vec<String>,
    /// Shims of ours that are started ahead of need; 0 starts each when it is needed.
    pub(crate) warm_shims: usize,
    /// Directory of the shims' sockets in place of their own choice.
    pub(crate) socket_dir: String,
}

impl ShimManager {
    /// Longest directory, in bytes: a socket's path has room for no more beside its name.
    const MAX_SOCKET_DIR_BYTES: usize = 42;

    /// The directory of sockets, if one is configured.
    ///
    /// # Errors
    /// When no socket could be made in it.
    pub(crate) fn socket_dir(&self) -> Result<Option<String>, String> {
        let dir = &self.socket_dir;
        if dir.is_empty() {
            return Ok(None);
        }
        if !dir.starts_with('/') || dir.len() > Self::MAX_SOCKET_DIR_BYTES {
            return Err(format!(
                "socket_dir {dir:?} of io.containerd.shim.v1.manager: want an absolute path of at most {} bytes",
                Self::MAX_SOCKET_DIR_BYTES
            ));
        }
        Ok(Some(dir.clone()))
    }
}

impl Default for ShimManager {
    fn default() -> Self {
        Self {
            env: Vec::new(),
            warm_shims: 2,
            socket_dir: String::new(),
        }
    }
}

/// `io.containerd.service.v1.diff-service`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct DiffService {
    /// Differs in the order they are tried.
    pub(crate) default: Vec<String>,
    /// Whether each applied layer is synced.
    pub(crate) sync_fs: bool,
}

impl Default for DiffService {
    fn default() -> Self {
        Self {
            default: vec!["walking".to_owned()],
            sync_fs: false,
        }
    }
}

/// `io.containerd.transfer.v1.local`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Transfer {
    pub(crate) max_concurrent_downloads: u32,
    pub(crate) concurrent_layer_fetch_buffer: u64,
    pub(crate) max_concurrent_uploaded_layers: u32,
    pub(crate) max_concurrent_unpacks: u32,
    pub(crate) check_platform_supported: bool,
    pub(crate) config_path: String,
    pub(crate) unpack_config: Vec<UnpackConfig>,
}

impl Default for Transfer {
    fn default() -> Self {
        Self {
            max_concurrent_downloads: 3,
            concurrent_layer_fetch_buffer: 0,
            max_concurrent_uploaded_layers: 3,
            max_concurrent_unpacks: 1,
            check_platform_supported: false,
            config_path: String::new(),
            unpack_config: Vec::new(),
        }
    }
}

/// One entry of `unpack_config`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct UnpackConfig {
    pub(crate) platform: String,
    pub(crate) snapshotter: String,
    pub(crate) differ: String,
    pub(crate) limits: u32,
    pub(crate) layer_types: Vec<String>,
}

/// `io.containerd.monitor.container.v1.restart`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Restart {
    /// Go duration between two looks at labelled containers.
    pub(crate) interval: String,
}

impl Default for Restart {
    fn default() -> Self {
        Self {
            interval: "10s".to_owned(),
        }
    }
}

/// `io.containerd.monitor.task.v1.cgroups`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Cgroups {
    /// Whether the metrics of tasks are left out.
    pub(crate) no_prometheus: bool,
}

/// `io.containerd.image-verifier.v1.bindir`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Verifier {
    pub(crate) bin_dir: String,
    pub(crate) max_verifiers: i32,
    pub(crate) per_verifier_timeout: String,
}

impl Default for Verifier {
    fn default() -> Self {
        Self {
            bin_dir: "/opt/containerd/image-verifier/bin".to_owned(),
            max_verifiers: 10,
            per_verifier_timeout: "10s".to_owned(),
        }
    }
}

/// `io.containerd.nri.v1.nri`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Nri {
    pub(crate) disable: bool,
    pub(crate) socket_path: String,
    pub(crate) plugin_path: String,
    pub(crate) plugin_config_path: String,
    pub(crate) plugin_registration_timeout: String,
    pub(crate) plugin_request_timeout: String,
    pub(crate) disable_connections: bool,
    pub(crate) default_validator: Table,
}

impl Default for Nri {
    fn default() -> Self {
        Self {
            disable: false,
            socket_path: "/var/run/nri/nri.sock".to_owned(),
            plugin_path: "/opt/nri/plugins".to_owned(),
            plugin_config_path: "/etc/nri/conf.d".to_owned(),
            plugin_registration_timeout: "5s".to_owned(),
            plugin_request_timeout: "2s".to_owned(),
            disable_connections: false,
            default_validator: Table::new(),
        }
    }
}

impl Plugins {
    /// Types every table of ours in `tables`; says which others there are.
    ///
    /// # Errors
    /// For an unknown key or a value of the wrong type, with its path.
    pub(crate) fn parse(mut tables: Table) -> Result<(Self, Vec<String>), Error> {
        let plugins = Self {
            cgroups: take(&mut tables, "io.containerd.monitor.task.v1.cgroups")?
                .unwrap_or_default(),
            scheduler: take(&mut tables, "io.containerd.gc.v1.scheduler")?.unwrap_or_default(),
            metadata: take(&mut tables, "io.containerd.metadata.v1.bolt")?.unwrap_or_default(),
            overlayfs: take(&mut tables, "io.containerd.snapshotter.v1.overlayfs")?
                .unwrap_or_default(),
            native: take(&mut tables, "io.containerd.snapshotter.v1.native")?.unwrap_or_default(),
            erofs: take(&mut tables, "io.containerd.snapshotter.v1.erofs")?.unwrap_or_default(),
            blockfile: take(&mut tables, "io.containerd.snapshotter.v1.blockfile")?
                .unwrap_or_default(),
            shim_manager: take(&mut tables, "io.containerd.shim.v1.manager")?.unwrap_or_default(),
            diff: take(&mut tables, "io.containerd.service.v1.diff-service")?.unwrap_or_default(),
            transfer: take(&mut tables, "io.containerd.transfer.v1.local")?.unwrap_or_default(),
            restart: take(&mut tables, "io.containerd.monitor.container.v1.restart")?
                .unwrap_or_default(),
            verifier: take(&mut tables, "io.containerd.image-verifier.v1.bindir")?
                .unwrap_or_default(),
            nri: take(&mut tables, "io.containerd.nri.v1.nri")?.unwrap_or_default(),
            cri: cri::Cri {
                server: take(&mut tables, "io.containerd.grpc.v1.cri")?.unwrap_or_default(),
                images: take(&mut tables, "io.containerd.cri.v1.images")?.unwrap_or_default(),
                runtime: take(&mut tables, "io.containerd.cri.v1.runtime")?.unwrap_or_default(),
                tasks: take(&mut tables, "io.containerd.service.v1.tasks-service")?
                    .unwrap_or_default(),
            },
        };
        let unknown = tables
            .keys()
            .filter(|name| !IGNORED.contains(&name.as_str()))
            .cloned()
            .collect();
        Ok((plugins, unknown))
    }
}

fn take<T: DeserializeOwned>(tables: &mut Table, name: &str) -> Result<Option<T>, Error> {
    let Some(value) = tables.remove(name) else {
        return Ok(None);
    };
    typed(value, &format!("plugins.'{name}'")).map(Some)
}

/// `value` as a `T`; an error says below which `place`.
pub(super) fn typed<T: DeserializeOwned>(value: Value, place: &str) -> Result<T, Error> {
    T::deserialize(value).map_err(|error| Error::Invalid {
        place: place.to_owned(),
        reason: error.to_string().trim().replace('\n', " "),
    })
}
