//! Running a pod: name, lease, network, pause process, in this order, and back in reverse.

use std::sync::Arc;

use lighter_engine::image::{Descriptor, Matcher};
use lighter_engine::runtime::CreateTask;
use lighter_engine::transfer::{NewImage, UnpackRequest};
use lighter_proto::errdefs::render;
use lighter_proto::runtime::v1::{
    ContainerEventType, PodSandboxConfig, PodSandboxMetadata, PodSandboxState,
};
use lighter_store::Labels;

use super::files::on_host;
use super::records::{New, POD};
use super::{new_id, task_runtime};
use crate::error::{Error, Result};
use crate::image::{Image, MANAGED_LABEL, PINNED_LABEL, pause};
use crate::plugin::{Plugin, UNDO_LIMIT};
use crate::spec::sandbox;
use crate::store::Pod;

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

impl Plugin {
    /// Runs a pod; its id. A failure leaves nothing, or a pod that is not ready when undoing it
    /// failed as well.
    pub(super) async fn run_pod(
        self: &Arc<Self>,
        config: PodSandboxConfig,
        handler: String,
    ) -> Result<String> {
        self.handler(&handler)?;
        let metadata = config
            .metadata
            .clone()
            .ok_or_else(|| Error::invalid("sandbox config must include metadata"))?;
        let (id, name) = (new_id(), name_of(&metadata));
        let reservation = self.store.reserve("sandbox", &name, &id)?;
        self.db
            .leases()
            .create(&self.scope, &id, Labels::new())
            .await?;
        let netns = if on_host(&config, |o| o.network()) {
            None
        } else {
            match self.make_netns().await {
                Ok(path) => Some(path),
                Err(error) => {
                    self.delete_lease(&id).await?;
                    return Err(error.context(format!("pod {name}")));
                }
            }
        };
        let pod = Arc::new(Pod::new(id.clone(), name, config, handler, netns));
        let _busy = pod.busy.lock().await;
        self.store.add_pod(Arc::clone(&pod));
        match self.build_pod(&pod).await {
            Ok(()) => {
                reservation.keep();
                self.announce(&id, &id, ContainerEventType::ContainerCreatedEvent);
                self.announce(&id, &id, ContainerEventType::ContainerStartedEvent);
                Ok(id)
            }
            Err(error) => {
                let undone = tokio::time::timeout(UNDO_LIMIT, self.undo_pod(&pod)).await;
                let failure = match undone {
                    Ok(Ok(())) => None,
                    Ok(Err(failure)) => Some(failure.to_string()),
                    Err(_) => Some("took too long".to_owned()),
                };
                match failure {
                    None => self.store.remove_pod(&id),
                    Some(failure) => {
                        // Kept, so that the kubelet's Stop and Remove try again.
                        tracing::warn!(pod = %id, %failure, "pod not undone");
                        reservation.keep();
                        pod.update(|s| s.visible = true);
                    }
                }
                Err(error)
            }
        }
    }

    async fn build_pod(self: &Arc<Self>, pod: &Arc<Pod>) -> Result<()> {
        if let Some(netns) = &pod.netns {
            let (ip, others, result) = self.attach_network(pod, netns).await?;
            let result = serde_json::to_value(result)?;
            pod.update(|s| {
                s.ip = ip;
                s.additional_ips = others;
                s.cni_result = Some(result);
            });
        }
        let snapshotter = self.snapshotter_of(&pod.handler);
        let image = self.pause_image(&snapshotter).await?;
        let files = self.write_pod_files(&pod.id, &pod.config).await?;
        let handler = self.handler(&pod.handler)?;
        let image_name = image.first_name();
        let spec = sandbox::spec(&sandbox::Input {
            id: &pod.id,
            config: &pod.config,
            image: &image.process,
            image_name: &image_name,
            files: &files,
            netns: pod.netns.as_deref(),
            hostname: &Self::hostname(&pod.config),
            runtime: &self.config.runtime,
            handler,
            base: crate::spec::base(),
        })?;
        let scope = self.scope.with_lease(&pod.id);
        let snapshots = self.db.snapshots(&snapshotter)?;
        let rootfs = snapshots
            .view(&scope, &pod.id, image.chain_id.as_deref(), Labels::new())
            .await?;
        let record = self
            .record(New {
                id: &pod.id,
                kind: "sandbox",
                labels: &pod.config.labels,
                image: image_name,
                handler,
                spec: &spec,
                snapshotter,
                extension: POD,
                metadata: self.pod_metadata(pod)?,
                pod_id: "",
            })
            .await?;
        let task = CreateTask {
            rootfs,
            runtime: task_runtime(handler),
            ..CreateTask::of(&record)
        };
        let created = self.tasks.create(&scope, task).await;
        let handle =
            created.map_err(|e| Error::from(e).context("failed to create containerd task"))?;
        let started = handle.start("").await;
        let pid = started
            .map_err(|e| Error::from(e).context("failed to start sandbox container task"))?;
        pod.update(|s| {
            s.state = PodSandboxState::SandboxReady;
            s.created_at = std::time::SystemTime::now();
            s.pid = pid;
            s.visible = true;
        });
        self.watch_pod(Arc::clone(pod), handle);
        Ok(())
    }

    /// Takes back whatever of the pod exists.
    pub(super) async fn undo_pod(&self, pod: &Pod) -> Result<()> {
        self.kill_task(&pod.id).await?;
        self.delete_record(&pod.id).await?;
        self.delete_snapshot(&self.snapshotter_of(&pod.handler), &pod.id)
            .await?;
        self.remove_pod_files(&pod.id).await?;
        if let Some(netns) = &pod.netns {
            self.detach_network(pod, netns).await?;
        }
        self.delete_lease(&pod.id).await
    }

    /// Ends a lease; one that is gone is fine.
    pub(super) async fn delete_lease(&self, id: &str) -> Result<()> {
        match self.db.leases().delete(&self.scope, id).await {
            Err(error) if !Error::from_store(&error).is_not_found() => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// The pause image, made and unpacked when it is not there.
    async fn pause_image(&self, snapshotter: &str) -> Result<Image> {
        if let Some(image) = self.images.find(pause::NAME)
            && let Some(chain) = &image.chain_id
            && self
                .db
                .snapshots(snapshotter)?
                .stat(&self.scope, chain)
                .await
                .is_ok()
        {
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

    async fn make_pause_image(
        &self,
        scope: &lighter_store::Scope,
        snapshotter: &str,
    ) -> Result<()> {
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
            .unpack(scope, pause::NAME, target, unpack)
            .await
            .map_err(failed)?;
        self.images.refresh(pause::NAME).await;
        Ok(())
    }

    async fn put_blob(&self, scope: &lighter_store::Scope, blob: &pause::Blob) -> Result<()> {
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
