//! The shim's binary, driven over its socket, with the built-in runtime and with runc.

mod harness;
mod lifecycle;
mod order;
mod protocol;
mod streams;
