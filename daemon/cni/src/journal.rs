//! The list of containers that may hold network resources, written before the first `ADD`.
//!
//! | path | content |
//! |---|---|
//! | `<dir>/<container id>` | JSON array of cache entries without results, one for each network |
//!
//! A file appears before any plugin runs and goes when every plugin confirmed its `DEL`, so after a
//! crash the names are exactly the containers to check. The name alone is enough to undo: it is
//! written before anything a plugin writes, and the file system keeps that order, so no sync is
//! needed even against a loss of power.

use std::io;
use std::path::{Path, PathBuf};

use super::cache::Entry;
use super::error::Error;

#[derive(Debug, Clone)]
pub(super) struct Journal {
    dir: PathBuf,
}

impl Journal {
    pub(super) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    /// Notes that `id` is about to be attached as `planned` says.
    pub(super) fn begin(&self, id: &str, planned: &[Entry]) -> Result<(), Error> {
        let path = self.dir.join(id);
        let content = serde_json::to_vec(planned).unwrap_or_default();
        let write = || match std::fs::write(&path, &content) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                std::fs::create_dir_all(&self.dir)?;
                std::fs::write(&path, &content)
            }
            other => other,
        };
        write().map_err(|source| Error::Io {
            operation: "write network journal",
            path: path.clone(),
            source,
        })
    }

    /// Notes that nothing of `id` is left.
    pub(super) fn end(&self, id: &str) -> Result<(), Error> {
        let path = self.dir.join(id);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::Io {
                operation: "delete network journal",
                path,
                source: e,
            }),
            _ => Ok(()),
        }
    }

    /// Whether `id` is in the list.
    pub(super) fn has(&self, id: &str) -> bool {
        self.dir.join(id).exists()
    }

    /// What was planned for `id`; nothing when the content did not survive.
    pub(super) fn planned(&self, id: &str) -> Vec<Entry> {
        std::fs::read(self.dir.join(id))
            .ok()
            .and_then(|content| serde_json::from_slice(&content).ok())
            .unwrap_or_default()
    }

    /// The containers in the list.
    pub(super) fn ids(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| super::conf::is_name(name))
            .collect()
    }
}
