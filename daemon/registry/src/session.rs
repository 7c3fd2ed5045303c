//! The daemon's registry client and its sessions.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use reqwest::Url;
use tokio::sync::Semaphore;

use super::auth::{Authorizer, Peer};
use super::client::Clients;
use super::hosts::{self, Capabilities, Host};
use super::request::Place;
use super::{Anonymous, Credentials, Error, HostsConfig, Reference};

/// Bounds of downloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one ranged request; 0 fetches every blob in one.
    pub chunk_bytes: usize,
    /// Ranged requests at once for one blob.
    pub chunks_per_blob: usize,
    /// Chunks held in memory by all downloads together.
    pub chunks_in_memory: usize,
    /// Blobs shorter than this are fetched in one request.
    pub ranged_above_bytes: u64,
    /// Bytes a second below which a connection is given up for another.
    pub min_rate_bytes: u64,
    /// Time over which that rate is measured.
    pub rate_window: Duration,
    /// Connections tried at one place without a byte of progress.
    pub attempts_without_progress: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            chunk_bytes: 4 << 20,
            chunks_per_blob: 3,
            chunks_in_memory: 6,
            ranged_above_bytes: 32 << 20,
            min_rate_bytes: 1024,
            rate_window: Duration::from_secs(30),
            attempts_without_progress: 5,
        }
    }
}

/// Configuration of the registry client.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Where hosts are configured.
    pub hosts: HostsConfig,
    /// Bounds of downloads.
    pub limits: Limits,
}

/// The registry client; clones share connections.
#[derive(Debug, Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    config: Config,
    clients: Clients,
    /// Bounds the memory of ranged downloads over the whole daemon.
    pub(super) chunks: Arc<Semaphore>,
}

/// What an operation may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read.
    Pull,
    /// Read and write.
    Push,
}

/// What goes with one operation.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// Read or write.
    pub access: Access,
    /// Where credentials come from.
    pub credentials: Arc<dyn Credentials>,
    /// Headers for every request to the registry's hosts.
    pub headers: BTreeMap<String, String>,
    /// Configuration directories instead of the daemon's, joined by `:`; empty: the daemon's.
    pub host_dir: PathBuf,
    /// `http` or `https` where nothing else says; empty: the daemon's.
    pub default_scheme: String,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            access: Access::Pull,
            credentials: Arc::new(Anonymous),
            headers: BTreeMap::new(),
            host_dir: PathBuf::new(),
            default_scheme: String::new(),
        }
    }
}

/// A host with the client for it.
#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    pub(super) host: Host,
    pub(super) client: reqwest::Client,
}

impl Endpoint {
    pub(super) fn peer(&self) -> Peer<'_> {
        Peer {
            host: &self.host,
            client: &self.client,
        }
    }

    /// URL of `tail` (`manifests/x`) in `repository`.
    pub(super) fn url(&self, repository: &str, tail: &str) -> Result<Url, Error> {
        let host = &self.host;
        let base = format!("{}://{}{}", host.scheme_now(), host.authority, host.path);
        let mut url =
            Url::parse(&format!("{base}/{repository}/{tail}")).map_err(|error| Error::Invalid {
                reason: format!("{base}: {error}"),
            })?;
        if let Some(namespace) = &host.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Ok(url)
    }
}

/// One operation on one reference: its hosts and its one token cache.
#[derive(Debug)]
pub struct Session {
    pub(super) registry: Arc<Inner>,
    pub(super) reference: Reference,
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) auth: Authorizer,
}

impl Registry {
    /// A client without connections yet.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            inner: Arc::new(Inner {
                chunks: Arc::new(Semaphore::new(config.limits.chunks_in_memory.max(1))),
                config,
                clients: Clients::default(),
            }),
        }
    }

    /// Begins an operation on `reference`: reads the hosts' configuration.
    ///
    /// # Errors
    /// `InvalidArgument` for unusable configuration.
    pub async fn session(
        &self,
        reference: Reference,
        options: SessionOptions,
    ) -> Result<Session, Error> {
        let mut config = self.inner.config.hosts.clone();
        if !options.host_dir.as_os_str().is_empty() {
            config.roots = std::env::split_paths(&options.host_dir).collect();
        }
        if !options.default_scheme.is_empty() {
            config.default_scheme = options.default_scheme;
        }
        let headers = header_map(&options.headers)?;
        let inner = Arc::clone(&self.inner);
        let name = reference.host().to_owned();
        let endpoints = tokio::task::spawn_blocking(move || {
            let mut endpoints = Vec::new();
            for mut host in hosts::load(&config, &name)? {
                for (key, value) in &headers {
                    host.headers.insert(key.clone(), value.clone());
                }
                let client = inner.clients.of(&host)?;
                endpoints.push(Endpoint { host, client });
            }
            Ok::<_, Error>(endpoints)
        })
        .await
        .expect("reading configuration does not panic")?;
        let actions = match options.access {
            Access::Pull => "pull",
            Access::Push => "pull,push",
        };
        let scope = format!("repository:{}:{actions}", reference.repository());
        let auth = Authorizer::new(
            options.credentials,
            reference.to_string(),
            BTreeSet::from([scope]),
        );
        Ok(Session {
            registry: Arc::clone(&self.inner),
            reference,
            endpoints,
            auth,
        })
    }
}

fn header_map(headers: &BTreeMap<String, String>) -> Result<HeaderMap, Error> {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        let bad = |_| Error::Invalid {
            reason: format!("header {name:?}"),
        };
        let key = HeaderName::from_bytes(name.as_bytes()).map_err(|_| Error::Invalid {
            reason: format!("header {name:?}"),
        })?;
        let mut value = HeaderValue::from_str(value).map_err(bad)?;
        value.set_sensitive(true);
        map.insert(key, value);
    }
    Ok(map)
}

impl Session {
    /// The reference of the operation.
    #[must_use]
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// The hosts that are tried, in order.
    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.endpoints.iter().map(|endpoint| &endpoint.host)
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.registry.config.limits
    }

    /// Endpoints with a capability, and whether others follow each.
    pub(super) fn capable(
        &self,
        capability: &'static str,
        has: impl Fn(&Capabilities) -> bool,
    ) -> Result<Vec<(&Endpoint, Place)>, Error> {
        let mut found: Vec<_> = self
            .endpoints
            .iter()
            .filter(|endpoint| has(&endpoint.host.capabilities))
            .map(|endpoint| (endpoint, Place::BeforeOthers))
            .collect();
        match found.last_mut() {
            Some((_, place)) => *place = Place::Last,
            None => return Err(Error::NoHosts { capability }),
        }
        Ok(found)
    }
}
