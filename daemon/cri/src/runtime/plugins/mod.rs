//! The hooks of NRI plugins in the life of pods and containers.
//!
//! Each pod and container has a stage, so that plugins are told of an end once, however it comes:
//! by a call, by itself, or with the pod.

mod describe;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use lighter_proto::errdefs::{Classify as _, render};
use lighter_proto::nri::pkg::api::v1alpha1 as message;
use lighter_proto::runtime::v1::{ContainerConfig, ContainerState, LinuxContainerResources};
use serde_json::Value;

use self::describe::Described;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::nri::{self, Nri, SyncBlock};
use crate::plugin::Plugin;
use crate::store::{Container, Pod};

/// How far plugins were told of one pod or container.
#[derive(Debug, Default)]
struct Stage {
    /// Its stop was told.
    stopped: bool,
}

/// The plugins and what they were told.
#[derive(Debug, Default)]
pub(crate) struct Hooks {
    nri: std::sync::OnceLock<Arc<Nri>>,
    /// By id. The inner lock is held while plugins are told, so that a removal comes after the stop.
    stages: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Stage>>>>,
}

impl Hooks {
    /// The plugins; `None` when there are none to tell.
    fn listening(&self) -> Option<&Arc<Nri>> {
        self.nri.get().filter(|nri| !nri.is_idle())
    }

    /// How plugins were called, and how many there are.
    pub(crate) fn metrics(&self) -> Option<(&nri::Metrics, usize)> {
        let nri = self.nri.get()?;
        Some((nri.metrics(), nri.active()))
    }

    /// Notes that plugins know of an end already, from an earlier run.
    pub(crate) async fn was_told(&self, id: &str) {
        self.stage(id).lock().await.stopped = true;
    }

    fn stage(&self, id: &str) -> Arc<tokio::sync::Mutex<Stage>> {
        let mut stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(stages.entry(id.to_owned()).or_default())
    }

    fn forget(&self, id: &str) {
        let mut stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        stages.remove(id);
    }
}

fn refused(what: &str) -> impl FnOnce(nri::Error) -> Error {
    let what = what.to_owned();
    move |error| Error::new(error.kind(), format!("{what}: {}", render(&error)))
}

fn told(what: &str, id: &str, result: std::result::Result<(), nri::Error>) {
    if let Err(error) = result {
        tracing::error!(id, error = %render(&error), "NRI {what} failed");
    }
}

/// The runtime as plugins call it.
struct Callee(Weak<Plugin>);

#[async_trait]
impl nri::Runtime for Callee {
    async fn snapshot(&self) -> (Vec<message::PodSandbox>, Vec<message::Container>) {
        let Some(plugin) = self.0.upgrade() else {
            return Default::default();
        };
        let pods = plugin.store.visible_pods();
        let pods = pods.iter().map(|pod| plugin.pod_message(pod)).collect();
        let mut containers = plugin.store.all_containers();
        containers.retain(|container| {
            let state = container.status().state;
            !matches!(
                state,
                ContainerState::ContainerExited | ContainerState::ContainerUnknown
            )
        });
        let containers = containers.iter().map(|c| plugin.container_message(c));
        (pods, containers.collect())
    }

    async fn update(
        &self,
        updates: Vec<message::ContainerUpdate>,
    ) -> Vec<message::ContainerUpdate> {
        match self.0.upgrade() {
            Some(plugin) => plugin.apply_updates(updates).await,
            None => updates,
        }
    }

    async fn evict(&self, evictions: Vec<message::ContainerEviction>) {
        if let Some(plugin) = self.0.upgrade() {
            plugin.apply_evictions(evictions).await;
        }
    }
}

impl Plugin {
    /// Lets plugins in. Pods of earlier runs are known by now.
    ///
    /// # Errors
    /// When their socket cannot be made.
    pub(crate) async fn start_nri(self: &Arc<Self>, config: nri::Config) -> Result<()> {
        let callee = Arc::new(Callee(Arc::downgrade(self)));
        let started = Nri::start(config, callee)
            .await
            .map_err(refused("start NRI"))?;
        let (stop, ended) = (self.stop.clone(), Arc::clone(&started));
        self.tracker.spawn(async move {
            stop.cancelled().await;
            ended.shutdown().await;
        });
        // There is one start in a process.
        let _ = self.hooks.nri.set(started);
        Ok(())
    }

    /// Keeps new plugins out while an object is between its hook and its visibility.
    pub(super) async fn block_plugins(&self) -> Option<SyncBlock> {
        match self.hooks.nri.get() {
            Some(nri) => Some(nri.block_sync().await),
            None => None,
        }
    }

