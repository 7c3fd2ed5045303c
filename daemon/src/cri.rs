//! The CRI plugin in this daemon: whether it is on, what it is made over, what introspection says.

use std::sync::Arc;

use lighter_cri::nri;
use lighter_cri::plugin::{self, Gate};
use lighter_engine::gc::Collector;
use lighter_engine::runtime::Manager;
use lighter_engine::transfer::Transfer;
use lighter_proto::errdefs::{Classify as _, ErrorKind, WireError, render};
use lighter_store::metadata::Db;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, warn};

use crate::config::Config;
use crate::plugin::Plugin;
use crate::plugin::builtins::kind;

/// What the plugin works with.
pub(crate) struct Parts {
    /// Records.
    pub(crate) db: Db,
    /// Tasks.
    pub(crate) tasks: Manager,
    /// Transfers.
    pub(crate) transfer: Transfer,
    /// Garbage collection.
    pub(crate) collector: Collector,
    /// Owner of what calls leave behind.
    pub(crate) tracker: TaskTracker,
    /// Ends with the daemon.
    pub(crate) stop: CancellationToken,
}

/// The plugin, as far as it could be made.
pub(crate) struct Cri {
    plugin: Option<Arc<plugin::Plugin>>,
    gate: Arc<Gate>,
    /// Its entries for introspection.
    pub(crate) entries: Vec<Plugin>,
}

impl Cri {
    /// The way to the plugin for its services; `None` where it is off.
    pub(crate) fn gate(&self) -> Option<Arc<Gate>> {
        self.plugin.as_ref().map(|_| Arc::clone(&self.gate))
    }

    /// The plugin for the metrics page; `None` where it is off.
    pub(crate) fn measured(&self) -> Option<Arc<plugin::Plugin>> {
        self.plugin.clone()
    }

    /// Finds what earlier runs left, then serves: tasks must be on the books before.
    pub(crate) fn recover(self, tracker: &TaskTracker) {
        let Some(plugin) = self.plugin else { return };
        let gate = self.gate;
        tracker.spawn(async move {
            if let Err(error) = plugin.recover(&gate).await {
                error!(%error, "CRI stays shut");
            }
        });
    }
}

/// Makes the plugin, unless the configuration turns it off. One that fails is left out, and
/// introspection says why.
pub(crate) async fn build(config: &Config, parts: Parts) -> Cri {
    let mut entries = Vec::new();
    let mut absent = None;
    for (id, requires) in HELPERS {
        let entry = Plugin::new(kind::CRI, id).requires(requires).on_platform();
        if config.disabled(&entry.uri()) {
            absent = absent.or(Some(entry.uri()));
        } else {
            entries.push(entry);
        }
    }
    let entry = Plugin::new(kind::GRPC, "cri")
        .requires(&REQUIRES)
        .on_platform()
        .export("CRIVersion", "v1");
    let mut cri = Cri {
        plugin: None,
        gate: Arc::default(),
        entries,
    };
    if config.disabled(&entry.uri()) {
        return cri;
    }
    if let Some(absent) = absent {
        let reason = format!("{absent} is turned off by disabled_plugins: skip plugin");
        let error = WireError::new(ErrorKind::Unavailable, reason);
        cri.entries.push(entry.failed(error));
        return cri;
    }
    let nri = match nri_config(config) {
        Ok(nri) => nri,
        Err(error) => {
            let error = WireError::new(ErrorKind::InvalidArgument, error);
            cri.entries.push(entry.failed(error));
            return cri;
        }
    };
    let built = plugin::Plugin::build(plugin::Parts {
        config: config.plugins.cri.clone(),
        nri,
        root: config.root.clone(),
        state: config.state.clone(),
        db: parts.db,
        tasks: parts.tasks,
        transfer: parts.transfer,
        collector: parts.collector,
        tracker: parts.tracker,
        stop: parts.stop,
        version: crate::VERSION.to_owned(),
    });
    match built.await {
        Ok(plugin) => {
            cri.plugin = Some(plugin);
            cri.entries.push(entry);
        }
        Err(error) => {
            warn!(error = %render(&error), "CRI left out");
            let error = WireError::new(error.kind(), render(&error));
            cri.entries.push(entry.failed(error));
        }
    }
    cri
}

/// Settings of NRI plugins; the message of an error names the key.
fn nri_config(config: &Config) -> Result<nri::Config, String> {
    let table = &config.plugins.nri;
    let place = |key: &str| format!("plugins.'io.containerd.nri.v1.nri'.{key}");
    let duration = |key: &str, text: &str| {
        crate::config::duration(&place(key), text).map_err(|e| e.to_string())
    };
    let validator = table.default_validator.clone();
    let validator = validator
        .try_into()
        .map_err(|e| format!("{}: {e}", place("default_validator")))?;
    Ok(nri::Config {
        disable: table.disable,
        socket_path: (&table.socket_path).into(),
        plugin_path: (&table.plugin_path).into(),
        plugin_config_path: (&table.plugin_config_path).into(),
        registration_timeout: duration(
            "plugin_registration_timeout",
            &table.plugin_registration_timeout,
        )?,
        request_timeout: duration("plugin_request_timeout", &table.plugin_request_timeout)?,
        disable_connections: table.disable_connections,
        default_validator: validator,
        runtime_version: crate::VERSION.to_owned(),
    })
}

/// Types that the service needs.
const REQUIRES: [&str; 6] = [
    kind::CRI,
    kind::EVENT,
    kind::SERVICE,
    kind::LEASE,
    kind::SANDBOX_STORE,
    kind::TRANSFER,
];

/// The parts that upstream lists apart, and the types each needs.
const HELPERS: [(&str, &[&str]); 2] = [
    (
        "images",
        &[
            kind::LEASE,
            kind::METADATA,
            kind::SANDBOX_STORE,
            kind::SERVICE,
            kind::SNAPSHOTTER,
            kind::TRANSFER,
        ],
    ),
    ("runtime", &[kind::WARNING]),
];
