//! Activations by name: made, undone, listed, found again after a restart.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use lighter_proto::errdefs::{Classify, ErrorKind, render};
use lighter_snapshotter::Mount;
use lighter_snapshotter::mount::{Made, has_prefix, is_mountpoint, mount_at, ready, unmount_all};
use lighter_store::filter::Filter;
use lighter_store::metadata::edges::{self, Kind, Node};
use lighter_store::{Namespace, Scope};
use tracing::warn;

use super::activation::{Activate, Activation, Active};
use super::loopdev;
use super::record::{read, write};
use crate::gc::{Collectable, Item};

/// Directory below the state directory.
const DIR: &str = "io.containerd.mount-manager.v1.bolt";
/// Most mounts of one activation.
const MAX_MOUNTS: usize = 1024;

/// Why an activation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The name is active.
    #[error("mount {name}: already exists")]
    Exists {
        /// The name.
        name: String,
    },
    /// No such activation.
    #[error("mount {name}: not found")]
    NotFound {
        /// The name.
        name: String,
    },
    /// The caller can do these mounts itself.
    #[error("no mounts need to be activated: not implemented")]
    Needless,
    /// The request makes no sense.
    #[error("{reason}: invalid argument")]
    Invalid {
        /// Why.
        reason: String,
    },
    /// The system refused a mount, or it makes no sense.
    #[error(transparent)]
    Mount(#[from] lighter_snapshotter::mount::Error),
    /// What a mount needs could not be made, or a mount not be undone.
    #[error("{reason}")]
    Failed {
        /// Which and why.
        reason: String,
    },
}

impl Classify for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Exists { .. } => ErrorKind::AlreadyExists,
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Needless => ErrorKind::Unimplemented,
            Self::Invalid { .. } => ErrorKind::InvalidArgument,
            Self::Mount(error) => error.kind(),
            Self::Failed { .. } => ErrorKind::Internal,
        }
    }
}

/// Whose activation, and its name.
pub(super) type Key = (Namespace, String);

/// An activation, or one under way; and its directory.
#[derive(Debug)]
enum Slot {
    Busy,
    Done(PathBuf, Activation),
}

/// All activations; clones share them.
#[derive(Debug, Clone)]
pub struct Mounts {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    /// Directories that `mkdir/` and `mkfs/` may work in.
    roots: Vec<PathBuf>,
    book: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    next: u64,
    slots: BTreeMap<Key, Slot>,
}

impl Mounts {
    /// Finds the activations of earlier runs below `state` and undoes those that were cut off, or
    /// lost their mounts. Blocks.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn open(state: &Path, root: &Path) -> std::io::Result<Self> {
        let dir = state.join(DIR);
        std::fs::create_dir_all(&dir)?;
        let mut book = Book::default();
        for entry in std::fs::read_dir(&dir)? {
            let path = entry?.path();
            book.next = book.next.max(number(&path).map_or(0, |n| n + 1));
            let whole = read(&path).filter(|(_, activation)| {
                let mounted = activation.active.iter().all(is_there);
                if !mounted {
                    warn!(name = activation.name, path = %path.display(),
                        "mounts of an activation are gone; it is forgotten");
                }
                mounted
            });
            match whole {
                Some((key, activation)) => {
                    book.slots.insert(key, Slot::Done(path, activation));
                }
                None => {
                    if let Err(error) = clear(&path) {
                        warn!(path = %path.display(), error, "cannot undo a mount activation that was cut off");
                    }
                }
            }
        }
        Ok(Self {
            inner: Arc::new(Inner {
                dir,
                roots: vec![state.to_owned(), root.to_owned()],
                book: Mutex::new(book),
            }),
        })
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.inner
            .book
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the mounts that need more than the kernel, and says which are left. With `temporary`
    /// all of them are made, and one bind of the last is left. Blocks.
    ///
    /// # Errors
    /// `Unimplemented` when nothing needs it, `AlreadyExists`, `InvalidArgument`, or why a mount
    /// failed; nothing stays mounted then.
    pub fn activate(&self, scope: &Scope, wanted: Activate<'_>) -> Result<Activation, Error> {
        let Activate {
            name,
            mounts,
            temporary,
            ..
        } = wanted;
        let invalid = |reason: &str| Error::Invalid {
            reason: reason.to_owned(),
        };
        if name.is_empty() {
            return Err(invalid("mount name must not be empty"));
        }
        if mounts.is_empty() || mounts.len() > MAX_MOUNTS {
            return Err(invalid("an activation has 1 to 1024 mounts"));
        }
        let ours = if temporary {
            mounts.len()
        } else {
            made_here(mounts).ok_or(Error::Needless)?
        };
        let key = (scope.namespace.clone(), name.to_owned());
        let path = {
            let mut book = self.book();
            if book.slots.contains_key(&key) {
                return Err(Error::Exists {
                    name: name.to_owned(),
                });
            }
            book.slots.insert(key.clone(), Slot::Busy);
            book.next += 1;
            self.inner.dir.join((book.next - 1).to_string())
        };
        let made = self.make(&path, &key, wanted, ours, scope.lease.as_deref());
        let mut book = self.book();
        match &made {
            Ok(activation) => {
                book.slots.insert(key, Slot::Done(path, activation.clone()));
            }
            Err(_) => {
                book.slots.remove(&key);
                drop(book);
                if let Err(error) = clear(&path) {
                    warn!(path = %path.display(), error, "cannot undo a mount activation");
                }
            }
        }
        made
    }

