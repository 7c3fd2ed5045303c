//! CRI's three tables of the configuration file, typed.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Everything CRI is configured by.
#[derive(Debug, Clone, Default)]
pub struct Cri {
    /// `[plugins.'io.containerd.grpc.v1.cri']`
    pub server: Server,
    /// `[plugins.'io.containerd.cri.v1.images']`
    pub images: Images,
    /// `[plugins.'io.containerd.cri.v1.runtime']`
    pub runtime: Runtime,
    /// `[plugins.'io.containerd.service.v1.tasks-service']`
    pub tasks: Tasks,
}

/// Files of classes that containers may ask for.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tasks {
    /// YAML file of classes of block I/O; empty for none.
    pub blockio_config_file: String,
    /// File of classes of cache and memory bandwidth. Of no effect: those in resctrl are joined.
    pub rdt_config_file: String,
}

/// The streaming server.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Whether CRI is kept off the TCP listener.
    pub disable_tcp_service: bool,
    /// Address the streaming server listens on.
    pub stream_server_address: String,
    /// Port of it; `0` picks one.
    pub stream_server_port: String,
    /// Go duration after which an idle stream is closed.
    pub stream_idle_timeout: String,
    /// Whether streams use TLS.
    pub enable_tls_streaming: bool,
    /// Certificate and key for TLS.
    pub x509_key_pair_streaming: KeyPair,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            disable_tcp_service: true,
            stream_server_address: "127.0.0.1".to_owned(),
            stream_server_port: "0".to_owned(),
            stream_idle_timeout: "4h0m0s".to_owned(),
            enable_tls_streaming: false,
            x509_key_pair_streaming: KeyPair::default(),
        }
    }
}

/// Files of a certificate and its key.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeyPair {
    /// PEM certificate.
    pub tls_cert_file: String,
    /// PEM key.
    pub tls_key_file: String,
}

/// The image service.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Images {
    /// Snapshotter that images are unpacked to.
    pub snapshotter: String,
    /// Whether image annotations are kept from snapshotters.
    pub disable_snapshot_annotations: bool,
    /// Whether layer blobs are dropped after unpacking.
    pub discard_unpacked_layers: bool,
    /// Blobs downloaded at once for one image.
    pub max_concurrent_downloads: u32,
    /// Bytes of each ranged request in one layer; 0 is one request.
    pub concurrent_layer_fetch_buffer: u64,
    /// Go duration without progress after which a pull fails.
    pub image_pull_progress_timeout: String,
    /// Whether each unpacked layer is synced.
    pub image_pull_with_sync_fs: bool,
    /// Seconds between measurements of snapshots.
    pub stats_collect_period: u64,
    /// Whether pulls go the older way, past the transfer service.
    pub use_local_image_pull: bool,
    /// Images that are never collected, by role; `sandbox` is the pause image.
    pub pinned_images: BTreeMap<String, String>,
    /// Registries.
    pub registry: Registry,
    /// Decryption.
    pub image_decryption: Decryption,
    /// Platform and snapshotter by runtime handler.
    pub runtime_platforms: BTreeMap<String, RuntimePlatform>,
}

impl Default for Images {
    fn default() -> Self {
        Self {
            snapshotter: "overlayfs".to_owned(),
            disable_snapshot_annotations: true,
            discard_unpacked_layers: false,
            max_concurrent_downloads: 3,
            concurrent_layer_fetch_buffer: 0,
            image_pull_progress_timeout: "5m0s".to_owned(),
            image_pull_with_sync_fs: false,
            stats_collect_period: 10,
            use_local_image_pull: false,
            pinned_images: BTreeMap::from([(
                "sandbox".to_owned(),
                crate::image::pause::NAME.to_owned(),
            )]),
            registry: Registry::default(),
            image_decryption: Decryption::default(),
            runtime_platforms: BTreeMap::new(),
        }
    }
}

/// How registries are reached.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registry {
    /// Directories of `hosts.toml` files, joined by `:`.
    pub config_path: String,
    /// Headers sent to every registry.
    pub headers: BTreeMap<String, Vec<String>>,
    /// Deprecated: mirrors by host.
    pub mirrors: BTreeMap<String, Mirror>,
    /// Deprecated: credentials and TLS by host.
    pub configs: BTreeMap<String, toml::Table>,
    /// Deprecated: credentials by URL.
    pub auths: BTreeMap<String, toml::Table>,
}

