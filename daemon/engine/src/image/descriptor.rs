//! Descriptors with everything an image document may say in them.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use lighter_proto::containerd::types;
use lighter_store::{Digest, metadata};
use serde::{Deserialize, Serialize};

use super::platform::Platform;
use crate::registry;

/// What a blob is, how long, where, and for which platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Media type.
    pub media_type: String,
    /// Digest.
    pub digest: Digest,
    /// Bytes.
    pub size_bytes: u64,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Platform, where an index says it.
    pub platform: Option<Platform>,
    /// Other places to fetch it from.
    pub urls: Vec<String>,
    /// The blob itself, where it is embedded.
    pub data: Option<Vec<u8>>,
    /// Type of an artifact that is no image.
    pub artifact_type: String,
}

/// As JSON has it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Wire {
    pub(crate) media_type: String,
    pub(crate) digest: String,
    pub(crate) size: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) urls: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) annotations: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) data: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) platform: Option<Platform>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) artifact_type: Option<String>,
}

impl Descriptor {
    /// A descriptor of `bytes`.
    #[must_use]
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self::new(media_type, Digest::of(bytes), bytes.len() as u64)
    }

    /// A descriptor without annotations and the like.
    #[must_use]
    pub fn new(media_type: &str, digest: Digest, size_bytes: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size_bytes,
            annotations: BTreeMap::new(),
            platform: None,
            urls: Vec::new(),
            data: None,
            artifact_type: String::new(),
        }
    }

    /// The embedded bytes, if they are what the descriptor says.
    #[must_use]
    pub fn embedded(&self) -> Option<&[u8]> {
        let data = self.data.as_deref()?;
        (data.len() as u64 == self.size_bytes && Digest::of(data) == self.digest).then_some(data)
    }

    /// Reads the JSON form.
    pub(crate) fn from_wire(wire: Wire) -> Result<Self, String> {
        let digest = Digest::parse(&wire.digest).map_err(|error| error.to_string())?;
        let size_bytes = u64::try_from(wire.size)
            .map_err(|_| format!("{digest} has the negative size {}", wire.size))?;
        Ok(Self {
            media_type: wire.media_type,
            digest,
            size_bytes,
            annotations: wire.annotations.unwrap_or_default(),
            platform: wire.platform.map(Platform::normalized),
            urls: wire.urls.unwrap_or_default(),
            // What does not decode is fetched like anything else.
            data: wire.data.and_then(|data| STANDARD.decode(data).ok()),
            artifact_type: wire.artifact_type.unwrap_or_default(),
        })
    }

    /// The JSON form.
    pub(crate) fn to_wire(&self) -> Wire {
        Wire {
            media_type: self.media_type.clone(),
            digest: self.digest.to_string(),
            size: i64::try_from(self.size_bytes).unwrap_or(i64::MAX),
            urls: (!self.urls.is_empty()).then(|| self.urls.clone()),
            annotations: (!self.annotations.is_empty()).then(|| self.annotations.clone()),
            data: self.data.as_ref().map(|data| STANDARD.encode(data)),
            platform: self.platform.clone(),
            artifact_type: (!self.artifact_type.is_empty()).then(|| self.artifact_type.clone()),
        }
    }

    /// What a registry is asked for.
    #[must_use]
    pub fn target(&self) -> registry::Target {
        registry::Target {
            media_type: self.media_type.clone(),
            digest: self.digest.clone(),
            size_bytes: self.size_bytes,
            urls: self.urls.clone(),
            annotations: self.annotations.clone(),
        }
    }
}

impl From<registry::Target> for Descriptor {
    fn from(target: registry::Target) -> Self {
        Self {
            annotations: target.annotations,
            urls: target.urls,
            ..Self::new(&target.media_type, target.digest, target.size_bytes)
        }
    }
}

impl From<metadata::Descriptor> for Descriptor {
    fn from(stored: metadata::Descriptor) -> Self {
        Self {
            annotations: stored.annotations,
            ..Self::new(&stored.media_type, stored.digest, stored.size_bytes)
        }
    }
}

impl From<&Descriptor> for metadata::Descriptor {
    fn from(descriptor: &Descriptor) -> Self {
        Self {
            media_type: descriptor.media_type.clone(),
            digest: descriptor.digest.clone(),
            size_bytes: descriptor.size_bytes,
            annotations: descriptor.annotations.clone(),
        }
    }
}

impl From<&Descriptor> for types::Descriptor {
    fn from(descriptor: &Descriptor) -> Self {
        Self {
            media_type: descriptor.media_type.clone(),
            digest: descriptor.digest.to_string(),
            size: i64::try_from(descriptor.size_bytes).unwrap_or(i64::MAX),
            annotations: descriptor.annotations.clone().into_iter().collect(),
        }
    }
}
