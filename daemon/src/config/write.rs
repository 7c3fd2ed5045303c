//! The file as text: `config default`, `config dump`, `config migrate`.

use lighter_cri::config as cri;
use serde::Serialize;
use toml::{Table, Value};

use super::migrate::LATEST;
use super::{DEFAULT_ADDRESS, DEFAULT_MESSAGE_BYTES, DEFAULT_ROOT, DEFAULT_STATE};

/// The defaults overlaid with `table`, as TOML.
///
/// # Errors
/// When a value cannot be written; the defaults always can.
pub(crate) fn to_text(table: &Table) -> Result<String, toml::ser::Error> {
    let mut whole = defaults()?;
    overlay(&mut whole, table.clone());
    toml::to_string(&whole)
}

fn overlay(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => overlay(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

/// Section, key and value of every default that is not CRI's.
#[allow(clippy::too_many_lines, reason = "one literal")]
fn defaults() -> Result<Table, toml::ser::Error> {
    let bytes = i64::try_from(DEFAULT_MESSAGE_BYTES).expect("16 MiB fits");
    let mut whole = toml::toml! {
        temp = ""
        disabled_plugins = []
        required_plugins = []
        oom_score = 0
        imports = []

        [grpc]
        tcp_address = ""
        tcp_tls_ca = ""
        tcp_tls_cert = ""
        tcp_tls_key = ""
        uid = 0
        gid = 0

        [ttrpc]
        address = ""
        uid = 0
        gid = 0

        [debug]
        uid = 0
        gid = 0
        level = ""
        format = ""

        [metrics]
        address = ""
        grpc_histogram = false

        [cgroup]
        path = ""

        [timeouts]
        "io.containerd.timeout.bolt.open" = "0s"
        "io.containerd.timeout.cri.defercleanup" = "1m0s"
        "io.containerd.timeout.metrics.shimstats" = "2s"
        "io.containerd.timeout.shim.cleanup" = "5s"
        "io.containerd.timeout.shim.load" = "5s"
        "io.containerd.timeout.shim.shutdown" = "3s"
        "io.containerd.timeout.task.state" = "2s"

        [plugins."io.containerd.gc.v1.scheduler"]
        pause_threshold = 0.02
        deletion_threshold = 0
        mutation_threshold = 100
        schedule_delay = "0s"
        startup_delay = "100ms"

        [plugins."io.containerd.metadata.v1.bolt"]
        content_sharing_policy = "shared"
        no_sync = false

        [plugins."io.containerd.shim.v1.manager"]
        env = []
        warm_shims = 2
        socket_dir = ""

        [plugins."io.containerd.service.v1.diff-service"]
        default = ["walking"]
        sync_fs = false

        [plugins."io.containerd.snapshotter.v1.overlayfs"]
        root_path = ""
        upperdir_label = false
        sync_remove = false
        slow_chown = false
        mount_options = []

        [plugins."io.containerd.snapshotter.v1.native"]
        root_path = ""

        [plugins."io.containerd.monitor.container.v1.restart"]
        interval = "10s"

        [plugins."io.containerd.transfer.v1.local"]
        max_concurrent_downloads = 3
        concurrent_layer_fetch_buffer = 0
        max_concurrent_uploaded_layers = 3
        max_concurrent_unpacks = 1
        check_platform_supported = false
        config_path = ""

        [plugins."io.containerd.image-verifier.v1.bindir"]
        bin_dir = "/opt/containerd/image-verifier/bin"
        max_verifiers = 10
        per_verifier_timeout = "10s"

        [plugins."io.containerd.nri.v1.nri"]
        disable = false
        socket_path = "/var/run/nri/nri.sock"
        plugin_path = "/opt/nri/plugins"
        plugin_config_path = "/etc/nri/conf.d"
        plugin_registration_timeout = "5s"
        plugin_request_timeout = "2s"
        disable_connections = false
    };
    whole.insert("version".to_owned(), Value::Integer(LATEST));
    whole.insert("root".to_owned(), Value::String(DEFAULT_ROOT.to_owned()));
    whole.insert("state".to_owned(), Value::String(DEFAULT_STATE.to_owned()));
    if let Some(Value::Table(grpc)) = whole.get_mut("grpc") {
        grpc.insert(
            "address".to_owned(),
            Value::String(DEFAULT_ADDRESS.to_owned()),
        );
        grpc.insert("max_recv_message_size".to_owned(), Value::Integer(bytes));
        grpc.insert("max_send_message_size".to_owned(), Value::Integer(bytes));
    }
    if let Some(Value::Table(plugins)) = whole.get_mut("plugins") {
        insert(
            plugins,
            "io.containerd.grpc.v1.cri",
            &cri::Server::default(),
        )?;
        insert(
            plugins,
            "io.containerd.cri.v1.images",
            &cri::Images::default(),
        )?;
        insert(
            plugins,
            "io.containerd.cri.v1.runtime",
            &cri::Runtime::default(),
        )?;
        insert(
            plugins,
            "io.containerd.service.v1.tasks-service",
            &cri::Tasks::default(),
        )?;
    }
    Ok(whole)
}

fn insert<T: Serialize>(
    plugins: &mut Table,
    name: &str,
    table: &T,
) -> Result<(), toml::ser::Error> {
    plugins.insert(name.to_owned(), Value::try_from(table)?);
    Ok(())
}
