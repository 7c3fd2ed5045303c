//! Registries over HTTP: references, hosts, auth, resolve, fetch, push.
//!
//! A [`Registry`] lives as long as the daemon: connection pools, configuration directories, limits.
//! Each operation on one reference opens a [`Session`], which reads the hosts' configuration anew
//! and holds the one token cache of that operation. Nothing here knows of images, leases or
//! namespaces; bytes go into whatever [`Sink`] the caller hands in.
//!
//! Spec: OCI distribution-spec v1.1; Docker token authentication; containerd's `hosts.toml`.

mod auth;
mod challenge;
mod client;
mod encoding;
mod error;
mod fetch;
mod hosts;
mod hosts_file;
mod push;
mod redact;
pub mod reference;
mod referrers;
mod request;
mod resolve;
mod session;
mod token;
mod verify;

pub use self::auth::{Anonymous, Credential, CredentialRequest, Credentials, OneHost, Secret};
pub use self::encoding::Decoder;
pub use self::error::{Error, SinkError, TransportCause};
pub use self::fetch::{Progress, Sink};
pub use self::hosts::{Capabilities, Host, HostsConfig, Scheme, Tls};
pub use self::push::{Blob, Open, Pushed};
pub use self::reference::Reference;
pub use self::session::{Access, Config, Limits, Registry, Session, SessionOptions};

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use lighter_floor::Digest;

/// What a registry is asked for or answers with: one blob or manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Media type; empty when unknown.
    pub media_type: String,
    /// Digest of the bytes.
    pub digest: Digest,
    /// Bytes; 0 when unknown.
    pub size_bytes: u64,
    /// Other places to get it from (foreign layers).
    pub urls: Vec<String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

/// Media types that live under `/manifests/`.
pub const MANIFEST_TYPES: [&str; 4] = [
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
];

/// Largest manifest or index accepted, in bytes: upstream's bound, its odd factor included.
pub const MAX_MANIFEST_BYTES: u64 = 4 * 1048 * 1048;
