//! Running a pod: name, lease, network, pause process, in this order, and back in reverse.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lighter_engine::image::{Descriptor, Matcher};
use lighter_engine::runtime::{CreateTask, Handle};
use lighter_engine::transfer::{NewImage, UnpackRequest};
use lighter_proto::errdefs::render;
use lighter_proto::runtime::v1::{
    ContainerEventType, PodSandboxConfig, PodSandboxMetadata, PodSandboxState,
};
use lighter_snapshotter::Mount;
use lighter_store::{Labels, Scope};

use super::files::on_host;
use super::records::{New, POD};
use super::{new_id, task_runtime};
use crate::config::Handler;
use crate::error::{Error, Result};
use crate::image::{Image, MANAGED_LABEL, PINNED_LABEL, pause};
use crate::plugin::Plugin;
use crate::selinux::label_mounts;
use crate::spec::sandbox;
use crate::store::Pod;
use crate::turn::Taken;

/// Name that a pod reserves.
fn name_of(metadata: &PodSandboxMetadata) -> String {
    let PodSandboxMetadata {
        name,
        namespace,
        uid,
        attempt,
    } = metadata;
    format!("{name}_{namespace}_{uid}_{attempt}")
}

/// Annotation of pods that run under the handler of the same name.
const UNTRUSTED: &str = "io.kubernetes.cri.untrusted-workload";
/// That handler.
const UNTRUSTED_HANDLER: &str = "untrusted";

/// The handler of a pod: the one asked for, unless the pod is not to be trusted.
///
/// # Errors
/// For a pod that is not to be trusted and asks for what only trusted ones may have.
fn handler_of(config: &PodSandboxConfig, asked: String) -> Result<String> {
    if config.annotations.get(UNTRUSTED).map(String::as_str) != Some("true") {
        return Ok(asked);
    }
    if !asked.is_empty() && asked != UNTRUSTED_HANDLER {
        return Err(Error::unknown(
            "untrusted workload with explicit runtime handler is not allowed",
        ));
    }
    if on_host(config, |o| o.network())
        || on_host(config, |o| o.pid())
        || on_host(config, |o| o.ipc())
    {
        return Err(Error::unknown(
            "untrusted workload with host access is not allowed",
        ));
    }
    Ok(UNTRUSTED_HANDLER.to_owned())
}

/// How long the network of a pod whose start failed may take: one that is whole is undone whole.
const LATE_NETWORK: Duration = Duration::from_secs(5);

/// Attaches the network while the sandbox starts. A start that fails soon ends the wait for the
/// network; a network that fails waits for the start, which then can be undone.
async fn both<T>(
    network: impl Future<Output = Result<()>>,
    start: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::pin!(network, start);
    tokio::select! {
        attached = &mut network => {
            let started = start.await;
            attached?;
            started
        }
        started = &mut start => {
            if started.is_err() {
                // The start's failure is the one to tell.
                let _ = tokio::time::timeout(LATE_NETWORK, network).await;
                return started;
            }
            network.await?;
            started
        }
    }
}

impl Plugin {
    /// Runs a pod; its id. A failure leaves nothing, or a pod that is not ready when undoing it
    /// failed as well.
    pub(super) async fn run_pod(
        self: &Arc<Self>,
        config: PodSandboxConfig,
        handler: String,
    ) -> Result<String> {
        let handler = handler_of(&config, handler)?;
        self.handler(&handler)?;
        let metadata = config
            .metadata
            .clone()
            .ok_or_else(|| Error::unknown("sandbox config must include metadata"))?;
        if on_host(&config, |o| o.network()) && !config.hostname.is_empty() {
            return Err(Error::invalid(format!(
                "unable to set hostname {:?} without a private UTS namespace: a pod on the host's network keeps the host's name",
                config.hostname
            )));
        }
        let (id, name) = (new_id(), name_of(&metadata));
        self.free_name(&name).await?;
        let reservation = self.store.reserve("sandbox", &name, &id)?;
        let netns = self.netns_path(&config);
        let pod = Arc::new(Pod::new(id.clone(), name, config, handler, netns));
        let turn = pod.busy.take("RunPodSandbox", &pod.name).await?;
        self.store.pods.add(Arc::clone(&pod));
        let error = match self.build_pod(&pod, &turn).await {
            Ok(()) => {
                reservation.keep();
                self.announce(&id, &id, ContainerEventType::ContainerCreatedEvent);
                self.announce(&id, &id, ContainerEventType::ContainerStartedEvent);
                return Ok(id);
            }
            Err(error) => error,
        };
        match self.undo_pod(&pod, &turn).await {
            Ok(()) => self.store.pods.remove(&id),
            Err(failure) => {
                tracing::warn!(sandbox_id = %id, %failure, "pod not undone");
                reservation.keep();
                self.abandon(&pod);
            }
        }
        Err(error)
    }

