//! Which hosts answer for a registry's name, in which order, and how each is spoken to.
//!
//! Without configuration that is the registry itself; a directory of it (`certs.d` layout) may put
//! mirrors before it. Read anew for every operation, so that a change needs no restart.
//!
//! Upstream: containerd `docs/hosts.md`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::HeaderMap;
use tracing::warn;

use super::{Error, hosts_file};

const DOCKER: &str = "docker.io";
const DOCKER_ENDPOINT: &str = "registry-1.docker.io";
const API: &str = "/v2";
/// Most bytes read of one configuration file.
pub(super) const MAX_FILE_BYTES: u64 = 1 << 20;

/// Where hosts are configured.
#[derive(Debug, Clone, Default)]
pub struct HostsConfig {
    /// Directories looked through in order; each holds one directory a host.
    pub roots: Vec<PathBuf>,
    /// Scheme of registries that nothing says otherwise for: `http` or `https`; empty for the
    /// rules of [`Scheme`].
    pub default_scheme: String,
    /// TLS settings where a host's configuration has none of its own.
    pub tls: Tls,
}

/// What a host may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Blobs and manifests by digest.
    pub pull: bool,
    /// Tags to digests.
    pub resolve: bool,
    /// Uploads.
    pub push: bool,
    /// The referrers list.
    pub referrers: bool,
}

impl Capabilities {
    /// All of them.
    pub const ALL: Self = Self {
        pull: true,
        resolve: true,
        push: true,
        referrers: true,
    };
}

/// How a host is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// TLS only.
    Https,
    /// Plain only.
    Http,
    /// TLS first; plain once the peer turned out not to speak it.
    HttpsThenHttp,
}

/// TLS settings of a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Tls {
    /// PEM files of further authorities.
    pub ca: Vec<PathBuf>,
    /// PEM files of certificate and key; may be the same file.
    pub client: Vec<(PathBuf, PathBuf)>,
    /// Whether any certificate will do.
    pub skip_verify: bool,
}

impl Tls {
    pub(super) fn is_default(&self) -> bool {
        self.ca.is_empty() && self.client.is_empty() && !self.skip_verify
    }
}

/// One host that answers for a registry's name.
#[derive(Debug, Clone)]
pub struct Host {
    pub(super) scheme: Scheme,
    /// Set once a [`Scheme::HttpsThenHttp`] host was found to speak plain HTTP.
    pub(super) plain: Arc<AtomicBool>,
    /// Host and port.
    pub(super) authority: String,
    /// Path before the repository: `/v2`, or what the configuration says.
    pub(super) path: String,
    pub(super) capabilities: Capabilities,
    pub(super) headers: HeaderMap,
    pub(super) tls: Tls,
    pub(super) dial_timeout: Option<Duration>,
    /// Value of `?ns=`: set where the host stands in for another.
    pub(super) namespace: Option<String>,
}

impl Host {
    pub(super) fn new(scheme: Scheme, authority: &str) -> Self {
        Self {
            scheme,
            plain: Arc::default(),
            authority: authority.to_owned(),
            path: API.to_owned(),
            capabilities: Capabilities::ALL,
            headers: HeaderMap::new(),
            tls: Tls::default(),
            dial_timeout: None,
            namespace: None,
        }
    }

    /// Host and port.
    #[must_use]
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// What it may be used for.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// The scheme to use now.
    pub(super) fn scheme_now(&self) -> &'static str {
        match self.scheme {
            Scheme::Https => "https",
            Scheme::Http => "http",
            Scheme::HttpsThenHttp if self.plain.load(Ordering::Relaxed) => "http",
            Scheme::HttpsThenHttp => "https",
        }
    }

    /// URL of its API, for people.
    #[must_use]
    pub fn base_url(&self) -> String {
        format!("{}://{}{}", self.scheme_now(), self.authority, self.path)
    }
}

/// Hosts for the registry `name`, in the order to try them. Blocks: reads files.
///
/// # Errors
/// `InvalidArgument` for an unknown default scheme.
pub(super) fn load(config: &HostsConfig, name: &str) -> Result<Vec<Host>, Error> {
    let mut fallback = default_host(name, &config.default_scheme)?;
    fallback.tls = config.tls.clone();
    let directory = config.roots.iter().find_map(|root| directory(root, name));
    let mut hosts = match directory {
        None => vec![fallback],
        Some(directory) => from_directory(&directory, fallback),
    };
    for host in &mut hosts {
        let own = host.authority == name || name == DOCKER && host.authority == DOCKER_ENDPOINT;
        host.namespace = (!own).then(|| name.to_owned());
    }
    Ok(hosts)
}

fn directory(root: &Path, name: &str) -> Option<PathBuf> {
    let with_port = name
        .rsplit_once(':')
        .filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()))
        .map(|(host, port)| format!("{host}_{port}_"));
    let candidates = [with_port.as_deref(), Some(name), Some("_default")];
    candidates
        .into_iter()
        .flatten()
        .filter(|c| !matches!(*c, "." | "..") && !c.contains('/'))
        .map(|candidate| root.join(candidate))
        .find(|path| path.is_dir())
}

fn from_directory(directory: &Path, fallback: Host) -> Vec<Host> {
    let file = directory.join("hosts.toml");
    match hosts_file::read(&file) {
        Ok(Some(text)) => match hosts_file::parse(&text, directory, &fallback) {
            Ok(hosts) => return hosts,
            Err(reason) => warn!(path = %file.display(), error = %reason, "hosts file ignored"),
        },
        Ok(None) => {}
        Err(error) => warn!(path = %file.display(), %error, "hosts file ignored"),
    }
    vec![with_certificates(directory, fallback)]
}

