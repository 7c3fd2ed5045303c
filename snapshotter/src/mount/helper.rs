//! Mounts made by a helper program: `fuse.*` and `fuse3.*`.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{Error, Mount};

/// Bytes of a helper's complaint that are passed on.
const STDERR_MAX_BYTES: usize = 4096;

/// The helper and the type it is given, when the mount needs one.
pub(super) fn of(fstype: &str) -> Option<(&'static str, &str)> {
    if let Some(kind) = fstype.strip_prefix("fuse3.") {
        return Some(("mount.fuse3", kind));
    }
    fstype
        .strip_prefix("fuse.")
        .map(|kind| ("mount.fuse", kind))
}

/// Runs `helper source target -o … -t kind`.
pub(super) fn mount(helper: &str, kind: &str, mount: &Mount, target: &Path) -> Result<(), Error> {
    let mut command = Command::new(helper);
    command.arg(&mount.source).arg(target);
    if !mount.options.is_empty() {
        command.arg("-o").arg(mount.options.join(","));
    }
    let output = command
        .args([OsStr::new("-t"), OsStr::new(kind)])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output()
        .map_err(Error::io("run mount helper", helper))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = &output.stderr[..output.stderr.len().min(STDERR_MAX_BYTES)];
    Err(Error::Helper {
        helper: helper.to_owned(),
        stderr: format!(
            "{}: {}",
            output.status,
            String::from_utf8_lossy(stderr).trim()
        ),
    })
}