    async fn build_pod(self: &Arc<Self>, pod: &Arc<Pod>, turn: &Taken<'_>) -> Result<()> {
        turn.at("pause image");
        let snapshotter = self.snapshotter_of(&pod.handler);
        let handler = self.handler(&pod.handler)?;
        let image = self.pause_image(handler, &snapshotter).await?;
        let image_name = image.first_name();
        let mut spec = sandbox::spec(&sandbox::Input {
            id: &pod.id,
            config: &pod.config,
            image: &image.process,
            image_name: &image_name,
            files: &self.pod_files(&pod.id, &pod.config),
            netns: pod.netns.as_deref(),
            userns: self.userns_path(&pod.id, &pod.config).as_deref(),
            hostname: &Self::hostname(&pod.config),
            runtime: &self.config.runtime,
            handler,
            base: self.base_spec(&pod.handler),
        })?;
        self.label_pod(pod, handler, &mut spec)?;
        // On record before anything is made, so that a crash leaves nothing unknown.
        turn.at("record");
        let record = self.record(New {
            id: &pod.id,
            kind: "sandbox",
            labels: &pod.config.labels,
            image: image_name,
            handler,
            spec: &spec,
            snapshotter: snapshotter.clone(),
            extension: POD,
            metadata: self.pod_metadata(pod)?,
            making: true,
            pod_id: "",
        });
        let leases = self.db.leases();
        let lease = leases.create(&self.scope, &pod.id, Labels::new());
        let (record, lease) = tokio::join!(record, lease);
        let record = record?;
        lease?;
        pod.update(|s| s.created_at = record.created_at);
        turn.at("namespace, root and files");
        let scope = self.scope.with_lease(&pod.id);
        let (namespace, rootfs, files) = tokio::join!(
            self.make_netns(pod),
            self.pod_root_of(&scope, &snapshotter, pod, &image),
            self.write_pod_files(&pod.id, &pod.config)
        );
        namespace?;
        files?;
        let task = CreateTask {
            rootfs: rootfs?,
            runtime: task_runtime(handler),
            ..CreateTask::of(&record)
        };
        turn.at("network (CNI ADD), start of the sandbox");
        let runtime = self.runtime_label(&pod.handler);
        let begun = Instant::now();
        let started = both(self.make_network(pod), self.start_pod(&scope, task)).await;
        if started.is_ok() {
            let took = begun.elapsed();
            self.timers.note("sandbox_runtime_create", &runtime, took);
        }
        let (handle, pid) = started?;
        pod.update(|s| s.pid = pid);
        turn.at("NRI RunPodSandbox");
        let _blocked = self.block_plugins().await;
        self.plugins_run_pod(pod).await?;
        turn.at("keep");
        if let Err(error) = self.keep_pod(pod, record).await {
            // Plugins know it already, and nothing else tells them that it goes.
            self.plugins_stop_pod(pod).await;
            self.plugins_remove_pod(pod).await;
            return Err(error);
        }
        pod.update(|s| {
            s.state = PodSandboxState::SandboxReady;
            s.visible = true;
        });
        self.watch_pod(Arc::clone(pod), handle);
        Ok(())
    }

    async fn start_pod(&self, scope: &Scope, task: CreateTask) -> Result<(Handle, u32)> {
        let created = self.tasks.create(scope, task).await;
        let handle =
            created.map_err(|e| Error::from(e).context("failed to create containerd task"))?;
        let started = handle.start("").await;
        let pid = started
            .map_err(|e| Error::from(e).context("failed to start sandbox container task"))?;
        Ok((handle, pid))
    }

    /// Root of the pause process: our own image needs no writable layer for what every pod mounts;
    /// another's, or a base spec with more mounts, may.
    async fn pod_root_of(
        &self,
        scope: &Scope,
        snapshotter: &str,
        pod: &Pod,
        image: &Image,
    ) -> Result<Vec<Mount>> {
        let snapshots = self.db.snapshots(snapshotter)?;
        let parent = image.chain_id.as_deref();
        let labels = crate::userns::snapshot_labels(pod.namespace_options());
        let complete = image.names.contains(pause::NAME) && !self.has_base_spec(&pod.handler);
        let made = if complete {
            snapshots.view(scope, &pod.id, parent, labels).await
        } else {
            snapshots.prepare(scope, &pod.id, parent, labels).await
        };
        let mut mounts = made?;
        label_mounts(&mut mounts, pod.mount_label());
        Ok(mounts)
    }

