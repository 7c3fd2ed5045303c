//! A pod's network: its namespace and what CNI does to it.

use std::path::{Path, PathBuf};

use lighter_proto::runtime::v1::{PodSandboxConfig, Protocol};

use crate::cni::{IpPreference, NetworkResult, Options, PortMapping};
use crate::error::{Error, Result};
use crate::netns;
use crate::plugin::Plugin;
use crate::store::Pod;

fn options(id: &str, config: &PodSandboxConfig) -> Options {
    let metadata = config.metadata.clone().unwrap_or_default();
    let mut options =
        Options::default().kubernetes(&metadata.namespace, &metadata.name, id, &metadata.uid);
    let port = |number: i32| u16::try_from(number).unwrap_or(0);
    options.capabilities.port_mappings = config
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
    options
}

impl Plugin {
    /// Makes the pod's namespace.
    pub(super) async fn make_netns(&self) -> Result<PathBuf> {
        let own = self.state.join("netns");
        let under_state = self.config.runtime.netns_mounts_under_state_dir;
        let dir = if under_state {
            own.as_path()
        } else {
            Path::new(netns::DEFAULT_DIR)
        };
        Ok(netns::create(dir, None).await?)
    }

    /// Attaches the pod to its networks; its addresses.
    pub(super) async fn attach_network(
        &self,
        pod: &Pod,
        path: &Path,
    ) -> Result<(String, Vec<String>, NetworkResult)> {
        let failed = |detail: String| {
            Error::unknown(format!(
                "failed to setup network for sandbox {:?}: {detail}",
                pod.id
            ))
        };
        let result = self
            .cni
            .setup(&pod.id, path, &options(&pod.id, &pod.config))
            .await
            .map_err(|e| failed(lighter_proto::errdefs::render(&e)))?;
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
            None => {
                self.detach_network(pod, path).await?;
                Err(Error::unknown(format!(
                    "failed to find network info for sandbox {:?}",
                    pod.id
                )))
            }
        }
    }

    /// Detaches the pod; a namespace that is gone is fine.
    pub(super) async fn detach_network(&self, pod: &Pod, path: &Path) -> Result<()> {
        let open = Some(path).filter(|p| !netns::is_closed(p));
        self.cni
            .teardown(&pod.id, open, &options(&pod.id, &pod.config))
            .await?;
        Ok(netns::remove(path).await?)
    }
}
