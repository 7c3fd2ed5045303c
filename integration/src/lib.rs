//! The harness of the black-box tests and benchmarks: real daemons, real registries, real images.
//!
//! A test names no daemon: [`Subject`] says which one the run is about (`SUBJECT=lighter`, the
//! default, or `SUBJECT=containerd`, Debian's, the reference). A test that fails on the reference is
//! a wrong test. Everything a test makes lives below one temporary directory and one namespace of
//! its own, and [`Daemon::finish`] asserts that nothing of it is left.

mod cli;
pub mod client;
pub mod cri;
mod daemon;
mod docker;
mod eventually;
mod floor;
pub mod image;
mod leftovers;
mod oci;
mod process;
pub mod raw;
mod registry;
pub mod subject;
mod sys;

pub use cli::{Cli, Output};
pub use client::{Client, Container, Exit};
pub use daemon::{Daemon, Options};
pub use docker::Engine;
pub use eventually::eventually;
pub use floor::Floor;
pub use image::{Blob, Image, Layer, bind};
pub use leftovers::remove_cgroup_parents;
pub use oci::Spec;
pub use process::parent_of;
pub use registry::Registry;
pub use subject::{Subject, built, runtime};

/// What every helper and test returns.
pub type Result<T = (), E = anyhow::Error> = std::result::Result<T, E>;
