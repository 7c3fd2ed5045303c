//! Decisions: what it means to run, pull, unpack, diff, transfer and collect.
//!
//! Each module owns one engine; the edges (gRPC services, CRI) call them and decide nothing. Engines
//! use the stores below and never the other way round.

pub mod diff;
pub mod differ;
pub mod gc;
pub mod image;
mod ingest;
pub mod mounts;
pub mod restart;
pub mod runtime;
pub mod sandbox;
pub mod streaming;
pub mod transfer;

pub use lighter_registry as registry;
