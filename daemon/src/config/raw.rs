//! The file as it is written: one struct per table of ours, nothing interpreted.
//!
//! A table of ours refuses keys it does not know; the tables below `[plugins]` are read by
//! whoever owns them, see [`super::plugins`].

use std::collections::BTreeMap;

use serde::Deserialize;

/// The whole file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct File {
    pub(crate) version: Option<i64>,
    pub(crate) root: Option<String>,
    pub(crate) state: Option<String>,
    pub(crate) temp: Option<String>,
    /// Of no effect: there are no loadable plugins.
    pub(crate) plugin_dir: Option<String>,
    pub(crate) oom_score: i32,
    pub(crate) disabled_plugins: Vec<String>,
    pub(crate) required_plugins: Vec<String>,
    pub(crate) imports: Vec<String>,
    pub(crate) grpc: Grpc,
    pub(crate) ttrpc: Socket,
    pub(crate) debug: Debug,
    pub(crate) metrics: Metrics,
    pub(crate) cgroup: Cgroup,
    pub(crate) timeouts: BTreeMap<String, String>,
    pub(crate) proxy_plugins: BTreeMap<String, ProxyPlugin>,
    pub(crate) stream_processors: BTreeMap<String, StreamProcessor>,
    pub(crate) plugins: toml::Table,
}

/// `[grpc]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Grpc {
    pub(crate) address: String,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) tcp_address: String,
    pub(crate) tcp_tls_ca: String,
    pub(crate) tcp_tls_cert: String,
    pub(crate) tcp_tls_key: String,
    pub(crate) tcp_tls_common_name: String,
    pub(crate) max_recv_message_size: usize,
    pub(crate) max_send_message_size: usize,
}

/// `[ttrpc]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Socket {
    pub(crate) address: String,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
}

/// `[debug]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Debug {
    /// Absent: beside the state; empty: none.
    pub(crate) address: Option<String>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) level: String,
    pub(crate) format: String,
}

/// `[metrics]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Metrics {
    pub(crate) address: String,
    pub(crate) grpc_histogram: bool,
}

/// `[cgroup]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Cgroup {
    pub(crate) path: String,
}

/// `[proxy_plugins.<name>]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ProxyPlugin {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) address: String,
    pub(crate) platform: String,
    pub(crate) exports: BTreeMap<String, String>,
    pub(crate) capabilities: Vec<String>,
}

/// `[stream_processors.<id>]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct StreamProcessor {
    pub(crate) accepts: Vec<String>,
    pub(crate) returns: String,
    pub(crate) path: String,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<String>,
}
