//! The listener of a seccomp filter that notifies: handed to the agent that the profile names.

use std::os::fd::{AsFd as _, OwnedFd};

use crate::error::{Context, Result};
use crate::passing;
use crate::seccomp::Program;

/// Sends the listener of a notifying filter to its agent, with the container's state.
/// Spec: config-linux.md, "Container Process State".
pub(crate) fn pass_listener(
    program: &Program,
    listener: &OwnedFd,
    version: &str,
    pid: i32,
    state: &str,
) -> Result<()> {
    let state: serde_json::Value = serde_json::from_str(state).expect("made by us");
    let text = serde_json::json!({
        "ociVersion": version,
        "fds": ["seccompFd"],
        "pid": pid,
        "metadata": program.listener_metadata,
        "state": state,
    })
    .to_string();
    passing::send_to(&program.listener_path, text.as_bytes(), listener.as_fd())
        .context(|| format!("seccomp listener {}", program.listener_path))
}
