//! Which of our shims serves which group of containers (a pod, usually).
//!
//! A shim groups by two annotations of the spec, and whoever starts one for a group that is served
//! gets the server's address. For a group whose server was started here the answer is known, so
//! no process has to be asked.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lighter_store::Namespace;
use serde::Deserialize;

use super::bootstrap::Bootstrap;

/// Annotations that name a group; the first one wins.
const GROUP_ANNOTATIONS: [&str; 2] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
];

#[derive(Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// The group that a spec names.
pub(super) fn group_of(spec: &[u8]) -> Option<String> {
    // Most specs name none: a search is cheaper than reading all of the JSON.
    let named = |key: &&str| spec.windows(key.len()).any(|part| part == key.as_bytes());
    if !GROUP_ANNOTATIONS.iter().any(named) {
        return None;
    }
    let annotated: Annotated = serde_json::from_slice(spec).ok()?;
    let mut annotations = annotated.annotations?;
    GROUP_ANNOTATIONS
        .iter()
        .find_map(|key| annotations.remove(*key))
}

/// Binary of a server, and how it is reached.
type Server = (PathBuf, Bootstrap);

/// Servers by namespace and group.
#[derive(Debug, Default)]
pub(super) struct Groups(Mutex<HashMap<(Namespace, String), Server>>);

impl Groups {
    fn locked(&self) -> MutexGuard<'_, HashMap<(Namespace, String), Server>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How a group's server of this binary is reached.
    pub(super) fn server(
        &self,
        namespace: &Namespace,
        group: &str,
        shim: &Path,
    ) -> Option<Bootstrap> {
        let servers = self.locked();
        let (binary, server) = servers.get(&(namespace.clone(), group.to_owned()))?;
        (binary == shim).then(|| server.clone())
    }

    /// Keeps a group's server.
    pub(super) fn remember(&self, namespace: &Namespace, group: String, server: Server) {
        self.locked().insert((namespace.clone(), group), server);
    }

    /// Whether the server at `address` is a group's.
    pub(super) fn has(&self, address: &str) -> bool {
        let servers = self.locked();
        servers
            .values()
            .any(|(_, server)| server.address == address)
    }

    /// Drops what is known of the server at `address`.
    pub(super) fn forget(&self, address: &str) {
        self.locked()
            .retain(|_, (_, server)| server.address != address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_comes_from_the_annotations_alone() {
        let spec = br#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod","io.containerd.runc.v2.group":"g"}}"#;
        assert_eq!(group_of(spec).as_deref(), Some("g"));
        let spec = br#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#;
        assert_eq!(group_of(spec).as_deref(), Some("pod"));
        let elsewhere = br#"{"process":{"env":["io.kubernetes.cri.sandbox-id=x"]}}"#;
        assert_eq!(group_of(elsewhere), None);
        assert_eq!(group_of(b"{}"), None);
    }

    #[test]
    fn a_server_is_forgotten_with_its_address_and_bound_to_its_binary() {
        let (groups, namespace) = (Groups::default(), Namespace::new("n").unwrap());
        let server = Bootstrap::parse(b"unix:///s").unwrap();
        let shim = PathBuf::from("/bin/shim");
        groups.remember(&namespace, "g".to_owned(), (shim.clone(), server.clone()));
        assert_eq!(groups.server(&namespace, "g", &shim), Some(server));
        assert_eq!(
            groups.server(&namespace, "g", Path::new("/bin/other")),
            None
        );
        groups.forget("unix:///s");
        assert_eq!(groups.server(&namespace, "g", &shim), None);
    }
}
