//! What a container is doing, and how that is told: to who asks, to hooks and to agents.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::record::Record;
use crate::spec::Spec;

/// What a container is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being created (or its creator died meanwhile).
    Creating,
    /// Waits for its start.
    Created,
    /// Runs.
    Running,
    /// Runs, but is frozen.
    Paused,
    /// Its init has ended.
    Stopped,
}

impl Status {
    /// The word of the specification.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// State of a container, as `state` prints it.
/// Spec: OCI runtime-spec, runtime.md, "State"; Differs: `rootfs`, `created` and `owner` as runc adds them.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(
    missing_docs,
    reason = "properties carry the names and meaning of the specification"
)]
pub struct State {
    pub oci_version: String,
    pub id: String,
    pub pid: i32,
    pub status: Status,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    /// RFC 3339.
    pub created: String,
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    pub annotations: HashMap<String, String>,
    pub owner: String,
}

/// The state that hooks and seccomp agents get, one line of JSON.
pub(crate) fn hook_state(spec: &Spec, id: &str, bundle: &Path, pid: i32, status: &str) -> String {
    state_text(
        &spec.oci_version,
        id,
        bundle,
        &spec.annotations,
        pid,
        status,
    )
}

fn state_text(
    version: &str,
    id: &str,
    bundle: &Path,
    annotations: &HashMap<String, String>,
    pid: i32,
    status: &str,
) -> String {
    let mut state = serde_json::json!({
        "ociVersion": version,
        "id": id,
        "status": status,
        "pid": pid,
        "bundle": bundle,
    });
    if !annotations.is_empty() {
        state["annotations"] = serde_json::json!(annotations);
    }
    state.to_string()
}

impl Record {
    /// As [`hook_state`], from the record.
    pub(crate) fn hook_state(&self, status: Status) -> String {
        let pid = if status == Status::Stopped {
            0
        } else {
            self.pid
        };
        state_text(
            &self.oci_version,
            &self.id,
            &self.bundle,
            &self.annotations,
            pid,
            status.as_str(),
        )
    }
}
