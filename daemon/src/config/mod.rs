//! Configuration: containerd's files of version 1 to 4, validated into types.
//!
//! An unknown key in a table of ours is an error that says where; a table of a plugin that is not
//! ours is only warned about. What other modules get holds no unparsed string.

pub(crate) mod cli;
mod duration;
mod imports;
mod listen;
pub(crate) mod migrate;
pub(crate) mod plugins;
mod raw;
mod write;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(crate) use duration::duration;
pub(crate) use listen::{MessageLimits, Socket, Tcp, Tls};
pub(crate) use raw::{ProxyPlugin, StreamProcessor};
pub(crate) use write::to_text;

use listen::tcp;
use plugins::Plugins;

/// Where the file is looked for.
pub(crate) const DEFAULT_PATH: &str = "/etc/containerd/config.toml";
const DEFAULT_ROOT: &str = "/var/lib/containerd";
const DEFAULT_STATE: &str = "/run/containerd";
const DEFAULT_ADDRESS: &str = "/run/containerd/containerd.sock";
/// Largest gRPC message either way, in bytes.
const DEFAULT_MESSAGE_BYTES: usize = 16 << 20;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is no TOML.
    #[error("{} is not valid TOML", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A value or key is wrong.
    #[error("configuration: {place}: {reason}")]
    Invalid {
        /// Path of the key.
        place: String,
        /// What is wrong.
        reason: String,
    },
}

impl Error {
    fn read(path: &Path, source: io::Error) -> Self {
        Self::Read {
            path: path.to_owned(),
            source,
        }
    }

    fn invalid(place: &str, reason: impl Into<String>) -> Self {
        Self::Invalid {
            place: place.to_owned(),
            reason: reason.into(),
        }
    }
}

/// How the log is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// `[timeouts]`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Timeouts {
    /// Reconnecting one shim at start.
    pub(crate) shim_load: Duration,
    /// Cleaning up after one shim.
    pub(crate) shim_cleanup: Duration,
    /// A shim's shutdown.
    pub(crate) shim_shutdown: Duration,
    /// State of one task in a list.
    pub(crate) task_state: Duration,
    /// Statistics of one task.
    pub(crate) shim_stats: Duration,
    /// CRI's deferred cleanup.
    pub(crate) cri_defer_cleanup: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            shim_load: Duration::from_secs(5),
            shim_cleanup: Duration::from_secs(5),
            shim_shutdown: Duration::from_secs(3),
            task_state: Duration::from_secs(2),
            shim_stats: Duration::from_secs(2),
            cri_defer_cleanup: Duration::from_secs(60),
        }
    }
}

/// Everything that is configured.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// Directory for what survives a boot.
    pub(crate) root: PathBuf,
    /// Directory for what dies with it.
    pub(crate) state: PathBuf,
    /// `TMPDIR` of everything started here.
    pub(crate) temp: Option<PathBuf>,
    /// gRPC.
    pub(crate) grpc: Socket,
    /// gRPC over TCP.
    pub(crate) tcp: Option<Tcp>,
    /// Limits of gRPC.
    pub(crate) limits: MessageLimits,
    /// Events of shims.
    pub(crate) ttrpc: Socket,
    /// Debug socket; an empty address is none, `None` is `debug.sock` in the state directory.
    pub(crate) debug: Option<Socket>,
    /// Log level as given.
    pub(crate) log_level: String,
    /// Log format.
    pub(crate) log_format: LogFormat,
    /// Address of the metrics' HTTP server.
    pub(crate) metrics: Option<String>,
    /// Whether latencies of RPCs are kept as histograms.
    pub(crate) grpc_histogram: bool,
    /// Score to set, 0 for none.
    pub(crate) oom_score: i32,
    /// cgroup the daemon moves itself to.
    pub(crate) cgroup: Option<String>,
    /// Ids of plugins that are off.
    pub(crate) disabled: Vec<String>,
    /// Ids of plugins without which the daemon does not start.
    pub(crate) required: Vec<String>,
    /// Timeouts.
    pub(crate) timeouts: Timeouts,
    /// Plugins in other processes, by name.
    pub(crate) proxies: BTreeMap<String, ProxyPlugin>,
    /// Programs that turn one media type into another.
    pub(crate) processors: BTreeMap<String, StreamProcessor>,
    /// Plugin tables.
    pub(crate) plugins: Plugins,
    /// What a person should know about the file.
    pub(crate) warnings: Vec<String>,
    /// The merged file, for `config dump`.
    pub(crate) table: toml::Table,
}

