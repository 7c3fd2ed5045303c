//! Configurations that we write: from the operator's template, and a bridge for a host without.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::error::Error;

/// The file that a rendered template becomes.
const FILE: &str = "10-containerd-net.conflist";
/// Bytes of a template.
const MAX_TEMPLATE: u64 = 1 << 20;

/// Renders `template` for the comma-separated `cidrs` and writes the result into `dir`.
pub(super) fn write(template: &Path, cidrs: &str, dir: &Path) -> Result<(), Error> {
    let io = |operation, path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io {
            operation,
            path,
            source,
        }
    };
    let invalid = |reason: String| Error::Load {
        reason: format!("cni template {}: {reason}", template.display()),
    };
    let read = || {
        let mut text = String::new();
        let file = std::fs::File::open(template)?;
        std::io::Read::read_to_string(&mut std::io::Read::take(file, MAX_TEMPLATE), &mut text)?;
        std::io::Result::Ok(text)
    };
    let text = read().map_err(io("read cni template", template))?;
    let values = Values::parse(cidrs).map_err(invalid)?;
    let rendered = render(&text, &values).map_err(invalid)?;
    let target = dir.join(FILE);
    let put = || {
        std::fs::create_dir_all(dir)?;
        let mut file = tempfile::Builder::new()
            .prefix(".tmp-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .tempfile_in(dir)?;
        file.write_all(rendered.as_bytes())?;
        file.persist(&target)?;
        std::io::Result::Ok(())
    };
    put().map_err(io("write cni config", &target))
}

/// What a template can refer to.
struct Values {
    cidrs: Vec<String>,
    routes: Vec<&'static str>,
}

impl Values {
    fn parse(cidrs: &str) -> Result<Self, String> {
        let cidrs: Vec<String> = cidrs
            .split(',')
            .map(|cidr| cidr.trim().to_owned())
            .filter(|cidr| !cidr.is_empty())
            .collect();
        let mut routes = Vec::new();
        for cidr in &cidrs {
            let (address, length) = cidr
                .split_once('/')
                .ok_or(format!("invalid CIDR {cidr:?}"))?;
            let address: IpAddr = address
                .parse()
                .map_err(|_| format!("invalid CIDR {cidr:?}"))?;
            let bits = if address.is_ipv4() { 32 } else { 128 };
            if !length.parse().is_ok_and(|length: u8| length <= bits) {
                return Err(format!("invalid CIDR {cidr:?}"));
            }
            let all = if address.is_ipv4() {
                "0.0.0.0/0"
            } else {
                "::/0"
            };
            if !routes.contains(&all) {
                routes.push(all);
            }
        }
        Ok(Self { cidrs, routes })
    }

    fn list(&self, name: &str) -> Option<Vec<&str>> {
        match name {
            ".PodCIDRRanges" => Some(self.cidrs.iter().map(String::as_str).collect()),
            ".Routes" => Some(self.routes.clone()),
            _ => None,
        }
    }
}

/// One range over a list, from its body's start.
struct Loop<'a> {
    body: &'a str,
    items: Vec<String>,
    next: usize,
    index_name: Option<String>,
    item_name: Option<String>,
}

