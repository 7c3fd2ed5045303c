//! A pod's network: its namespace and what CNI does to it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lighter_proto::errdefs::render;
use lighter_proto::runtime::v1::{PodSandboxConfig, Protocol};

use super::files::on_host;
use crate::cni::{Bandwidth, DnsConfig, IpPreference, NetworkResult, Options, PortMapping};
use crate::deadline::time_left;
use crate::error::{Error, Result};
use crate::plugin::Plugin;
use crate::store::Pod;
use crate::{netns, userns};

/// Annotations of a pod that limit its bandwidth.
const BANDWIDTH: (&str, &str) = (
    "kubernetes.io/ingress-bandwidth",
    "kubernetes.io/egress-bandwidth",
);
/// What is kept of a caller's time for undoing a network that could not be set up: this, and no
/// more than a quarter.
const UNDO_SHARE: Duration = Duration::from_secs(2);

/// What plugins are told of a pod.
///
/// # Errors
/// For a bandwidth that is none.
fn options(id: &str, config: &PodSandboxConfig) -> Result<Options> {
    let metadata = config.metadata.clone().unwrap_or_default();
    let mut options =
        Options::default().kubernetes(&metadata.namespace, &metadata.name, id, &metadata.uid);
    let port = |number: i32| u16::try_from(number).unwrap_or(0);
    let capabilities = &mut options.capabilities;
    capabilities.port_mappings = config
        .port_mappings
        .iter()
        .filter(|m| m.host_port > 0)
        .map(|m| PortMapping {
            host_port: port(m.host_port),
            container_port: port(m.container_port),
            protocol: match m.protocol() {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
                Protocol::Sctp => "sctp",
            }
            .to_owned(),
            host_ip: m.host_ip.clone(),
        })
        .collect();
    let annotation = |key: &str| config.annotations.get(key).map(String::as_str);
    capabilities.bandwidth =
        Bandwidth::from_annotations(annotation(BANDWIDTH.0), annotation(BANDWIDTH.1))
            .map_err(Error::unknown)?;
    capabilities.dns = config.dns_config.as_ref().map(|dns| DnsConfig {
        servers: dns.servers.clone(),
        searches: dns.searches.clone(),
        options: dns.options.clone(),
    });
    let pairs = config.annotations.iter();
    let annotations: serde_json::Map<_, _> =
        pairs.map(|(k, v)| (k.clone(), v.clone().into())).collect();
    capabilities.pod_annotations = (!annotations.is_empty()).then_some(annotations);
    let parent = config.linux.as_ref().map(|l| l.cgroup_parent.clone());
    capabilities.cgroup_path = parent.filter(|p| !p.is_empty());
    if let Some(left) = time_left() {
        // A plugin that hangs must leave time for the answer.
        options.timeout = options.timeout.min(left - UNDO_SHARE.min(left / 4));
    }
    Ok(options)
}

impl Plugin {
    /// Where the user namespace of a pod is pinned; `None` where it has none of its own, or no
    /// network that it would have to own.
    pub(super) fn userns_path(&self, id: &str, config: &PodSandboxConfig) -> Option<PathBuf> {
        let security = config.linux.as_ref()?.security_context.as_ref()?;
        userns::own(security.namespace_options.as_ref())?;
        let pinned = self.pod_state(id).join("pinned-namespaces").join("user");
        (!on_host(config, |o| o.network())).then_some(pinned)
    }

    /// Where the namespace of a new pod is pinned; `None` on the host's network.
    pub(super) fn netns_path(&self, config: &PodSandboxConfig) -> Option<PathBuf> {
        if on_host(config, |o| o.network()) {
            return None;
        }
        let own = self.state.join("netns");
        let under_state = self.config.runtime.netns_mounts_under_state_dir;
        let dir = if under_state {
            own.as_path()
        } else {
            Path::new(netns::DEFAULT_DIR)
        };
        Some(netns::new_path(dir))
    }

    /// Makes the pod's namespace.
    pub(super) async fn make_netns(&self, pod: &Pod) -> Result<()> {
        let Some(path) = &pod.netns else {
            return Ok(());
        };
        let owner = self.userns_path(&pod.id, &pod.config);
        let owner = match owner.zip(userns::own(pod.namespace_options())) {
            Some((pinned, own)) => Some(userns::create(&pinned, own).await?),
            None => None,
        };
        Ok(netns::create_named(path, owner).await?)
    }

    /// Attaches the pod to its networks.
    pub(super) async fn make_network(&self, pod: &Pod) -> Result<()> {
        let Some(path) = &pod.netns else {
            return Ok(());
        };
        let attach = self.attach_network(pod, path);
        let timers = &self.timers;
        let (ip, others, result) = timers.time("sandbox_create_network", "", attach).await?;
        let result = serde_json::to_value(result)?;
        pod.update(|s| {
            s.ip = ip;
            s.additional_ips = others;
            s.cni_result = Some(result);
        });
        Ok(())
    }

    /// Attaches the pod to its networks; its addresses.
    pub(super) async fn attach_network(
        &self,
        pod: &Pod,
        path: &Path,
    ) -> Result<(String, Vec<String>, NetworkResult)> {
        let failed = |error: Error| {
            error.context(format!("failed to setup network for sandbox {:?}", pod.id))
        };
        let result = self
            .cni_of(&pod.handler)
            .setup(&pod.id, path, &options(&pod.id, &pod.config)?)
            .await
            .map_err(|e| failed(e.into()))?;
        let preference = match self.config.runtime.cni.ip_pref.as_str() {
            "ipv6" => IpPreference::Ipv6,
            "cni" => IpPreference::Cni,
            _ => IpPreference::Ipv4,
        };
        match result.addresses("eth0", preference) {
            Some((ip, others)) => {
                let others = others.iter().map(ToString::to_string).collect();
                Ok((ip.to_string(), others, result))
            }
            None => Err(Error::unknown(format!(
                "failed to find network info for sandbox {:?}",
                pod.id
            ))),
        }
    }

    /// Detaches the pod; a namespace that is gone is fine.
    pub(super) async fn detach_network(self: &Arc<Self>, pod: &Pod, path: &Path) -> Result<()> {
        let open = Some(path).filter(|p| !netns::is_closed(p));
        let failed = |error: Error| {
            error.context(format!(
                "failed to destroy network for sandbox {:?}",
                pod.id
            ))
        };
        // A pod whose annotations are wrong was not attached, but must go all the same.
        let options = options(&pod.id, &pod.config).or_else(|_| {
            let mut config = pod.config.clone();
            config.annotations.clear();
            options(&pod.id, &config)
        })?;
        let networks = self.cni_of(&pod.handler);
        let half = match networks.teardown(&pod.id, open, &options).await {
            // It never was attached whole: a plugin that fails keeps nobody from going on.
            Err(error) if pod.state().cni_result.is_none() => {
                let error = render(&error);
                tracing::warn!(sandbox_id = %pod.id, %error, "network not detached");
                true
            }
            other => other.map(|()| false).map_err(|e| failed(e.into()))?,
        };
        netns::remove(path).await.map_err(|e| failed(e.into()))?;
        if half {
            self.detach_lost(pod.handler.clone(), pod.id.clone());
        }
        match self.userns_path(&pod.id, &pod.config) {
            Some(pinned) => userns::remove(&pinned),
            None => Ok(()),
        }
    }
}
