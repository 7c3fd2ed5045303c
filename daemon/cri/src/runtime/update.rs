//! Changing the resources of containers and pods while they live.

use std::collections::HashMap;
use std::sync::Arc;

use lighter_proto::any;
use lighter_proto::runtime::v1::{ContainerState, HugepageLimit, LinuxContainerResources};
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

/// What is known of the resources after an update: fields that it leaves empty stay.
fn merged(
    known: Option<LinuxContainerResources>,
    asked: &LinuxContainerResources,
    swap: bool,
) -> LinuxContainerResources {
    let mut merged = known.unwrap_or_default();
    let numbers = [
        (&mut merged.cpu_period, asked.cpu_period),
        (&mut merged.cpu_quota, asked.cpu_quota),
        (&mut merged.cpu_shares, asked.cpu_shares),
        (
            &mut merged.memory_limit_in_bytes,
            asked.memory_limit_in_bytes,
        ),
        (&mut merged.oom_score_adj, asked.oom_score_adj),
    ];
    for (field, value) in numbers {
        if value != 0 {
            *field = value;
        }
    }
    if asked.memory_swap_limit_in_bytes != 0 {
        merged.memory_swap_limit_in_bytes = asked.memory_swap_limit_in_bytes;
    } else if asked.memory_limit_in_bytes != 0 && swap {
        merged.memory_swap_limit_in_bytes = asked.memory_limit_in_bytes;
    }
    for (field, value) in [
        (&mut merged.cpuset_cpus, &asked.cpuset_cpus),
        (&mut merged.cpuset_mems, &asked.cpuset_mems),
    ] {
        if !value.is_empty() {
            field.clone_from(value);
        }
    }
    for limit in &asked.hugepage_limits {
        let same = |known: &&mut HugepageLimit| known.page_size == limit.page_size;
        match merged.hugepage_limits.iter_mut().find(same) {
            Some(known) => known.limit = limit.limit,
            None => merged.hugepage_limits.push(limit.clone()),
        }
    }
    merged.unified.extend(asked.unified.clone());
    merged
}

impl Plugin {
    /// Changes a container's resources: on record, and in its task when it runs.
    pub(super) async fn update_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
        asked: LinuxContainerResources,
        annotations: HashMap<String, String>,
    ) -> Result<()> {
        // A start reads the record: it comes before this update or after it.
        let _busy = container.busy.lock().await;
        let status = container.status();
        if status.removing {
            return Err(Error::unknown(format!(
                "failed to update resources: container {:?} is in removing state",
                container.id
            )));
        }
        let before = self.db.containers().get(&self.scope, &container.id)?;
        let mut spec: Value = serde_json::from_slice(&before.spec.value)?;
        resources::merge(&mut spec["linux"]["resources"], &asked, self.machine);
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
        container.update(|s| {
            s.resources = Some(merged(s.resources.take(), &asked, self.machine.swap));
        });
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
        let _busy = pod.busy.lock().await;
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

    /// Reads back what [`Plugin::update_pod`] kept, after a restart.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_keeps_what_it_does_not_name() {
        let known = LinuxContainerResources {
            cpu_shares: 2,
            cpuset_cpus: "0".into(),
            memory_limit_in_bytes: 5,
            ..Default::default()
        };
        let asked = LinuxContainerResources {
            memory_limit_in_bytes: 9,
            unified: HashMap::from([("memory.high".into(), "8".into())]),
            hugepage_limits: vec![HugepageLimit {
                page_size: "2MB".into(),
                limit: 1,
            }],
            ..Default::default()
        };
        let merged = merged(Some(known), &asked, true);
        assert_eq!((merged.cpu_shares, merged.cpuset_cpus.as_str()), (2, "0"));
        assert_eq!(
            (
                merged.memory_limit_in_bytes,
                merged.memory_swap_limit_in_bytes
            ),
            (9, 9)
        );
        assert_eq!((merged.unified.len(), merged.hugepage_limits.len()), (1, 1));
    }
}