/// Renders the part of Go's template language that such templates use: values, `range` with or
/// without variables, `if` on a value or an index, `end`, and trimming markers.
fn render(template: &str, values: &Values) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = template;
    let mut loops: Vec<Loop<'_>> = Vec::new();
    // For each open block: whether it is a range.
    let mut blocks: Vec<bool> = Vec::new();
    while let Some((before, after)) = rest.split_once("{{") {
        out.push_str(before);
        let (action, mut tail) = after.split_once("}}").ok_or("unclosed {{")?;
        let mut action = action;
        if let Some(trimmed) = action.strip_prefix("- ") {
            out.truncate(out.trim_end().len());
            action = trimmed;
        }
        if let Some(trimmed) = action.strip_suffix(" -") {
            tail = tail.trim_start();
            action = trimmed;
        }
        rest = tail;
        let action = action.trim();
        if let Some(header) = action.strip_prefix("range ") {
            let range = open_range(header, tail, values)?;
            if range.items.is_empty() {
                rest = skip_block(tail)?;
            } else {
                loops.push(range);
                blocks.push(true);
            }
        } else if let Some(condition) = action.strip_prefix("if ") {
            if truth(condition.trim(), &loops, values)? {
                blocks.push(false);
            } else {
                rest = skip_block(tail)?;
            }
        } else if action == "end" {
            let is_range = blocks.pop().ok_or("unexpected {{end}}")?;
            if is_range {
                let current = loops.last_mut().ok_or("unexpected {{end}}")?;
                current.next += 1;
                if current.next < current.items.len() {
                    rest = current.body;
                    blocks.push(true);
                } else {
                    loops.pop();
                }
            }
        } else if !action.starts_with("/*") {
            out.push_str(&lookup(action, &loops, values)?);
        }
    }
    if blocks.is_empty() {
        out.push_str(rest);
        Ok(out)
    } else {
        Err("unexpected end of the template, {{end}} is missing".to_owned())
    }
}

fn open_range<'a>(header: &str, body: &'a str, values: &Values) -> Result<Loop<'a>, String> {
    let (variables, list) = match header.split_once(":=") {
        Some((variables, list)) => (variables.trim(), list.trim()),
        None => ("", header.trim()),
    };
    let names: Vec<&str> = variables
        .split(',')
        .map(str::trim)
        .filter(|v| !v.is_empty())
        .collect();
    let (index_name, item_name) = match names.as_slice() {
        [] => (None, None),
        [item] => (None, Some((*item).to_owned())),
        [index, item] => (Some((*index).to_owned()), Some((*item).to_owned())),
        _ => return Err(format!("range with too many variables: {header}")),
    };
    let items = values
        .list(list)
        .ok_or_else(|| format!("unknown list {list}"))?;
    Ok(Loop {
        body,
        items: items.into_iter().map(str::to_owned).collect(),
        next: 0,
        index_name,
        item_name,
    })
}

/// The text after the `end` that closes the block whose body begins here.
fn skip_block(body: &str) -> Result<&str, String> {
    let mut depth = 1;
    let mut rest = body;
    while let Some((_, after)) = rest.split_once("{{") {
        let (action, tail) = after.split_once("}}").ok_or("unclosed {{")?;
        let trimmed = action
            .trim_start_matches("- ")
            .trim_end_matches(" -")
            .trim();
        if trimmed.starts_with("range ") || trimmed.starts_with("if ") {
            depth += 1;
        } else if trimmed == "end" {
            depth -= 1;
            if depth == 0 {
                return Ok(if action.ends_with(" -") {
                    tail.trim_start()
                } else {
                    tail
                });
            }
        }
        rest = tail;
    }
    Err("unexpected end of the template, {{end}} is missing".to_owned())
}

