//! Results of attachments, kept in the files that libcni keeps, so that a change of runtime in
//! either direction can still undo what the other did.
//!
//! | path | mode | what |
//! |---|---|---|
//! | `<dir>/results/<network>-<container id>-<ifname>` | 0600 | JSON [`Entry`], kind `cniCacheV1` |

use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::Error;

/// Where libcni keeps its cache.
pub const DEFAULT_DIR: &str = "/var/lib/cni";
/// The one format there is.
const KIND: &str = "cniCacheV1";
/// Bytes of one cache file: a configuration and a result, each at most 1 MiB, in base64 or JSON.
const MAX_BYTES: u64 = 4 << 20;

/// One attachment as it was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Entry {
    kind: String,
    /// Container id.
    pub(super) container_id: String,
    /// The network list, base64.
    config: String,
    /// Interface in the container.
    pub(super) if_name: String,
    /// Name of the network.
    pub(super) network_name: String,
    /// Path of the network namespace.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) netns: String,
    /// `CNI_ARGS` as pairs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) cni_args: Option<Vec<(String, String)>>,
    /// Capability arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) capability_args: Option<Map<String, Value>>,
    /// The chain's result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) result: Option<Map<String, Value>>,
}

impl Entry {
    /// An attachment of `container_id` to the network whose list is `config`.
    pub(super) fn new(container_id: &str, network: &str, ifname: &str, config: &[u8]) -> Self {
        Self {
            kind: KIND.to_owned(),
            container_id: container_id.to_owned(),
            config: STANDARD.encode(config),
            if_name: ifname.to_owned(),
            network_name: network.to_owned(),
            netns: String::new(),
            cni_args: None,
            capability_args: None,
            result: None,
        }
    }

    /// The network list it was made with.
    pub(super) fn config(&self) -> Option<Vec<u8>> {
        STANDARD.decode(&self.config).ok()
    }
}

/// The folder of results.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    results: PathBuf,
}

impl Cache {
    pub(super) fn new(dir: &Path) -> Self {
        Self {
            results: dir.join("results"),
        }
    }

    fn path(&self, network: &str, id: &str, ifname: &str) -> PathBuf {
        self.results.join(format!("{network}-{id}-{ifname}"))
    }

    /// Writes an entry whole: a reader sees the old file or the new one.
    pub(super) fn store(&self, entry: &Entry) -> Result<(), Error> {
        let path = self.path(&entry.network_name, &entry.container_id, &entry.if_name);
        let write = || {
            std::fs::create_dir_all(&self.results)?;
            let mut file = tempfile::Builder::new()
                .prefix(".tmp-")
                .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))
                .tempfile_in(&self.results)?;
            file.write_all(&serde_json::to_vec(entry)?)?;
            file.persist(&path)?;
            io::Result::Ok(())
        };
        write().map_err(|source| Error::Io {
            operation: "write network result",
            path,
            source,
        })
    }

    /// The attachments of one container; unreadable files are reported and skipped.
    pub(super) fn of(&self, id: &str) -> Vec<Entry> {
        let middle = format!("-{id}-");
        self.scan(|name| name.contains(&middle))
            .into_iter()
            .filter(|entry| entry.container_id == id)
            .collect()
    }

    /// Every attachment.
    pub(super) fn all(&self) -> Vec<Entry> {
        self.scan(|_| true)
    }

    fn scan(&self, wanted: impl Fn(&str) -> bool) -> Vec<Entry> {
        let Ok(entries) = std::fs::read_dir(&self.results) else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|n| !n.starts_with('.') && wanted(n)) else {
                continue;
            };
            match read(&self.results.join(name)) {
                Ok(Some(entry)) => found.push(entry),
                Ok(None) => {}
                Err(error) => tracing::warn!(file = name, %error, "unreadable network result"),
            }
        }
        found.sort_by(|a, b| a.if_name.cmp(&b.if_name));
        found
    }

    /// Deletes an entry; a missing one counts as deleted.
    pub(super) fn delete(&self, network: &str, id: &str, ifname: &str) -> Result<(), Error> {
        let path = self.path(network, id, ifname);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::Io {
                operation: "delete network result",
                path,
                source: e,
            }),
            _ => Ok(()),
        }
    }
}

/// Reads one file; `None` for one of another kind, which is not ours to touch.
fn read(path: &Path) -> io::Result<Option<Entry>> {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, MAX_BYTES), &mut bytes)?;
    let entry: Entry = serde_json::from_slice(&bytes)?;
    let usable = entry.kind == KIND
        && super::conf::is_name(&entry.container_id)
        && super::conf::is_name(&entry.network_name)
        && super::conf::is_interface(&entry.if_name);
    Ok(usable.then_some(entry))
}