    /// Ends a lease; one that is gone is fine.
    pub(super) async fn delete_lease(&self, id: &str) -> Result<()> {
        match self.db.leases().delete(&self.scope, id).await {
            Err(error) if !Error::from_store(&error).is_not_found() => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// The image of a pod's first process: our own, made and unpacked when it is not there, or the
    /// one that is configured, pulled when it is not and the handler lets it.
    async fn pause_image(&self, handler: &Handler, snapshotter: &str) -> Result<Image> {
        let configured = self.config.images.pinned_images.get("sandbox");
        let configured = configured.filter(|name| !name.is_empty() && *name != pause::NAME);
        if let Some(name) = configured {
            if self.unpacked(name, snapshotter).await.is_none() {
                let here = self.images.find(name);
                let made = match (handler.disable_pause_image_pull, here) {
                    (true, Some(image)) => self.images.unpack(&image, snapshotter).await,
                    (true, None) => Err(Error::not_found(format!(
                        "image {name:?}: not found, and disable_pause_image_pull keeps it from \
                         being pulled: load it, or name no pinned_images.sandbox"
                    ))),
                    (false, _) => self.images.pull(name, None, snapshotter).await.map(drop),
                };
                made.map_err(|e| e.context("failed to get sandbox image"))?;
            }
            return self.images.find(name).ok_or_else(|| {
                Error::not_found(format!("failed to get sandbox image {name:?}: not found"))
            });
        }
        if let Some(image) = self.unpacked(pause::NAME, snapshotter).await {
            return Ok(image);
        }
        let _one = self.pause_made.lock().await;
        if let Some(image) = self.unpacked(pause::NAME, snapshotter).await {
            return Ok(image);
        }
        let failed = |e: lighter_engine::transfer::Error| Error::unknown(render(&e));
        let lease = self.transfer.lease(&self.scope).await.map_err(failed)?;
        let made = self.make_pause_image(lease.scope(), snapshotter).await;
        lease.release().await;
        made?;
        self.images
            .find(pause::NAME)
            .ok_or_else(|| Error::unknown(format!("pause image {} is not usable", pause::NAME)))
    }

    /// An image that containers can be made from with `snapshotter`.
    async fn unpacked(&self, name: &str, snapshotter: &str) -> Option<Image> {
        let image = self.images.find(name)?;
        let chain = image.chain_id.as_ref()?;
        let snapshots = self.db.snapshots(snapshotter).ok()?;
        snapshots.stat(&self.scope, chain).await.ok()?;
        Some(image)
    }

    async fn make_pause_image(&self, scope: &Scope, snapshotter: &str) -> Result<()> {
        let failed = |e: lighter_engine::transfer::Error| Error::unknown(render(&e));
        let blobs = pause::blobs();
        for blob in &blobs {
            self.put_blob(scope, blob).await?;
        }
        let [_, _, manifest] = &blobs;
        let target: &Descriptor = &manifest.descriptor;
        let labels = Labels::from([
            (MANAGED_LABEL.0.to_owned(), MANAGED_LABEL.1.to_owned()),
            (PINNED_LABEL.0.to_owned(), PINNED_LABEL.1.to_owned()),
        ]);
        let image = NewImage {
            name: pause::NAME.to_owned(),
            labels,
        };
        self.transfer
            .record(scope, image, target)
            .await
            .map_err(failed)?;
        let unpack = UnpackRequest {
            matcher: Matcher::host(),
            snapshotter: snapshotter.to_owned(),
        };
        self.transfer
            .unpack(scope, pause::NAME, target, unpack, None)
            .await
            .map_err(failed)?;
        self.images.refresh(pause::NAME).await;
        Ok(())
    }

    async fn put_blob(&self, scope: &Scope, blob: &pause::Blob) -> Result<()> {
        let descriptor = &blob.descriptor;
        let reference = format!("cri-pause-{}", descriptor.digest);
        let content = self.db.content();
        let expected = Some(&descriptor.digest);
        let opened = content
            .writer(scope, &reference, descriptor.size_bytes, expected)
            .await;
        let mut writer = match opened {
            Ok(writer) => writer,
            Err(lighter_store::Error::AlreadyExists { .. }) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        // Whatever a try before this one left.
        writer.truncate(0).await?;
        writer.write(blob.data.clone()).await?;
        match writer
            .commit(descriptor.size_bytes, expected, blob.labels.clone())
            .await
        {
            Ok(_) | Err(lighter_store::Error::AlreadyExists { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