    fn make(
        &self,
        path: &Path,
        key: &Key,
        wanted: Activate<'_>,
        ours: usize,
        lease: Option<&str>,
    ) -> Result<Activation, Error> {
        let mounts = wanted.mounts;
        let failed = |reason: String| Error::Failed { reason };
        std::fs::create_dir(path).map_err(|e| failed(format!("mkdir {}: {e}", path.display())))?;
        let mut activation = Activation {
            name: key.1.clone(),
            active: Vec::new(),
            system: Vec::new(),
            labels: wanted.labels.clone(),
            lease: lease.map(str::to_owned),
        };
        // What a crash leaves has a record that says it is not whole.
        write(path, key, &activation, false).map_err(failed)?;
        for (index, mount) in mounts[..ours].iter().enumerate() {
            let point = path.join(index.to_string());
            let mount = self.ready(mount, &activation.active)?;
            if mount.fstype == "loop" {
                loopdev::attach(&mount, &point).map_err(failed)?;
            } else {
                std::fs::create_dir(&point)
                    .map_err(|e| failed(format!("mkdir {}: {e}", point.display())))?;
                // Each has a mount point of its own: its place in the whole is the caller's affair.
                let alone = Mount {
                    target: String::new(),
                    ..mount.clone()
                };
                mount_at(&alone, &point)?;
            }
            activation.active.push(Active {
                mount,
                mounted_at: SystemTime::now(),
                mount_point: point.display().to_string(),
            });
        }
        for mount in &mounts[ours..] {
            activation
                .system
                .push(self.ready(mount, &activation.active)?);
        }
        if wanted.temporary
            && let Some(last) = activation.active.last()
        {
            let mode = if last.mount.has("ro") { "ro" } else { "rw" };
            activation.system.push(Mount {
                fstype: "bind".to_owned(),
                source: last.mount_point.clone(),
                target: String::new(),
                options: vec!["rbind".to_owned(), mode.to_owned()],
            });
        }
        write(path, key, &activation, true).map_err(failed)?;
        Ok(activation)
    }

    /// The mount with its prefixes carried out, left to right.
    fn ready(&self, mount: &Mount, active: &[Active]) -> Result<Mount, Error> {
        let made: Vec<Made<'_>> = active
            .iter()
            .map(|active| Made {
                mount: &active.mount,
                point: &active.mount_point,
            })
            .collect();
        ready(mount, &made, &self.inner.roots).map_err(|reason| Error::Invalid { reason })
    }

    /// Undoes an activation, last mount first. Repeatable after a failure. Blocks.
    ///
    /// # Errors
    /// `NotFound`, or why a mount stays.
    pub fn deactivate(&self, namespace: &Namespace, name: &str) -> Result<(), Error> {
        self.undo(namespace, name, |_| true)
    }

    fn undo(
        &self,
        namespace: &Namespace,
        name: &str,
        meant: impl FnOnce(&Path) -> bool,
    ) -> Result<(), Error> {
        let missing = || Error::NotFound {
            name: name.to_owned(),
        };
        let key = (namespace.clone(), name.to_owned());
        let (path, activation) = {
            let mut book = self.book();
            match book.slots.insert(key.clone(), Slot::Busy) {
                Some(Slot::Done(path, activation)) if meant(&path) => (path, activation),
                Some(other) => {
                    book.slots.insert(key, other);
                    return Err(missing());
                }
                None => {
                    book.slots.remove(&key);
                    return Err(missing());
                }
            }
        };
        let cleared = clear(&path);
        let mut book = self.book();
        match cleared {
            Ok(()) => {
                book.slots.remove(&key);
                Ok(())
            }
            Err(reason) => {
                book.slots.insert(key, Slot::Done(path, activation));
                Err(Error::Failed { reason })
            }
        }
    }

