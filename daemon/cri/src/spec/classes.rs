//! Classes of block I/O and of cache and memory bandwidth (RDT) that annotations choose.
//!
//! Classes of block I/O come from `blockio_config_file`. Those of RDT are the operator's, made in resctrl.
//! A class that is asked for where there are none is an error unless the configuration says that such are
//! passed over.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value, json};

use super::blockio::BlockIo;
use super::container::Input;
use crate::config;
use crate::error::{Error, Result};

/// Where classes of cache and bandwidth are.
const RESCTRL: &str = "/sys/fs/resctrl";
/// Largest file of classes, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The class that `kind` (`blockio` or `rdt`) annotations choose for a container: its own, else its
/// pod's for it, else its pod's for all.
fn class<'a>(
    kind: &str,
    name: &str,
    container: &'a HashMap<String, String>,
    pod: &'a HashMap<String, String>,
) -> Option<&'a str> {
    let of_pod = format!("{kind}.resources.beta.kubernetes.io");
    container
        .get(&format!("io.kubernetes.cri.{kind}-class"))
        .or_else(|| pod.get(&format!("{of_pod}/container.{name}")))
        .or_else(|| pod.get(&format!("{of_pod}/pod")))
        .map(String::as_str)
        .filter(|class| !class.is_empty())
}

/// What the operator configured.
#[derive(Debug, Default)]
pub struct Classes {
    /// `None` without a file that could be read.
    blockio: Option<BlockIo>,
}

/// The classes in a file.
fn read(file: &Path) -> Result<BlockIo, String> {
    let size = std::fs::metadata(file).map_err(|e| e.to_string())?.len();
    if size > MAX_FILE_BYTES {
        return Err(format!("{size} bytes are more than {MAX_FILE_BYTES}"));
    }
    let text = std::fs::read_to_string(file).map_err(|e| e.to_string())?;
    BlockIo::parse(&text)
}

impl Classes {
    /// Reads the files that the configuration names. One that cannot be read is logged, and there are no
    /// classes then: nothing else depends on it.
    #[must_use]
    pub fn load(tasks: &config::Tasks) -> Self {
        if !tasks.rdt_config_file.is_empty() {
            tracing::warn!(
                "rdt_config_file of plugins.'io.containerd.service.v1.tasks-service' has no effect: make \
                 the classes in {RESCTRL} (mkdir, schemata) before containers ask for them"
            );
        }
        let file = &tasks.blockio_config_file;
        if file.is_empty() {
            return Self::default();
        }
        let blockio = read(Path::new(file))
            .inspect_err(|error| tracing::error!(%file, %error, "blockio initialization failed"));
        Self {
            blockio: blockio.ok(),
        }
    }

    /// A class of block I/O as `linux.resources.blockIO` of a spec; `None` where there are no classes.
    ///
    /// # Errors
    /// When there are classes, but not this one.
    pub(crate) fn block_io(&self, class: &str) -> Result<Option<Value>> {
        let Some(classes) = &self.blockio else {
            return Ok(None);
        };
        let found = classes.class(class);
        found
            .map(Some)
            .ok_or_else(|| Error::unknown(format!("no OCI BlockIO parameters for class {class:?}")))
    }
}

/// Puts the classes of a container into its spec.
///
/// # Errors
/// For a class that cannot be had here.
pub(super) fn apply(input: &Input<'_>, spec: &mut Value) -> Result<()> {
    let name = input
        .config
        .metadata
        .as_ref()
        .map_or("", |m| m.name.as_str());
    let (own, pod) = (&input.config.annotations, &input.pod.annotations);
    let handlers = &input.runtime.containerd;
    if let Some(class) = class("blockio", name, own, pod) {
        if let Some(limits) = input.classes.block_io(class)? {
            spec["linux"]["resources"]["blockIO"] = limits;
        } else if !handlers.ignore_blockio_not_enabled_errors {
            return Err(Error::unknown(format!(
                "blockio disabled, refusing to set blockio class of container {name:?} to {class:?}: \
                 blockio_config_file names no classes (ignore_blockio_not_enabled_errors passes it over)"
            )));
        }
    }
    if let Some(class) = class("rdt", name, own, pod) {
        let known = !class.contains('/')
            && class != "."
            && class != ".."
            && Path::new(RESCTRL).join(class).join("tasks").exists();
        if known {
            spec["linux"]["intelRdt"] = json!({ "closID": class });
        } else if !handlers.ignore_rdt_not_enabled_errors {
            return Err(Error::unknown(format!(
                "RDT disabled, refusing to set RDT class of container {name:?} to {class:?}: there is no \
                 such class below {RESCTRL} (ignore_rdt_not_enabled_errors passes it over)"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_annotation_wins() {
        let map = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            let owned = pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
            owned.collect()
        };
        let pod = map(&[
            ("blockio.resources.beta.kubernetes.io/pod", "slow"),
            ("blockio.resources.beta.kubernetes.io/container.db", "fast"),
            ("rdt.resources.beta.kubernetes.io/container.web", "gold"),
        ]);
        let own = map(&[("io.kubernetes.cri.blockio-class", "own")]);
        let none = HashMap::new();
        assert_eq!(class("blockio", "web", &none, &pod), Some("slow"));
        assert_eq!(class("blockio", "db", &none, &pod), Some("fast"));
        assert_eq!(class("blockio", "db", &own, &pod), Some("own"));
        assert_eq!(class("rdt", "db", &own, &pod), None);
        assert_eq!(class("rdt", "web", &own, &pod), Some("gold"));
        // An empty one takes the pod's away.
        let off = map(&[("io.kubernetes.cri.blockio-class", "")]);
        assert_eq!(class("blockio", "db", &off, &pod), None);
    }

    #[test]
    fn a_file_that_cannot_be_read_turns_classes_off() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let tasks = config::Tasks {
            blockio_config_file: file.path().display().to_string(),
            ..config::Tasks::default()
        };
        std::fs::write(file.path(), "Classes:\n  slow:\n  - Weight: 80\n").unwrap();
        let classes = Classes::load(&tasks);
        assert_eq!(
            classes.block_io("slow").unwrap(),
            Some(json!({ "weight": 80 }))
        );
        let unknown = classes.block_io("fast").unwrap_err().to_string();
        assert_eq!(unknown, "no OCI BlockIO parameters for class \"fast\"");
        std::fs::write(file.path(), "nonsense").unwrap();
        assert_eq!(Classes::load(&tasks).block_io("slow").unwrap(), None);
        assert_eq!(
            Classes::load(&config::Tasks::default())
                .block_io("slow")
                .unwrap(),
            None
        );
    }
}
