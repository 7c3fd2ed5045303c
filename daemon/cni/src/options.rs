//! What a caller may tell plugins about one container: arguments and capabilities.

use serde_json::{Map, Value, json};
use std::time::Duration;

use super::conf::Network;

/// Time for the whole setup unless the caller says otherwise; the kubelet waits four minutes.
const SETUP_TIMEOUT: Duration = Duration::from_secs(180);

/// Options of one setup. All are optional.
#[derive(Debug, Clone)]
pub struct Options {
    /// `CNI_ARGS`, as pairs.
    pub args: Vec<(String, String)>,
    /// Values for capabilities; a plugin gets those it declares.
    pub capabilities: Capabilities,
    /// Time for all plugins together; what still runs then is killed. A teardown has a minute at most.
    pub timeout: Duration,
    /// Interface names are this and a number.
    pub interface_prefix: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            args: Vec::new(),
            capabilities: Capabilities::default(),
            timeout: SETUP_TIMEOUT,
            interface_prefix: "eth".to_owned(),
        }
    }
}

impl Options {
    /// The arguments that plugins of a Kubernetes pod expect.
    #[must_use]
    pub fn kubernetes(mut self, namespace: &str, name: &str, id: &str, uid: &str) -> Self {
        for (key, value) in [
            ("IgnoreUnknown", "1"),
            ("K8S_POD_NAMESPACE", namespace),
            ("K8S_POD_NAME", name),
            ("K8S_POD_INFRA_CONTAINER_ID", id),
            ("K8S_POD_UID", uid),
        ] {
            self.args.push((key.to_owned(), value.to_owned()));
        }
        self
    }
}

/// Values for the well-known capabilities of the CNI conventions.
#[derive(Debug, Clone, Default)]
pub struct Capabilities {
    /// `portMappings`; those without a host port are left out.
    pub port_mappings: Vec<PortMapping>,
    /// `bandwidth`.
    pub bandwidth: Option<Bandwidth>,
    /// `ipRanges`: sets of ranges, as the plugin documents them.
    pub ip_ranges: Vec<Vec<IpRange>>,
    /// `ips`: addresses asked for, in CIDR form.
    pub ips: Vec<String>,
    /// `mac`: hardware address asked for.
    pub mac: Option<String>,
    /// `dns`.
    pub dns: Option<DnsConfig>,
    /// `aliases`: names of the container in the network.
    pub aliases: Vec<String>,
    /// `cgroupPath`.
    pub cgroup_path: Option<String>,
    /// `io.kubernetes.cri.pod-annotations`.
    pub pod_annotations: Option<Map<String, Value>>,
}

/// A port of the host that leads to one of the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortMapping {
    /// Port on the host; 0 means none.
    pub host_port: u16,
    /// Port in the container.
    pub container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// Address on the host; empty for all.
    pub host_ip: String,
}

/// Limits in bits per second, and bursts in bits. 0 means no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bandwidth {
    /// Towards the container.
    pub ingress_rate: u64,
    /// Burst towards the container.
    pub ingress_burst: u64,
    /// From the container.
    pub egress_rate: u64,
    /// Burst from the container.
    pub egress_burst: u64,
}

impl Bandwidth {
    /// The largest burst that the bandwidth plugin takes: what is sent at once without a wait.
    const MAX_BURST: u64 = u32::MAX as u64;

    /// Reads the `kubernetes.io/ingress-bandwidth` and `egress-bandwidth` annotations, which are
    /// Kubernetes quantities in bits per second.
    ///
    /// # Errors
    /// The value that is not a quantity between 1k and 1P.
    pub fn from_annotations(
        ingress: Option<&str>,
        egress: Option<&str>,
    ) -> Result<Option<Self>, String> {
        let rate = |text: Option<&str>| {
            text.map_or(Ok(0), |text| {
                quantity(text)
                    .filter(|n| (1_000..=1_000_000_000_000_000).contains(n))
                    .ok_or_else(|| format!("invalid bandwidth {text:?}: want 1k to 1P, as in 10M"))
            })
        };
        let (ingress, egress) = (rate(ingress)?, rate(egress)?);
        let burst = |rate: u64| if rate == 0 { 0 } else { Self::MAX_BURST };
        Ok((ingress != 0 || egress != 0).then(|| Self {
            ingress_rate: ingress,
            ingress_burst: burst(ingress),
            egress_rate: egress,
            egress_burst: burst(egress),
        }))
    }
}

