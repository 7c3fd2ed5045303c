//! Classes of block I/O and of cache and memory bandwidth (RDT) that annotations choose.
//!
//! Neither is configured in this daemon: a class that is asked for is an error unless the
//! configuration says that such are passed over. RDT classes that the operator made in resctrl can
//! be joined.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value, json};

use super::container::Input;
use crate::error::{Error, Result};

/// Annotation of a pod for all its containers.
const POD: &str = "resources.beta.kubernetes.io/pod";
/// Annotation of a container, or, with its name, of its pod.
const CONTAINER: &str = "resources.beta.kubernetes.io/container";
/// Where classes of cache and bandwidth are.
const RESCTRL: &str = "/sys/fs/resctrl";

/// The class that `kind` (`blockio` or `rdt`) annotations choose for a container: its own, else its
/// pod's for it, else its pod's for all.
fn class<'a>(
    kind: &str,
    name: &str,
    container: &'a HashMap<String, String>,
    pod: &'a HashMap<String, String>,
) -> Option<&'a str> {
    let own = format!("{kind}.{CONTAINER}");
    container
        .get(&own)
        .or_else(|| pod.get(&format!("{own}.{name}")))
        .or_else(|| pod.get(&format!("{kind}.{POD}")))
        .map(String::as_str)
        .filter(|class| !class.is_empty())
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
    if let Some(class) = class("blockio", name, own, pod)
        && !handlers.ignore_blockio_not_enabled_errors
    {
        return Err(Error::unknown(format!(
            "blockio support is not enabled: no classes are configured, but {class:?} is asked for \
             (ignore_blockio_not_enabled_errors passes it over)"
        )));
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
                "RDT support is not enabled: there is no class {class:?} below {RESCTRL} \
                 (ignore_rdt_not_enabled_errors passes it over)"
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
        ]);
        let own = map(&[("blockio.resources.beta.kubernetes.io/container", "own")]);
        let none = HashMap::new();
        assert_eq!(class("blockio", "web", &none, &pod), Some("slow"));
        assert_eq!(class("blockio", "db", &none, &pod), Some("fast"));
        assert_eq!(class("blockio", "db", &own, &pod), Some("own"));
        assert_eq!(class("rdt", "db", &own, &pod), None);
    }
}
