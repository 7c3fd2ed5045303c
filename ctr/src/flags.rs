//! Flags that several commands share.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::duration;
use crate::spec::model::{IdMapping, Mount, Namespace, Rlimit};
use crate::spec::parse;

/// Which snapshotter; empty means the namespace's or the daemon's default.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct SnapshotterFlag {
    /// Snapshotter to use [default: the namespace's, else overlayfs]
    #[arg(
        long,
        env = "CONTAINERD_SNAPSHOTTER",
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) snapshotter: String,
}

/// How to reach a registry.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Registry")]
pub(crate) struct RegistryFlags {
    /// Do not check the registry's TLS certificate
    #[arg(long, short = 'k')]
    pub(crate) skip_verify: bool,
    /// Speak plain HTTP
    #[arg(long)]
    pub(crate) plain_http: bool,
    /// Credentials; the password is asked for when it is left out
    #[arg(long, short = 'u', value_name = "USER[:PASSWORD]")]
    pub(crate) user: Option<String>,
    /// Refresh token for the authorization server
    #[arg(long, value_name = "TOKEN", conflicts_with = "user")]
    pub(crate) refresh: Option<String>,
    /// Directory of hosts.toml files, on the daemon's side
    #[arg(long, value_name = "DIR")]
    pub(crate) hosts_dir: Option<PathBuf>,
    /// CA certificate of the registry (PEM)
    #[arg(long, value_name = "FILE")]
    pub(crate) tlscacert: Option<PathBuf>,
    /// Client certificate (PEM)
    #[arg(long, value_name = "FILE")]
    pub(crate) tlscert: Option<PathBuf>,
    /// Key of the client certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "tlscert")]
    pub(crate) tlskey: Option<PathBuf>,
    /// Show requests to and answers of the registry
    #[arg(long)]
    pub(crate) http_dump: bool,
    /// Show the timing of each request to the registry
    #[arg(long)]
    pub(crate) http_trace: bool,
}

/// A lifetime; zero for ever.
#[derive(Debug, Clone, Args)]
pub(crate) struct ExpiryFlag {
    /// Lifetime (0 = for ever)
    #[arg(long, visible_alias = "expiration", short = 'x', value_parser = duration::parse,
          default_value = "24h", value_name = "DURATION")]
    pub(crate) expires: Duration,
}

/// A port that can be opened; kept as it was written.
fn published(text: &str) -> Result<String, String> {
    crate::cni::port(text).map(|_| text.to_owned())
}

/// Which runtime, and how it is configured.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Runtime")]
pub(crate) struct RuntimeFlags {
    /// Runtime name, or absolute path of a shim [default: the namespace's, else io.containerd.runc.v2]
    #[arg(long, value_name = "NAME")]
    pub(crate) runtime: Option<String>,
    /// Configuration file handed to the runtime
    #[arg(long, value_name = "FILE")]
    pub(crate) runtime_config_path: Option<PathBuf>,
    /// runc-compatible binary
    #[arg(long, value_name = "PATH")]
    pub(crate) runc_binary: Option<String>,
    /// Directory of the runc-compatible binary's state
    #[arg(long, value_name = "DIR")]
    pub(crate) runc_root: Option<String>,
    /// Let systemd manage the cgroup
    #[arg(long)]
    pub(crate) runc_systemd_cgroup: bool,
    /// Do not use pivot_root
    #[arg(long)]
    pub(crate) no_pivot: bool,
}

/// What a container is made of; `run` and `containers create` share it.
#[derive(Debug, Clone, Args)]
pub(crate) struct ContainerFlags {
    #[command(flatten)]
    pub(crate) snapshotter: SnapshotterFlag,
    /// Labels of the container's snapshot
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) snapshotter_label: Vec<String>,
    /// The first argument is a directory to use as root filesystem, not an image
    #[arg(long)]
    pub(crate) rootfs: bool,
    /// Runtime spec to use as it is; then only the container's ID is given
    #[arg(long, short = 'c', value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Use the image of this platform
    #[arg(long)]
    pub(crate) platform: Option<String>,
    /// Labels of the container (and annotations of its spec)
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) label: Vec<String>,
    /// Annotations of the spec
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) annotation: Vec<String>,
    /// Create the container in this sandbox
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    pub(crate) sandbox: String,
    /// Allocate a terminal
    #[arg(long, short = 't')]
    pub(crate) tty: bool,
    /// Keep standard input open (ctr always does)
    #[arg(long, short = 'i')]
    pub(crate) interactive: bool,
    /// File to write the pid to
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Give the container a network by the CNI configuration in /etc/cni/net.d (`ctr network`)
    #[arg(long)]
    pub(crate) cni: bool,
    /// Open a port of the host that leads to one of the container; implies --cni
    #[arg(long, short, value_name = "[IP:]HOST:PORT[/PROTO]", value_parser = published,
          conflicts_with = "net_host")]
    pub(crate) publish: Vec<String>,
    /// Write the filesystem's data to disk when the image has to be unpacked first
    #[arg(long)]
    pub(crate) sync_fs: bool,
    #[command(flatten)]
    pub(crate) process: ProcessFlags,
    #[command(flatten)]
    pub(crate) filesystem: FilesystemFlags,
    #[command(flatten)]
    pub(crate) security: SecurityFlags,
    #[command(flatten)]
    pub(crate) resources: ResourceFlags,
    #[command(flatten)]
    pub(crate) runtime: RuntimeFlags,
}

