//! Writing a container to images.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use super::{Choices, DESCRIPTORS, MASK, external_mounts, joined};
use crate::container::{Container, Deletion};
use crate::error::{Context, Error, Result};
use crate::spec::Spec;
use crate::state::Status;

/// What happens to the container once it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Afterwards {
    Ends,
    Runs,
}

/// Writes a running or paused container to images.
pub(super) fn dump(
    container: &Container<'_>,
    choices: &Choices,
    parent: Option<&Path>,
    pre_dump: bool,
    afterwards: Afterwards,
) -> Result<()> {
    let locked = container.lock()?;
    let record = &locked.record;
    match container.status(record) {
        Status::Running | Status::Paused => {}
        status => {
            return Err(Error::State(format!(
                "cannot checkpoint a container that is {}",
                status.as_str()
            )));
        }
    }
    choices.make_directories()?;
    let spec = Spec::load(&record.bundle)?;
    let verb = if pre_dump { "pre-dump" } else { "dump" };
    let log = "dump.log";
    let mut command = choices.command(verb, log);
    command
        .arg("--tree")
        .arg(record.pid.to_string())
        .arg("--root")
        .arg(&record.rootfs);
    for (place, _) in external_mounts(&spec, &record.bundle)? {
        command
            .arg("--external")
            .arg(format!("mnt[{0}]:{0}", place.display()));
    }
    let masked = spec.linux.iter().flat_map(|linux| &linux.masked_paths);
    for path in masked.filter(|path| is_masked_file(record.pid, path)) {
        command.arg("--external").arg(format!("mnt[{path}]:{MASK}"));
    }
    leave_namespaces(&mut command, record.pid, &spec)?;
    if let Some(freezer) = record
        .group
        .as_ref()
        .and_then(|group| group.directory("freezer"))
    {
        command.arg("--freeze-cgroup").arg(freezer);
    }
    if afterwards == Afterwards::Runs && !pre_dump {
        command.arg("--leave-running");
    }
    if pre_dump {
        command.arg("--track-mem");
    }
    if let Some(parent) = parent {
        command.arg("--prev-images-dir").arg(parent);
    }
    let descriptors: Vec<String> = (0..3)
        .map(|number| {
            std::fs::read_link(format!("/proc/{}/fd/{number}", record.pid)).map_or_else(
                |_| String::new(),
                |link| link.to_string_lossy().into_owned(),
            )
        })
        .collect();
    choices.run(command, verb, log)?;
    let path = choices.images.join(DESCRIPTORS);
    let text = serde_json::to_string(&descriptors).expect("strings");
    std::fs::write(&path, text).context(|| format!("write {}", path.display()))?;
    drop(locked);
    if afterwards == Afterwards::Ends && !pre_dump {
        container.delete(Deletion::Forced)?;
    }
    Ok(())
}

/// Whether a masked path is covered by the host's null device. A directory is covered by a file system of the container's
/// own, which CRIU writes.
fn is_masked_file(pid: i32, path: &str) -> bool {
    let inside = format!("/proc/{pid}/root/{path}");
    std::fs::symlink_metadata(inside).is_ok_and(|found| !found.is_dir())
}

/// The network of a pod is not this container's to write, nor are its processes.
fn leave_namespaces(command: &mut Command, pid: i32, spec: &Spec) -> Result<()> {
    for namespace in spec.linux.iter().flat_map(joined) {
        let path = format!("/proc/{pid}/ns/{}", namespace.kind);
        let file = std::fs::metadata(&path).context(|| format!("stat {path}"))?;
        command.arg("--external").arg(format!(
            "{}[{}]:{}",
            namespace.kind,
            file.ino(),
            namespace.label
        ));
    }
    Ok(())
}
