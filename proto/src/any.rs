//! Packing of `google.protobuf.Any` the way containerd's clients expect it.
//!
//! Type URLs are written as bare full names, without `type.googleapis.com/`; a reader takes what
//! follows the last `/` of a URL, except for the JSON types below, whose names contain slashes.

use prost::{Message, Name};
use prost_types::Any;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// JSON: the OCI runtime spec of a container.
pub const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// JSON: the OCI process of an exec.
pub const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// JSON: OCI Linux resources of a task update.
pub const LINUX_RESOURCES: &str =
    "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
/// JSON: what an OCI runtime supports.
pub const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Why an `Any` could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The payload is of another type.
    #[error("unexpected type {got:?}, want {want:?}")]
    Type {
        /// URL found.
        got: String,
        /// Full name wanted.
        want: String,
    },
    /// The payload does not decode as its type.
    #[error("malformed {type_url}")]
    Decode {
        /// URL found.
        type_url: String,
        /// What the decoder said.
        source: prost::DecodeError,
    },
}

/// Packs a message of ours under its bare full name.
pub fn pack<M: Message + Name>(message: &M) -> Any {
    Any {
        type_url: M::full_name(),
        value: message.encode_to_vec(),
    }
}

/// Packs JSON under one of the JSON type names of this module.
///
/// # Errors
/// When `value` cannot be written as JSON (a map with non-string keys).
pub fn pack_json<T: Serialize>(type_url: &str, value: &T) -> Result<Any, serde_json::Error> {
    Ok(Any {
        type_url: type_url.to_owned(),
        value: serde_json::to_vec(value)?,
    })
}

/// Whether the payload is of type `name`, under whichever prefix.
#[must_use]
pub fn is(any: &Any, name: &str) -> bool {
    any.type_url == name
        || any
            .type_url
            .strip_suffix(name)
            .is_some_and(|p| p.ends_with('/'))
}

/// Unpacks a message, whatever prefix its URL has.
///
/// # Errors
/// [`Error::Type`] for another type, [`Error::Decode`] for bytes that are not one.
pub fn unpack<M: Message + Name + Default>(any: &Any) -> Result<M, Error> {
    let want = M::full_name();
    if !is(any, &want) {
        return Err(Error::Type {
            got: any.type_url.clone(),
            want,
        });
    }
    M::decode(any.value.as_slice()).map_err(|source| Error::Decode {
        type_url: any.type_url.clone(),
        source,
    })
}

/// Reads the payload as JSON, whatever its URL says.
///
/// # Errors
/// When the bytes are not JSON of a `T`.
pub fn unpack_json<T: DeserializeOwned>(any: &Any) -> Result<T, serde_json::Error> {
    serde_json::from_slice(&any.value)
}
