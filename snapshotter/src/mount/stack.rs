//! Mounts made of others: each on a directory of its own, the last on the target.
//!
//! The last one (an overlay, a bind) holds what it was made of, so the others are taken off their
//! directories at once: undoing the last undoes all.

use std::path::{Path, PathBuf};

use super::prepare::{has_prefix, ready};
use super::{Error, Made, Mount, mount_at, unmount_all};

/// Whether any of the mounts refers to those before it.
pub(super) fn is_stack(mounts: &[Mount]) -> bool {
    mounts.iter().any(has_prefix)
}

/// Mountpoints that are undone when the value is dropped.
struct Points {
    dir: PathBuf,
    made: Vec<(Mount, String)>,
}

/// Carries the mounts out, the last on `target`, the others on directories in `below`.
///
/// # Errors
/// The first failure; nothing is left then.
pub(super) fn mount(mounts: &[Mount], target: &Path, below: &Path) -> Result<(), Error> {
    let Some((last, others)) = mounts.split_last() else {
        return Ok(());
    };
    let dir = tempfile::Builder::new()
        .prefix("lighter-stack-")
        .tempdir_in(below)
        .map_err(Error::io("make temporary mountpoint in", below))?;
    let mut points = Points {
        dir: dir.keep(),
        made: Vec::new(),
    };
    for (index, mount) in others.iter().enumerate() {
        let point = points.dir.join(index.to_string());
        std::fs::create_dir(&point).map_err(Error::io("make directory", &point))?;
        let mount = points.ready(mount)?;
        mount_at(&mount, &point)?;
        points.made.push((mount, point.display().to_string()));
    }
    let last = points.ready(last)?;
    mount_at(&last, target)
}

impl Points {
    fn ready(&self, mount: &Mount) -> Result<Mount, Error> {
        let made: Vec<Made<'_>> = self
            .made
            .iter()
            .map(|(mount, point)| Made { mount, point })
            .collect();
        // Directories are made in what is mounted here, an image where the snapshot says.
        let mut roots = vec![self.dir.clone()];
        if mount.fstype.starts_with("mkfs/") {
            roots.extend(Path::new(&mount.source).parent().map(Path::to_owned));
        }
        ready(mount, &made, &roots).map_err(|reason| Error::Prepare { reason })
    }
}

impl Drop for Points {
    fn drop(&mut self) {
        for (_, point) in self.made.iter().rev() {
            if let Err(error) = unmount_all(Path::new(point)) {
                tracing::warn!(error = %lighter_proto::errdefs::render(&error), point,
                    "temporary mount stays behind");
                return;
            }
        }
        // Empty directories only, unless something is mounted still.
        for index in 0..=self.made.len() {
            let _absent = std::fs::remove_dir(self.dir.join(index.to_string()));
        }
        if let Err(error) = std::fs::remove_dir(&self.dir) {
            tracing::warn!(%error, path = %self.dir.display(), "temporary directory stays behind");
        }
    }
}
