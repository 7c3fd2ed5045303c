//! The `info` of verbose statuses: JSON for people and for `crictl inspect`.

use lighter_proto::any;
use lighter_proto::containerd::runc::v1::Options;
use lighter_proto::runtimeoptions;
use lighter_store::metadata;
use serde_json::{Map, Value, json};

use super::records::envelope;
use crate::error::Result;
use crate::plugin::Plugin;
use crate::store::{Container, Pod};

fn spec_of(record: Option<&metadata::Container>) -> Value {
    record
        .and_then(|r| serde_json::from_slice(&r.spec.value).ok())
        .unwrap_or_default()
}

/// Leaves out what says nothing.
fn told(mut info: Map<String, Value>) -> Value {
    info.retain(|_, value| match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => true,
    });
    Value::Object(info)
}

impl Plugin {
    fn runtime_of(&self, record: Option<&metadata::Container>) -> Result<(String, Value)> {
        let Some(record) = record else {
            return Ok((String::new(), Value::Null));
        };
        let options = record.runtime.options.as_ref();
        let runc = options.and_then(|o| any::unpack::<Options>(o).ok());
        let other = options.and_then(|o| any::unpack::<runtimeoptions::v1::Options>(o).ok());
        let options = match (runc, other) {
            (Some(options), _) => self.json.write(&options)?,
            (None, Some(options)) => json!({
                "type_url": options.type_url,
                "config_path": options.config_path,
                "config_body": String::from_utf8_lossy(&options.config_body),
            }),
            (None, None) => Value::Null,
        };
        Ok((record.runtime.name.clone(), options))
    }

    /// What `PodSandboxStatus` adds when it is verbose.
    pub(super) fn pod_info(&self, pod: &Pod) -> Result<Value> {
        let state = pod.state();
        let record = self.db.containers().get(&self.scope, &pod.id).ok();
        let (runtime, options) = self.runtime_of(record.as_ref())?;
        let resources = |r: &Option<_>| match r {
            Some(resources) => self
                .json
                .write(resources)
                .map(|linux| json!({ "linux": linux })),
            None => Ok(Value::Null),
        };
        let info = json!({
            "pid": state.pid,
            "processStatus": if state.pid == 0 { "deleted" } else { "running" },
            "netNamespaceClosed": pod.netns.as_ref().is_some_and(|n| crate::netns::is_closed(n)),
            "image": record.as_ref().map(|r| r.image.clone()),
            "snapshotKey": pod.id,
            "snapshotter": self.snapshotter_of(&pod.handler),
            "runtimeHandler": pod.handler,
            "runtimeType": runtime,
            "runtimeOptions": options,
            "config": self.json.write(&pod.config)?,
            "runtimeSpec": spec_of(record.as_ref()),
            "cniResult": state.cni_result,
            "sandboxMetadata": envelope(&self.pod_metadata(pod)?, false),
            "overhead": resources(&state.overhead)?,
            "resources": resources(&state.resources)?,
        });
        Ok(match info {
            Value::Object(map) => told(map),
            other => other,
        })
    }

    /// What `ContainerStatus` adds when it is verbose.
    pub(super) fn container_info(&self, container: &Container) -> Result<Value> {
        let status = container.status();
        let record = self.db.containers().get(&self.scope, &container.id).ok();
        let (runtime, options) = self.runtime_of(record.as_ref())?;
        let info = json!({
            "sandboxID": container.pod_id,
            "pid": status.pid,
            "removing": status.removing,
            "snapshotKey": container.id,
            "snapshotter": container.snapshotter,
            "runtimeType": runtime,
            "runtimeOptions": options,
            "config": self.json.write(&container.config)?,
            "runtimeSpec": spec_of(record.as_ref()),
        });
        Ok(match info {
            Value::Object(map) => told(map),
            other => other,
        })
    }
}