    /// File that says that plugins were told of a pod's stop.
    pub(super) fn stop_told(&self, id: &str) -> std::path::PathBuf {
        self.pod_root(id).join("stop-told")
    }

    fn spec_on_record(&self, id: &str) -> Value {
        let record = self.db.containers().get(&self.scope, id).ok();
        let spec = record.and_then(|r| serde_json::from_slice(&r.spec.value).ok());
        spec.unwrap_or_default()
    }

    fn pod_message(&self, pod: &Pod) -> message::PodSandbox {
        describe::pod(pod, &self.spec_on_record(&pod.id))
    }

    fn container_message(&self, container: &Container) -> message::Container {
        Described::made(container).message(&self.spec_on_record(&container.id))
    }

    /// The pod of a container; only its id when it is gone.
    fn pod_message_of(&self, container: &Container) -> message::PodSandbox {
        match self.store.pods.find(&container.pod_id) {
            Ok(Some(pod)) => self.pod_message(&pod),
            _ => message::PodSandbox {
                id: container.pod_id.clone(),
                ..Default::default()
            },
        }
    }

    /// A pod runs and is about to become visible.
    ///
    /// # Errors
    /// A plugin's refusal.
    pub(super) async fn plugins_run_pod(&self, pod: &Pod) -> Result<()> {
        let Some(nri) = self.hooks.listening() else {
            return Ok(());
        };
        let told_of = self.pod_message(pod);
        let Err(error) = nri.run_pod_sandbox(&told_of).await else {
            return Ok(());
        };
        told(
            "StopPodSandbox",
            &pod.id,
            nri.stop_pod_sandbox(&told_of).await,
        );
        told(
            "RemovePodSandbox",
            &pod.id,
            nri.remove_pod_sandbox(&told_of).await,
        );
        Err(refused("NRI RunPodSandbox failed")(error))
    }

    /// A pod was stopped. Told once.
    pub(super) async fn plugins_stop_pod(&self, pod: &Pod) {
        let Some(nri) = self.hooks.listening() else {
            return;
        };
        let stage = self.hooks.stage(&pod.id);
        let mut stage = stage.lock().await;
        if !std::mem::replace(&mut stage.stopped, true) {
            let result = nri.stop_pod_sandbox(&self.pod_message(pod)).await;
            told("StopPodSandbox", &pod.id, result);
            // For the daemon after this one.
            let marker = self.stop_told(&pod.id);
            if let Err(error) = tokio::fs::write(&marker, b"").await {
                tracing::warn!(sandbox_id = %pod.id, %error, "plugins may be told again of the stop");
            }
        }
    }

    /// A pod is being removed.
    pub(super) async fn plugins_remove_pod(&self, pod: &Pod) {
        if let Some(nri) = self.hooks.listening() {
            let result = nri.remove_pod_sandbox(&self.pod_message(pod)).await;
            told("RemovePodSandbox", &pod.id, result);
        }
        self.hooks.forget(&pod.id);
    }

    /// A container is about to be made: plugins change its spec.
    ///
    /// # Errors
    /// A plugin's refusal, or a change that cannot be made.
    pub(super) async fn plugins_create(
        self: &Arc<Self>,
        pod: &Pod,
        id: &str,
        config: &ContainerConfig,
        image: &Image,
        spec: &mut Value,
    ) -> Result<()> {
        let Some(nri) = self.hooks.listening() else {
            return Ok(());
        };
        let digests = image.digests();
        let digest = digests.first().and_then(|d| d.rsplit_once('@'));
        let name = image.first_name();
        let described = Described {
            id,
            pod_id: &pod.id,
            config,
            image_id: &image.id,
            image_name: &name,
            image_digest: digest.map_or("", |(_, digest)| digest),
            status: None,
        };
        let failed = || refused("failed to get NRI adjustment for container");
        let told_of = described.message(spec);
        let mut created = nri
            .create_container(&self.pod_message(pod), &told_of)
            .await
            .map_err(failed())?;
        if !self.machine.hugetlb
            && let Some(linux) = &mut created.adjust.linux
            && let Some(resources) = &mut linux.resources
        {
            resources.hugepage_limits.clear();
        }
        let adjusted = self.adjust(spec, &created.adjust).await;
        if let Err(error) = adjusted {
            self.tell_undone(pod, &told_of).await;
            return Err(error.context("failed to NRI-adjust container spec"));
        }
        let failures = self.apply_updates(created.updates).await;
        for failure in failures {
            tracing::error!(container_id = %failure.container_id, "NRI update failed");
        }
        self.apply_evictions(created.evictions).await;
        Ok(())
    }