impl Default for Registry {
    fn default() -> Self {
        Self {
            config_path: "/etc/containerd/certs.d:/etc/docker/certs.d".to_owned(),
            headers: BTreeMap::new(),
            mirrors: BTreeMap::new(),
            configs: BTreeMap::new(),
            auths: BTreeMap::new(),
        }
    }
}

/// Deprecated mirror table.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mirror {
    /// URLs in order of preference.
    pub endpoint: Vec<String>,
}

/// How encrypted images are treated.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Decryption {
    /// `node`, or empty for none.
    pub key_model: String,
}

impl Default for Decryption {
    fn default() -> Self {
        Self {
            key_model: "node".to_owned(),
        }
    }
}

/// Platform and snapshotter of one runtime handler.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct RuntimePlatform {
    /// Platform string.
    pub platform: String,
    /// Snapshotter.
    pub snapshotter: String,
}

/// The runtime service.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
#[allow(clippy::struct_excessive_bools, reason = "the file's keys")]
pub struct Runtime {
    /// Runtimes.
    pub containerd: Containerd,
    /// Pod networks.
    pub cni: Cni,
    /// Whether SELinux labels are set.
    pub enable_selinux: bool,
    /// Upper bound of SELinux categories; 0 is 1024, which is the most.
    pub selinux_category_range: u32,
    /// Bytes at which a log line is split; negative never splits.
    pub max_container_log_line_size: i64,
    /// Whether AppArmor is left alone.
    pub disable_apparmor: bool,
    /// Whether `oom_score_adj` is clamped to the daemon's own.
    pub restrict_oom_score_adj: bool,
    /// Whether proc mount requests are ignored.
    pub disable_proc_mount: bool,
    /// Profile of containers that ask for none.
    pub unset_seccomp_profile: String,
    /// Whether a missing hugetlb controller is no error.
    pub tolerate_missing_hugetlb_controller: bool,
    /// Whether the hugetlb controller is left alone.
    pub disable_hugetlb_controller: bool,
    /// Whether devices get their owner from the security context.
    pub device_ownership_from_security_context: bool,
    /// Whether volumes of the image are ignored.
    pub ignore_image_defined_volumes: bool,
    /// Whether network namespaces are mounted below the state directory.
    pub netns_mounts_under_state_dir: bool,
    /// Whether pods may bind low ports unprivileged.
    pub enable_unprivileged_ports: bool,
    /// Whether pods may ping unprivileged.
    pub enable_unprivileged_icmp: bool,
    /// Whether CDI devices are injected.
    pub enable_cdi: bool,
    /// Directories of CDI specs.
    pub cdi_spec_dirs: Vec<String>,
    /// Go duration given to the output of an `ExecSync` after its process ended; 0 is for ever.
    pub drain_exec_sync_io_timeout: String,
    /// Ids of deprecations not to warn about.
    pub ignore_deprecation_warnings: Vec<String>,
    /// Go duration between collections of statistics; empty is the default.
    pub stats_collect_period: String,
    /// Go duration that statistics are kept; empty is the default.
    pub stats_retention_period: String,
    /// Whether checkpoints are offered.
    pub enable_criu: bool,
    /// Whether a container may be made of a checkpoint in place of an image.
    pub enable_experimental_restore_via_create: bool,
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            containerd: Containerd::default(),
            cni: Cni::default(),
            enable_selinux: false,
            selinux_category_range: 1024,
            max_container_log_line_size: 16384,
            disable_apparmor: false,
            restrict_oom_score_adj: false,
            disable_proc_mount: false,
            unset_seccomp_profile: String::new(),
            tolerate_missing_hugetlb_controller: true,
            disable_hugetlb_controller: true,
            device_ownership_from_security_context: false,
            ignore_image_defined_volumes: false,
            netns_mounts_under_state_dir: false,
            enable_unprivileged_ports: true,
            enable_unprivileged_icmp: true,
            enable_cdi: true,
            cdi_spec_dirs: vec!["/etc/cdi".to_owned(), "/var/run/cdi".to_owned()],
            drain_exec_sync_io_timeout: "0s".to_owned(),
            ignore_deprecation_warnings: Vec::new(),
            stats_collect_period: String::new(),
            stats_retention_period: String::new(),
            enable_criu: true,
            enable_experimental_restore_via_create: false,
        }
    }
}

