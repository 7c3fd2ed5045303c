//! The OCI spec of a container, from defaults, image and flags, in that order.
//!
//! Pure but for what the flags ask for: files they name, devices, and (handed in) the rootfs whose
//! account files resolve user names.

mod apparmor;
mod defaults;
mod devices;
pub(crate) mod model;
pub(crate) mod parse;
mod seccomp;
mod user;

use std::path::Path;

use anyhow::Context as _;

use crate::advice;
use crate::flags::{ContainerFlags, FilesystemFlags, ProcessFlags, ResourceFlags, SecurityFlags};
use crate::image::model::Settings;
use crate::labels;
use model::{Capabilities, DeviceRule, Mount, Namespace, Spec};

pub(crate) use defaults::spec as default_spec;
pub(crate) use user::{Accounts, Identity};

/// Search path of a process whose image says nothing.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Period that `--cpus` is counted in, microseconds.
const CPU_PERIOD: u64 = 100_000;

/// What a container's root filesystem comes from.
#[derive(Debug)]
pub(crate) enum Source<'a> {
    /// An image's settings and the account files in its rootfs.
    Image(&'a Settings, &'a Accounts),
    /// A directory of the host.
    Directory(&'a Path),
}

/// Builds the spec of container `id`.
pub(crate) fn build(
    namespace: &str,
    id: &str,
    flags: &ContainerFlags,
    source: &Source<'_>,
    args: &[String],
) -> anyhow::Result<Spec> {
    let mut spec = defaults::spec(namespace, id);
    spec.resources_mut()
        .devices
        .extend(defaults::device_rules());
    base(&mut spec, source)?;
    process(&mut spec, &flags.process, source, args)?;
    if flags.tty {
        spec.process_mut().terminal = true;
        set_env(&mut spec.process_mut().env, "TERM=xterm");
    }
    security(&mut spec, &flags.security)?;
    filesystem(&mut spec, &flags.filesystem)?;
    resources(&mut spec, &flags.resources)?;
    let annotations = labels::given(&flags.annotation)
        .into_iter()
        .chain(labels::given(&flags.label));
    spec.annotations.extend(annotations);
    let process = spec.process_mut();
    if process.args.is_empty() {
        return advice::fail(
            "no command to run: neither the image nor the command line names one",
            "put a command after the container's ID",
        );
    }
    if !process.env.iter().any(|entry| entry.starts_with("PATH=")) {
        process.env.insert(0, DEFAULT_PATH.to_owned());
    }
    Ok(spec)
}

/// A spec from a file, used as it is but for the annotations that labels make.
pub(crate) fn from_file(path: &Path, labels: &[String]) -> anyhow::Result<Spec> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut spec: Spec = serde_json::from_slice(&text).with_context(|| {
        format!(
            "{} is no runtime spec (`ctr oci spec` prints one)",
            path.display()
        )
    })?;
    spec.annotations.extend(labels::given(labels));
    Ok(spec)
}

/// What the image, or the directory, says.
fn base(spec: &mut Spec, source: &Source<'_>) -> anyhow::Result<()> {
    match source {
        Source::Image(settings, accounts) => {
            let user = match settings.user.as_str() {
                "" => "0:0",
                named => named,
            };
            let mut identity = accounts.resolve(user)?;
            if settings.user.is_empty() {
                // Root without an entry in passwd is still root; its groups are looked up by name.
                identity.additional_gids = accounts.resolve("0").map(|r| r.additional_gids)?;
            }
            let process = spec.process_mut();
            process.env.extend(settings.env.iter().cloned());
            process
                .args
                .extend(settings.entrypoint.iter().chain(&settings.cmd).cloned());
            if !settings.working_dir.is_empty() {
                process.cwd.clone_from(&settings.working_dir);
            }
            set_user(spec, identity);
        }
        Source::Directory(path) => {
            let path = std::path::absolute(path)?;
            anyhow::ensure!(
                path.is_dir(),
                "{} is no directory to use as rootfs",
                path.display()
            );
            let path = path.into_os_string().into_string();
            let path = path.map_err(|path| anyhow::anyhow!("{} is not UTF-8", path.display()))?;
            spec.root.get_or_insert_default().path = path;
        }
    }
    Ok(())
}

