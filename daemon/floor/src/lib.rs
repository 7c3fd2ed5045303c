//! What every layer names things by, without any policy: digests and identifiers, checked once,
//! where they enter.

pub mod digest;
pub mod ident;

pub use digest::Digest;
pub use ident::{Identifier, Namespace};