    async fn adjust(&self, spec: &mut Value, adjust: &message::ContainerAdjustment) -> Result<()> {
        nri::apply_adjustment(spec, adjust);
        let resources = adjust.linux.as_ref().and_then(|l| l.resources.as_ref());
        let class = resources.and_then(|r| r.blockio_class.as_ref());
        if let Some(class) = class.map(|c| c.value.as_str()).filter(|c| !c.is_empty()) {
            let limits = self.classes.block_io(class)?.ok_or_else(|| {
                Error::unknown(format!(
                    "block I/O class {class:?}: blockio_config_file names no classes"
                ))
            })?;
            spec["linux"]["resources"]["blockIO"] = limits;
        }
        let names: Vec<String> = adjust.cdi_devices.iter().map(|d| d.name.clone()).collect();
        self.inject_devices(spec, names).await
    }

    async fn tell_undone(&self, pod: &Pod, container: &message::Container) {
        let Some(nri) = self.hooks.listening() else {
            return;
        };
        let pod = self.pod_message(pod);
        let stopped = nri.stop_container(&pod, container).await.map(|_| ());
        told("StopContainer", &container.id, stopped);
        let removed = nri.remove_container(&pod, container).await;
        told("RemoveContainer", &container.id, removed);
    }

    /// Making a container failed after plugins were asked.
    pub(super) async fn plugins_undo_create(&self, pod: &Pod, id: &str, config: &ContainerConfig) {
        if self.hooks.listening().is_none() {
            return;
        }
        let described = Described {
            id,
            pod_id: &pod.id,
            config,
            image_id: "",
            image_name: "",
            image_digest: "",
            status: None,
        };
        let spec = self.spec_on_record(id);
        self.tell_undone(pod, &described.message(&spec)).await;
    }

    /// A container was made and is visible.
    pub(super) async fn plugins_created(&self, container: &Container) {
        if let Some(nri) = self.hooks.listening() {
            let (pod, told_of) = (
                self.pod_message_of(container),
                self.container_message(container),
            );
            let result = nri.post_create_container(&pod, &told_of).await;
            told("PostCreateContainer", &container.id, result);
        }
    }

    /// A container's process exists and is about to be let go.
    ///
    /// # Errors
    /// A plugin's refusal.
    pub(super) async fn plugins_start(&self, container: &Container, pid: u32) -> Result<()> {
        let Some(nri) = self.hooks.listening() else {
            return Ok(());
        };
        let mut told_of = self.container_message(container);
        told_of.pid = pid;
        nri.start_container(&self.pod_message_of(container), &told_of)
            .await
            .map_err(refused("NRI container start failed"))
    }

    /// A container was started.
    pub(super) async fn plugins_started(&self, container: &Container) {
        if let Some(nri) = self.hooks.listening() {
            let (pod, told_of) = (
                self.pod_message_of(container),
                self.container_message(container),
            );
            let result = nri.post_start_container(&pod, &told_of).await;
            told("PostStartContainer", &container.id, result);
        }
    }

    /// What plugins make of an update.
    ///
    /// # Errors
    /// A plugin's refusal.
    pub(super) async fn plugins_update(
        self: &Arc<Self>,
        container: &Container,
        asked: LinuxContainerResources,
    ) -> Result<LinuxContainerResources> {
        let Some(nri) = self.hooks.listening() else {
            return Ok(asked);
        };
        let (pod, told_of) = (
            self.pod_message_of(container),
            self.container_message(container),
        );
        let updated = nri
            .update_container(&pod, &told_of, &describe::resources(&asked))
            .await
            .map_err(refused("NRI container update failed"))?;
        for failure in self.apply_updates(updated.updates).await {
            tracing::error!(container_id = %failure.container_id, "NRI update failed");
        }
        self.apply_evictions(updated.evictions).await;
        Ok(match updated.resources {
            Some(wanted) => describe::asked(&wanted),
            None => asked,
        })
    }

    /// A container was updated.
    pub(super) async fn plugins_updated(&self, container: &Container) {
        if let Some(nri) = self.hooks.listening() {
            let (pod, told_of) = (
                self.pod_message_of(container),
                self.container_message(container),
            );
            let result = nri.post_update_container(&pod, &told_of).await;
            told("PostUpdateContainer", &container.id, result);
        }
    }