fn set_user(spec: &mut Spec, identity: Identity) {
    let user = &mut spec.process_mut().user;
    user.uid = identity.uid;
    user.gid = identity.gid;
    user.additional_gids = identity.additional_gids;
}

fn process(
    spec: &mut Spec,
    flags: &ProcessFlags,
    source: &Source<'_>,
    args: &[String],
) -> anyhow::Result<()> {
    if let Some(user) = &flags.user {
        let identity = match source {
            Source::Image(_, accounts) => accounts.resolve(user)?,
            Source::Directory(path) => Accounts::read(path)?.resolve(user)?,
        };
        set_user(spec, identity);
    }
    let process = spec.process_mut();
    add_env(&mut process.env, flags)?;
    if !args.is_empty() {
        // A command replaces all that the image says, entrypoint included, as upstream's does.
        process.args = args.to_vec();
    }
    if let Some(cwd) = &flags.cwd {
        process.cwd.clone_from(cwd);
    }
    if let Some(limit) = &flags.rlimit_nofile {
        process.rlimits.retain(|entry| entry.kind != limit.kind);
        process.rlimits.push(limit.clone());
    }
    if let Some(hostname) = &flags.hostname {
        spec.hostname.clone_from(hostname);
    }
    Ok(())
}

/// Adds the variables of `--env-file` and `--env` to an environment.
pub(crate) fn add_env(env: &mut Vec<String>, flags: &ProcessFlags) -> anyhow::Result<()> {
    for path in &flags.env_file {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the env file {}", path.display()))?;
        for entry in parse::env_file(&text) {
            set_env(env, &entry);
        }
    }
    for entry in &flags.env {
        set_env(env, entry);
    }
    Ok(())
}

/// Sets `KEY=value`; a bare `KEY` passes our own value on, or removes it where we have none.
pub(crate) fn set_env(env: &mut Vec<String>, entry: &str) {
    let key = entry.split('=').next().unwrap_or(entry);
    let entry = if entry.contains('=') {
        Some(entry.to_owned())
    } else {
        std::env::var(key)
            .ok()
            .map(|value| format!("{key}={value}"))
    };
    let at = env
        .iter()
        .position(|old| old.split('=').next() == Some(key));
    match (at, entry) {
        (Some(at), Some(entry)) => env[at] = entry,
        (Some(at), None) => drop(env.remove(at)),
        (None, Some(entry)) => env.push(entry),
        (None, None) => {}
    }
}

fn security(spec: &mut Spec, flags: &SecurityFlags) -> anyhow::Result<()> {
    if flags.privileged {
        privileged(spec);
        if !flags.privileged_without_host_devices {
            spec.linux_mut().devices.extend(devices::all()?);
            let everything = DeviceRule {
                allow: true,
                access: "rwm".to_owned(),
                ..Default::default()
            };
            spec.resources_mut().devices = vec![everything];
        }
    }
    let process = spec.process_mut();
    let sets = process.capabilities.get_or_insert_default();
    for set in [&mut sets.bounding, &mut sets.effective, &mut sets.permitted] {
        for name in &flags.cap_add {
            if !set.contains(name) {
                set.push(name.clone());
            }
        }
        set.retain(|name| !flags.cap_drop.contains(name));
    }
    if flags.allow_new_privs {
        process.no_new_privileges = false;
    }
    if let Some(name) = &flags.apparmor_default_profile {
        apparmor::load_default(name)?;
        process.apparmor_profile.clone_from(name);
    }
    if let Some(name) = &flags.apparmor_profile {
        process.apparmor_profile.clone_from(name);
    }
    if flags.seccomp {
        let profile = match &flags.seccomp_profile {
            Some(path) => seccomp::from_file(path)?,
            None => {
                let sets = spec.process_mut().capabilities.get_or_insert_default();
                seccomp::default_profile(&sets.bounding)
            }
        };
        spec.linux_mut().seccomp = Some(profile);
    }
    Ok(())
}

