//! What plugins answer, in every version of the format, and what the pod's record keeps of it.
//!
//! The record has the shape that containerd writes as `cniResult`, so its readers read ours.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Entries of any kind taken from one result.
const MAX_ENTRIES: usize = 1024;

/// The networks of one pod, joined.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkResult {
    /// Interfaces by name, those on the host's side included.
    #[serde(rename = "Interfaces")]
    pub interfaces: BTreeMap<String, Interface>,
    /// One per network.
    #[serde(rename = "DNS")]
    pub dns: Vec<Dns>,
    /// Routes of all networks.
    #[serde(rename = "Routes")]
    pub routes: Vec<Route>,
}

/// One interface.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Interface {
    /// Its addresses, in the plugin's order.
    #[serde(rename = "IPConfigs")]
    pub ip_configs: Vec<IpConfig>,
    /// Hardware address.
    #[serde(rename = "Mac")]
    pub mac: String,
    /// Path of its network namespace; empty on the host's side.
    #[serde(rename = "Sandbox")]
    pub sandbox: String,
    /// PCI address, for passed-through devices.
    #[serde(rename = "PciID")]
    pub pci_id: String,
    /// Socket, for vhost-user interfaces.
    #[serde(rename = "SocketPath")]
    pub socket_path: String,
}

/// One address.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct IpConfig {
    /// The address, without prefix length.
    #[serde(rename = "IP")]
    pub ip: IpAddr,
    /// Its gateway.
    #[serde(rename = "Gateway", default)]
    pub gateway: Option<IpAddr>,
}

/// Name resolution a network suggests.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Servers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// Local domain.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// Search list.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Resolver options.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

/// One route.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Route {
    /// Destination network in CIDR form.
    pub dst: String,
    /// Gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<String>,
}

/// Which address is the pod's first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IpPreference {
    /// The first IPv4 address.
    #[default]
    #[serde(alias = "")]
    Ipv4,
    /// The first IPv6 address.
    Ipv6,
    /// The first of the plugin.
    Cni,
}

impl NetworkResult {
    /// The first address of `interface` by preference, and the others. `None` without any.
    #[must_use]
    pub fn addresses(
        &self,
        interface: &str,
        preference: IpPreference,
    ) -> Option<(IpAddr, Vec<IpAddr>)> {
        let configs = &self.interfaces.get(interface)?.ip_configs;
        let mut all: Vec<IpAddr> = configs.iter().map(|c| c.ip).collect();
        let wanted = |ip: &IpAddr| match preference {
            IpPreference::Ipv4 => ip.is_ipv4(),
            IpPreference::Ipv6 => ip.is_ipv6(),
            IpPreference::Cni => true,
        };
        let first = all.iter().position(wanted).unwrap_or(0);
        (!all.is_empty()).then(|| (all.remove(first), all))
    }

    /// Adds the answer of one network, whose interface in the pod is `ifname`.
    pub(super) fn add(&mut self, answer: Answer, ifname: &str) {
        for (name, interface) in &answer.interfaces {
            let entry = self.interfaces.entry(name.clone()).or_default();
            entry.mac.clone_from(&interface.mac);
            entry.sandbox.clone_from(&interface.sandbox);
            entry.pci_id.clone_from(&interface.pci_id);
            entry.socket_path.clone_from(&interface.socket_path);
        }
        for (index, config) in answer.ips {
            let name = index
                .and_then(|i| answer.interfaces.get(i))
                .map_or(ifname, |(name, _)| name.as_str());
            let entry = self.interfaces.entry(name.to_owned()).or_default();
            entry.ip_configs.push(config);
        }
        self.dns.push(answer.dns);
        self.routes.extend(answer.routes);
    }
}

/// One plugin chain's final result, read from any version of the format.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Answer {
    interfaces: Vec<(String, Interface)>,
    ips: Vec<(Option<usize>, IpConfig)>,
    dns: Dns,
    routes: Vec<Route>,
}

impl Answer {
    /// Reads a result. Versions before 0.3.0 have `ip4` and `ip6` instead of `ips`.
    ///
    /// # Errors
    /// What is malformed, as a sentence.
    pub(super) fn parse(result: &Map<String, Value>) -> Result<Self, String> {
        let mut answer = Self::default();
        for entry in array(result, "interfaces")? {
            answer.interfaces.push(interface(entry)?);
        }
        for entry in array(result, "ips")? {
            let index = entry.get("interface").and_then(Value::as_u64);
            let index = index.and_then(|i| usize::try_from(i).ok());
            if index.is_some_and(|i| i >= answer.interfaces.len()) {
                return Err("invalid IP configuration: invalid interface index".to_owned());
            }
            answer.ips.push((index, address(entry, "address")?));
        }
        for entry in array(result, "routes")? {
            answer.routes.push(route(entry)?);
        }
        for key in ["ip4", "ip6"] {
            let Some(entry) = result.get(key).filter(|v| !v.is_null()) else {
                continue;
            };
            answer.ips.push((None, address(entry, "ip")?));
            let object = entry.as_object().ok_or(format!("{key} is not an object"))?;
            for entry in array(object, "routes")? {
                answer.routes.push(route(entry)?);
            }
        }
        if let Some(dns) = result.get("dns").filter(|v| !v.is_null()) {
            answer.dns = Dns::deserialize(dns).map_err(|e| format!("dns: {e}"))?;
        }
        Ok(answer)
    }
}