    /// A pod's resources are about to change.
    ///
    /// # Errors
    /// A plugin's refusal.
    pub(super) async fn plugins_update_pod(
        &self,
        pod: &Pod,
        overhead: Option<&LinuxContainerResources>,
        resources: Option<&LinuxContainerResources>,
    ) -> Result<()> {
        let Some(nri) = self.hooks.listening() else {
            return Ok(());
        };
        let (overhead, resources) = (
            overhead.map(describe::resources),
            resources.map(describe::resources),
        );
        nri.update_pod_sandbox(
            &self.pod_message(pod),
            overhead.as_ref(),
            resources.as_ref(),
        )
        .await
        .map_err(refused("NRI sandbox update failed"))
    }

    /// A pod's resources were changed.
    pub(super) async fn plugins_updated_pod(&self, pod: &Pod) {
        if let Some(nri) = self.hooks.listening() {
            let result = nri.post_update_pod_sandbox(&self.pod_message(pod)).await;
            told("PostUpdatePodSandbox", &pod.id, result);
        }
    }

    /// A container has ended. Told once; returns when plugins know it.
    pub(super) async fn plugins_stopped(self: &Arc<Self>, container: &Container) {
        let Some(nri) = self.hooks.listening() else {
            return;
        };
        let updates = {
            let stage = self.hooks.stage(&container.id);
            let mut stage = stage.lock().await;
            if std::mem::replace(&mut stage.stopped, true) {
                return;
            }
            let (pod, told_of) = (
                self.pod_message_of(container),
                self.container_message(container),
            );
            nri.stop_container(&pod, &told_of).await
        };
        match updates {
            Ok(updates) => {
                for failure in self.apply_updates(updates).await {
                    tracing::error!(container_id = %failure.container_id, "NRI update failed");
                }
            }
            Err(error) => told("StopContainer", &container.id, Err(error)),
        }
    }

    /// A container is being removed, and has ended if it ever ran.
    pub(super) async fn plugins_remove(self: &Arc<Self>, container: &Container) {
        if let Some(nri) = self.hooks.listening() {
            self.plugins_stopped(container).await;
            let (pod, told_of) = (
                self.pod_message_of(container),
                self.container_message(container),
            );
            let result = nri.remove_container(&pod, &told_of).await;
            told("RemoveContainer", &container.id, result);
        }
        self.hooks.forget(&container.id);
    }

    /// Makes changes that plugins want; those that failed and may not be passed over.
    async fn apply_updates(
        self: &Arc<Self>,
        updates: Vec<message::ContainerUpdate>,
    ) -> Vec<message::ContainerUpdate> {
        let mut failed = Vec::new();
        for update in updates {
            let Ok(Some(container)) = self.store.containers.find(&update.container_id) else {
                continue;
            };
            let wanted = update.linux.as_ref().and_then(|l| l.resources.as_ref());
            let Some(asked) = wanted.map(describe::asked) else {
                continue;
            };
            let changed = self
                .change_container(&container, &asked, HashMap::new())
                .await;
            if let Err(error) = changed
                && !update.ignore_failure
            {
                tracing::warn!(container_id = %container.id, %error, "NRI update failed");
                failed.push(update);
            }
        }
        failed
    }

    async fn apply_evictions(self: &Arc<Self>, evictions: Vec<message::ContainerEviction>) {
        for eviction in evictions {
            let Ok(Some(container)) = self.store.containers.find(&eviction.container_id) else {
                continue;
            };
            let reason = eviction.reason;
            tracing::info!(container_id = %container.id, reason, "evicted by an NRI plugin");
            if let Err(error) = self.stop_container(&container, Duration::ZERO).await {
                tracing::warn!(container_id = %container.id, %error, "eviction failed");
            }
        }
    }

    /// Injects CDI devices into a spec.
    ///
    /// # Errors
    /// For devices that no CDI spec has, or when CDI is off.
    pub(super) async fn inject_devices(&self, spec: &mut Value, names: Vec<String>) -> Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        let Some(registry) = self.cdi.clone() else {
            return Err(Error::unknown(format!(
                "CDI devices {names:?} are asked for, but enable_cdi is off"
            )));
        };
        let mut edited = std::mem::take(spec);
        // Reads directories when they have changed.
        let done = tokio::task::spawn_blocking(move || {
            let done = registry.inject(&mut edited, &names);
            (edited, done)
        });
        let (edited, done) = done.await.map_err(|e| Error::unknown(e.to_string()))?;
        *spec = edited;
        done.map_err(|e| Error::unknown(format!("CDI device injection failed: {}", render(&e))))
    }
}