/// Everything that a container is normally kept from.
fn privileged(spec: &mut Spec) {
    // Ours at most: a runtime started by the same root could not give more.
    let all: Vec<_> = defaults::own_capabilities().map(str::to_owned).collect();
    let process = spec.process_mut();
    process.capabilities = Some(Capabilities {
        bounding: all.clone(),
        effective: all.clone(),
        permitted: all,
        ..Default::default()
    });
    process.apparmor_profile.clear();
    process.selinux_label.clear();
    process.no_new_privileges = false;
    let linux = spec.linux_mut();
    linux.masked_paths.clear();
    linux.readonly_paths.clear();
    linux.seccomp = None;
    for mount in &mut spec.mounts {
        if ["sysfs", "cgroup"].contains(&mount.kind.as_str()) {
            for option in &mut mount.options {
                if option == "ro" {
                    "rw".clone_into(option);
                }
            }
        }
    }
}

fn filesystem(spec: &mut Spec, flags: &FilesystemFlags) -> anyhow::Result<()> {
    if flags.net_host {
        let hostname = rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned();
        spec.linux_mut()
            .namespaces
            .retain(|entry| entry.kind != "network");
        for file in ["/etc/hosts", "/etc/resolv.conf"] {
            spec.mounts.push(Mount {
                destination: file.to_owned(),
                kind: "bind".to_owned(),
                source: file.to_owned(),
                options: vec!["rbind".to_owned(), "ro".to_owned()],
                ..Default::default()
            });
        }
        set_env(&mut spec.process_mut().env, &format!("HOSTNAME={hostname}"));
    }
    spec.mounts.extend(flags.mount.iter().cloned());
    if flags.read_only {
        spec.root.get_or_insert_default().readonly = true;
    }
    let linux = spec.linux_mut();
    if let Some(propagation) = &flags.rootfs_propagation {
        linux.rootfs_propagation.clone_from(propagation);
    }
    if !flags.uidmap.is_empty() {
        linux.uid_mappings.clone_from(&flags.uidmap);
        linux.gid_mappings.clone_from(&flags.gidmap);
        linux.namespaces.push(Namespace {
            kind: "user".to_owned(),
            path: String::new(),
        });
    }
    for joined in &flags.with_ns {
        linux.namespaces.retain(|entry| entry.kind != joined.kind);
        linux.namespaces.push(joined.clone());
    }
    for path in &flags.device {
        for device in devices::at(path)? {
            spec.resources_mut().devices.push(DeviceRule {
                allow: true,
                kind: device.kind.clone(),
                major: Some(device.major),
                minor: Some(device.minor),
                access: "rwm".to_owned(),
            });
            spec.linux_mut().devices.push(device);
        }
    }
    Ok(())
}

fn resources(spec: &mut Spec, flags: &ResourceFlags) -> anyhow::Result<()> {
    if flags.memory_limit != 0 {
        spec.resources_mut().memory.get_or_insert_default().limit = Some(flags.memory_limit);
    }
    let cpu = spec.cpu_mut();
    if flags.cpu_shares > 0 {
        cpu.shares = Some(flags.cpu_shares);
    }
    anyhow::ensure!(
        flags.cpus >= 0.0 && flags.cpus < 1e6,
        "--cpus {} is no number of CPUs: give one like 1.5",
        flags.cpus
    );
    if flags.cpus > 0.0 {
        #[expect(clippy::cast_possible_truncation, reason = "bounded just above")]
        let quota = (flags.cpus * 100_000.0) as i64;
        (cpu.quota, cpu.period) = (Some(quota), Some(CPU_PERIOD));
    }
    if flags.cpu_quota.is_some() || flags.cpu_period.is_some() {
        cpu.quota = Some(flags.cpu_quota.unwrap_or(-1));
        cpu.period = flags.cpu_period.filter(|&period| period > 0);
    }
    cpu.burst = flags.cpu_burst.filter(|&burst| burst > 0);
    cpu.cpus = flags.cpuset_cpus.clone().unwrap_or_default();
    cpu.mems = flags.cpuset_mems.clone().unwrap_or_default();
    let linux = spec.linux_mut();
    if let Some(path) = &flags.cgroup {
        linux.cgroups_path.clone_from(path);
    }
    if let Some(class) = &flags.rdt_class {
        linux.intel_rdt = Some(serde_json::json!({ "closID": class }));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
