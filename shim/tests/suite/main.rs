//! The shim's binary, driven over its socket, with the built-in runtime and with runc.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    unreachable_pub,
    reason = "a test says why it failed by panicking"
)]

mod harness;
mod lifecycle;
mod order;
mod protocol;
mod streams;
