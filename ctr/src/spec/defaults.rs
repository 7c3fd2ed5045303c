//! The spec of a container about which nothing was said: upstream's defaults.

use lighter_floor::capabilities::DEFAULT as CAPABILITIES;

use super::model::{
    Capabilities, DeviceRule, Linux, Mount, Namespace, Process, Resources, Rlimit, Root, Spec,
};

/// Version of the runtime spec that the result says it follows: crun, up to 1.8 at least, refuses others.
const OCI_VERSION: &str = "1.0.2";
/// Open files, soft and hard.
const NOFILE: u64 = 1024;

/// Every capability Linux has, in numeric order.
pub(super) const ALL_CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/proc/scsi",
];

const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Destination, type, source, options.
const MOUNTS: [(&str, &str, &str, &[&str]); 7] = [
    ("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
    (
        "/dev",
        "tmpfs",
        "tmpfs",
        &["nosuid", "strictatime", "mode=755", "size=65536k"],
    ),
    (
        "/dev/pts",
        "devpts",
        "devpts",
        &[
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
            "gid=5",
        ],
    ),
    (
        "/dev/shm",
        "tmpfs",
        "shm",
        &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
    ),
    (
        "/dev/mqueue",
        "mqueue",
        "mqueue",
        &["nosuid", "noexec", "nodev"],
    ),
    (
        "/sys",
        "sysfs",
        "sysfs",
        &["nosuid", "noexec", "nodev", "ro"],
    ),
    (
        "/run",
        "tmpfs",
        "tmpfs",
        &["nosuid", "strictatime", "mode=755", "size=65536k"],
    ),
];

/// Devices every container may use: type, major, minor (none = any), access.
const DEVICES: [(&str, Option<i64>, Option<i64>, &str); 11] = [
    ("c", None, None, "m"),
    ("b", None, None, "m"),
    ("c", Some(1), Some(3), "rwm"),
    ("c", Some(1), Some(8), "rwm"),
    ("c", Some(1), Some(7), "rwm"),
    ("c", Some(5), Some(0), "rwm"),
    ("c", Some(1), Some(5), "rwm"),
    ("c", Some(1), Some(9), "rwm"),
    ("c", Some(5), Some(1), "rwm"),
    ("c", Some(136), None, "rwm"),
    ("c", Some(5), Some(2), "rwm"),
];

fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

/// The default spec of container `id` in `namespace`; without an id, as `oci spec` prints it.
pub(crate) fn spec(namespace: &str, id: &str) -> Spec {
    let capabilities = owned(&CAPABILITIES);
    let kinds = ["pid", "ipc", "uts", "mount", "network"];
    let namespaces = kinds
        .map(|kind| Namespace {
            kind: kind.to_owned(),
            path: String::new(),
        })
        .to_vec();
    let nofile = hard_nofile_limit().map_or(NOFILE, |hard| hard.min(NOFILE));
    Spec {
        oci_version: OCI_VERSION.to_owned(),
        process: Some(Process {
            cwd: "/".to_owned(),
            no_new_privileges: true,
            capabilities: Some(Capabilities {
                bounding: capabilities.clone(),
                effective: capabilities.clone(),
                permitted: capabilities,
                ..Default::default()
            }),
            rlimits: vec![Rlimit {
                kind: "RLIMIT_NOFILE".to_owned(),
                hard: nofile,
                soft: nofile,
            }],
            ..Default::default()
        }),
        root: Some(Root {
            path: "rootfs".to_owned(),
            ..Default::default()
        }),
        mounts: MOUNTS
            .iter()
            .map(|(destination, kind, source, options)| Mount {
                destination: (*destination).to_owned(),
                kind: (*kind).to_owned(),
                source: (*source).to_owned(),
                options: owned(options),
                ..Default::default()
            })
            .collect(),
        linux: Some(Linux {
            resources: Some(Resources {
                devices: vec![DeviceRule {
                    access: "rwm".to_owned(),
                    ..Default::default()
                }],
                ..Default::default()
            }),
            cgroups_path: format!("/{namespace}/{id}")
                .trim_end_matches('/')
                .to_owned(),
            namespaces,
            masked_paths: owned(&MASKED),
            readonly_paths: owned(&READ_ONLY),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A container cannot be given more than whoever starts it has without `CAP_SYS_RESOURCE`.
fn hard_nofile_limit() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum
}

/// Those of [`ALL_CAPABILITIES`] that we have; all of them where the kernel does not say.
pub(super) fn own_capabilities() -> impl Iterator<Item = &'static str> {
    let own = rustix::thread::capabilities(None).map_or(u64::MAX, |sets| sets.effective.bits());
    let all = ALL_CAPABILITIES.iter().enumerate();
    all.filter(move |(bit, _)| own & (1 << bit) != 0)
        .map(|(_, name)| *name)
}

/// Rules for the devices every container may use.
pub(super) fn device_rules() -> impl Iterator<Item = DeviceRule> {
    DEVICES
        .iter()
        .map(|(kind, major, minor, access)| DeviceRule {
            allow: true,
            kind: (*kind).to_owned(),
            major: *major,
            minor: *minor,
            access: (*access).to_owned(),
        })
}
