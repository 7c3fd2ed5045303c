//! Changing the resources of containers and pods while they live.

use std::collections::HashMap;
use std::sync::Arc;

use lighter_proto::any;
use lighter_proto::runtime::v1::{ContainerState, LinuxContainerResources};
use prost_types::Any;
use serde_json::{Value, json};

use super::records::SPEC;
use crate::error::{Error, Result};
use crate::plugin::Plugin;
use crate::spec::resources;
use crate::store::{Container, Pod};

/// Type of the resources that a runtime is sent.
const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
/// Extension of a pod's record: its resources as last updated.
pub(super) const UPDATED: &str = "updated-resources";
/// Type of that extension.
const UPDATED_TYPE: &str =
    "github.com/containerd/containerd/v2/internal/cri/server/podsandbox/UpdatedResources";

impl Plugin {
    /// Changes a container's resources: on record, and in its task when it runs.
    pub(super) async fn update_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
        asked: LinuxContainerResources,
        annotations: HashMap<String, String>,
    ) -> Result<()> {
        let _blocked = self.block_plugins().await;
        let asked = self.plugins_update(container, asked).await?;
        self.change_container(container, &asked, annotations)
            .await?;
        self.plugins_updated(container).await;
        Ok(())
    }

    /// [`Plugin::update_container`] without asking plugins: for changes that they want themselves.
    pub(super) async fn change_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
        asked: &LinuxContainerResources,
        annotations: HashMap<String, String>,
    ) -> Result<()> {
        // A start reads the record: it comes before this update or after it.
        let _turn = container
            .busy
            .take("UpdateContainerResources", &container.name)
            .await?;
        let status = container.status();
        if status.removing {
            return Err(Error::unknown(format!(
                "failed to update resources: container {:?} is in removing state",
                container.id
            )));
        }
        let before = self.db.containers().get(&self.scope, &container.id)?;
        let mut spec: Value = serde_json::from_slice(&before.spec.value)?;
        resources::merge(&mut spec["linux"]["resources"], asked, self.machine);
        self.store_spec(&container.id, any::pack_json(SPEC, &spec)?)
            .await?;
        if status.state == ContainerState::ContainerRunning
            && let Err(error) = self
                .update_task(&container.id, &spec["linux"]["resources"], annotations)
                .await
        {
            if let Err(failure) = self.store_spec(&container.id, before.spec).await {
                tracing::error!(container_id = %container.id, error = %failure, "spec not restored");
            }
            return Err(error.context("failed to update resources"));
        }
        let shown = resources::recorded(&spec);
        container.update(|s| s.resources = shown);
        self.save_status(container).await;
        Ok(())
    }

    async fn store_spec(&self, id: &str, spec: Any) -> Result<()> {
        let mut record = self.db.containers().get(&self.scope, id)?;
        record.spec = spec;
        let containers = self.db.containers();
        containers
            .update(&self.scope, record, &["spec".to_owned()])
            .await?;
        Ok(())
    }

    /// Sends a container's resources to its task. One that has just ended has none to change.
    async fn update_task(
        &self,
        id: &str,
        resources: &Value,
        annotations: HashMap<String, String>,
    ) -> Result<()> {
        let Some(task) = self.task(id).await? else {
            return Ok(());
        };
        let resources = any::pack_json(RESOURCES, resources)?;
        match task
            .update(Some(resources), annotations)
            .await
            .map_err(Error::from)
        {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// Keeps what the kubelet says of a pod's resources; its cgroup is the kubelet's own.
    pub(super) async fn update_pod(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        overhead: Option<LinuxContainerResources>,
        resources: Option<LinuxContainerResources>,
    ) -> Result<()> {
        let _blocked = self.block_plugins().await;
        self.plugins_update_pod(pod, overhead.as_ref(), resources.as_ref())
            .await?;
        self.keep_pod_resources(pod, overhead, resources).await?;
        self.plugins_updated_pod(pod).await;
        Ok(())
    }

    async fn keep_pod_resources(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        overhead: Option<LinuxContainerResources>,
        resources: Option<LinuxContainerResources>,
    ) -> Result<()> {
        let _turn = pod
            .busy
            .take("UpdatePodSandboxResources", &pod.name)
            .await?;
        let write = |linux: &Option<LinuxContainerResources>| -> Result<Value> {
            let linux = linux.as_ref().map(|l| self.json.write(l)).transpose()?;
            Ok(json!({ "linux": linux.unwrap_or_default() }))
        };
        let value = json!({ "overhead": write(&overhead)?, "resources": write(&resources)? });
        let mut record = self.db.containers().get(&self.scope, &pod.id)?;
        record
            .extensions
            .insert(UPDATED.to_owned(), any::pack_json(UPDATED_TYPE, &value)?);
        let containers = self.db.containers();
        let mask = ["extensions".to_owned()];
        containers.update(&self.scope, record, &mask).await?;
        pod.update(|state| {
            state.overhead = overhead;
            state.resources = resources;
        });
        Ok(())
    }

    /// Reads back what [`Plugin::keep_pod_resources`] kept, after a restart.
    pub(super) fn recover_pod_resources(&self, pod: &Pod, extension: &Any) -> Result<()> {
        let value: Value = serde_json::from_slice(&extension.value)?;
        let read = |key: &str| match &value[key]["linux"] {
            Value::Null => Ok(None),
            linux => self.json.read::<LinuxContainerResources>(linux).map(Some),
        };
        let (overhead, resources) = (read("overhead")?, read("resources")?);
        pod.update(|state| {
            state.overhead = overhead;
            state.resources = resources;
        });
        Ok(())
    }
}
