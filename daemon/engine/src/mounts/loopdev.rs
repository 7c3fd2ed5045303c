//! Mounts of type `loop`: a file as a block device, for the mounts that follow.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lighter_snapshotter::Mount;

/// Major number of loop devices. Spec: Linux, Documentation/admin-guide/devices.txt
const MAJOR: u32 = 7;
/// How long the last users of a file system may take to let go of it, and how often that is looked at.
const FREED: (Duration, Duration) = (Duration::from_secs(5), Duration::from_millis(1));

/// A loop device that frees itself, and the file that is behind it.
#[derive(Debug)]
pub(super) struct Freeing {
    directory: PathBuf,
    file: String,
}

impl Freeing {
    /// What the file system at `point` lies on, if the device goes with it.
    pub(super) fn below(point: &Path) -> Option<Self> {
        let device = rustix::fs::stat(point).ok()?.st_dev;
        if rustix::fs::major(device) != MAJOR {
            return None;
        }
        let minor = rustix::fs::minor(device);
        let directory = PathBuf::from(format!("/sys/dev/block/{MAJOR}:{minor}/loop"));
        let told = |name: &str| std::fs::read_to_string(directory.join(name)).ok();
        if told("autoclear")?.trim() != "1" {
            return None;
        }
        let file = told("backing_file")?;
        Some(Self { directory, file })
    }

    /// Waits until the device let go of the file: whoever mounts the file before that has two file systems that do not
    /// know of each other on the same bytes.
    pub(super) fn wait(&self) {
        let (longest, pause) = FREED;
        let end = Instant::now() + longest;
        let file = self.directory.join("backing_file");
        while std::fs::read_to_string(&file).is_ok_and(|now| now == self.file) {
            if Instant::now() > end {
                tracing::warn!(file = self.file.trim(), "still used through a loop device");
                return;
            }
            std::thread::sleep(pause);
        }
    }
}

/// Attaches the file and leaves a link to its device at `point`.
///
/// # Errors
/// What `losetup` says.
pub(super) fn attach(mount: &Mount, point: &Path) -> Result<(), String> {
    let mut command = Command::new("losetup");
    command.args(["--find", "--show"]);
    if mount.has("ro") {
        command.arg("--read-only");
    }
    if mount.has("direct-io") {
        command.arg("--direct-io=on");
    }
    let device = output(command.arg("--").arg(&mount.source))?;
    std::os::unix::fs::symlink(&device, point).map_err(|error| {
        let _detached = output(Command::new("losetup").arg("--detach").arg(&device));
        format!("symlink {}: {error}", point.display())
    })
}

/// Detaches what the link at `point` names; `false` when there is no link.
///
/// # Errors
/// What `losetup` says.
pub(super) fn detach(point: &Path) -> Result<bool, String> {
    let Ok(device) = std::fs::read_link(point) else {
        return Ok(false);
    };
    // A device that is detached already reads as one without a file behind it.
    if backed(&device) {
        output(Command::new("losetup").arg("--detach").arg(&device))?;
    }
    std::fs::remove_file(point).map_err(|e| format!("remove {}: {e}", point.display()))?;
    Ok(true)
}

/// Whether the link at `point` names a device with a file behind it.
pub(super) fn is_attached(point: &Path) -> bool {
    std::fs::read_link(point).is_ok_and(|device| backed(&device))
}

fn backed(device: &Path) -> bool {
    let name = device.file_name().map(PathBuf::from).unwrap_or_default();
    Path::new("/sys/block").join(name).join("loop").exists()
}

/// Runs a program; what it printed, or why it failed.
pub(super) fn output(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|e| format!("{name}: {e}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        let stderr = String::from_utf8_lossy(&output.stderr);
        Err(format!("{name}: {}: {}", stderr.trim(), output.status))
    }
}