    /// One activation.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn info(&self, namespace: &Namespace, name: &str) -> Result<Activation, Error> {
        match self.book().slots.get(&(namespace.clone(), name.to_owned())) {
            Some(Slot::Done(_, activation)) => Ok(activation.clone()),
            _ => Err(Error::NotFound {
                name: name.to_owned(),
            }),
        }
    }

    /// Activations of a namespace that match, in byte order of name.
    #[must_use]
    pub fn list(&self, namespace: &Namespace, filter: &Filter) -> Vec<Activation> {
        let book = self.book();
        let mine = book.slots.iter().filter(|((n, _), _)| n == namespace);
        mine.filter_map(|(_, slot)| match slot {
            Slot::Done(_, activation) if filter.matches(activation) => Some(activation.clone()),
            Slot::Done(..) | Slot::Busy => None,
        })
        .collect()
    }
}

#[async_trait]
impl Collectable for Mounts {
    fn kind(&self) -> Kind {
        Kind::Mount
    }

    fn items(&self) -> Vec<Item> {
        let book = self.book();
        let entries = book.slots.iter();
        entries
            .filter_map(|((namespace, name), slot)| match slot {
                Slot::Done(path, activation) => Some((namespace, name, path, activation)),
                Slot::Busy => None,
            })
            .map(|(namespace, name, path, activation)| {
                let node = Node::new(Kind::Mount, namespace.as_str(), name);
                let mut keepers = Vec::new();
                edges::back_references(&node, &activation.labels, &mut |from| keepers.push(from));
                Item {
                    namespace: namespace.to_string(),
                    id: name.clone(),
                    serial: number(path).unwrap_or_default(),
                    lease: activation.lease.clone(),
                    keepers,
                }
            })
            .collect()
    }

    async fn remove(&self, item: &Item) -> Result<(), lighter_store::Error> {
        let namespace = Namespace::new(&item.namespace)?;
        let (this, name, serial) = (self.clone(), item.id.clone(), item.serial);
        let done = tokio::task::spawn_blocking(move || {
            this.undo(&namespace, &name, |path| number(path) == Some(serial))
        });
        let reason = match done.await {
            Ok(Ok(()) | Err(Error::NotFound { .. })) => return Ok(()),
            Ok(Err(error)) => render(&error),
            Err(error) => error.to_string(),
        };
        Err(lighter_store::Error::Io {
            operation: "deactivate",
            path: PathBuf::from(&item.id),
            source: std::io::Error::other(reason),
        })
    }
}

/// The number that a directory is named by.
fn number(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.parse().ok()
}

/// Whether what was mounted still is.
fn is_there(active: &Active) -> bool {
    let point = Path::new(&active.mount_point);
    if active.mount.fstype == "loop" {
        return loopdev::is_attached(point);
    }
    // A table that cannot be read says nothing about the mount.
    is_mountpoint(point).unwrap_or(true)
}

/// How many of `mounts`, from the first on, are mounted here; `None` when the caller can do them all.
/// One whose prefixes are carried out is then a plain mount, which is the caller's; those before it,
/// which it may refer to, are not.
fn made_here(mounts: &[Mount]) -> Option<usize> {
    let last = |is: fn(&Mount) -> bool| mounts.iter().rposition(is);
    let prefixed = last(has_prefix);
    let handled = last(|mount| mount.kind() == "loop").map(|index| index + 1);
    prefixed.max(handled)
}

/// Whether any of `mounts` needs more than the kernel.
pub(crate) fn needed(mounts: &[Mount]) -> bool {
    mounts.iter().any(needs_us)
}

/// Whether a mount needs more than the kernel.
fn needs_us(mount: &Mount) -> bool {
    mount.kind() == "loop" || has_prefix(mount)
}

/// Undoes whatever is in a directory, last mount first, and removes it.
fn clear(path: &Path) -> Result<(), String> {
    let Ok(entries) = std::fs::read_dir(path) else {
        return Ok(());
    };
    let mut points: Vec<u64> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    points.sort_unstable();
    for index in points.into_iter().rev() {
        let point = path.join(index.to_string());
        if loopdev::detach(&point)? {
            continue;
        }
        let device = loopdev::Freeing::below(&point);
        unmount_all(&point).map_err(|e| render(&e))?;
        if let Some(device) = device {
            device.wait();
        }
        // Only ever an empty directory: what a mount hid must not be followed by a removal.
        std::fs::remove_dir(&point).map_err(|e| format!("remove {}: {e}", point.display()))?;
    }
    std::fs::remove_dir_all(path).map_err(|e| format!("remove {}: {e}", path.display()))
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
