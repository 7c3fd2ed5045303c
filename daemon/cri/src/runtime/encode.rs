//! Pods and containers as the kubelet reads them, one by one.

use std::collections::HashMap;

use lighter_proto::runtime::v1 as api;
use lighter_proto::time;

use super::signals::told_signal;
use crate::plugin::Plugin;
use crate::store::{Container, Pod};

/// Whether labels have everything that a selector asks.
pub(super) fn selected(
    labels: &HashMap<String, String>,
    selector: &HashMap<String, String>,
) -> bool {
    selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}

impl Plugin {
    /// A pod's status.
    pub(super) fn pod_status_of(&self, pod: &Pod) -> api::PodSandboxStatus {
        let state = pod.state();
        let closed = pod
            .netns
            .as_ref()
            .is_none_or(|n| crate::netns::is_closed(n));
        let network = if closed {
            api::PodSandboxNetworkStatus::default()
        } else {
            let others = state.additional_ips.into_iter().map(|ip| api::PodIp { ip });
            api::PodSandboxNetworkStatus {
                ip: state.ip,
                additional_ips: others.collect(),
            }
        };
        let options = pod
            .config
            .linux
            .as_ref()
            .and_then(|l| l.security_context.as_ref())
            .and_then(|s| s.namespace_options.clone());
        api::PodSandboxStatus {
            id: pod.id.clone(),
            metadata: pod.config.metadata.clone(),
            state: state.state.into(),
            created_at: time::to_nanos(state.created_at),
            network: Some(network),
            linux: Some(api::LinuxPodSandboxStatus {
                namespaces: Some(api::Namespace { options }),
            }),
            labels: pod.config.labels.clone(),
            annotations: pod.config.annotations.clone(),
            runtime_handler: pod.handler.clone(),
        }
    }

    fn image_of(&self, container: &Container) -> (String, String) {
        self.images.titles(&container.image_id).unwrap_or_else(|| {
            let asked = container.config.image.as_ref().map(|i| i.image.clone());
            (asked.unwrap_or_default(), container.image_id.clone())
        })
    }

    /// What a container's image is known by.
    pub(super) fn image_ref_of(&self, container: &Container) -> String {
        self.image_of(container).1
    }

    /// A container's status.
    pub(super) fn status_of(&self, container: &Container) -> api::ContainerStatus {
        let status = container.status();
        let (image, image_ref) = self.image_of(container);
        let nanos = |at: Option<std::time::SystemTime>| at.map_or(0, time::to_nanos);
        let config = &container.config;
        let log_path = container.log_path.as_ref().map(|p| p.display().to_string());
        api::ContainerStatus {
            id: container.id.clone(),
            metadata: config.metadata.clone(),
            state: status.state.into(),
            created_at: time::to_nanos(status.created_at),
            started_at: nanos(status.started_at),
            finished_at: nanos(status.finished_at),
            exit_code: status.exit_code,
            image: Some(api::ImageSpec {
                image,
                ..Default::default()
            }),
            image_ref,
            reason: status.reason,
            message: status.message,
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
            mounts: config.mounts.clone(),
            log_path: log_path.unwrap_or_default(),
            resources: status.resources.map(|linux| api::ContainerResources {
                linux: Some(linux),
                windows: None,
            }),
            image_id: container.image_id.clone(),
            user: Some(container.user.clone()),
            stop_signal: told_signal(container).into(),
        }
    }
}