impl Config {
    /// Reads the file named on the command line and applies the flags. The default file may be
    /// missing, another may not.
    ///
    /// # Errors
    /// When a file cannot be read or does not make sense.
    pub(crate) fn load(cli: &cli::Cli) -> Result<Self, Error> {
        let missing = cli.config == Path::new(DEFAULT_PATH) && !cli.config.exists();
        let table = if missing {
            toml::Table::new()
        } else {
            imports::load(&cli.config)?
        };
        let mut config = Self::from_table(table)?;
        config.apply(cli)?;
        Ok(config)
    }

    fn apply(&mut self, cli: &cli::Cli) -> Result<(), Error> {
        if let Some(root) = &cli.root {
            self.root = absolute("--root", root)?;
        }
        if let Some(state) = &cli.state {
            self.state = absolute("--state", state)?;
        }
        if let Some(address) = &cli.address {
            let path = address.strip_prefix("unix://").unwrap_or(address);
            self.grpc.address = absolute("--address", Path::new(path))?;
            self.ttrpc.address = ttrpc_of(&self.grpc.address);
        }
        if let Some(level) = &cli.log_level {
            self.log_level = log_level("--log-level", level)?;
        }
        if self.root == self.state {
            return Err(Error::invalid(
                "root",
                "root and state must be different paths",
            ));
        }
        Ok(())
    }

    /// Validates a merged table in the newest layout.
    ///
    /// # Errors
    /// For an unknown key of ours or a value that makes no sense.
    pub(crate) fn from_table(table: toml::Table) -> Result<Self, Error> {
        let file: raw::File = plugins::typed(toml::Value::Table(table.clone()), "file")?;
        let mut warnings = Vec::new();
        if file.plugin_dir.is_some() {
            warnings.push("plugin_dir has no effect: there are no loadable plugins".to_owned());
        }
        let (plugins, unknown) = Plugins::parse(file.plugins)?;
        warnings.extend(
            unknown
                .into_iter()
                .map(|name| format!("ignoring the table of unknown plugin {name}")),
        );
        if plugins.erofs.max_unmerged_layers > 0 {
            warnings.push(
                "plugins.'io.containerd.snapshotter.v1.erofs'.max_unmerged_layers has no effect: \
                 layers are always mounted apart"
                    .to_owned(),
            );
        }
        let (uid, gid) = (
            nix::unistd::geteuid().as_raw(),
            nix::unistd::getegid().as_raw(),
        );
        let socket = |address: &str, own_uid: Option<u32>, own_gid: Option<u32>| Socket {
            address: PathBuf::from(address),
            uid: own_uid.unwrap_or(uid),
            gid: own_gid.unwrap_or(gid),
        };
        let grpc_address = or_default(&file.grpc.address, DEFAULT_ADDRESS);
        let grpc = socket(grpc_address, file.grpc.uid, file.grpc.gid);
        let mut ttrpc = socket(
            &file.ttrpc.address,
            file.ttrpc.uid.or(file.grpc.uid),
            file.ttrpc.gid.or(file.grpc.gid),
        );
        if ttrpc.address.as_os_str().is_empty() {
            ttrpc.address = ttrpc_of(&grpc.address);
        }
        let debug = file.debug.address.as_deref();
        let debug = debug.map(|address| socket(address, file.debug.uid, file.debug.gid));
        Ok(Self {
            root: absolute(
                "root",
                Path::new(or_default(
                    file.root.as_deref().unwrap_or_default(),
                    DEFAULT_ROOT,
                )),
            )?,
            state: absolute(
                "state",
                Path::new(or_default(
                    file.state.as_deref().unwrap_or_default(),
                    DEFAULT_STATE,
                )),
            )?,
            temp: file.temp.filter(|t| !t.is_empty()).map(PathBuf::from),
            tcp: tcp(&file.grpc)?,
            limits: MessageLimits {
                receive_bytes: or_bytes(file.grpc.max_recv_message_size),
                send_bytes: or_bytes(file.grpc.max_send_message_size),
            },
            grpc,
            ttrpc,
            debug,
            log_level: log_level("debug.level", &file.debug.level)?,
            log_format: log_format(&file.debug.format)?,
            metrics: Some(file.metrics.address).filter(|a| !a.is_empty()),
            grpc_histogram: file.metrics.grpc_histogram,
            oom_score: file.oom_score,
            cgroup: Some(file.cgroup.path).filter(|p| !p.is_empty()),
            disabled: file.disabled_plugins,
            required: file.required_plugins,
            timeouts: timeouts(&file.timeouts, &mut warnings)?,
            proxies: proxies(file.proxy_plugins)?,
            processors: file.stream_processors,
            plugins,
            warnings,
            table,
        })
    }

