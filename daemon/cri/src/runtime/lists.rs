//! Lists of pods and containers, written as messages of the API straight from what is in memory.
//!
//! A kubelet asks for both lists more than once a second and for nothing else as often. Building a
//! value for each object only to encode it would copy every label twice; what never changes, labels
//! and annotations most of all, is encoded once and kept.

use bytes::Bytes;
use lighter_proto::runtime::v1 as api;
use lighter_proto::time;
use prost::Message;
use prost::encoding::{
    WireType, encode_key, encode_varint, hash_map, int32, int64, message, string,
};

use super::encode::selected;
use crate::error::Result;
use crate::plugin::Plugin;
use crate::store::{Container, Pod};

/// Field in which both answers have their objects.
const ITEM: u32 = 1;

impl Plugin {
    /// A `ListPodSandboxResponse` of the pods that match.
    pub(super) fn pod_list(&self, filter: Option<api::PodSandboxFilter>) -> Bytes {
        let filter = filter.unwrap_or_default();
        let (mut list, mut body) = (Vec::new(), Vec::new());
        for pod in self.store.visible_pods() {
            let labels = &pod.config.labels;
            if pod.id.starts_with(&filter.id) && selected(labels, &filter.label_selector) {
                let wanted = filter.state.as_ref().map(|s| s.state);
                if write_pod(&mut body, &pod, wanted) {
                    push(&mut list, &mut body);
                }
            }
        }
        list.into()
    }

    /// A `ListContainersResponse` of the containers that match.
    pub(super) fn container_list(&self, filter: Option<api::ContainerFilter>) -> Bytes {
        let filter = filter.unwrap_or_default();
        let (mut list, mut body) = (Vec::new(), Vec::new());
        for container in self.store.all_containers() {
            if container.id.starts_with(&filter.id)
                && container.pod_id.starts_with(&filter.pod_sandbox_id)
                && selected(&container.config.labels, &filter.label_selector)
            {
                let wanted = filter.state.as_ref().map(|s| s.state);
                let image_ref = self.image_ref_of(&container);
                if write_container(&mut body, &container, &image_ref, wanted) {
                    push(&mut list, &mut body);
                }
            }
        }
        list.into()
    }

    /// [`Self::pod_list`], timed.
    pub(crate) fn list_pods(&self, filter: Option<api::PodSandboxFilter>) -> Bytes {
        self.timers
            .time_now("sandbox_list", || self.pod_list(filter))
    }

    /// [`Self::container_list`], timed.
    pub(crate) fn list_containers(&self, filter: Option<api::ContainerFilter>) -> Bytes {
        self.timers
            .time_now("container_list", || self.container_list(filter))
    }

    /// Pods that match, for who needs values.
    pub(super) fn pods(
        &self,
        filter: Option<api::PodSandboxFilter>,
    ) -> Result<Vec<api::PodSandbox>> {
        let list: api::ListPodSandboxResponse = read_back(self.pod_list(filter))?;
        Ok(list.items)
    }

    /// Containers that match, for who needs values.
    pub(super) fn containers(
        &self,
        filter: Option<api::ContainerFilter>,
    ) -> Result<Vec<api::Container>> {
        let list: api::ListContainersResponse = read_back(self.container_list(filter))?;
        Ok(list.containers)
    }
}

/// The message that bytes of ours are.
///
/// # Errors
/// For bytes that are none.
pub(super) fn read_back<M: Message + Default>(list: Bytes) -> Result<M> {
    M::decode(list).map_err(|error| crate::error::Error::unknown(error.to_string()))
}

/// Appends `body` as one object of a list, and empties it.
fn push(list: &mut Vec<u8>, body: &mut Vec<u8>) {
    encode_key(ITEM, WireType::LengthDelimited, list);
    encode_varint(body.len() as u64, list);
    list.append(body);
}

/// A `PodSandbox`; nothing, and false, when its state is not the one that is `wanted`.
fn write_pod(out: &mut Vec<u8>, pod: &Pod, wanted: Option<i32>) -> bool {
    let (state, created_at) = pod.brief();
    let state = i32::from(state);
    if wanted.is_some_and(|wanted| wanted != state) {
        return false;
    }
    out.extend_from_slice(pod.listed.get_or_init(|| fixed_of_pod(pod)));
    if state != 0 {
        int32::encode(3, &state, out);
    }
    int64::encode(4, &time::to_nanos(created_at), out);
    true
}

fn fixed_of_pod(pod: &Pod) -> Box<[u8]> {
    let mut out = Vec::new();
    text(&mut out, 1, &pod.id);
    part(&mut out, 2, pod.config.metadata.as_ref());
    pairs(&mut out, 5, &pod.config.labels);
    pairs(&mut out, 6, &pod.config.annotations);
    text(&mut out, 7, &pod.handler);
    out.into()
}

