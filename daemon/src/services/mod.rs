//! gRPC services: decode, one call down, encode.

pub(crate) mod containers;
pub(crate) mod content;
pub(crate) mod cri;
pub(crate) mod diff;
pub(crate) mod disk;
pub(crate) mod encoded;
pub(crate) mod events;
pub(crate) mod images;
pub(crate) mod introspection;
pub(crate) mod leases;
pub(crate) mod mounts;
pub(crate) mod namespaces;
pub(crate) mod sandboxes;
pub mod scope;
pub(crate) mod snapshots;
pub(crate) mod streaming;
pub(crate) mod tasks;
pub(crate) mod transfer;
pub(crate) mod version;
pub(crate) mod wire;
