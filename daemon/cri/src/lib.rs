//! The CRI plugin: what a kubelet needs, on top of the engine.
//!
//! The leaf modules need no engine: configuration ([`config`]), pod networks ([`cni`], [`netns`]),
//! the server of exec, attach and port-forward ([`streaming`]), plugins ([`nri`]), devices
//! ([`cdi`]), labels ([`selinux`]) and the default seccomp profile ([`seccomp_default`]). Above them
//! stand images ([`image`]), the specs of containers ([`spec`]) and what is known of pods ([`store`]),
//! and the two services over them ([`runtime`], [`plugin`]).

pub mod cdi;
pub mod config;
pub mod error;
pub mod image;
pub mod json;
pub mod nri;
pub mod plugin;
pub mod runtime;
pub mod seccomp_default;
pub mod selinux;
pub mod spec;
pub mod store;
pub mod streaming;
pub mod turn;
pub mod userns;

mod deadline;
mod oci;
mod sys;

pub use lighter_cni as cni;
pub use lighter_cni::netns;

/// The namespace that everything of the kubelet lives in.
pub const NAMESPACE: &str = "k8s.io";
