//! `record.json`, the file beside an activation's mount points.

use std::path::Path;

use lighter_proto::time::{from_nanos, to_nanos};
use lighter_snapshotter::Mount;
use lighter_store::{Labels, Namespace};
use serde::{Deserialize, Serialize};

use super::activation::{Activation, Active};
use super::manager::Key;

const FILE: &str = "record.json";

/// The file beside the mount points.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    namespace: String,
    name: String,
    labels: Labels,
    #[serde(default)]
    lease: Option<String>,
    complete: bool,
    active: Vec<RecordedActive>,
    system: Vec<RecordedMount>,
}

#[derive(Debug, Serialize, Deserialize)]
struct RecordedActive {
    mount: RecordedMount,
    mounted_at_ns: i64,
    mount_point: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct RecordedMount {
    fstype: String,
    source: String,
    target: String,
    options: Vec<String>,
}

impl From<&Mount> for RecordedMount {
    fn from(mount: &Mount) -> Self {
        Self {
            fstype: mount.fstype.clone(),
            source: mount.source.clone(),
            target: mount.target.clone(),
            options: mount.options.clone(),
        }
    }
}

impl From<RecordedMount> for Mount {
    fn from(mount: RecordedMount) -> Self {
        Self {
            fstype: mount.fstype,
            source: mount.source,
            target: mount.target,
            options: mount.options,
        }
    }
}

/// Writes the record of an activation in place of an earlier one.
pub(super) fn write(
    path: &Path,
    key: &Key,
    activation: &Activation,
    complete: bool,
) -> Result<(), String> {
    let record = Record {
        namespace: key.0.to_string(),
        name: key.1.clone(),
        labels: activation.labels.clone(),
        lease: activation.lease.clone(),
        complete,
        active: activation
            .active
            .iter()
            .map(|active| RecordedActive {
                mount: (&active.mount).into(),
                mounted_at_ns: to_nanos(active.mounted_at),
                mount_point: active.mount_point.clone(),
            })
            .collect(),
        system: activation.system.iter().map(Into::into).collect(),
    };
    let text = serde_json::to_vec(&record).map_err(|e| e.to_string())?;
    let (temp, target) = (path.join(".record.json"), path.join(FILE));
    std::fs::write(&temp, text)
        .and_then(|()| std::fs::rename(&temp, &target))
        .map_err(|e| format!("write {}: {e}", target.display()))
}

/// The activation of a directory, if it is whole.
pub(super) fn read(path: &Path) -> Option<(Key, Activation)> {
    let record: Record = serde_json::from_slice(&std::fs::read(path.join(FILE)).ok()?).ok()?;
    if !record.complete {
        return None;
    }
    let namespace = Namespace::new(&record.namespace).ok()?;
    let active = record.active.into_iter().map(|active| Active {
        mount: active.mount.into(),
        mounted_at: from_nanos(active.mounted_at_ns),
        mount_point: active.mount_point,
    });
    let activation = Activation {
        name: record.name.clone(),
        active: active.collect(),
        system: record.system.into_iter().map(Into::into).collect(),
        labels: record.labels,
        lease: record.lease,
    };
    Some(((namespace, record.name), activation))
}
