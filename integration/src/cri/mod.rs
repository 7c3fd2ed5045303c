//! A kubelet's side of CRI: a client of both services, a node to run pods on, networks, streams.

mod client;
pub mod faults;
mod log;
mod network;
mod node;
mod nri;
pub mod stream;

pub use client::{Cri, Pod};
pub use log::{Line, lines};
pub use network::{Network, Outside};
pub use node::{Node, Settings, newer};
pub use nri::NriPlugin;
