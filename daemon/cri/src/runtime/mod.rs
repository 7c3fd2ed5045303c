//! Pods and containers over the engine: one file per group of calls.

mod archive;
mod backlog;
mod checkpoint;
mod containers;
mod copy;
mod deprecated;
mod encode;
mod events;
mod exec;
mod features;
mod files;
mod image_disk;
mod info;
mod labels;
mod lists;
mod metrics;
mod network;
mod output;
mod plugins;
mod pods;
mod records;
mod recover;
mod restore;
mod rpc;
mod salvage;
mod selinux;
mod service;
mod signals;
mod stats;
mod stop;
mod timers;
mod undo;
mod update;
mod volumes;

pub(crate) use backlog::Backlog;
pub use exec::Backend;
pub(crate) use features::Known as KnownFeatures;
pub(crate) use image_disk::ImageFilesystem;
pub(crate) use output::Outputs;
pub(crate) use plugins::Hooks;
pub use service::RuntimeEdge;
pub(crate) use stats::History;
pub(crate) use timers::Timers;

use rand::Rng as _;

/// Name of the runtime that serves a handler: our own shim where its type is the common one and no
/// program is named.
fn task_runtime(handler: &crate::config::Handler) -> String {
    match (handler.runtime_path.as_str(), handler.runtime_type.as_str()) {
        ("", "io.containerd.runc.v2") => "io.containerd.lighter.v2".to_owned(),
        ("", name) => name.to_owned(),
        (path, _) => path.to_owned(),
    }
}

/// A new id: 64 hex digits.
fn new_id() -> String {
    let bytes: [u8; 32] = rand::rng().random();
    hex::encode(bytes)
}
