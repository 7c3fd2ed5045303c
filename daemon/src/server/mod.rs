//! Listeners and what surrounds every request: sockets, gRPC, ttrpc, HTTP for metrics and debug.

mod authority;
mod connection;
mod deadline;
pub(crate) mod debug;
pub(crate) mod grpc;
pub(crate) mod http;
pub(crate) mod listen;
pub(crate) mod metrics;
pub(crate) mod observe;
pub(crate) mod task_metrics;
pub(crate) mod tls;
pub(crate) mod ttrpc;
