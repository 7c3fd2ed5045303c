//! Durable facts: what exists, in which namespace, who holds it, and the bytes of it.
//!
//! Two layers. The floor has no policy: identifiers, digests, labels, filters, the scope of a
//! request. Above it the stores: [`metadata`] (records and their references, over the one
//! committer), [`content`] (blobs on disk), [`events`] (the bounded fan-out). Nothing here knows of
//! containers that run.

pub mod content;
pub mod error;
pub mod events;
pub mod filter;
pub mod labels;
pub mod metadata;
pub mod scope;

pub use error::Error;
pub use labels::Labels;
pub use lighter_floor::{Digest, Identifier, Namespace, digest, ident};
pub use scope::Scope;
