//! Older layouts of the file, rewritten to the newest.
//!
//! Version 1 named plugins by their last component; version 2 had all of CRI in one table, which
//! version 3 splits in three; version 4 moves the servers' tables below `plugins`. All of them are
//! read; version 3's layout is what is kept in memory and written.

use std::path::Path;

use toml::{Table, Value};

use super::Error;

/// The version written and kept in memory.
pub(crate) const LATEST: i64 = 3;
/// The newest version read.
const NEWEST: i64 = 4;

const CRI: &str = "io.containerd.grpc.v1.cri";
const CRI_IMAGES: &str = "io.containerd.cri.v1.images";
const CRI_RUNTIME: &str = "io.containerd.cri.v1.runtime";
const SHIM_MANAGER: &str = "io.containerd.shim.v1.manager";

/// Short names of version 1 and what they stand for.
const SHORT_NAMES: [(&str, &str); 10] = [
    ("cri", CRI),
    ("cgroups", "io.containerd.monitor.v1.cgroups"),
    ("diff-service", "io.containerd.service.v1.diff-service"),
    ("scheduler", "io.containerd.gc.v1.scheduler"),
    ("opt", "io.containerd.internal.v1.opt"),
    ("restart", "io.containerd.internal.v1.restart"),
    ("bolt", "io.containerd.metadata.v1.bolt"),
    ("overlayfs", "io.containerd.snapshotter.v1.overlayfs"),
    ("native", "io.containerd.snapshotter.v1.native"),
    ("linux", "io.containerd.runtime.v1.linux"),
];

/// Keys of CRI's version 2 table that stay in the server's table.
const SERVER_KEYS: [&str; 7] = [
    "disable_tcp_service",
    "stream_server_address",
    "stream_server_port",
    "stream_idle_timeout",
    "enable_tls_streaming",
    "x509_key_pair_streaming",
    "tolerate_missing_hugetlb_controller_server",
];
/// Keys that go to the image service's table.
const IMAGE_KEYS: [&str; 8] = [
    "max_concurrent_downloads",
    "image_pull_progress_timeout",
    "image_pull_with_sync_fs",
    "concurrent_layer_fetch_buffer",
    "use_local_image_pull",
    "registry",
    "image_decryption",
    "stats_collect_period",
];
/// Keys of CRI's `containerd` table that go to the image service.
const IMAGE_STORE_KEYS: [&str; 3] = [
    "snapshotter",
    "disable_snapshot_annotations",
    "discard_unpacked_layers",
];
/// Keys that no longer mean anything.
const DROPPED_KEYS: [&str; 3] = ["systemd_cgroup", "enable_unprivileged", "no_pivot"];

/// The table of one file in the newest layout.
///
/// # Errors
/// When its version is unknown or a table is no table.
pub(crate) fn to_latest(mut table: Table, path: &Path) -> Result<Table, Error> {
    let version = match table.get("version") {
        None => 1,
        Some(Value::Integer(version)) => *version,
        Some(_) => {
            return Err(Error::Invalid {
                place: format!("{}: version", path.display()),
                reason: "must be a number".to_owned(),
            });
        }
    };
    if !(1..=NEWEST).contains(&version) {
        return Err(Error::Invalid {
            place: format!("{}: version", path.display()),
            reason: format!(
                "expected containerd config version equal to or less than `{NEWEST}`, got `{version}`"
            ),
        });
    }
    if version < 2 {
        long_names(&mut table);
    }
    if version < 3 {
        split_cri(&mut table);
    }
    if version > 3 {
        hoist_servers(&mut table);
    }
    rename_monitors(&mut table);
    rename_shim_manager(&mut table);
    table.insert("version".to_owned(), Value::Integer(LATEST));
    Ok(table)
}

fn long_names(table: &mut Table) {
    let full = |short: &str| {
        SHORT_NAMES
            .iter()
            .find(|(name, _)| *name == short)
            .map_or_else(|| short.to_owned(), |(_, full)| (*full).to_owned())
    };
    for list in ["disabled_plugins", "required_plugins"] {
        if let Some(Value::Array(names)) = table.get_mut(list) {
            for name in names {
                if let Value::String(name) = name {
                    *name = full(name);
                }
            }
        }
    }
    if let Some(Value::Table(plugins)) = table.get_mut("plugins") {
        *plugins = std::mem::take(plugins)
            .into_iter()
            .map(|(name, value)| (full(&name), value))
            .collect();
    }
}

fn take_table(from: &mut Table, key: &str) -> Option<Table> {
    match from.remove(key) {
        Some(Value::Table(table)) => Some(table),
        Some(other) => {
            from.insert(key.to_owned(), other);
            None
        }
        None => None,
    }
}

