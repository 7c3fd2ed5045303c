//! Pods and containers on record: containerd's labels and extensions, and status files.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use lighter_proto::containerd::runc::v1::Options;
use lighter_proto::runtimeoptions;
use lighter_proto::{any, time};
use lighter_store::metadata::{self, Runtime};
use lighter_store::{Identifier, Labels};
use prost_types::Any;
use serde_json::{Value, json};

use crate::config::Handler;
use crate::error::{Result, io};
use crate::image::Image;
use crate::json::Json;
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

/// In an extension beside the metadata: the object is only being made.
pub(super) const MAKING: &str = "Making";

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
    /// Whether the object is only being made: after a crash it is removed.
    pub(super) making: bool,
    pub(super) pod_id: &'a str,
}

/// Options for the shim from a handler's table.
pub(super) fn options(handler: &Handler) -> Option<Any> {
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
    if !handler.takes_runc_options() {
        let config_path = text("ConfigPath");
        // As upstream: a runtime without a file gets the whole table.
        let config_body = match config_path.as_str() {
            "" => toml::to_string(table).unwrap_or_default().into_bytes(),
            _ => text("ConfigBody").into_bytes(),
        };
        return Some(any::pack(&runtimeoptions::v1::Options {
            type_url: text("TypeUrl"),
            config_path,
            config_body,
        }));
    }
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

/// Metadata as extensions hold it.
pub(super) fn envelope(metadata: &Value, making: bool) -> Value {
    let mut value = json!({ "Version": "v1", "Metadata": metadata });
    if making {
        value[MAKING] = json!(true);
    }
    value
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
        let extension = any::pack_json(new.extension.1, &envelope(&new.metadata, new.making))?;
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
            "ProcessLabel": pod.process_label(),
        }))
    }

    /// Metadata of a container made from `image`.
    pub(super) fn container_metadata(&self, container: &Container, image: &Image) -> Result<Value> {
        let digests = image.digests();
        let digest = digests.first().and_then(|name| name.split_once('@'));
        Ok(json!({
            "ID": container.id,
            "Name": container.name,
            "SandboxID": container.pod_id,
            "Config": self.json.write(&container.config)?,
            "ImageRef": container.image_id,
            "ImageName": image.first_name(),
            "ImageDigest": digest.map(|(_, digest)| digest).unwrap_or_default(),
            "LogPath": container.log_path,
            "StopSignal": container.stop_signal.to_string(),
            "ProcessLabel": container.labels.process(),
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

    /// Notes what was found out of a pod since its record was made, and that it is made.
    pub(super) async fn keep_pod(&self, pod: &Pod, mut record: metadata::Container) -> Result<()> {
        let value = envelope(&self.pod_metadata(pod)?, false);
        record
            .extensions
            .insert(POD.0.to_owned(), any::pack_json(POD.1, &value)?);
        let mask = [format!("extensions.{}", POD.0)];
        let containers = self.db.containers();
        containers.update(&self.scope, record, &mask).await?;
        Ok(())
    }

    /// Writes a container's status beside its record, whole or not at all.
    pub(super) async fn save_status(&self, container: &Arc<Container>) {
        let (dir, written) = (self.container_root(&container.id), Arc::clone(container));
        let json = self.json.clone();
        let done = tokio::task::spawn_blocking(move || write_status(&json, &dir, &written)).await;
        let error = match done {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::error!(container_id = %container.id, %error, "status not written");
    }

    /// The status that was written last; `None` when there is none that can be read.
    pub(super) fn read_status(&self, id: &str) -> Option<Value> {
        let bytes = std::fs::read(self.container_root(id).join("status")).ok()?;
        serde_json::from_slice(&bytes).ok()
    }
}

/// | `status` | JSON |
/// |---|---|
/// | `Version` | `v1` |
/// | `Pid`, `ExitCode` | numbers |
/// | `CreatedAt`, `StartedAt`, `FinishedAt` | nanoseconds since 1970; 0 for not yet |
/// | `Reason`, `Message` | text |
/// | `Resources` | as last applied, in protobuf's names |
/// | `StopSent`, `OomKilled` | flags |
///
/// Not synced: it only has to outlive the daemon. After the machine went down no container runs,
/// and one without a status is taken for lost.
fn write_status(json: &Json, dir: &Path, container: &Container) -> Result<()> {
    let _one = container.file();
    if container.status().removing && !dir.exists() {
        return Ok(());
    }
    let status = container.status();
    let resources = status.resources.as_ref();
    let value = json!({
        "Version": "v1",
        "Pid": status.pid,
        "CreatedAt": time::to_nanos(status.created_at),
        "StartedAt": nanos(status.started_at),
        "FinishedAt": nanos(status.finished_at),
        "ExitCode": status.exit_code,
        "Reason": status.reason,
        "Message": status.message,
        "Resources": resources.map(|r| json.write(r)).transpose()?,
        "StopSent": status.stop_sent,
        "OomKilled": status.oom_killed,
    });
    let (path, partial) = (dir.join("status"), dir.join("status.partial"));
    std::fs::write(&partial, value.to_string()).map_err(io("write", &partial))?;
    std::fs::rename(&partial, &path).map_err(io("replace", &path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shim_that_is_not_runcs_gets_its_own_options() {
        let handler = |runtime_type: &str, table: &str| Handler {
            runtime_type: runtime_type.to_owned(),
            options: toml::from_str(table).unwrap(),
            ..Handler::default()
        };
        let own = |handler: &Handler| {
            let packed = options(handler).unwrap();
            any::unpack::<runtimeoptions::v1::Options>(&packed).unwrap()
        };
        let file = "TypeUrl = \"kata\"\nConfigPath = \"/etc/kata.toml\"";
        let kata = own(&handler("io.containerd.kata.v2", file));
        assert_eq!(
            (kata.type_url.as_str(), kata.config_path.as_str()),
            ("kata", "/etc/kata.toml")
        );
        assert!(kata.config_body.is_empty());
        let blob = own(&handler("io.containerd.runsc.v1", "platform = \"kvm\""));
        assert_eq!(blob.config_body, b"platform = \"kvm\"\n");
        let runc = options(&handler("io.containerd.runc.v2", "BinaryName = \"crun\"")).unwrap();
        assert_eq!(any::unpack::<Options>(&runc).unwrap().binary_name, "crun");
        assert!(options(&Handler::default()).is_none());
    }
}