fn truth(condition: &str, loops: &[Loop<'_>], values: &Values) -> Result<bool, String> {
    if let Some(list) = values.list(condition) {
        return Ok(!list.is_empty());
    }
    let value = lookup(condition, loops, values)?;
    Ok(!value.is_empty() && value != "0")
}

fn lookup(name: &str, loops: &[Loop<'_>], values: &Values) -> Result<String, String> {
    if name == ".PodCIDR" {
        return Ok(values.cidrs.first().cloned().unwrap_or_default());
    }
    for range in loops.iter().rev() {
        if name == "." || range.item_name.as_deref() == Some(name) {
            return Ok(range.items[range.next].clone());
        }
        if range.index_name.as_deref() == Some(name) {
            return Ok(range.next.to_string());
        }
    }
    Err(format!("unknown value {name}"))
}

/// A bridge for a host that has no configuration.
#[derive(Debug, Clone)]
pub struct BridgeConfig {
    /// Name of the network.
    pub network: String,
    /// Name of the bridge on the host.
    pub bridge: String,
    /// Its subnets in CIDR form.
    pub subnets: Vec<String>,
    /// Directories searched for optional plugins: those missing are left out.
    pub bin_dirs: Vec<PathBuf>,
}

impl Default for BridgeConfig {
    fn default() -> Self {
        Self {
            network: "lighter".to_owned(),
            bridge: "lighter0".to_owned(),
            subnets: vec!["10.88.0.0/16".to_owned()],
            bin_dirs: vec![PathBuf::from("/opt/cni/bin"), PathBuf::from("/usr/lib/cni")],
        }
    }
}

/// A conflist for that bridge: masqueraded, with host ports, and with bandwidth limits and
/// firewall rules where those plugins are installed.
///
/// # Errors
/// A subnet that is not in CIDR form.
pub fn bridge_conflist(config: &BridgeConfig) -> Result<String, Error> {
    let values =
        Values::parse(&config.subnets.join(",")).map_err(|reason| Error::Load { reason })?;
    let ranges: Vec<_> = values
        .cidrs
        .iter()
        .map(|c| json!([{"subnet": c}]))
        .collect();
    let routes: Vec<_> = values
        .routes
        .iter()
        .map(|dst| json!({"dst": dst}))
        .collect();
    let mut plugins = vec![
        json!({
            "type": "bridge", "bridge": config.bridge, "isGateway": true, "ipMasq": true,
            "hairpinMode": true, "promiscMode": false,
            "ipam": {"type": "host-local", "ranges": ranges, "routes": routes},
        }),
        json!({"type": "portmap", "capabilities": {"portMappings": true}}),
    ];
    for optional in [
        json!({"type": "firewall"}),
        json!({"type": "bandwidth", "capabilities": {"bandwidth": true}}),
    ] {
        let kind = optional["type"].as_str().unwrap_or_default();
        if super::exec::find(kind, &config.bin_dirs).is_ok() {
            plugins.push(optional);
        }
    }
    let list = json!({"cniVersion": "1.0.0", "name": config.network, "plugins": plugins});
    let mut text = String::new();
    // Writing into a String cannot fail.
    let _ = writeln!(text, "{list:#}");
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_template_renders() {
        let template = r#"{"name":"n","plugins":[{"type":"bridge","ipam":{"subnet":"{{.PodCIDR}}",
"ranges":[{{range $i, $range := .PodCIDRRanges}}{{if $i}}, {{end}}[{"subnet":"{{$range}}"}]{{end}}],
"routes":[{{range $i, $route := .Routes}}{{if $i}}, {{end}}{"dst":"{{$route}}"}{{end}}]}}]}"#;
        let values = Values::parse("10.0.0.0/24, fd00::/64").unwrap();
        let value: serde_json::Value =
            serde_json::from_str(&render(template, &values).unwrap()).unwrap();
        let ipam = &value["plugins"][0]["ipam"];
        assert_eq!(ipam["subnet"], "10.0.0.0/24");
        assert_eq!(ipam["ranges"][1][0]["subnet"], "fd00::/64");
        assert_eq!(
            ipam["routes"],
            json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}])
        );
    }

    #[test]
    fn trimming_dot_and_nesting_render() {
        let values = Values::parse("10.0.0.0/24").unwrap();
        let text = "a {{- range .Routes -}} \n {{if .PodCIDR}}<{{.}}>{{end}} {{- end}} b";
        assert_eq!(render(text, &values).unwrap(), "a<0.0.0.0/0> b");
    }

    #[test]
    fn broken_templates_and_cidrs_are_named() {
        let values = Values::parse("10.0.0.0/24").unwrap();
        for bad in [
            "{{",
            "{{.Nope}}",
            "{{range .Routes}}",
            "{{end}}",
            "{{range .X}}{{end}}",
        ] {
            assert!(render(bad, &values).is_err(), "{bad}");
        }
        for bad in ["10.0.0.0", "x/24", "10.0.0.0/33", "fd00::/129"] {
            assert!(Values::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_bridge_list_loads() {
        let text = bridge_conflist(&BridgeConfig::default()).unwrap();
        let network = super::super::Network::parse(text.as_bytes()).unwrap();
        assert_eq!(network.plugins[0].kind, "bridge");
        assert!(
            network.plugins[1]
                .capabilities
                .contains(&"portMappings".to_owned())
        );
    }
}