impl Runtime {
    /// Checks keys of handlers; what is accepted without effect.
    ///
    /// # Errors
    /// For a value that a key cannot have.
    pub(crate) fn check(&self) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        for (name, handler) in &self.containerd.runtimes {
            let place =
                format!("plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{name}");
            if !matches!(handler.sandboxer.as_str(), "" | "podsandbox") {
                warnings.push(format!(
                    "{place}.sandboxer = {:?} has no effect: pods of this handler are made with a pause \
                     process in its runtime; take the key away, or name \"podsandbox\"",
                    handler.sandboxer
                ));
            }
            match handler.io_type.as_str() {
                "" | "fifo" => {}
                "streaming" => warnings.push(format!(
                    "{place}.io_type = \"streaming\" has no effect: output of this handler goes through \
                     fifos; take the key away, or name \"fifo\""
                )),
                other => {
                    return Err(Error::invalid(format!(
                        "{place}.io_type: `io_type` can only be `streaming` or `fifo`, got {other:?}"
                    )));
                }
            }
        }
        Ok(warnings)
    }
}

/// Runtimes by handler.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Containerd {
    /// Handler of pods that name none.
    pub default_runtime_name: String,
    /// Whether a block I/O class on a machine without them is no error.
    pub ignore_blockio_not_enabled_errors: bool,
    /// Whether an RDT class on a machine without them is no error.
    pub ignore_rdt_not_enabled_errors: bool,
    /// Handlers; `runc` is there even when the file names only others.
    #[serde(deserialize_with = "with_runc")]
    pub runtimes: BTreeMap<String, Handler>,
}

/// Handlers of the file beside the one there is without a file.
fn with_runc<'de, D: serde::Deserializer<'de>>(
    file: D,
) -> Result<BTreeMap<String, Handler>, D::Error> {
    let mut runtimes = Containerd::default().runtimes;
    runtimes.extend(BTreeMap::deserialize(file)?);
    Ok(runtimes)
}

impl Default for Containerd {
    fn default() -> Self {
        Self {
            default_runtime_name: "runc".to_owned(),
            ignore_blockio_not_enabled_errors: false,
            ignore_rdt_not_enabled_errors: false,
            runtimes: BTreeMap::from([("runc".to_owned(), Handler::default())]),
        }
    }
}

/// One runtime handler.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Handler {
    /// Runtime name.
    pub runtime_type: String,
    /// Absolute path of the shim, in place of the name.
    pub runtime_path: String,
    /// Pod annotations passed on (globs).
    pub pod_annotations: Vec<String>,
    /// Container annotations passed on (globs).
    pub container_annotations: Vec<String>,
    /// Options for the shim.
    pub options: toml::Table,
    /// Whether privileged containers get no host devices.
    pub privileged_without_host_devices: bool,
    /// Whether such containers may use all devices.
    pub privileged_without_host_devices_all_devices_allowed: bool,
    /// Whether containers may write their cgroup.
    pub cgroup_writable: bool,
    /// File of the base OCI spec.
    pub base_runtime_spec: String,
    /// CNI directory of this handler.
    pub cni_conf_dir: String,
    /// CNI configurations loaded from it.
    pub cni_max_conf_num: u32,
    /// Snapshotter of this handler.
    pub snapshotter: String,
    /// Sandbox controller. Of no effect but a warning: pods are made as `podsandbox` makes them.
    pub sandboxer: String,
    /// Whether a configured pause image has to be there already: it is not pulled.
    pub disable_pause_image_pull: bool,
    /// `""` or `fifo`; `streaming` has no effect but a warning.
    pub io_type: String,
}

impl Handler {
    /// Whether its shim takes runc's options; others take a configuration file or a blob.
    #[must_use]
    pub fn takes_runc_options(&self) -> bool {
        matches!(
            self.runtime_type.as_str(),
            "io.containerd.runc.v2" | "io.containerd.lighter.v2"
        )
    }
}

impl Default for Handler {
    fn default() -> Self {
        Self {
            runtime_type: "io.containerd.runc.v2".to_owned(),
            runtime_path: String::new(),
            pod_annotations: Vec::new(),
            container_annotations: Vec::new(),
            options: toml::Table::new(),
            privileged_without_host_devices: false,
            privileged_without_host_devices_all_devices_allowed: false,
            cgroup_writable: false,
            base_runtime_spec: String::new(),
            cni_conf_dir: String::new(),
            cni_max_conf_num: 0,
            snapshotter: String::new(),
            sandboxer: "podsandbox".to_owned(),
            disable_pause_image_pull: false,
            io_type: String::new(),
        }
    }
}