/// The process.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Process")]
pub(crate) struct ProcessFlags {
    /// Environment variable; without a value, ours is passed on
    #[arg(long, short = 'e', value_name = "KEY[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// File of environment variables, one a line
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Working directory
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<String>,
    /// User, group optional
    #[arg(long, short = 'u', value_name = "NAME|UID[:GROUP|GID]")]
    pub(crate) user: Option<String>,
    /// Host name
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<String>,
    /// Limit of open files
    #[arg(long, value_name = "SOFT:HARD", value_parser = parse::nofile)]
    pub(crate) rlimit_nofile: Option<Rlimit>,
}

/// Filesystem and namespaces.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Filesystem and namespaces")]
pub(crate) struct FilesystemFlags {
    /// Mount, e.g. type=bind,src=/tmp,dst=/host,options=rbind:ro
    #[arg(long, value_name = "type=…,src=…,dst=…,options=…", value_parser = parse::mount)]
    pub(crate) mount: Vec<Mount>,
    /// Make the root filesystem read-only
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Propagation of the root filesystem (private, slave, shared …)
    #[arg(long, value_name = "MODE")]
    pub(crate) rootfs_propagation: Option<String>,
    /// Use the host's network
    #[arg(long)]
    pub(crate) net_host: bool,
    /// Join an existing namespace
    #[arg(long, value_name = "TYPE:PATH", value_parser = parse::namespace)]
    pub(crate) with_ns: Vec<Namespace>,
    /// Map user ids: run in a user namespace
    #[arg(long, value_name = "CONTAINER:HOST:LENGTH", value_parser = parse::id_mapping,
          requires = "gidmap")]
    pub(crate) uidmap: Vec<IdMapping>,
    /// Map group ids: run in a user namespace
    #[arg(long, value_name = "CONTAINER:HOST:LENGTH", value_parser = parse::id_mapping,
          requires = "uidmap")]
    pub(crate) gidmap: Vec<IdMapping>,
    /// Let the snapshotter map the ids of the root filesystem (by labels)
    #[arg(long)]
    pub(crate) remap_labels: bool,
    /// Device, or directory of devices, of the host
    #[arg(long, value_name = "PATH")]
    pub(crate) device: Vec<PathBuf>,
}

/// Privileges.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Privileges")]
pub(crate) struct SecurityFlags {
    /// All capabilities, all host devices, nothing masked or read-only
    #[arg(long)]
    pub(crate) privileged: bool,
    /// Privileged, but without the host's devices
    #[arg(long, requires = "privileged")]
    pub(crate) privileged_without_host_devices: bool,
    /// Let programs gain privileges (setuid)
    #[arg(long)]
    pub(crate) allow_new_privs: bool,
    /// Add a capability
    #[arg(long, value_name = "CAP_…", value_parser = parse::capability)]
    pub(crate) cap_add: Vec<String>,
    /// Remove a capability
    #[arg(long, value_name = "CAP_…", value_parser = parse::capability)]
    pub(crate) cap_drop: Vec<String>,
    /// Filter system calls by the default profile
    #[arg(long)]
    pub(crate) seccomp: bool,
    /// Filter system calls by this profile
    #[arg(long, value_name = "FILE", requires = "seccomp")]
    pub(crate) seccomp_profile: Option<PathBuf>,
    /// Load the default AppArmor profile under this name and use it
    #[arg(long, value_name = "NAME", conflicts_with = "apparmor_profile")]
    pub(crate) apparmor_default_profile: Option<String>,
    /// Use a loaded AppArmor profile
    #[arg(long, value_name = "NAME")]
    pub(crate) apparmor_profile: Option<String>,
}

/// Limits.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Limits")]
pub(crate) struct ResourceFlags {
    /// Memory, bytes
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = 0,
        hide_default_value = true
    )]
    pub(crate) memory_limit: i64,
    /// CPUs, e.g. 1.5
    #[arg(long, value_name = "NUMBER", default_value_t = 0.0, hide_default_value = true,
          conflicts_with_all = ["cpu_quota", "cpu_period"])]
    pub(crate) cpus: f64,
    /// Weight among other containers
    #[arg(long, value_name = "NUMBER", default_value_t = 1024)]
    pub(crate) cpu_shares: u64,
    /// CPU time of a period, microseconds (-1 = no limit)
    #[arg(long, value_name = "MICROSECONDS", allow_negative_numbers = true)]
    pub(crate) cpu_quota: Option<i64>,
    /// Length of a period, microseconds
    #[arg(long, value_name = "MICROSECONDS")]
    pub(crate) cpu_period: Option<u64>,
    /// CPU time that may be saved up, microseconds
    #[arg(long, value_name = "MICROSECONDS")]
    pub(crate) cpu_burst: Option<u64>,
    /// CPUs to run on, e.g. 1-2,4
    #[arg(long, value_name = "LIST")]
    pub(crate) cpuset_cpus: Option<String>,
    /// Memory nodes to use, e.g. 0
    #[arg(long, value_name = "LIST")]
    pub(crate) cpuset_mems: Option<String>,
    /// cgroup path ("" = no cgroup)
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup: Option<String>,
    /// RDT class
    #[arg(long, value_name = "NAME")]
    pub(crate) rdt_class: Option<String>,
}
