//! Container Device Interface: devices by vendor-defined names, turned into edits of an OCI spec.
//!
//! Spec: CDI 1.1. Later directories win over earlier ones; a device defined twice at one priority
//! is nobody's. The directories are looked at before every resolution and read again when
//! anything in them changed, so there is nothing to keep running.

mod edits;
mod spec;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

pub use self::spec::{Device, Edits, Spec};

/// Where specs are looked for, lowest priority first.
pub const DEFAULT_DIRS: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];
/// Annotations whose values name devices, separated by commas.
const ANNOTATION_PREFIX: &str = "cdi.k8s.io/";
/// Spec files in one directory.
const MAX_FILES: usize = 4096;

/// Why devices cannot be given to a container.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Names that no spec defines, or that are no names.
    #[error("CDI device injection failed: unresolvable CDI devices {}{}", names.join(", "), causes(problems))]
    Unresolvable {
        /// The names.
        names: Vec<String>,
        /// Specs that could not be used, which may be why.
        problems: Vec<String>,
    },
    /// An annotation that names no device.
    #[error(
        "failed to parse CDI device annotation {key:?}: invalid CDI device name {name:?}, want vendor.com/class=name"
    )]
    Annotation {
        /// Key of the annotation.
        key: String,
        /// The bad name.
        name: String,
    },
    /// A device's edits cannot be made.
    #[error("CDI device injection failed: {reason}")]
    Edit {
        /// What is wrong, with the path concerned.
        reason: String,
    },
}

fn causes(problems: &[String]) -> String {
    if problems.is_empty() {
        String::new()
    } else {
        format!(" (unusable specs: {})", problems.join("; "))
    }
}

/// The specs of a host.
#[derive(Debug)]
pub struct Registry {
    dirs: Vec<PathBuf>,
    cache: Mutex<(Vec<Stamp>, Arc<Loaded>)>,
}

/// What identifies one state of one file.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    path: PathBuf,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

/// Everything read from the directories.
#[derive(Debug, Default)]
struct Loaded {
    specs: Vec<Spec>,
    /// Qualified name → spec, device within it, priority.
    devices: HashMap<String, (usize, usize, usize)>,
    /// Files that could not be used, and names defined twice.
    problems: Vec<String>,
}

impl Registry {
    /// A registry of these directories, lowest priority first. They need not exist.
    #[must_use]
    pub fn new(dirs: impl IntoIterator<Item = PathBuf>) -> Self {
        Self {
            dirs: dirs.into_iter().collect(),
            cache: Mutex::default(),
        }
    }

    /// The names of all devices, sorted. May block on the file system.
    #[must_use]
    pub fn devices(&self) -> Vec<String> {
        let mut names: Vec<String> = self.load().devices.keys().cloned().collect();
        names.sort();
        names
    }