/// Pod networks.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cni {
    /// Directories of plugin binaries.
    pub bin_dirs: Vec<String>,
    /// Directory of configurations.
    pub conf_dir: String,
    /// Configurations used; 0 is all.
    pub max_conf_num: u32,
    /// Whether networks are set up one after the other.
    pub setup_serially: bool,
    /// Template the configuration is made from when the pod range is known.
    pub conf_template: String,
    /// `ipv4`, `ipv6` or `cni`; empty is `ipv4`.
    pub ip_pref: String,
    /// Whether loopback is brought up without a plugin.
    pub use_internal_loopback: bool,
}

impl Default for Cni {
    fn default() -> Self {
        Self {
            bin_dirs: vec!["/opt/cni/bin".to_owned()],
            conf_dir: "/etc/cni/net.d".to_owned(),
            max_conf_num: 1,
            setup_serially: false,
            conf_template: String::new(),
            ip_pref: String::new(),
            use_internal_loopback: false,
        }
    }
}

/// A Go duration such as `1m30s`; `None` for empty text, which is the default.
///
/// # Errors
/// For text of another form; the message names `key`.
pub(crate) fn duration(key: &str, text: &str) -> Result<Option<Duration>> {
    if text.is_empty() {
        return Ok(None);
    }
    let invalid = || {
        Error::invalid(format!(
            "{key}: {text:?} is not a duration such as \"1m30s\""
        ))
    };
    if text == "0" {
        return Ok(Some(Duration::ZERO));
    }
    let (mut total, mut rest) = (0.0_f64, text);
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(invalid)?;
        let number: f64 = rest[..digits].parse().map_err(|_| invalid())?;
        rest = &rest[digits..];
        let letters = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        let unit = match &rest[..letters] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1e-6,
            "ns" => 1e-9,
            _ => return Err(invalid()),
        };
        total += number * unit;
        rest = &rest[letters..];
    }
    Duration::try_from_secs_f64(total)
        .map(Some)
        .map_err(|_| invalid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handler_more_takes_none_away() {
        let read = |text: &str| toml::from_str::<Containerd>(text).unwrap().runtimes;
        let runtimes = read("[runtimes.other]\nruntime_type = 'x'");
        assert_eq!(runtimes["other"].runtime_type, "x");
        assert_eq!(runtimes["runc"].runtime_type, "io.containerd.runc.v2");
        let changed = read("[runtimes.runc]\nruntime_path = '/x'");
        assert_eq!(
            (changed.len(), changed["runc"].runtime_path.as_str()),
            (1, "/x")
        );
    }

    #[test]
    fn keys_without_effect_are_told() {
        let mut runtime = Runtime::default();
        assert!(runtime.check().unwrap().is_empty());
        let handler = |sandboxer: &str, io_type: &str| Handler {
            sandboxer: sandboxer.to_owned(),
            io_type: io_type.to_owned(),
            ..Handler::default()
        };
        let runtimes = &mut runtime.containerd.runtimes;
        runtimes.insert("a".to_owned(), handler("", "fifo"));
        runtimes.insert("b".to_owned(), handler("shim", "streaming"));
        let told = runtime.check().unwrap();
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(
            told[0].contains("runtimes.b.sandboxer = \"shim\""),
            "{told:?}"
        );
        assert!(told[1].contains("runtimes.b.io_type"), "{told:?}");
        let runtimes = &mut runtime.containerd.runtimes;
        runtimes.insert("c".to_owned(), handler("podsandbox", "pipe"));
        let refused = runtime.check().unwrap_err().to_string();
        assert!(refused.contains("runtimes.c.io_type"), "{refused}");
    }

    #[test]
    fn go_durations_are_read() {
        let read = |text: &str| duration("k", text).unwrap();
        assert_eq!(read(""), None);
        assert_eq!(read("4h0m0s"), Some(Duration::from_secs(14400)));
        assert_eq!(read("1.5s"), Some(Duration::from_millis(1500)));
        assert_eq!(read("100ms"), Some(Duration::from_millis(100)));
        assert_eq!(read("0s"), Some(Duration::ZERO));
        for bad in ["5", "s", "1x", "-1s", "1s2"] {
            let error = duration("k", bad).unwrap_err().to_string();
            assert!(error.starts_with("k: "), "{error}");
        }
    }
}
