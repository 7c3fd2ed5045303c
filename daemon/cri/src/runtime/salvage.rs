//! Pods and containers whose metadata on record cannot be read: a disk that lied, another program that
//! wrote. Their spec names them as well, so they are listed, stopped and removed like others, instead
//! of staying for ever where nobody sees them.

use std::path::PathBuf;
use std::sync::Arc;

use lighter_proto::runtime::v1::{
    ContainerConfig, ContainerMetadata, ContainerState, ImageSpec, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig,
    PodSandboxMetadata,
};
use lighter_store::metadata;
use serde_json::Value;

use super::recover::{Found, Unsure, user_from};
use crate::plugin::Plugin;
use crate::store::{Container, ContainerStatus, NewContainer, Pod};

/// The signal that ends a container of which nothing better is known.
const SIGTERM: u32 = 15;

fn spec_of(record: &metadata::Container) -> Value {
    serde_json::from_slice(&record.spec.value).unwrap_or_default()
}

/// One of the annotations that CRI puts into every spec.
fn annotation(spec: &Value, name: &str) -> String {
    let value = &spec["annotations"][format!("io.kubernetes.cri.{name}")];
    value.as_str().unwrap_or_default().to_owned()
}

/// The SELinux label that a spec's process runs with; empty for none.
fn label_of(spec: &Value) -> &str {
    spec["process"]["selinuxLabel"].as_str().unwrap_or_default()
}

/// The configuration of a pod as far as its spec tells it; what is unknown is named after the id.
fn pod_config(id: &str, spec: &Value, netns: Option<&PathBuf>) -> PodSandboxConfig {
    let or_id = |text: String| if text.is_empty() { id.to_owned() } else { text };
    let network = match netns {
        Some(_) => NamespaceMode::Pod,
        None => NamespaceMode::Node,
    };
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: or_id(annotation(spec, "sandbox-name")),
            uid: or_id(annotation(spec, "sandbox-uid")),
            namespace: or_id(annotation(spec, "sandbox-namespace")),
            attempt: 0,
        }),
        log_directory: annotation(spec, "sandbox-log-directory"),
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(NamespaceOption {
                    network: network.into(),
                    ..NamespaceOption::default()
                }),
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    }
}

/// The network namespace that a pod's spec joins.
fn netns_of(spec: &Value) -> Option<PathBuf> {
    let namespaces = spec["linux"]["namespaces"].as_array()?;
    let network = namespaces.iter().find(|n| n["type"] == "network")?;
    let path = network["path"].as_str().filter(|path| !path.is_empty())?;
    Some(PathBuf::from(path))
}

impl Plugin {
    /// Takes over a pod by its spec.
    pub(super) async fn salvage_pod(self: &Arc<Self>, record: &metadata::Container) {
        let (id, spec) = (record.id.to_string(), spec_of(record));
        let netns = netns_of(&spec);
        let config = pod_config(&id, &spec, netns.as_ref());
        // Its name stays free: whoever runs the pod again must not be held up by this one.
        let pod = Pod::new(id.clone(), id.clone(), config, String::new(), netns);
        let pod = Arc::new(pod);
        pod.label(self.selinux.recorded(label_of(&spec)));
        pod.update(|s| {
            s.created_at = record.created_at;
            s.visible = true;
        });
        self.store.pods.add(Arc::clone(&pod));
        match self.find_task(&id).await {
            Found::Live(handle) => self.take_pod(&pod, handle).await,
            Found::None => {}
            Found::Unsure => self.ask_again(Unsure::Pod(pod)),
        }
    }

    /// Takes over a container by its spec.
    pub(super) async fn salvage_container(self: &Arc<Self>, record: &metadata::Container) {
        let (id, spec) = (record.id.to_string(), spec_of(record));
        let name = annotation(&spec, "container-name");
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: if name.is_empty() { id.clone() } else { name },
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image: record.image.clone(),
                ..ImageSpec::default()
            }),
            ..ContainerConfig::default()
        };
        let image = self.images.find(&record.image);
        let container = Arc::new(Container::new(
            NewContainer {
                id: id.clone(),
                name: id.clone(),
                pod_id: annotation(&spec, "sandbox-id"),
                config,
                image_id: image.map_or_else(|| record.image.clone(), |image| image.id),
                log_path: None,
                stop_signal: SIGTERM,
                snapshotter: record.snapshotter.clone(),
                user: user_from(&spec),
                labels: self.selinux.recorded(label_of(&spec)),
            },
            ContainerStatus::created(None),
        ));
        container.update(|s| s.created_at = record.created_at);
        self.store.containers.add(Arc::clone(&container));
        match self.find_task(&id).await {
            Found::Live(handle) => self.take_container(&container, handle).await,
            Found::None => self.settle_container(&container).await,
            Found::Unsure => {
                container.update(|s| s.state = ContainerState::ContainerUnknown);
                self.ask_again(Unsure::Container(container));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_spec_names_its_pod() {
        let spec = json!({
            "annotations": {
                "io.kubernetes.cri.sandbox-name": "ship",
                "io.kubernetes.cri.sandbox-namespace": "harbour",
            },
            "linux": { "namespaces": [
                { "type": "pid" }, { "type": "network", "path": "/run/netns/x" },
            ] },
        });
        let netns = netns_of(&spec);
        assert_eq!(netns, Some(PathBuf::from("/run/netns/x")));
        let metadata = pod_config("7", &spec, netns.as_ref()).metadata.unwrap();
        assert_eq!(
            (metadata.name.as_str(), metadata.uid.as_str()),
            ("ship", "7")
        );
        assert_eq!(netns_of(&Value::Null), None);
    }
}