    /// Whether the plugin `id` (`<type>.<id>`) is turned off.
    pub(crate) fn disabled(&self, id: &str) -> bool {
        self.disabled.iter().any(|d| d == id)
    }
}

fn log_format(text: &str) -> Result<LogFormat, Error> {
    match text {
        "" | "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        other => Err(Error::invalid(
            "debug.format",
            format!("{other:?} is neither text nor json"),
        )),
    }
}

fn or_default<'a>(value: &'a str, default: &'a str) -> &'a str {
    if value.is_empty() { default } else { value }
}

fn or_bytes(value: usize) -> usize {
    if value == 0 {
        DEFAULT_MESSAGE_BYTES
    } else {
        value
    }
}

fn ttrpc_of(address: &Path) -> PathBuf {
    let mut path = address.as_os_str().to_owned();
    path.push(".ttrpc");
    PathBuf::from(path)
}

fn absolute(place: &str, path: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(|e| Error::invalid(place, e.to_string()))
}

fn log_level(place: &str, level: &str) -> Result<String, Error> {
    match level.to_ascii_lowercase().as_str() {
        "" => Ok("info".to_owned()),
        "fatal" | "panic" => Ok("error".to_owned()),
        "warning" => Ok("warn".to_owned()),
        known @ ("trace" | "debug" | "info" | "warn" | "error") => Ok(known.to_owned()),
        other => Err(Error::invalid(
            place,
            format!("{other:?} is none of trace, debug, info, warn, error, fatal, panic"),
        )),
    }
}

fn timeouts(raw: &BTreeMap<String, String>, warnings: &mut Vec<String>) -> Result<Timeouts, Error> {
    let mut timeouts = Timeouts::default();
    for (name, text) in raw {
        let value = duration(&format!("timeouts.'{name}'"), text)?;
        match name.as_str() {
            "io.containerd.timeout.shim.load" => timeouts.shim_load = value,
            "io.containerd.timeout.shim.cleanup" => timeouts.shim_cleanup = value,
            "io.containerd.timeout.shim.shutdown" => timeouts.shim_shutdown = value,
            "io.containerd.timeout.task.state" => timeouts.task_state = value,
            "io.containerd.timeout.metrics.shimstats" => timeouts.shim_stats = value,
            "io.containerd.timeout.cri.defercleanup" => timeouts.cri_defer_cleanup = value,
            "io.containerd.timeout.bolt.open" => {}
            other => warnings.push(format!("ignoring unknown timeout {other}")),
        }
    }
    Ok(timeouts)
}

fn proxies(raw: BTreeMap<String, ProxyPlugin>) -> Result<BTreeMap<String, ProxyPlugin>, Error> {
    for (name, proxy) in &raw {
        let place = format!("proxy_plugins.{name}");
        if !matches!(
            proxy.kind.as_str(),
            "snapshot" | "content" | "diff" | "sandbox"
        ) {
            return Err(Error::invalid(
                &format!("{place}.type"),
                format!(
                    "{:?} is none of snapshot, content, diff, sandbox",
                    proxy.kind
                ),
            ));
        }
        if proxy.address.is_empty() {
            return Err(Error::invalid(
                &format!("{place}.address"),
                "must not be empty",
            ));
        }
    }
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_of_ours_is_an_error_with_its_place_and_an_unknown_plugin_a_warning() {
        let config =
            Config::from_table("[plugins.'io.example.v1.x']\na = 1\n".parse().unwrap()).unwrap();
        assert_eq!(config.warnings.len(), 1);
        assert!(config.warnings[0].contains("io.example.v1.x"));
        let error = Config::from_table(
            "[plugins.'io.containerd.gc.v1.scheduler']\npause_treshold = 1.0\n"
                .parse()
                .unwrap(),
        )
        .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("io.containerd.gc.v1.scheduler") && text.contains("pause_treshold"),
            "{text}"
        );
        let error = Config::from_table("[grpc]\nadress = 'x'\n".parse().unwrap()).unwrap_err();
        assert!(error.to_string().contains("adress"), "{error}");
    }

    #[test]
    fn the_default_text_is_a_configuration() {
        let text = to_text(&toml::Table::new()).unwrap();
        let table: toml::Table = text.parse().unwrap();
        let config = Config::from_table(table).unwrap();
        assert_eq!(config.grpc.address, Path::new(DEFAULT_ADDRESS));
        assert_eq!(
            config.ttrpc.address,
            Path::new("/run/containerd/containerd.sock.ttrpc")
        );
    }
}