/// A `Container`; nothing, and false, when its state is not the one that is `wanted`.
fn write_container(
    out: &mut Vec<u8>,
    container: &Container,
    image_ref: &String,
    wanted: Option<i32>,
) -> bool {
    let (state, created_at) = container.brief();
    let state = i32::from(state);
    if wanted.is_some_and(|wanted| wanted != state) {
        return false;
    }
    let fixed = container.listed.get_or_init(|| fixed_of(container));
    out.extend_from_slice(fixed);
    text(out, 5, image_ref);
    if state != 0 {
        int32::encode(6, &state, out);
    }
    int64::encode(7, &time::to_nanos(created_at), out);
    true
}

fn fixed_of(container: &Container) -> Box<[u8]> {
    let (config, mut out) = (&container.config, Vec::new());
    text(&mut out, 1, &container.id);
    text(&mut out, 2, &container.pod_id);
    part(&mut out, 3, config.metadata.as_ref());
    part(&mut out, 4, config.image.as_ref());
    pairs(&mut out, 8, &config.labels);
    pairs(&mut out, 9, &config.annotations);
    text(&mut out, 10, &container.image_id);
    out.into()
}

fn text(out: &mut Vec<u8>, number: u32, value: &String) {
    if !value.is_empty() {
        string::encode(number, value, out);
    }
}

fn part(out: &mut Vec<u8>, number: u32, value: Option<&impl Message>) {
    if let Some(value) = value {
        message::encode(number, value, out);
    }
}

fn pairs(out: &mut Vec<u8>, number: u32, map: &std::collections::HashMap<String, String>) {
    let (key, value) = (string::encoded_len, string::encoded_len);
    hash_map::encode(string::encode, key, string::encode, value, number, map, out);
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::store::{ContainerStatus, NewContainer};

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        let owned = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into()));
        owned.collect()
    }

    #[test]
    fn a_pod_reads_as_it_was_written() {
        let config = api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: "pod".into(),
                uid: "uid".into(),
                namespace: "default".into(),
                attempt: 3,
            }),
            labels: map(&[("a", "1"), ("empty", "")]),
            annotations: map(&[("note", "text")]),
            ..Default::default()
        };
        let pod = Pod::new("id".into(), "n".into(), config.clone(), "fast".into(), None);
        pod.update(|state| state.created_at = SystemTime::UNIX_EPOCH + Duration::from_nanos(77));
        let not_ready = i32::from(api::PodSandboxState::SandboxNotready);
        for (at, wanted) in [(0, None), (1, Some(not_ready))] {
            if at == 1 {
                pod.update(|state| state.state = api::PodSandboxState::SandboxNotready);
            }
            let (mut list, mut body) = (Vec::new(), Vec::new());
            assert!(write_pod(&mut body, &pod, wanted));
            push(&mut list, &mut body);
            let list: api::ListPodSandboxResponse = read_back(list.into()).expect("ours");
            let expected = api::PodSandbox {
                id: "id".into(),
                metadata: config.metadata.clone(),
                state: not_ready,
                created_at: 77,
                labels: config.labels.clone(),
                annotations: config.annotations.clone(),
                runtime_handler: "fast".into(),
            };
            assert_eq!(list.items, [expected]);
        }
        assert!(!write_pod(&mut Vec::new(), &pod, Some(not_ready - 1)));
    }

    #[test]
    fn a_container_reads_as_it_was_written() {
        let config = api::ContainerConfig {
            metadata: Some(api::ContainerMetadata {
                name: "main".into(),
                attempt: 1,
            }),
            image: Some(api::ImageSpec {
                image: "busybox".into(),
                ..Default::default()
            }),
            labels: map(&[("l", "v")]),
            annotations: map(&[("n", "w")]),
            ..Default::default()
        };
        let new = NewContainer {
            id: "c".into(),
            name: "n".into(),
            pod_id: "p".into(),
            config: config.clone(),
            image_id: "sha256:1".into(),
            log_path: None,
            stop_signal: 15,
            snapshotter: "overlayfs".into(),
            user: api::ContainerUser::default(),
            labels: crate::selinux::Labels::default(),
        };
        let container = Container::new(new, ContainerStatus::created(None));
        container.update(|status| {
            status.created_at = SystemTime::UNIX_EPOCH + Duration::from_nanos(5);
            status.state = api::ContainerState::ContainerRunning;
        });
        let running = i32::from(api::ContainerState::ContainerRunning);
        let (mut list, mut body) = (Vec::new(), Vec::new());
        assert!(write_container(
            &mut body,
            &container,
            &"name@digest".into(),
            Some(running)
        ));
        push(&mut list, &mut body);
        let list: api::ListContainersResponse = read_back(list.into()).expect("ours");
        let expected = api::Container {
            id: "c".into(),
            pod_sandbox_id: "p".into(),
            metadata: config.metadata,
            image: config.image,
            image_ref: "name@digest".into(),
            state: running,
            created_at: 5,
            labels: config.labels,
            annotations: config.annotations,
            image_id: "sha256:1".into(),
        };
        assert_eq!(list.containers, [expected]);
        assert!(!write_container(
            &mut body,
            &container,
            &String::new(),
            Some(0)
        ));
    }
}
