//! Sandbox controllers: what runs the sandboxes that records describe.
//!
//! A [`Controller`] is one way to run them. [`ShimController`] asks shims that have the sandbox
//! service, [`ProxyController`] one in another process; CRI adds one of its own under the name `podsandbox`. [`Sandboxes`] finds the
//! controller by name, and tells subscribers what happens.

mod controller;
mod proxy;
mod shim;

pub use controller::{Controller, Created, SandboxStatus, Sandboxes, Started};
pub use proxy::ProxyController;
pub use shim::ShimController;
