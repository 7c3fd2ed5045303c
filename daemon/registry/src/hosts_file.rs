//! `hosts.toml`: text to hosts. Pure but for [`read`].

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use reqwest::Url;
use serde::Deserialize;
use toml::Spanned;

use super::hosts::{Capabilities, Host, MAX_FILE_BYTES, Scheme, Tls};

/// Most hosts in one file.
const MAX_HOSTS: usize = 64;

#[derive(Debug, Default, Deserialize)]
struct File {
    #[serde(default)]
    server: String,
    #[serde(default)]
    host: BTreeMap<Spanned<String>, Table>,
    #[serde(flatten)]
    root: Table,
}

#[derive(Debug, Default, Deserialize)]
struct Table {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany>,
    client: Option<Client>,
    skip_verify: Option<bool>,
    header: Option<BTreeMap<String, OneOrMany>>,
    override_path: Option<bool>,
    dial_timeout: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn list(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Client {
    One(String),
    Many(Vec<String>),
    Pairs(Vec<Vec<String>>),
}

/// The text of `path`; `None` when there is no such file.
pub(super) fn read(path: &Path) -> std::io::Result<Option<String>> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut text = String::new();
    file.take(MAX_FILE_BYTES).read_to_string(&mut text)?;
    Ok(Some(text))
}

/// Hosts of a file in `directory`; `fallback` is the registry itself, tried last unless the file
/// names a `server`.
pub(super) fn parse(text: &str, directory: &Path, fallback: &Host) -> Result<Vec<Host>, String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
    if file.host.len() > MAX_HOSTS {
        return Err(format!("more than {MAX_HOSTS} hosts"));
    }
    let mut tables: Vec<(Spanned<String>, Table)> = file.host.into_iter().collect();
    tables.sort_by_key(|(key, _)| key.span().start);
    let mut hosts = Vec::with_capacity(tables.len() + 1);
    for (url, table) in tables {
        let host = host_of_url(url.get_ref(), &table)?;
        hosts.push(apply(host, &table, directory)?);
    }
    let server = if file.server.is_empty() {
        fallback.clone()
    } else {
        host_of_url(&file.server, &file.root)?
    };
    hosts.push(apply(server, &file.root, directory)?);
    Ok(hosts)
}

fn host_of_url(text: &str, table: &Table) -> Result<Host, String> {
    let full = if text.contains("://") {
        text.to_owned()
    } else {
        format!("https://{text}")
    };
    let url = Url::parse(&full).map_err(|error| format!("host {text:?}: {error}"))?;
    let scheme = match url.scheme() {
        "https" => Scheme::Https,
        "http" => Scheme::Http,
        other => return Err(format!("host {text:?}: unknown scheme {other:?}")),
    };
    let name = url
        .host_str()
        .ok_or_else(|| format!("host {text:?}: no host"))?;
    let authority = match url.port() {
        Some(port) => format!("{name}:{port}"),
        None => name.to_owned(),
    };
    let mut host = Host::new(scheme, &authority);
    let path = url.path().trim_end_matches('/');
    host.path = if table.override_path == Some(true) || path.ends_with("/v2") {
        path.to_owned()
    } else {
        format!("{path}/v2")
    };
    Ok(host)
}

fn apply(mut host: Host, table: &Table, directory: &Path) -> Result<Host, String> {
    if let Some(names) = &table.capabilities {
        host.capabilities = capabilities(names)?;
    }
    let tls = tls(table, directory)?;
    let explicit = !tls.is_default();
    if host.scheme == Scheme::Http && explicit {
        let port = super::hosts::split_port(&host.authority).1;
        if port.is_some_and(|port| port != "80") {
            host.scheme = Scheme::HttpsThenHttp;
        }
    }
    if explicit || table.skip_verify.is_some() {
        host.tls = tls;
    }
    if let Some(table) = &table.header {
        host.headers = headers(table)?;
    }
    if let Some(text) = &table.dial_timeout {
        let timeout =
            duration(text).ok_or_else(|| format!("dial_timeout {text:?}: no duration"))?;
        host.dial_timeout = Some(timeout);
    }
    Ok(host)
}

