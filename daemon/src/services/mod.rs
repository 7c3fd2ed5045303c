//! gRPC services: decode, one call down, encode.

pub(crate) mod introspection;
pub mod scope;
pub(crate) mod streaming;
pub(crate) mod tasks;
pub(crate) mod transfer;
pub(crate) mod version;