/// A Kubernetes quantity as a whole number.
fn quantity(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor: f64 = match &text[digits.len()..] {
        "" => 1.0,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "Ki" => 1024.0,
        "Mi" => 1_048_576.0,
        "Gi" => 1_073_741_824.0,
        "Ti" => 1_099_511_627_776.0,
        _ => return None,
    };
    let number: f64 = digits.parse().ok().filter(|n: &f64| n.is_finite())?;
    let value = number * factor;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to lie well within u64"
    )]
    (0.0..1e18).contains(&value).then(|| value.round() as u64)
}

/// One range of addresses.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IpRange {
    /// The network in CIDR form.
    pub subnet: String,
    /// First address; empty for the plugin's choice.
    pub range_start: String,
    /// Last address; empty for the plugin's choice.
    pub range_end: String,
    /// Gateway; empty for the plugin's choice.
    pub gateway: String,
}

/// Name resolution of the container.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DnsConfig {
    /// Servers.
    pub servers: Vec<String>,
    /// Search list.
    pub searches: Vec<String>,
    /// Resolver options.
    pub options: Vec<String>,
}

impl Capabilities {
    /// The values as `runtimeConfig` has them, by capability.
    pub(super) fn values(&self) -> Map<String, Value> {
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
        let mapped = self.port_mappings.iter().filter(|p| p.host_port > 0);
        let mapped: Vec<Value> = mapped.map(PortMapping::value).collect();
        if !mapped.is_empty() {
            put("portMappings", mapped.into());
        }
        if let Some(limits) = self.bandwidth {
            let value = json!({
                "ingressRate": limits.ingress_rate, "ingressBurst": limits.ingress_burst,
                "egressRate": limits.egress_rate, "egressBurst": limits.egress_burst,
            });
            put("bandwidth", value);
        }
        if !self.ip_ranges.is_empty() {
            let set = |set: &Vec<IpRange>| set.iter().map(IpRange::value).collect::<Vec<_>>();
            put("ipRanges", self.ip_ranges.iter().map(set).collect());
        }
        if !self.ips.is_empty() {
            put("ips", self.ips.clone().into());
        }
        if let Some(mac) = &self.mac {
            put("mac", mac.clone().into());
        }
        if let Some(dns) = &self.dns {
            let value = json!({
                "servers": dns.servers, "searches": dns.searches, "options": dns.options,
            });
            put("dns", value);
        }
        if !self.aliases.is_empty() {
            put("aliases", self.aliases.clone().into());
        }
        if let Some(path) = &self.cgroup_path {
            put("cgroupPath", path.clone().into());
        }
        if let Some(annotations) = &self.pod_annotations {
            put(
                "io.kubernetes.cri.pod-annotations",
                annotations.clone().into(),
            );
        }
        map
    }
}

impl PortMapping {
    fn value(&self) -> Value {
        json!({
            "hostPort": self.host_port, "containerPort": self.container_port,
            "protocol": self.protocol.to_ascii_lowercase(), "hostIP": self.host_ip,
        })
    }
}

impl IpRange {
    fn value(&self) -> Value {
        let mut map = Map::new();
        for (key, text) in [
            ("subnet", &self.subnet),
            ("rangeStart", &self.range_start),
            ("rangeEnd", &self.range_end),
            ("gateway", &self.gateway),
        ] {
            if !text.is_empty() {
                map.insert(key.to_owned(), text.clone().into());
            }
        }
        map.into()
    }
}

/// The capability values that some plugin of `network` declares.
pub(super) fn declared(network: &Network, values: &Map<String, Value>) -> Map<String, Value> {
    let wanted = |key: &String| network.plugins.iter().any(|p| p.capabilities.contains(key));
    let pairs = values.iter().filter(|(key, _)| wanted(key));
    pairs.map(|(k, v)| (k.clone(), v.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidth_annotations_are_quantities_in_bounds() {
        let read = |text| Bandwidth::from_annotations(Some(text), None);
        assert_eq!(read("10M").unwrap().unwrap().ingress_rate, 10_000_000);
        assert_eq!(read("1Mi").unwrap().unwrap().ingress_rate, 1 << 20);
        for bad in ["", "x", "1", "10Z", "-5M", "1e999", "NaN", "2000P"] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert_eq!(Bandwidth::from_annotations(None, None), Ok(None));
    }

    #[test]
    fn ports_without_a_host_port_are_left_out() {
        let mapping = |host_port| PortMapping {
            host_port,
            container_port: 80,
            protocol: "TCP".to_owned(),
            host_ip: String::new(),
        };
        let capabilities = Capabilities {
            port_mappings: vec![mapping(0), mapping(8080)],
            ..Capabilities::default()
        };
        let values = capabilities.values();
        assert_eq!(values["portMappings"].as_array().unwrap().len(), 1);
        assert_eq!(values["portMappings"][0]["protocol"], "tcp");
    }
}
