//! Networks for containers that a person starts: the daemon's own CNI code, with upstream ctr's
//! conventions for where things are.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use lighter_cni::{
    Capabilities, Cni, Config, IpPreference, NetworkResult, Options, PortMapping, netns,
};

use crate::advice;

/// Where configurations are looked for, unless `NETCONFPATH` names a directory, as CNI's own tools
/// read it; the first by name is used.
const CONFIG_DIR: &str = "/etc/cni/net.d";
/// Where plugins are looked for, in order, unless `CNI_PATH` says: upstream's place, then Debian's.
const PLUGIN_DIRS: &str = "/opt/cni/bin:/usr/lib/cni";
/// Where it stands which containers have a network, so that any later command can take it down.
const STATE_DIR: &str = "/var/lib/lighter/ctr";
/// Where network namespaces are pinned, so that plugins can still enter them when the last process
/// is gone: some take their rules down only then.
const PIN_DIR: &str = "/run/lighter/ctr/netns";

/// An environment variable, or what stands in for it.
fn setting(name: &str, default: &str) -> String {
    std::env::var(name)
        .ok()
        .filter(|value| !value.is_empty())
        .unwrap_or_else(|| default.to_owned())
}

/// The directory of network configurations.
pub(crate) fn config_dir() -> PathBuf {
    PathBuf::from(setting("NETCONFPATH", CONFIG_DIR))
}

/// The directories of plugins.
pub(crate) fn plugin_dirs() -> Vec<PathBuf> {
    std::env::split_paths(&setting("CNI_PATH", PLUGIN_DIRS)).collect()
}

/// The networks that are configured.
pub(crate) async fn open() -> Cni {
    Cni::new(Config {
        conf_dir: config_dir(),
        bin_dirs: plugin_dirs(),
        ..Config::with_root(Path::new(STATE_DIR))
    })
    .await
}

/// A container's network.
#[derive(Debug)]
pub(crate) struct Network {
    cni: Cni,
    id: String,
}

impl Network {
    /// The network of a container, whether it has one or not.
    pub(crate) async fn of(namespace: &str, container: &str) -> Self {
        Self {
            cni: open().await,
            id: format!("{namespace}-{container}"),
        }
    }

    /// Gives the container whose first process is `pid` its interfaces, and opens `ports`.
    pub(crate) async fn setup(
        &self,
        pid: u32,
        ports: Vec<PortMapping>,
    ) -> anyhow::Result<NetworkResult> {
        if let Err(error) = self.cni.networks() {
            return advice::fail(
                format!("no network to join: {error}"),
                "make one with `ctr network init`, or use --net-host",
            );
        }
        let options = Options {
            capabilities: Capabilities {
                port_mappings: ports,
                ..Capabilities::default()
            },
            args: vec![("IgnoreUnknown".to_owned(), "1".to_owned())],
            ..Options::default()
        };
        let netns = self.pin(pid)?;
        match self.cni.setup(&self.id, &netns, &options).await {
            Ok(result) => Ok(result),
            Err(error) => {
                netns::remove(&netns).await?;
                Err(error.into())
            }
        }
    }

    /// Takes the interfaces down and gives the addresses back. Fine when there is nothing left.
    pub(crate) async fn remove(&self) -> anyhow::Result<()> {
        let pinned = self.pinned();
        let netns = pinned.exists().then_some(pinned.as_path());
        let options = Options::default();
        self.cni.teardown(&self.id, netns, &options).await?;
        Ok(netns::remove(&pinned).await?)
    }

    fn pinned(&self) -> PathBuf {
        Path::new(PIN_DIR).join(&self.id)
    }

    fn pin(&self, pid: u32) -> anyhow::Result<PathBuf> {
        let pinned = self.pinned();
        std::fs::create_dir_all(PIN_DIR)
            .and_then(|()| std::fs::File::create(&pinned))
            .and_then(|_| {
                let netns = format!("/proc/{pid}/ns/net");
                Ok(rustix::mount::mount_bind(netns, &pinned)?)
            })
            .with_context(|| format!("cannot pin a network namespace at {}", pinned.display()))?;
        Ok(pinned)
    }
}

/// The address of a container, for people; empty when it has none.
pub(crate) fn address(result: &NetworkResult) -> String {
    result
        .addresses("eth0", IpPreference::Cni)
        .map(|(first, _)| first.to_string())
        .unwrap_or_default()
}

/// Reads `[HOST-IP:]HOST-PORT:PORT[/PROTOCOL]`, as Docker's `--publish` is written.
pub(crate) fn port(text: &str) -> Result<PortMapping, String> {
    let wrong = || format!("{text:?} is no [HOST-IP:]HOST-PORT:PORT[/tcp|udp|sctp]");
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    if !["tcp", "udp", "sctp"].contains(&protocol) {
        return Err(wrong());
    }
    let (rest, container) = ports.rsplit_once(':').ok_or_else(wrong)?;
    let (ip, host) = rest.rsplit_once(':').unwrap_or(("", rest));
    let ip = ip.trim_start_matches('[').trim_end_matches(']');
    if !ip.is_empty() && ip.parse::<std::net::IpAddr>().is_err() {
        return Err(wrong());
    }
    let number = |text: &str| text.parse::<u16>().ok().filter(|n| *n > 0);
    Ok(PortMapping {
        host_port: number(host).ok_or_else(wrong)?,
        container_port: number(container).ok_or_else(wrong)?,
        protocol: protocol.to_owned(),
        host_ip: ip.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::port;

    #[test]
    fn ports_are_written_as_for_docker() {
        let mapping = port("8080:80").unwrap();
        assert_eq!((mapping.host_port, mapping.container_port), (8080, 80));
        assert_eq!(
            (mapping.protocol.as_str(), mapping.host_ip.as_str()),
            ("tcp", "")
        );
        let mapping = port("127.0.0.1:53:5353/udp").unwrap();
        assert_eq!(
            (mapping.host_ip.as_str(), mapping.host_port),
            ("127.0.0.1", 53)
        );
        assert_eq!(port("[::1]:1:2").unwrap().host_ip, "::1");
        for wrong in ["80", "0:80", "a:80", "1:70000", "x:1:2", "1:2/icmp", ":2"] {
            assert!(port(wrong).is_err(), "{wrong}");
        }
    }
}
