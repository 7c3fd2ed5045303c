//! HTTP clients, one a TLS configuration, kept so that connections are used again.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use super::hosts::{Host, Tls, is_loopback, split_port};
use super::verify::SystemRoots;
use super::{Error, verify};

/// How long connecting may take where the configuration does not say.
const DIAL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long an idle connection is kept.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Idle connections kept a host: as many as one pull uses at once.
const MAX_IDLE_PER_HOST: usize = 4;
/// Clients kept; configurations rarely have more than a handful of different hosts.
const MAX_CLIENTS: usize = 32;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    tls: Tls,
    /// When the files last changed, so that a renewed certificate is picked up.
    changed: Vec<Option<SystemTime>>,
    dial_timeout: Duration,
    loopback: bool,
}

/// All clients of the daemon.
#[derive(Debug, Default)]
pub(super) struct Clients {
    system: SystemRoots,
    clients: Mutex<HashMap<Key, reqwest::Client>>,
}

impl Clients {
    /// The client for `host`. Blocks: reads certificates.
    pub(super) fn of(&self, host: &Host) -> Result<reqwest::Client, Error> {
        let files = host
            .tls
            .ca
            .iter()
            .chain(host.tls.client.iter().flat_map(|(c, k)| [c, k]));
        let changed = |path: &PathBuf| std::fs::metadata(path).and_then(|m| m.modified()).ok();
        let key = Key {
            changed: files.map(changed).collect(),
            tls: host.tls.clone(),
            dial_timeout: host.dial_timeout.unwrap_or(DIAL_TIMEOUT),
            loopback: is_loopback(split_port(&host.authority).0),
        };
        if let Some(client) = self.lock().get(&key) {
            return Ok(client.clone());
        }
        let client = build(&key, &self.system)?;
        let mut clients = self.lock();
        if clients.len() >= MAX_CLIENTS {
            clients.clear();
        }
        clients.insert(key, client.clone());
        Ok(client)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, reqwest::Client>> {
        self.clients
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn build(key: &Key, system: &SystemRoots) -> Result<reqwest::Client, Error> {
    let tls = verify::config(&key.tls, system)?;
    let mut builder = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        // Redirects are followed by hand: tokens must not go along to another host.
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(key.dial_timeout)
        .pool_idle_timeout(IDLE_TIMEOUT)
        .pool_max_idle_per_host(MAX_IDLE_PER_HOST)
        // One connection a download: HTTP/2's shared window slows several large bodies down.
        .http1_only()
        .user_agent(concat!(
            "containerd/2.4.0 lighter/",
            env!("CARGO_PKG_VERSION")
        ));
    if key.loopback {
        builder = builder.no_proxy();
    }
    builder.build().map_err(|error| Error::Invalid {
        reason: format!("HTTP client: {}", lighter_proto::errdefs::render(&error)),
    })
}
