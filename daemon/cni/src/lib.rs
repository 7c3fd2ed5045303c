//! Pod networks by CNI plugins: loads the operator's configuration, attaches, detaches, checks.
//!
//! Spec: CNI 1.1 (versions 0.1.0 to 1.1.0 are spoken). Nothing here knows Kubernetes: what pods
//! need is passed in [`Options`], so the command line's `--cni` goes the same way.
//!
//! ```text
//! setup:    journal ── lo up ∥ ADD a ─ ADD b … ── cache ── result     (failure: teardown, error)
//! teardown: cache ∪ journal ∪ configuration ── DEL b ─ DEL a … ── forget cache, then journal
//! ```
//!
//! The journal names every container that may hold an address, from before its first `ADD` until
//! after its last `DEL`; [`Cni::recover`] empties it of those that nobody knows any more.
//!
//! `networks.rs` is what is configured, `attach.rs` a container's life in it, `leftovers.rs` what
//! crashes leave. A network's plugins are called one after the other in `chain.rs`, each as `exec.rs`
//! does it.

mod attach;
mod cache;
mod chain;
mod conf;
mod config;
mod error;
mod exec;
mod journal;
mod leftovers;
mod metrics;
pub mod netns;
mod networks;
mod options;
mod result;
mod sys;
mod template;
mod watch;

pub use self::cache::DEFAULT_DIR as DEFAULT_CACHE_DIR;
pub use self::conf::{Network, Plugin, Version};
pub use self::config::Config;
pub use self::error::{Error, Failure};
pub use self::metrics::{Metrics, Operation, OperationStats};
pub use self::networks::Cni;
pub use self::options::{Bandwidth, Capabilities, DnsConfig, IpRange, Options, PortMapping};
pub use self::result::{Dns, Interface, IpConfig, IpPreference, NetworkResult, Route};
pub use self::sys::NamespaceHolder;
pub use self::template::{BridgeConfig, bridge_conflist};

#[cfg(test)]
mod tests;
