//! Pods and containers on record: containerd's labels and extensions, and status files.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use lighter_proto::containerd::runc::v1::Options;
use lighter_proto::runtime::v1::ContainerState;
use lighter_proto::{any, time};
use lighter_store::metadata::{self, Runtime};
use lighter_store::{Identifier, Labels};
use prost_types::Any;
use serde_json::{Value, json};

use crate::config::Handler;
use crate::error::{Result, io};
use crate::plugin::Plugin;
use crate::store::{Container, Pod};

/// What a record is of.
pub(super) const KIND: &str = "io.cri-containerd.kind";
/// Extension of pods, and its type.
pub(super) const POD: (&str, &str) = (
    "io.cri-containerd.sandbox.metadata",
    "github.com/containerd/cri/pkg/store/sandbox/Metadata",
);
/// Extension of containers, and its type.
pub(super) const CONTAINER: (&str, &str) = (
    "io.cri-containerd.container.metadata",
    "github.com/containerd/cri/pkg/store/container/Metadata",
);
/// Type of a spec.
pub(super) const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// What a record is made of.
pub(super) struct New<'a> {
    pub(super) id: &'a str,
    pub(super) kind: &'static str,
    pub(super) labels: &'a HashMap<String, String>,
    pub(super) image: String,
    pub(super) handler: &'a Handler,
    pub(super) spec: &'a Value,
    pub(super) snapshotter: String,
    pub(super) extension: (&'static str, &'static str),
    pub(super) metadata: Value,
    pub(super) pod_id: &'a str,
}

/// Options for the shim from a handler's table.
fn options(handler: &Handler) -> Option<Any> {
    let table = &handler.options;
    if table.is_empty() {
        return None;
    }
    let text = |key: &str| {
        table
            .get(key)
            .and_then(|v| v.as_str())
            .unwrap_or_default()
            .to_owned()
    };
    let flag = |key: &str| {
        table
            .get(key)
            .and_then(toml::Value::as_bool)
            .unwrap_or_default()
    };
    let number = |key: &str| {
        let number = table
            .get(key)
            .and_then(toml::Value::as_integer)
            .unwrap_or_default();
        u32::try_from(number).unwrap_or_default()
    };
    Some(any::pack(&Options {
        no_new_keyring: flag("NoNewKeyring"),
        shim_cgroup: text("ShimCgroup"),
        io_uid: number("IoUid"),
        io_gid: number("IoGid"),
        binary_name: text("BinaryName"),
        root: text("Root"),
        systemd_cgroup: flag("SystemdCgroup"),
        criu_image_path: text("CriuImagePath"),
        criu_work_path: text("CriuWorkPath"),
        ..Options::default()
    }))
}

fn nanos(at: Option<SystemTime>) -> i64 {
    at.map_or(0, time::to_nanos)
}

impl Plugin {
    /// Writes a record.
    pub(super) async fn record(&self, new: New<'_>) -> Result<metadata::Container> {
        let mut labels: Labels = new
            .labels
            .iter()
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        labels.insert(KIND.to_owned(), new.kind.to_owned());
        let extension = any::pack_json(
            new.extension.1,
            &json!({ "Version": "v1", "Metadata": new.metadata }),
        )?;
        let now = SystemTime::now();
        let record = metadata::Container {
            id: Identifier::new(new.id)?,
            labels,
            image: new.image,
            runtime: Runtime {
                name: new.handler.runtime_type.clone(),
                options: options(new.handler),
            },
            spec: any::pack_json(SPEC, new.spec)?,
            snapshotter: new.snapshotter,
            snapshot_key: new.id.to_owned(),
            created_at: now,
            updated_at: now,
            extensions: BTreeMap::from([(new.extension.0.to_owned(), extension)]),
            sandbox_id: new.pod_id.to_owned(),
        };
        Ok(self.db.containers().create(&self.scope, record).await?)
    }

    /// Metadata of a pod.
    pub(super) fn pod_metadata(&self, pod: &Pod) -> Result<Value> {
        let state = pod.state();
        Ok(json!({
            "ID": pod.id,
            "Name": pod.name,
            "Config": self.json.write(&pod.config)?,
            "NetNSPath": pod.netns.as_ref().map(|p| p.display().to_string()).unwrap_or_default(),
            "IP": state.ip,
            "AdditionalIPs": state.additional_ips,
            "RuntimeHandler": pod.handler,
            "CNIResult": state.cni_result,
            "ProcessLabel": "",
        }))
    }

    /// Metadata of a container.
    pub(super) fn container_metadata(&self, container: &Container) -> Result<Value> {
        Ok(json!({
            "ID": container.id,
            "Name": container.name,
            "SandboxID": container.pod_id,
            "Config": self.json.write(&container.config)?,
            "ImageRef": container.image_id,
            "LogPath": container.log_path,
            "StopSignal": container.stop_signal.to_string(),
            "ProcessLabel": "",
        }))
    }

    /// Removes a record; one that is gone is fine.
    pub(super) async fn delete_record(&self, id: &str) -> Result<()> {
        match self.db.containers().delete(&self.scope, id).await {
            Err(error) if !crate::error::Error::from_store(&error).is_not_found() => {
                Err(error.into())
            }
            _ => Ok(()),
        }
    }

    /// Removes a snapshot; one that is gone is fine.
    pub(super) async fn delete_snapshot(&self, snapshotter: &str, key: &str) -> Result<()> {
        match self
            .db
            .snapshots(snapshotter)?
            .remove(&self.scope, key)
            .await
        {
            Err(error) if !crate::error::Error::from_store(&error).is_not_found() => {
                Err(error.into())
            }
            _ => Ok(()),
        }
    }

    /// Directory of a container below the root.
    pub(super) fn container_root(&self, id: &str) -> PathBuf {
        self.root.join("containers").join(id)
    }

    /// Writes a container's status beside its record, whole or not at all.
    pub(super) async fn save_status(&self, container: &Arc<Container>) {
        if let Err(error) = self.write_status(container).await {
            tracing::error!(container = %container.id, %error, "status not written");
        }
    }

    async fn write_status(&self, container: &Container) -> Result<()> {
        let status = container.status();
        let value = json!({
            "Version": "v1",
            "Pid": status.pid,
            "CreatedAt": time::to_nanos(status.created_at),
            "StartedAt": nanos(status.started_at),
            "FinishedAt": nanos(status.finished_at),
            "ExitCode": status.exit_code,
            "Reason": status.reason,
            "Message": status.message,
            "Running": status.state == ContainerState::ContainerRunning,
        });
        let dir = self.container_root(&container.id);
        let (path, partial) = (dir.join("status"), dir.join("status.partial"));
        tokio::fs::write(&partial, value.to_string())
            .await
            .map_err(io("write", &partial))?;
        tokio::fs::rename(&partial, &path)
            .await
            .map_err(io("replace", &path))
    }
}
