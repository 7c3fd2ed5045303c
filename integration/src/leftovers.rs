//! What a test must not leave: mounts, processes, cgroups and files that carry its marks.

use std::fs;
use std::path::{Path, PathBuf};

/// Lists everything on the machine that mentions `dir` or runs in cgroups of `namespace`.
#[must_use]
pub(crate) fn find(dir: &Path, namespace: &str) -> Vec<String> {
    let mut found = mounts(dir)
        .into_iter()
        .map(|m| format!("mount {}", m.display()))
        .collect::<Vec<_>>();
    found.extend(
        processes(dir, namespace)
            .into_iter()
            .map(|(pid, what)| format!("process {pid}: {what}")),
    );
    found.extend(
        cgroups(namespace)
            .into_iter()
            .map(|c| format!("cgroup {}", c.display())),
    );
    found
}

/// Whether a command line is that of a shim that waits to be used: it belongs to the daemon.
#[must_use]
pub(crate) fn is_warm(line: &str) -> bool {
    line.contains("containerd-shim-lighter-v2") && line.trim_end().ends_with(" warm")
}

/// Mountpoints below `dir`, deepest first.
#[must_use]
pub(crate) fn mounts(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut points: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|point| point.starts_with(dir))
        .collect();
    points.reverse();
    points
}

/// Live processes whose command line names `dir`, or which are in a cgroup of `namespace`.
#[must_use]
pub(crate) fn processes(dir: &Path, namespace: &str) -> Vec<(i32, String)> {
    let own = std::process::id();
    let dir = dir.to_string_lossy();
    let group = format!("/{namespace}/");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<i32>().ok())
        else {
            continue;
        };
        if u32::try_from(pid) == Ok(own) {
            continue;
        }
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let groups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        let zombie = fs::read_to_string(entry.path().join("stat"))
            .is_ok_and(|stat| stat.rsplit(')').next().is_some_and(|s| s.starts_with(" Z")));
        if !zombie && (line.contains(dir.as_ref()) || groups.contains(&group)) {
            found.push((pid, line));
        }
    }
    found
}

/// Cgroup directories of containers of `namespace`, in every hierarchy.
#[must_use]
pub(crate) fn cgroups(namespace: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut roots = vec![PathBuf::from("/sys/fs/cgroup")];
    roots.extend(
        fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path()),
    );
    for root in roots {
        let parent = root.join(namespace);
        for entry in fs::read_dir(&parent).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                found.push(entry.path());
            }
        }
    }
    found
}

/// Removes the (by then empty) cgroup directories of the namespace itself.
pub fn remove_cgroup_parents(namespace: &str) {
    let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(namespace));
    for entry in fs::read_dir("/sys/fs/cgroup")
        .into_iter()
        .flatten()
        .flatten()
    {
        let _ = fs::remove_dir(entry.path().join(namespace));
    }
}