    /// Files that could not be used, and names defined twice. May block on the file system.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        self.load().problems.clone()
    }

    /// Makes the edits of the named devices in an OCI spec. May block on the file system.
    ///
    /// # Errors
    /// [`Error::Unresolvable`] naming every unknown device; the spec is unchanged then.
    pub fn inject(&self, oci: &mut Value, names: &[String]) -> Result<(), Error> {
        if names.is_empty() {
            return Ok(());
        }
        let loaded = self.load();
        let mut all = Edits::default();
        let mut unknown = Vec::new();
        let mut specs_used = Vec::new();
        for name in names {
            let Some(&(spec, device, _)) = loaded.devices.get(name) else {
                unknown.push(name.clone());
                continue;
            };
            let spec_ref = &loaded.specs[spec];
            if !specs_used.contains(&spec) {
                specs_used.push(spec);
                all.append(&spec_ref.container_edits);
            }
            all.append(&spec_ref.devices[device].container_edits);
        }
        if !unknown.is_empty() {
            return Err(Error::Unresolvable {
                names: unknown,
                problems: loaded.problems.clone(),
            });
        }
        let mut edited = oci.clone();
        edits::apply(&mut edited, &all).map_err(|reason| Error::Edit { reason })?;
        *oci = edited;
        Ok(())
    }

    /// What the directories hold now.
    fn load(&self) -> Arc<Loaded> {
        let (files, mut problems) = self.files();
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let (stamps, priorities): (Vec<Stamp>, Vec<usize>) = files.into_iter().unzip();
        if cache.0 != stamps {
            let mut loaded = Loaded::read(&stamps, &priorities);
            loaded.problems.append(&mut problems);
            for problem in &loaded.problems {
                tracing::warn!(problem, "CDI spec");
            }
            *cache = (stamps, Arc::new(loaded));
        }
        cache.1.clone()
    }

    /// The spec files of all directories, with their priorities.
    fn files(&self) -> (Vec<(Stamp, usize)>, Vec<String>) {
        let (mut found, mut problems) = (Vec::new(), Vec::new());
        for (priority, dir) in self.dirs.iter().enumerate() {
            let Ok(entries) = fs::read_dir(dir) else {
                continue;
            };
            let is_spec = |path: &PathBuf| {
                path.extension()
                    .is_some_and(|e| e == "json" || e == "yaml" || e == "yml")
            };
            let mut paths: Vec<PathBuf> = entries
                .flatten()
                .map(|e| e.path())
                .filter(is_spec)
                .collect();
            paths.sort();
            if paths.len() > MAX_FILES {
                problems.push(format!("{}: more than {MAX_FILES} files", dir.display()));
                paths.truncate(MAX_FILES);
            }
            for path in paths {
                if let Ok(meta) = fs::metadata(&path)
                    && meta.is_file()
                {
                    let stamp = Stamp {
                        path,
                        inode: meta.ino(),
                        size: meta.len(),
                        changed: (meta.ctime(), meta.ctime_nsec()),
                    };
                    found.push((stamp, priority));
                }
            }
        }
        (found, problems)
    }
}

impl Loaded {
    fn read(files: &[Stamp], priorities: &[usize]) -> Self {
        let mut loaded = Self::default();
        let mut conflicts: BTreeMap<String, usize> = BTreeMap::new();
        for (stamp, priority) in files.iter().zip(priorities) {
            match Spec::read(&stamp.path) {
                Ok(spec) => loaded.add(spec, *priority, &stamp.path, &mut conflicts),
                Err(reason) => {
                    loaded
                        .problems
                        .push(format!("{}: {reason}", stamp.path.display()));
                }
            }
        }
        for (name, priority) in conflicts {
            // A definition of higher priority settles it.
            if loaded
                .devices
                .get(&name)
                .is_some_and(|found| found.2 == priority)
            {
                loaded.devices.remove(&name);
            }
        }
        loaded
    }

    fn add(
        &mut self,
        spec: Spec,
        priority: usize,
        path: &Path,
        conflicts: &mut BTreeMap<String, usize>,
    ) {
        let index = self.specs.len();
        for (device, entry) in spec.devices.iter().enumerate() {
            let name = format!("{}={}", spec.kind, entry.name);
            if self
                .devices
                .get(&name)
                .is_some_and(|found| found.2 == priority)
            {
                let path = path.display();
                self.problems
                    .push(format!("{path}: conflicting device {name:?}"));
                conflicts.insert(name, priority);
            } else {
                self.devices.insert(name, (index, device, priority));
            }
        }
        self.specs.push(spec);
    }
}

/// The devices that a container's annotations ask for.
///
/// # Errors
/// [`Error::Annotation`] for a value that is no list of qualified names.
pub fn from_annotations<'a>(
    annotations: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    for (key, value) in annotations {
        if !key.starts_with(ANNOTATION_PREFIX) {
            continue;
        }
        for name in value.split(',') {
            if !spec::is_qualified(name) {
                return Err(Error::Annotation {
                    key: key.clone(),
                    name: name.to_owned(),
                });
            }
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests;
