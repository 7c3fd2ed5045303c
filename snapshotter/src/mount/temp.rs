//! Mounts at a temporary path, gone when the value is dropped.

use std::path::{Path, PathBuf};

use super::{Error, Mount, mount_all, stack, unmount_recursive};

/// What a temporary mount may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// As the mounts say.
    AsGiven,
    /// Nothing may be written, whatever the mounts say.
    ReadOnly,
}

/// A temporary mountpoint with mounts on it.
#[derive(Debug)]
pub struct TempMount {
    path: PathBuf,
}

impl TempMount {
    /// Makes a directory in `below` and carries the mounts out on it; those that are made of others
    /// (`format/…`) as well.
    ///
    /// `volatile` is dropped: a temporary overlay would leave a mark that forbids the next mount.
    ///
    /// # Errors
    /// When the directory or a mount cannot be made; nothing is left then.
    pub fn new(below: &Path, mounts: &[Mount], access: Access) -> Result<Self, Error> {
        let dir = tempfile::Builder::new()
            .prefix("lighter-mount-")
            .tempdir_in(below)
            .map_err(Error::io("make temporary mountpoint in", below))?;
        let mounts: Vec<Mount> = mounts.iter().map(|m| adapt(m, access)).collect();
        // From here on the drop of `temp` cleans up.
        let temp = Self { path: dir.keep() };
        if stack::is_stack(&mounts) {
            stack::mount(&mounts, &temp.path, below)?;
        } else {
            mount_all(&mounts, &temp.path)?;
        }
        Ok(temp)
    }

    /// The mountpoint.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Unmounts now and says whether it worked.
    ///
    /// # Errors
    /// When something is mounted still or the directory cannot be removed.
    pub fn close(self) -> Result<(), Error> {
        let path = self.path.clone();
        std::mem::forget(self);
        remove(&path)
    }
}

pub(super) fn adapt(mount: &Mount, access: Access) -> Mount {
    let mut mount = match access {
        Access::AsGiven => mount.clone(),
        Access::ReadOnly => mount.read_only(),
    };
    if mount.kind() == "overlay" {
        mount.options.retain(|o| o != "volatile");
    }
    mount
}

fn remove(path: &Path) -> Result<(), Error> {
    unmount_recursive(path)?;
    // Only an empty directory: never the contents of something still mounted.
    std::fs::remove_dir(path).map_err(Error::io("remove mountpoint", path))
}

impl Drop for TempMount {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(error = %lighter_proto::errdefs::render(&error), path = %self.path.display(),
                "temporary mount stays behind");
        }
    }
}
