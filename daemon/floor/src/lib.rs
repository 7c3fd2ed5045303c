//! What every layer agrees on, without any policy: digests and identifiers, checked once, where they
//! enter; the default capabilities; the form of container logs.

pub mod capabilities;
pub mod cri_log;
pub mod digest;
pub mod ident;
pub mod timestamp;

pub use digest::Digest;
pub use ident::{Identifier, Namespace};