/// Docker's layout: `*.crt` are authorities, `*.cert` with `*.key` are client pairs.
fn with_certificates(directory: &Path, mut host: Host) -> Host {
    let mut files: Vec<PathBuf> = match std::fs::read_dir(directory) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(error) => {
            warn!(path = %directory.display(), %error, "certificates ignored");
            Vec::new()
        }
    };
    files.sort();
    for file in &files {
        match file.extension().and_then(|e| e.to_str()) {
            Some("crt") => host.tls.ca.push(file.clone()),
            Some("cert") => {
                let key = file.with_extension("key");
                if files.contains(&key) {
                    host.tls.client.push((file.clone(), key));
                } else {
                    warn!(path = %file.display(), "client certificate without a .key ignored");
                }
            }
            _ => {}
        }
    }
    host
}

fn default_host(name: &str, default_scheme: &str) -> Result<Host, Error> {
    let forced = match default_scheme {
        "" => None,
        "http" => Some(Scheme::Http),
        "https" => Some(Scheme::Https),
        other => {
            return Err(Error::Invalid {
                reason: format!("unknown scheme {other:?}: use http or https"),
            });
        }
    };
    if name == DOCKER {
        return Ok(Host::new(forced.unwrap_or(Scheme::Https), DOCKER_ENDPOINT));
    }
    let (host, port) = split_port(name);
    if !is_loopback(host) {
        return Ok(Host::new(forced.unwrap_or(Scheme::Https), name));
    }
    let scheme = forced.unwrap_or(match port {
        None | Some("443") => Scheme::Https,
        Some("80") => Scheme::Http,
        Some(_) => Scheme::HttpsThenHttp,
    });
    let mut host = Host::new(scheme, name);
    // Nobody else can answer on loopback, and nobody issues certificates for it.
    host.tls.skip_verify = forced.is_none();
    Ok(host)
}

pub(super) fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host.trim_matches(['[', ']']), Some(port)),
        _ => (authority.trim_matches(['[', ']']), None),
    }
}

/// Whether `host` (without port) can only be this machine.
pub(super) fn is_loopback(host: &str) -> bool {
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_from(root: &Path, name: &str) -> Vec<Host> {
        let config = HostsConfig {
            roots: vec![root.to_owned()],
            ..HostsConfig::default()
        };
        load(&config, name).expect("loads")
    }

    #[test]
    fn defaults_follow_name_and_port() {
        let scheme = |name| {
            default_host(name, "")
                .map(|h| (h.scheme, h.tls.skip_verify))
                .ok()
        };
        assert_eq!(scheme("quay.io"), Some((Scheme::Https, false)));
        assert_eq!(scheme("localhost"), Some((Scheme::Https, true)));
        assert_eq!(scheme("127.0.0.1:80"), Some((Scheme::Http, true)));
        assert_eq!(scheme("[::1]:5000"), Some((Scheme::HttpsThenHttp, true)));
        let docker = default_host("docker.io", "").expect("known");
        assert_eq!(docker.base_url(), "https://registry-1.docker.io/v2");
        assert!(default_host("x.io", "ftp").is_err());
        let forced = default_host("localhost:1", "http").expect("known");
        assert_eq!(forced.scheme, Scheme::Http);
    }

    #[test]
    fn the_first_existing_directory_wins_and_mirrors_get_the_namespace() {
        let root = tempfile::tempdir().expect("tempdir");
        let put = |dir: &str, text: &str| {
            std::fs::create_dir_all(root.path().join(dir)).expect("mkdir");
            std::fs::write(root.path().join(dir).join("hosts.toml"), text).expect("write");
        };
        put(
            "_default",
            "[host.\"http://mirror:1\"]\ncapabilities=[\"pull\"]\n",
        );
        put(
            "x.io_5000_",
            "server = \"https://y.io/base\"\n[host.\"https://b.io\"]\n[host.\"https://a.io/p\"]\noverride_path = true\n",
        );
        let names = |hosts: &[Host]| {
            hosts
                .iter()
                .map(|h| (h.base_url(), h.namespace.clone()))
                .collect::<Vec<_>>()
        };
        let ns = |s: &str| Some(s.to_owned());
        assert_eq!(
            names(&load_from(root.path(), "x.io:5000")),
            [
                ("https://b.io/v2".to_owned(), ns("x.io:5000")),
                ("https://a.io/p".to_owned(), ns("x.io:5000")),
                ("https://y.io/base/v2".to_owned(), ns("x.io:5000")),
            ]
        );
        let other = load_from(root.path(), "z.io");
        assert_eq!(
            names(&other),
            [
                ("http://mirror:1/v2".to_owned(), ns("z.io")),
                ("https://z.io/v2".to_owned(), None),
            ]
        );
        assert!(!other[0].capabilities.resolve && other[0].capabilities.pull);
    }

    #[test]
    fn a_broken_file_falls_back_to_certificates() {
        let root = tempfile::tempdir().expect("tempdir");
        let dir = root.path().join("x.io");
        std::fs::create_dir(&dir).expect("mkdir");
        for (name, text) in [
            ("hosts.toml", "[host.\"https://a\"]\ncapabilities=[\"fly\"]"),
            ("ca.crt", ""),
            ("me.cert", ""),
            ("me.key", ""),
        ] {
            std::fs::write(dir.join(name), text).expect("write");
        }
        let hosts = load_from(root.path(), "x.io");
        assert_eq!(hosts.len(), 1);
        assert_eq!(hosts[0].tls.ca, [dir.join("ca.crt")]);
        assert_eq!(
            hosts[0].tls.client,
            [(dir.join("me.cert"), dir.join("me.key"))]
        );
    }
}
