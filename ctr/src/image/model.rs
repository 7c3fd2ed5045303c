//! Documents of an image: descriptors, manifests, indexes, configurations.
//!
//! Spec: OCI image-spec; Docker's schema 2 has the same shape under other media types.

use std::collections::{BTreeMap, HashMap};

use anyhow::Context as _;
use lighter_proto::containerd::types;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// Media types of an index.
pub(crate) const INDEX_TYPES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
/// Media types of a manifest.
pub(crate) const MANIFEST_TYPES: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
/// Most entries of an index or layers of a manifest that are looked at.
const MAX_CHILDREN: usize = 4096;

/// Names a blob.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: String,
    pub(crate) size: i64,
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "or_default"
    )]
    pub(crate) annotations: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) platform: Option<PlatformEntry>,
    #[serde(flatten)]
    pub(crate) rest: Map<String, Value>,
}

impl Descriptor {
    /// Whether it names a list of manifests.
    pub(crate) fn is_index(&self) -> bool {
        INDEX_TYPES.contains(&self.media_type.as_str())
    }

    /// Whether it names one image.
    pub(crate) fn is_manifest(&self) -> bool {
        MANIFEST_TYPES.contains(&self.media_type.as_str())
    }

    /// Whether it names a layer that must not be passed on.
    pub(crate) fn is_foreign(&self) -> bool {
        self.media_type.contains("nondistributable") || self.media_type.contains(".foreign.")
    }

    /// The form the daemon's API has.
    pub(crate) fn to_wire(&self) -> types::Descriptor {
        types::Descriptor {
            media_type: self.media_type.clone(),
            digest: self.digest.clone(),
            size: self.size,
            annotations: self.annotations.clone().into_iter().collect(),
        }
    }
}

impl From<types::Descriptor> for Descriptor {
    fn from(wire: types::Descriptor) -> Self {
        Self {
            media_type: wire.media_type,
            digest: wire.digest,
            size: wire.size,
            annotations: wire.annotations.into_iter().collect(),
            ..Default::default()
        }
    }
}

/// A platform as documents write it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PlatformEntry {
    #[serde(default)]
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) os: String,
    #[serde(
        default,
        rename = "os.version",
        skip_serializing_if = "String::is_empty"
    )]
    pub(crate) os_version: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) variant: String,
}

/// A list of manifests.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Index {
    pub(crate) schema_version: u32,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) media_type: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) manifests: Vec<Descriptor>,
    #[serde(flatten)]
    pub(crate) rest: Map<String, Value>,
}

/// One image.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    pub(crate) schema_version: u32,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) media_type: String,
    pub(crate) config: Descriptor,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) layers: Vec<Descriptor>,
    #[serde(flatten)]
    pub(crate) rest: Map<String, Value>,
}

/// How an image is run, and what its layers unpack to.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub(crate) struct Config {
    #[serde(flatten)]
    pub(crate) platform: PlatformEntry,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) config: Settings,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) rootfs: RootFs,
}

/// Defaults of a container made from the image.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Settings {
    #[serde(deserialize_with = "or_default")]
    pub(crate) user: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) env: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) entrypoint: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) cmd: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) working_dir: String,
    #[serde(deserialize_with = "or_default")]
    pub(crate) labels: HashMap<String, String>,
    #[serde(deserialize_with = "or_default")]
    pub(crate) stop_signal: String,
}

/// Digests of the layers when unpacked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct RootFs {
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) diff_ids: Vec<String>,
}

/// Go writes empty lists and maps as `null`.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// What is refused before a document is read as one kind: a document of the other kind under its
/// media type, or the retired first schema.
fn check_kind(what: &str, digest: &str, json: &Value, foreign: &[&str]) -> anyhow::Result<()> {
    anyhow::ensure!(
        json.get("fsLayers").is_none(),
        "{what} {digest} is of schema 1, which is no longer supported: push the image again with \
         a current tool"
    );
    for key in foreign {
        anyhow::ensure!(
            json.get(*key).is_none(),
            "{what} {digest} has {key:?}: of another kind"
        );
    }
    Ok(())
}

/// Reads an index.
pub(crate) fn index(digest: &str, bytes: &[u8]) -> anyhow::Result<Index> {
    let wrap = || format!("index {digest} is malformed");
    let json: Value = serde_json::from_slice(bytes).with_context(wrap)?;
    check_kind("index", digest, &json, &["config", "layers"])?;
    let index: Index = serde_json::from_value(json).with_context(wrap)?;
    anyhow::ensure!(
        index.manifests.len() <= MAX_CHILDREN,
        "index {digest} has too many entries"
    );
    Ok(index)
}

/// Reads a manifest.
pub(crate) fn manifest(digest: &str, bytes: &[u8]) -> anyhow::Result<Manifest> {
    let wrap = || format!("manifest {digest} is malformed");
    let json: Value = serde_json::from_slice(bytes).with_context(wrap)?;
    check_kind("manifest", digest, &json, &["manifests"])?;
    let manifest: Manifest = serde_json::from_value(json).with_context(wrap)?;
    anyhow::ensure!(
        manifest.layers.len() <= MAX_CHILDREN,
        "manifest {digest} has too many layers"
    );
    Ok(manifest)
}

/// Reads a configuration.
pub(crate) fn config(digest: &str, bytes: &[u8]) -> anyhow::Result<Config> {
    serde_json::from_slice(bytes).with_context(|| format!("image config {digest} is malformed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_is_an_empty_list() {
        let bytes = br#"{"architecture":"amd64","os":"linux","config":{"Env":null,"Cmd":["a"]},
            "rootfs":{"type":"layers","diff_ids":null}}"#;
        let config = config("d", bytes).unwrap();
        assert_eq!(config.config.cmd, ["a"]);
        assert!(config.rootfs.diff_ids.is_empty() && config.config.env.is_empty());
        assert_eq!(config.platform.architecture, "amd64");
    }

    #[test]
    fn one_kind_under_the_name_of_the_other_is_refused() {
        let both =
            br#"{"schemaVersion":2,"manifests":[],"config":{"digest":"x","size":1},"layers":[]}"#;
        assert!(index("d", both).is_err() && manifest("d", both).is_err());
        assert!(manifest("d", br#"{"schemaVersion":1,"fsLayers":[]}"#).is_err());
    }

    #[test]
    fn unknown_fields_of_a_descriptor_are_kept() {
        let text = r#"{"mediaType":"m","digest":"d","size":1,"urls":["https://x"]}"#;
        let descriptor: Descriptor = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&descriptor).unwrap(), text);
    }
}
