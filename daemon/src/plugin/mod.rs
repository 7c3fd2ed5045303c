//! What the daemon is made of, in the terms of containerd's plugins: types, ids, capabilities.
//!
//! There are no loadable plugins here; clients look for these records to learn what is there.

pub(crate) mod builtins;
pub(crate) mod graph;

pub(crate) use graph::{Graph, Plugin};
