//! Wire types only: the messages and services of containerd, CRI, NRI and the shim runtime.
//!
//! The module tree mirrors the protobuf packages, so `containerd.services.tasks.v1.CreateTaskRequest`
//! is [`containerd::services::tasks::v1::CreateTaskRequest`]. Nothing here decides anything; the
//! hand-written modules convert between wire forms and Rust values once, for everyone.

#[allow(
    missing_docs,
    missing_debug_implementations,
    unused_qualifications,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

pub use generated::*;

/// The compiled descriptor set of every `.proto` file of this crate, for reflection and tests.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The part of [`FILE_DESCRIPTOR_SET`] that CRI's messages need.
pub const CRI_DESCRIPTOR_SET: &[u8] =
    include_bytes!(concat!(env!("OUT_DIR"), "/cri-descriptors.bin"));

pub mod any;
pub mod errdefs;
pub mod line;
mod sys;
pub mod time;
pub mod ttrpc;
