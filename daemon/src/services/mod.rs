//! gRPC services: decode, one call down, encode.

pub(crate) mod introspection;
pub mod scope;
pub(crate) mod tasks;
pub(crate) mod version;
