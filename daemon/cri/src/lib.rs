//! The CRI plugin: what a kubelet needs, on top of the engine.
//!
//! The leaf modules need no engine: configuration ([`config`]), pod networks ([`cni`], [`netns`]),
//! the server of exec, attach and port-forward ([`streaming`]), plugins ([`nri`]), devices
//! ([`cdi`]), and the default seccomp profile ([`seccomp_default`]).

pub mod cdi;
pub mod cni;
pub mod config;
pub mod netns;
pub mod nri;
pub mod seccomp_default;
pub mod streaming;

mod oci;
mod sys;