fn capabilities(names: &[String]) -> Result<Capabilities, String> {
    let mut found = Capabilities {
        pull: false,
        resolve: false,
        push: false,
        referrers: false,
    };
    for name in names {
        match name.to_ascii_lowercase().as_str() {
            "pull" => found.pull = true,
            "resolve" => found.resolve = true,
            "push" => found.push = true,
            "referrers" => found.referrers = true,
            _ => return Err(format!("unknown capability {name:?}")),
        }
    }
    Ok(found)
}

fn tls(table: &Table, directory: &Path) -> Result<Tls, String> {
    let at = |path: &String| -> PathBuf { directory.join(path) };
    let client = match &table.client {
        None => Vec::new(),
        Some(Client::One(file)) => vec![(at(file), at(file))],
        Some(Client::Many(files)) => files.iter().map(|file| (at(file), at(file))).collect(),
        Some(Client::Pairs(pairs)) => pairs
            .iter()
            .map(|pair| match pair.as_slice() {
                [both] => Ok((at(both), at(both))),
                [cert, key] if key.is_empty() => Ok((at(cert), at(cert))),
                [cert, key] => Ok((at(cert), at(key))),
                _ => Err("client: want [certificate, key]".to_owned()),
            })
            .collect::<Result<_, _>>()?,
    };
    let ca = table.ca.as_ref().map(OneOrMany::list).unwrap_or_default();
    Ok(Tls {
        ca: ca.iter().map(at).collect(),
        client,
        skip_verify: table.skip_verify.unwrap_or(false),
    })
}

fn headers(table: &BTreeMap<String, OneOrMany>) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, values) in table {
        let key =
            HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("header {name:?}"))?;
        for value in values.list() {
            let mut value =
                HeaderValue::from_str(value).map_err(|_| format!("value of header {name:?}"))?;
            value.set_sensitive(true);
            headers.append(key.clone(), value);
        }
    }
    Ok(headers)
}

/// A duration as Go writes it: `30s`, `1m30s`, `1.5s`, `500ms`.
fn duration(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
        let (number, after) = rest.split_at(digits);
        let unit_end = after
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(after.len());
        let (unit, remaining) = after.split_at(unit_end);
        let unit_s = match unit {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let seconds = number.parse::<f64>().ok()? * unit_s;
        total = total.checked_add(Duration::try_from_secs_f64(seconds).ok()?)?;
        rest = remaining;
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_in_etc(text: &str) -> Result<Vec<Host>, String> {
        parse(text, Path::new("/etc/x"), &Host::new(Scheme::Https, "x.io"))
    }

    #[test]
    fn every_key_is_understood_on_host_and_root() {
        let hosts = parse_in_etc(
            r#"
server = "http://s:5000"
ca = "root.pem"
[host."https://m"]
ca = ["a.pem", "/b.pem"]
client = [["c.pem", "k.pem"], ["both.pem", ""]]
skip_verify = true
override_path = true
dial_timeout = "1m0.5s"
capabilities = ["PULL"]
[host."https://m".header]
x-one = "1"
x-two = ["2", "3"]
"#,
        )
        .expect("parses");
        let mirror = &hosts[0];
        assert_eq!(
            mirror.tls.ca,
            [PathBuf::from("/etc/x/a.pem"), PathBuf::from("/b.pem")]
        );
        assert_eq!(mirror.tls.client[1].1, PathBuf::from("/etc/x/both.pem"));
        assert!(mirror.tls.skip_verify);
        assert_eq!(mirror.path, "");
        assert_eq!(mirror.dial_timeout, Some(Duration::from_millis(60_500)));
        assert_eq!(mirror.headers.get_all("x-two").iter().count(), 2);
        assert_eq!(hosts[1].scheme, Scheme::HttpsThenHttp);
        assert_eq!(hosts[1].tls.ca, [PathBuf::from("/etc/x/root.pem")]);
    }

    #[test]
    fn bad_files_say_what_is_wrong() {
        for bad in [
            "server = 3",
            "[host.\"ftp://x\"]",
            "[host.\"https://\"]",
            "[host.\"https://x\"]\ncapabilities=[\"x\"]",
            "[host.\"https://x\"]\ndial_timeout=\"soon\"",
            "[host.\"https://x\"]\nclient=[[\"a\",\"b\",\"c\"]]",
            "[host.\"https://x\".header]\n\"a b\"=\"c\"",
            "not toml",
        ] {
            assert!(parse_in_etc(bad).is_err(), "{bad}");
        }
    }
}