fn split_cri(table: &mut Table) {
    let Some(Value::Table(plugins)) = table.get_mut("plugins") else {
        return;
    };
    let Some(mut cri) = take_table(plugins, CRI) else {
        return;
    };
    let mut images = take_table(plugins, CRI_IMAGES).unwrap_or_default();
    let mut server = Table::new();
    for key in DROPPED_KEYS {
        cri.remove(key);
    }
    for key in SERVER_KEYS {
        if let Some(value) = cri.remove(key) {
            server.insert(key.to_owned(), value);
        }
    }
    for key in IMAGE_KEYS {
        if let Some(value) = cri.remove(key) {
            images.insert(key.to_owned(), value);
        }
    }
    if let Some(sandbox) = cri.remove("sandbox_image") {
        let mut pinned = Table::new();
        pinned.insert("sandbox".to_owned(), sandbox);
        images.insert("pinned_images".to_owned(), Value::Table(pinned));
    }
    if let Some(Value::Table(containerd)) = cri.get_mut("containerd") {
        for key in IMAGE_STORE_KEYS {
            if let Some(value) = containerd.remove(key) {
                images.insert(key.to_owned(), value);
            }
        }
        // Runtimes of before `runtimes.<handler>` existed.
        for key in ["default_runtime", "untrusted_workload_runtime", "no_pivot"] {
            containerd.remove(key);
        }
        if let Some(Value::Table(runtimes)) = containerd.get_mut("runtimes") {
            runtimes.iter_mut().for_each(|(_, runtime)| {
                if let Value::Table(runtime) = runtime {
                    for key in ["runtime_engine", "runtime_root"] {
                        runtime.remove(key);
                    }
                    if let Some(mode) = runtime.remove("sandbox_mode") {
                        runtime.insert("sandboxer".to_owned(), mode);
                    }
                }
            });
        }
    }
    if let Some(Value::Table(cni)) = cri.get_mut("cni")
        && let Some(dir) = cni.remove("bin_dir")
    {
        cni.insert("bin_dirs".to_owned(), Value::Array(vec![dir]));
    }
    plugins.insert(CRI.to_owned(), Value::Table(server));
    plugins.insert(CRI_IMAGES.to_owned(), Value::Table(images));
    plugins.insert(CRI_RUNTIME.to_owned(), Value::Table(cri));
}

/// Version 4 has the servers' tables as plugins.
fn hoist_servers(table: &mut Table) {
    let Some(Value::Table(plugins)) = table.get_mut("plugins") else {
        return;
    };
    let mut moved = Table::new();
    for name in ["grpc", "ttrpc", "debug", "metrics"] {
        if let Some(server) = take_table(plugins, &format!("io.containerd.server.v1.{name}")) {
            moved.insert(name.to_owned(), Value::Table(server));
        }
    }
    if let Some(tcp) = take_table(plugins, "io.containerd.server.v1.grpc-tcp") {
        let grpc = moved
            .entry("grpc")
            .or_insert_with(|| Value::Table(Table::new()));
        if let Value::Table(grpc) = grpc {
            for (key, value) in tcp {
                grpc.insert(format!("tcp_{key}"), value);
            }
        }
    }
    for (name, server) in moved {
        table.insert(name, server);
    }
}

/// Plugins that had other types before version 3; a table under the new name wins.
fn rename_monitors(table: &mut Table) {
    let Some(Value::Table(plugins)) = table.get_mut("plugins") else {
        return;
    };
    for (old, new) in [
        (
            "io.containerd.internal.v1.restart",
            "io.containerd.monitor.container.v1.restart",
        ),
        (
            "io.containerd.monitor.v1.cgroups",
            "io.containerd.monitor.task.v1.cgroups",
        ),
    ] {
        if let Some(found) = plugins.remove(old) {
            plugins.entry(new).or_insert(found);
        }
    }
}

fn rename_shim_manager(table: &mut Table) {
    let Some(Value::Table(plugins)) = table.get_mut("plugins") else {
        return;
    };
    let Some(mut old) = take_table(plugins, "io.containerd.runtime.v2.task") else {
        return;
    };
    let manager = plugins
        .entry(SHIM_MANAGER)
        .or_insert_with(|| Value::Table(Table::new()));
    let Value::Table(manager) = manager else {
        return;
    };
    if old
        .remove("sched_core")
        .is_some_and(|v| v.as_bool() == Some(true))
    {
        manager
            .entry("env")
            .or_insert_with(|| Value::Array(vec![Value::String("SCHED_CORE=1".to_owned())]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn migrated(text: &str) -> Table {
        to_latest(text.parse().unwrap(), Path::new("test.toml")).unwrap()
    }

    #[test]
    fn version_one_disables_cri_by_its_short_name() {
        let table = migrated("disabled_plugins = ['cri']");
        assert_eq!(table["disabled_plugins"][0].as_str(), Some(CRI));
    }

    #[test]
    fn version_two_cri_is_split_in_three() {
        let table = migrated(
            "version = 2\n[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image='p:3'\nstream_server_port='1'\n\
             systemd_cgroup=false\nenable_selinux=true\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\n\
             snapshotter='native'\ndefault_runtime_name='x'\n[plugins.'io.containerd.grpc.v1.cri'.cni]\nbin_dir='/b'\n",
        );
        let plugins = &table["plugins"];
        assert_eq!(plugins[CRI]["stream_server_port"].as_str(), Some("1"));
        assert_eq!(
            plugins[CRI_IMAGES]["pinned_images"]["sandbox"].as_str(),
            Some("p:3")
        );
        assert_eq!(plugins[CRI_IMAGES]["snapshotter"].as_str(), Some("native"));
        assert_eq!(plugins[CRI_RUNTIME]["enable_selinux"].as_bool(), Some(true));
        assert_eq!(
            plugins[CRI_RUNTIME]["containerd"]["default_runtime_name"].as_str(),
            Some("x")
        );
        assert_eq!(
            plugins[CRI_RUNTIME]["cni"]["bin_dirs"][0].as_str(),
            Some("/b")
        );
        assert!(plugins[CRI_RUNTIME].get("systemd_cgroup").is_none());
    }

    #[test]
    fn an_unknown_version_is_refused() {
        assert!(to_latest("version = 9".parse().unwrap(), Path::new("x")).is_err());
    }
}
