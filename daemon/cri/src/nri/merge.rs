//! Joining the answers of several plugins: each sees what the ones before it changed, and two that
//! set one thing are an error naming both. Nothing here does I/O.

use std::collections::HashMap;

use lighter_proto::nri::pkg::api::v1alpha1::{
    Container, ContainerAdjustment, ContainerEviction, ContainerUpdate, Field, Hooks, KeyValue,
    LinuxContainer, LinuxContainerAdjustment, LinuxContainerUpdate, LinuxCpu, LinuxMemory,
    LinuxRdt, LinuxResources, Mount,
};

use super::error::Error;
use super::owners::Owners;

/// What a key begins with when it is to be removed.
const REMOVE: char = '-';

/// The key that an entry removes, if it removes one.
pub(super) fn removed(key: &str) -> Option<&str> {
    key.strip_prefix(REMOVE)
}

/// Answers to one request, so far.
#[derive(Debug, Default)]
pub(super) struct Merge {
    /// The container as the next plugin sees it.
    pub(super) container: Container,
    /// Everything asked for, joined.
    pub(super) adjust: ContainerAdjustment,
    /// Changes to other containers, in the order in which they were first named.
    pub(super) updates: Vec<ContainerUpdate>,
    /// Containers to stop.
    pub(super) evictions: Vec<ContainerEviction>,
    pub(super) owners: Owners,
    /// The container is being created, so it cannot be updated.
    creating: bool,
}

/// A field that every plugin may set once.
macro_rules! claim_fields {
    ($owners:expr, $id:expr, $plugin:expr, $from:expr, $to:expr,
     $($field:ident => $owner:ident),+ $(,)?) => {$(
        if let Some(value) = &$from.$field {
            $owners.claim($id, Field::$owner, $plugin)?;
            $to.$field = Some(value.clone());
        }
    )+};
}

/// Entries with a key, which plugins add, replace and remove.
macro_rules! claim_entries {
    ($self:ident, $plugin:expr, $entries:expr, $key:ident, $owner:ident,
     $adjusted:expr, $seen:expr) => {
        let id = $self.container.id.clone();
        for entry in $entries.iter().filter_map(|entry| removed(&entry.$key)) {
            $self.owners.release_entry(&id, Field::$owner, entry);
            $adjusted.retain(|other| other.$key != entry);
            $seen.retain(|other| other.$key != entry);
        }
        for entry in $entries {
            match removed(&entry.$key) {
                // Kept, so that what the container has of its own goes too.
                Some(_) => $adjusted.insert(0, entry),
                None => {
                    $self
                        .owners
                        .claim_entry(&id, Field::$owner, &entry.$key, $plugin)?;
                    $seen.retain(|other| other.$key != entry.$key);
                    $seen.push(entry.clone());
                    $adjusted.push(entry);
                }
            }
        }
    };
}

impl Merge {
    /// Begins the answer to a container's creation.
    pub(super) fn create(container: Container) -> Self {
        Self {
            container,
            creating: true,
            ..Self::default()
        }
    }

    /// Begins the answer to any other request.
    pub(super) fn change() -> Self {
        Self::default()
    }

    fn linux(&mut self) -> &mut LinuxContainerAdjustment {
        self.adjust.linux.get_or_insert_default()
    }

    fn seen(&mut self) -> &mut LinuxContainer {
        self.container.linux.get_or_insert_default()
    }

