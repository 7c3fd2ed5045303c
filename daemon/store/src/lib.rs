//! Durable facts: what exists, in which namespace, who holds it, and the bytes of it.
//!
//! Two layers. The floor has no policy: identifiers, digests, labels, filters, the scope of a
//! request. Above it the stores: [`metadata`] (records and their references, over the one
//! committer), [`content`] (blobs on disk), [`events`] (the bounded fan-out). Nothing here knows of
//! containers that run.

pub mod content;
pub mod digest;
pub mod error;
pub mod events;
pub mod filter;
pub mod ident;
pub mod labels;
pub mod metadata;
pub mod scope;

pub use digest::Digest;
pub use error::Error;
pub use ident::{Identifier, Namespace};
pub use labels::Labels;
pub use scope::Scope;