fn array<'a>(object: &'a Map<String, Value>, key: &str) -> Result<&'a [Value], String> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(entries)) if entries.len() <= MAX_ENTRIES => Ok(entries),
        Some(Value::Array(_)) => Err(format!("{key} has more than {MAX_ENTRIES} entries")),
        Some(_) => Err(format!("{key} is not an array")),
    }
}

fn text(value: &Value, key: &str) -> String {
    let text = value.get(key).and_then(Value::as_str);
    text.unwrap_or_default().to_owned()
}

fn interface(entry: &Value) -> Result<(String, Interface), String> {
    let name = text(entry, "name");
    if name.is_empty() {
        return Err("an interface has no name".to_owned());
    }
    Ok((
        name,
        Interface {
            ip_configs: Vec::new(),
            mac: text(entry, "mac"),
            sandbox: text(entry, "sandbox"),
            pci_id: text(entry, "pciID"),
            socket_path: text(entry, "socketPath"),
        },
    ))
}

fn address(entry: &Value, key: &str) -> Result<IpConfig, String> {
    let cidr = text(entry, key);
    let ip = cidr.split('/').next().unwrap_or_default();
    let ip = ip
        .parse()
        .map_err(|_| format!("invalid IP configuration: invalid CIDR address: {cidr}"))?;
    let gateway = text(entry, "gateway");
    let gateway = match gateway.as_str() {
        "" => None,
        text => Some(
            text.parse()
                .map_err(|_| format!("invalid IP configuration: invalid IP address: {text}"))?,
        ),
    };
    Ok(IpConfig { ip, gateway })
}

fn route(entry: &Value) -> Result<Route, String> {
    let dst = text(entry, "dst");
    if dst.is_empty() {
        return Err("a route has no destination".to_owned());
    }
    let gw = Some(text(entry, "gw")).filter(|gw| !gw.is_empty());
    Ok(Route { dst, gw })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<NetworkResult, String> {
        let object = serde_json::from_str(json).unwrap();
        let mut result = NetworkResult::default();
        result.add(Answer::parse(&object)?, "eth0");
        Ok(result)
    }

    #[test]
    fn every_version_of_the_format_gives_the_address() {
        let forms = [
            r#"{"ip4":{"ip":"10.1.0.5/16","gateway":"10.1.0.1","routes":[{"dst":"0.0.0.0/0"}]}}"#,
            r#"{"cniVersion":"0.3.1","interfaces":[{"name":"veth1"},{"name":"eth0","sandbox":"/n"}],
               "ips":[{"version":"4","interface":1,"address":"10.1.0.5/16","gateway":"10.1.0.1"}],
               "routes":[{"dst":"0.0.0.0/0"}],"dns":{}}"#,
            r#"{"cniVersion":"1.1.0","ips":[{"address":"10.1.0.5/16","gateway":"10.1.0.1"}],
               "routes":[{"dst":"0.0.0.0/0","mtu":1400}]}"#,
        ];
        for form in forms {
            let result = parse(form).unwrap();
            let (first, others) = result.addresses("eth0", IpPreference::Ipv4).unwrap();
            assert_eq!(first.to_string(), "10.1.0.5");
            assert!(others.is_empty());
            assert_eq!(result.routes[0].dst, "0.0.0.0/0");
        }
    }

    #[test]
    fn preference_decides_the_first_address() {
        let dual =
            parse(r#"{"ips":[{"address":"fd00::5/64"},{"address":"10.0.0.5/24"}]}"#).unwrap();
        let first = |preference| dual.addresses("eth0", preference).unwrap().0.to_string();
        assert_eq!(first(IpPreference::Ipv4), "10.0.0.5");
        assert_eq!(first(IpPreference::Ipv6), "fd00::5");
        assert_eq!(first(IpPreference::Cni), "fd00::5");
        assert_eq!(dual.addresses("eth1", IpPreference::Cni), None);
    }

    #[test]
    fn malformed_results_are_refused() {
        for bad in [
            r#"{"ips":{}}"#,
            r#"{"ips":[{"address":"10.0.0.5/24","interface":7}]}"#,
            r#"{"ips":[{"address":"nonsense"}]}"#,
            r#"{"interfaces":[{}]}"#,
            r#"{"ip4":3}"#,
            r#"{"routes":[{}]}"#,
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_record_has_the_names_that_readers_know() {
        let json = serde_json::to_value(
            parse(r#"{"interfaces":[{"name":"eth0","mac":"aa"}],"ips":[{"interface":0,"address":"10.0.0.5/24"}]}"#).unwrap(),
        )
        .unwrap();
        assert_eq!(json["Interfaces"]["eth0"]["IPConfigs"][0]["IP"], "10.0.0.5");
        assert_eq!(json["DNS"][0], serde_json::json!({}));
    }
}