    /// Adds the adjustment that `plugin` asks for.
    pub(super) fn adjust(&mut self, plugin: &str, asked: ContainerAdjustment) -> Result<(), Error> {
        let ContainerAdjustment {
            annotations,
            mounts,
            env,
            hooks,
            linux,
            rlimits,
            cdi_devices,
            args,
        } = asked;
        self.annotations(plugin, &annotations)?;
        self.mounts(plugin, mounts)?;
        self.env(plugin, env)?;
        self.args(plugin, args)?;
        if let Some(hooks) = hooks {
            self.hooks(plugin, hooks);
        }
        if let Some(linux) = linux {
            self.linux_part(plugin, &linux)?;
        }
        let id = self.container.id.clone();
        for limit in rlimits {
            self.owners
                .claim_entry(&id, Field::Rlimits, &limit.r#type, plugin)?;
            self.container
                .rlimits
                .retain(|other| other.r#type != limit.r#type);
            self.container.rlimits.push(limit.clone());
            self.adjust.rlimits.push(limit);
        }
        for device in cdi_devices {
            self.owners
                .claim_entry(&id, Field::CdiDevices, &device.name, plugin)?;
            self.container.cdi_devices.push(device.clone());
            self.adjust.cdi_devices.push(device);
        }
        Ok(())
    }

    fn annotations(&mut self, plugin: &str, asked: &HashMap<String, String>) -> Result<(), Error> {
        let id = self.container.id.clone();
        for key in asked.keys().filter_map(|key| removed(key)) {
            self.owners.release_entry(&id, Field::Annotations, key);
            self.container.annotations.remove(key);
            self.adjust.annotations.remove(key);
            self.adjust
                .annotations
                .insert(format!("{REMOVE}{key}"), String::new());
        }
        for (key, value) in asked.iter().filter(|(key, _)| removed(key).is_none()) {
            self.owners
                .claim_entry(&id, Field::Annotations, key, plugin)?;
            self.container
                .annotations
                .insert(key.clone(), value.clone());
            self.adjust.annotations.insert(key.clone(), value.clone());
        }
        Ok(())
    }

    fn mounts(&mut self, plugin: &str, mounts: Vec<Mount>) -> Result<(), Error> {
        claim_entries!(
            self,
            plugin,
            mounts,
            destination,
            Mounts,
            self.adjust.mounts,
            self.container.mounts
        );
        Ok(())
    }

    fn env(&mut self, plugin: &str, asked: Vec<KeyValue>) -> Result<(), Error> {
        let id = self.container.id.clone();
        let forget = |env: &mut Vec<String>, key: &str| {
            env.retain(|pair| pair.split_once('=').is_none_or(|(name, _)| name != key));
        };
        for key in asked.iter().filter_map(|pair| removed(&pair.key)) {
            self.owners.release_entry(&id, Field::Env, key);
            forget(&mut self.container.env, key);
            self.adjust.env.retain(|other| other.key != key);
        }
        for pair in asked {
            if removed(&pair.key).is_some() {
                self.adjust.env.insert(0, pair);
                continue;
            }
            self.owners
                .claim_entry(&id, Field::Env, &pair.key, plugin)?;
            forget(&mut self.container.env, &pair.key);
            self.container
                .env
                .push(format!("{}={}", pair.key, pair.value));
            self.adjust.env.push(pair);
        }
        Ok(())
    }

    fn args(&mut self, plugin: &str, mut args: Vec<String>) -> Result<(), Error> {
        let id = self.container.id.clone();
        // An empty first argument means: whoever set it before.
        if args.first().is_some_and(String::is_empty) {
            args.remove(0);
            self.owners.release(&id, Field::Args);
        }
        if !args.is_empty() {
            self.owners.claim(&id, Field::Args, plugin)?;
            self.container.args.clone_from(&args);
            self.adjust.args = args;
        }
        Ok(())
    }

    fn hooks(&mut self, plugin: &str, hooks: Hooks) {
        let empty = hooks == Hooks::default();
        append(self.adjust.hooks.get_or_insert_default(), hooks.clone());
        append(self.container.hooks.get_or_insert_default(), hooks);
        if !empty {
            let id = self.container.id.clone();
            self.owners.share(&id, Field::OciHooks, plugin);
        }
    }

    fn linux_part(&mut self, plugin: &str, asked: &LinuxContainerAdjustment) -> Result<(), Error> {
        let id = self.container.id.clone();
        self.linux();
        self.seen();
        let adjusted = self.adjust.linux.get_or_insert_default();
        let seen = self.container.linux.get_or_insert_default();
        let devices = asked.devices.clone();
        claim_entries!(
            self,
            plugin,
            devices,
            path,
            Devices,
            adjusted.devices,
            seen.devices
        );
        let namespaces = asked.namespaces.clone();
        claim_entries!(
            self,
            plugin,
            namespaces,
            r#type,
            Namespace,
            adjusted.namespaces,
            seen.namespaces
        );
        if let Some(resources) = &asked.resources {
            let to = adjusted.resources.get_or_insert_default();
            set_resources(&mut self.owners, &id, plugin, resources, to)?;
            overlay(seen.resources.get_or_insert_default(), resources);
        }
        if !asked.cgroups_path.is_empty() {
            self.owners.claim(&id, Field::CgroupsPath, plugin)?;
            seen.cgroups_path.clone_from(&asked.cgroups_path);
            adjusted.cgroups_path.clone_from(&asked.cgroups_path);
        }
        claim_fields!(self.owners, &id, plugin, asked, adjusted,
            oom_score_adj => OomScoreAdj,
            io_priority => IoPriority,
            seccomp_policy => SeccompPolicy,
            scheduler => LinuxSched,
        );
        claim_fields!(self.owners, &id, plugin, asked, adjusted, memory_policy => MemoryPolicy);
        for_seen(seen, adjusted);
        self.linux_maps(plugin, &id, asked)?;
        let adjusted = self.adjust.linux.get_or_insert_default();
        let seen = self.container.linux.get_or_insert_default();
        if let Some(rdt) = &asked.rdt {
            set_rdt(&mut self.owners, &id, plugin, rdt, &mut adjusted.rdt)?;
            seen.rdt.clone_from(&adjusted.rdt);
        }
        Ok(())
    }

    /// The parts of a Linux adjustment that are maps.
    fn linux_maps(
        &mut self,
        plugin: &str,
        id: &str,
        asked: &LinuxContainerAdjustment,
    ) -> Result<(), Error> {
        let adjusted = self.adjust.linux.get_or_insert_default();
        let seen = self.container.linux.get_or_insert_default();
        for key in asked.sysctl.keys().filter_map(|key| removed(key)) {
            self.owners.release_entry(id, Field::Sysctl, key);
            seen.sysctl.remove(key);
            adjusted.sysctl.remove(key);
            adjusted
                .sysctl
                .insert(format!("{REMOVE}{key}"), String::new());
        }
        for (key, value) in asked
            .sysctl
            .iter()
            .filter(|(key, _)| removed(key).is_none())
        {
            self.owners.claim_entry(id, Field::Sysctl, key, plugin)?;
            seen.sysctl.insert(key.clone(), value.clone());
            adjusted.sysctl.insert(key.clone(), value.clone());
        }
        for key in asked.net_devices.keys().filter_map(|key| removed(key)) {
            self.owners.release_entry(id, Field::LinuxNetDevices, key);
            seen.net_devices.remove(key);
            adjusted.net_devices.remove(key);
            adjusted
                .net_devices
                .insert(format!("{REMOVE}{key}"), Default::default());
        }
        for (key, device) in asked
            .net_devices
            .iter()
            .filter(|(key, _)| removed(key).is_none())
        {
            self.owners
                .claim_entry(id, Field::LinuxNetDevices, key, plugin)?;
            seen.net_devices.insert(key.clone(), device.clone());
            adjusted.net_devices.insert(key.clone(), device.clone());
        }
        Ok(())
    }

    /// Adds the changes that `plugin` asks for to other containers.
    pub(super) fn update(
        &mut self,
        plugin: &str,
        asked: Vec<ContainerUpdate>,
    ) -> Result<(), Error> {
        for update in asked {
            let id = &update.container_id;
            if self.creating && *id == self.container.id {
                return Err(Error::UpdateDuringCreation {
                    plugin: plugin.to_owned(),
                    container: id.clone(),
                });
            }
            let found = self
                .updates
                .iter_mut()
                .find(|other| other.container_id == *id);
            let target = if let Some(found) = found {
                found.ignore_failure &= update.ignore_failure;
                found
            } else {
                self.updates.push(ContainerUpdate {
                    container_id: id.clone(),
                    linux: Some(LinuxContainerUpdate::default()),
                    ignore_failure: update.ignore_failure,
                });
                self.updates.last_mut().expect("it was just added")
            };
            let resources = update
                .linux
                .as_ref()
                .and_then(|linux| linux.resources.as_ref());
            let Some(resources) = resources else {
                continue;
            };
            let to = target
                .linux
                .get_or_insert_default()
                .resources
                .get_or_insert_default();
            match set_resources(&mut self.owners, id, plugin, resources, to) {
                Err(error) if update.ignore_failure => {
                    tracing::debug!(plugin, container_id = %id, %error, "NRI update left out");
                }
                other => other?,
            }
        }
        Ok(())
    }
}

/// Shows the next plugin what has been set so far.
fn for_seen(seen: &mut LinuxContainer, adjusted: &LinuxContainerAdjustment) {
    fn show<T: Clone>(to: &mut Option<T>, from: Option<&T>) {
        if let Some(value) = from {
            *to = Some(value.clone());
        }
    }
    show(&mut seen.oom_score_adj, adjusted.oom_score_adj.as_ref());
    show(&mut seen.io_priority, adjusted.io_priority.as_ref());
    show(&mut seen.seccomp_policy, adjusted.seccomp_policy.as_ref());
    show(&mut seen.scheduler, adjusted.scheduler.as_ref());
}

fn append(to: &mut Hooks, from: Hooks) {
    to.prestart.extend(from.prestart);
    to.create_runtime.extend(from.create_runtime);
    to.create_container.extend(from.create_container);
    to.start_container.extend(from.start_container);
    to.poststart.extend(from.poststart);
    to.poststop.extend(from.poststop);
}

/// Sets what `from` has in `to`, each thing claimed for `plugin`.
fn set_resources(
    owners: &mut Owners,
    id: &str,
    plugin: &str,
    from: &LinuxResources,
    to: &mut LinuxResources,
) -> Result<(), Error> {
    if let Some(memory) = &from.memory {
        let to = to.memory.get_or_insert_default();
        claim_fields!(owners, id, plugin, memory, to,
            limit => MemLimit,
            reservation => MemReservation,
            swap => MemSwapLimit,
            kernel => MemKernelLimit,
            kernel_tcp => MemTcpLimit,
            swappiness => MemSwappiness,
            disable_oom_killer => MemDisableOomKiller,
            use_hierarchy => MemUseHierarchy,
        );
    }
    if let Some(cpu) = &from.cpu {
        let to = to.cpu.get_or_insert_default();
        claim_fields!(owners, id, plugin, cpu, to,
            shares => CpuShares,
            quota => CpuQuota,
            period => CpuPeriod,
            realtime_runtime => CpuRealtimeRuntime,
            realtime_period => CpuRealtimePeriod,
        );
        if !cpu.cpus.is_empty() {
            owners.claim(id, Field::CpuSetCpUs, plugin)?;
            to.cpus.clone_from(&cpu.cpus);
        }
        if !cpu.mems.is_empty() {
            owners.claim(id, Field::CpuSetMems, plugin)?;
            to.mems.clone_from(&cpu.mems);
        }
    }
    for limit in &from.hugepage_limits {
        owners.claim_entry(id, Field::HugepageLimits, &limit.page_size, plugin)?;
        to.hugepage_limits
            .retain(|other| other.page_size != limit.page_size);
        to.hugepage_limits.push(limit.clone());
    }
    for (key, value) in &from.unified {
        owners.claim_entry(id, Field::CgroupsUnified, key, plugin)?;
        to.unified.insert(key.clone(), value.clone());
    }
    claim_fields!(owners, id, plugin, from, to,
        blockio_class => BlockioClass,
        rdt_class => RdtClass,
        pids => PidsLimit,
    );
    Ok(())
}

/// Sets what `from` has in `to`, with nothing claimed.
pub(super) fn overlay(to: &mut LinuxResources, from: &LinuxResources) {
    fn set<T: Clone>(to: &mut Option<T>, from: Option<&T>) {
        if let Some(value) = from {
            *to = Some(value.clone());
        }
    }
    if let Some(memory) = &from.memory {
        let LinuxMemory {
            limit,
            reservation,
            swap,
            kernel,
            kernel_tcp,
            swappiness,
            disable_oom_killer,
            use_hierarchy,
        } = to.memory.get_or_insert_default();
        set(limit, memory.limit.as_ref());
        set(reservation, memory.reservation.as_ref());
        set(swap, memory.swap.as_ref());
        set(kernel, memory.kernel.as_ref());
        set(kernel_tcp, memory.kernel_tcp.as_ref());
        set(swappiness, memory.swappiness.as_ref());
        set(disable_oom_killer, memory.disable_oom_killer.as_ref());
        set(use_hierarchy, memory.use_hierarchy.as_ref());
    }
    if let Some(cpu) = &from.cpu {
        let LinuxCpu {
            shares,
            quota,
            period,
            realtime_runtime,
            realtime_period,
            cpus,
            mems,
        } = to.cpu.get_or_insert_default();
        set(shares, cpu.shares.as_ref());
        set(quota, cpu.quota.as_ref());
        set(period, cpu.period.as_ref());
        set(realtime_runtime, cpu.realtime_runtime.as_ref());
        set(realtime_period, cpu.realtime_period.as_ref());
        for (to, from) in [(cpus, &cpu.cpus), (mems, &cpu.mems)] {
            if !from.is_empty() {
                to.clone_from(from);
            }
        }
    }
    for limit in &from.hugepage_limits {
        to.hugepage_limits
            .retain(|other| other.page_size != limit.page_size);
        to.hugepage_limits.push(limit.clone());
    }
    to.unified
        .extend(from.unified.iter().map(|(k, v)| (k.clone(), v.clone())));
    set(&mut to.blockio_class, from.blockio_class.as_ref());
    set(&mut to.rdt_class, from.rdt_class.as_ref());
    set(&mut to.pids, from.pids.as_ref());
}

fn set_rdt(
    owners: &mut Owners,
    id: &str,
    plugin: &str,
    from: &LinuxRdt,
    to: &mut Option<LinuxRdt>,
) -> Result<(), Error> {
    if from.remove {
        for field in [
            Field::RdtClosId,
            Field::RdtSchemata,
            Field::RdtEnableMonitoring,
        ] {
            owners.release(id, field);
        }
        *to = Some(LinuxRdt {
            remove: true,
            ..LinuxRdt::default()
        });
    }
    let to = to.get_or_insert_default();
    claim_fields!(owners, id, plugin, from, to,
        clos_id => RdtClosId,
        schemata => RdtSchemata,
        enable_monitoring => RdtEnableMonitoring,
    );
    Ok(())
}
